"""What the launcher was told must agree with the flags."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType


def check_processes(accelerator: Accelerator) -> None:
    """Raises ValueError if the processes that were launched do not know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate connects {accelerator.num_processes}: there is no GPU"
            " for each. Set ACCELERATE_USE_CPU=true to stay on the CPU, or launch one."
        )


def check_engine(accelerator: Accelerator, gradient_accumulation_steps: int, max_grad_norm: float) -> None:
    """After `accelerator.prepare`: raises ValueError if it does not do what its config or the flags say."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("The accelerate config asks for FSDP, which accelerate has on GPUs alone: use another.")
    if accelerator.gradient_accumulation_steps != gradient_accumulation_steps:
        raise ValueError(
            f"`--gradient_accumulation_steps` is {gradient_accumulation_steps}, but the DeepSpeed config says"
            f' {accelerator.gradient_accumulation_steps}: write "auto" there.'
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        clipping = accelerator.deepspeed_config["gradient_clipping"]
        if clipping != max_grad_norm:
            raise ValueError(
                f"`--max_grad_norm` is {max_grad_norm}, but DeepSpeed clips to {clipping}: launch with"
                f" `accelerate launch --gradient_clipping {max_grad_norm}`."
            )
