"""The learning rate's schedule, and what else a checkpoint keeps beside weights, optimizer and flags."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from arguments import TrainingArguments
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ddpm_diffusers.streaming import StreamedBatches


def make_lr_scheduler(
    args: TrainingArguments, optimizer: torch.optim.Optimizer, max_train_steps: int
) -> tuple[LambdaLR, int]:
    """The schedule over the optimizer steps, and how many of them are warm-up, by default a tenth."""
    warmup_steps = args.lr_warmup_steps
    if warmup_steps is None:
        warmup_steps = 0 if args.lr_scheduler == "constant" else max_train_steps // 10
    if warmup_steps >= max_train_steps:
        raise ValueError(
            f"`--lr_warmup_steps` is {warmup_steps}; it must be less than the {max_train_steps} steps of the run."
        )
    steps = {"num_warmup_steps": warmup_steps, "num_training_steps": max_train_steps}
    return get_scheduler(args.lr_scheduler, optimizer, **steps), warmup_steps


def gather_state(
    accelerator: Accelerator, lr_scheduler: LambdaLR, window: torch.Tensor, batches: DataLoader | StreamedBatches
) -> dict:
    """What to save of this run's position beside weights, optimizer and arguments; every process must call it.

    `window` holds this process's sums and counts of losses since the last line of metrics, (2, 5). "windows" and
    "streams" (if the data set is streamed) have one entry per process; "scaler" is there only with a gradient scaler.
    """
    state = {"lr_scheduler": lr_scheduler.state_dict(), "windows": gather_object([window.tolist()])}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    if isinstance(batches, StreamedBatches):
        state["streams"] = gather_object([batches.state_dict()])
    return state


def restore_state(
    state: dict,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: LambdaLR,
    learning_rate: float,
    window: torch.Tensor,
) -> dict | None:
    """Put back what `gather_state` saved, and return the state of this process's stream (None if not streamed).

    The optimizer's learning rates are set by this run's schedule at `state["step"]`. If the number of processes has
    changed, the main process takes all sums of losses, and `StreamedBatches` refuses the stream's state.
    """
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    for group, rate in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = learning_rate * rate(state["step"])  # this run's schedule: its length may be another
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    windows = torch.tensor(state["windows"], device=window.device)  # (processes, 2, 5)
    if len(windows) == accelerator.num_processes:
        window.copy_(windows[accelerator.process_index])
    elif accelerator.is_main_process:
        window.copy_(windows.sum(0))
    streams = state.get("streams")
    return streams and streams[accelerator.process_index % len(streams)]
