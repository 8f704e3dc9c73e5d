"""A training step as one CUDA graph: the GPU is given all of it at once, not kernel by kernel from Python."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


class GraphedStep:
    """Calls `step` as it is a few times, then captures what a call launches on the GPU, and replays that from then on.

    A replay does what the captured call did, with the tensors it is given, torch's seed and the learning rates of
    `optimizer` as they are by then, but runs no Python. So tensors must keep their shapes, what changes from call to
    call must be in tensors, and the tensor that `step` returns, if any, holds the last call's value only until the
    next one.
    """

    CALLS_BEFORE_CAPTURE = 3  # in which libraries set themselves up, and the network is compiled

    def __init__(self, step: Callable[..., torch.Tensor | None], optimizer: torch.optim.Optimizer):
        self.step, self.optimizer = step, optimizer
        self.calls, self.stream = 0, torch.cuda.Stream()
        self.graph, self.inputs, self.rates, self.result = None, [], [], None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor | None:
        if self.calls < self.CALLS_BEFORE_CAPTURE:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # not on the default stream, as torch asks of calls before a capture
                result = self.step(*tensors)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.capture(tensors)
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return self.result

    def capture(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Record a call without running it. For the graph, the learning rates become tensors that it reads.

        The optimizer has its numbers back afterwards, which schedule and checkpoints need.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        self.inputs = [torch.empty_like(tensor, device=device) for tensor in tensors]
        groups = self.optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        self.rates = [torch.tensor(rate, device=device) for rate, _ in before]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"], group["capturable"] = rate, True
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": the data loader may pin memory in another thread
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.step(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "A step of this network cannot be captured as a CUDA graph (it may copy from the CPU, for example):"
                " pass `--no_cuda_graph`."
            ) from error
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable
        self.graph = graph


def can_capture(accelerator: Accelerator, gradient_checkpointing: bool) -> bool:
    """Whether each batch is a whole step on one GPU, in which Python decides nothing.

    A gradient scaler decides whether to step, gradient checkpointing saves the state of random numbers, and some modes
    of torch.compile make graphs of their own.
    """
    device = accelerator.device
    return (
        device.type == "cuda"
        and (device.index is None or device.index == torch.cuda.current_device())
        and accelerator.distributed_type == DistributedType.NO
        and accelerator.gradient_accumulation_steps == 1
        and accelerator.scaler is None
        and accelerator.state.dynamo_plugin.mode in ("default", "max-autotune-no-cudagraphs")
        and not gradient_checkpointing
    )
