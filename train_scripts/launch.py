"""Setup and shutdown of a process, and checks that the launcher's settings agree with the flags."""

import ctypes
import logging
import os
import platform
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object, parse_flag_from_env

PRECISIONS = (None, "auto", "no", "fp16", "bf16")
PRECISION_HELP = (
    "auto (bf16 where the hardware computes in it, else fp16 on a GPU and no on a CPU), no, fp16 or bf16; accelerate's"
    " setting by default"
)
PATIENCE = timedelta(hours=6)  # of a process for the others, while one decodes or writes
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def make_accelerator(mixed_precision: str | None = None, **accelerator_kwargs) -> Accelerator:
    """The process's accelerator; ValueError if it does not connect all launched processes, or for fp16 on a CPU.

    Warnings are shown by the main process alone, but for those of `streaming`, whose processes read different images.
    """
    keep_freed_memory()
    accelerator = Accelerator(
        mixed_precision=choose_precision(mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **accelerator_kwargs,
    )
    check_processes(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`--mixed_precision` is fp16, which accelerate has on GPUs alone: use bf16, no or auto.")
    logging.basicConfig(format="%(message)s", level=logging.WARNING if accelerator.is_main_process else logging.ERROR)
    return accelerator


def choose_precision(mixed_precision: str | None, use_cpu: bool | None = None) -> str | None:
    """Resolve `auto`: bf16 if the GPU or the CPU computes in it natively, else fp16 on a GPU and no on a CPU."""
    if mixed_precision != "auto":
        return mixed_precision
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") if use_cpu is None else use_cpu
    if torch.cuda.is_available() and not use_cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # in newer versions of torch
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees for the next one, rather than return each block to the system.

    The system would have to clear the pages again each time (benchmarks/README.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)


def check_processes(accelerator: Accelerator) -> None:
    """Raise a ValueError if accelerate does not connect all the launched processes."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate connects {accelerator.num_processes}: there is no GPU"
            " for each. Set ACCELERATE_USE_CPU=true to stay on the CPU, or launch one."
        )
    # what `accelerate launch` sets for each process; a launcher of several sets WORLD_SIZE, too
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "`accelerate launch` was to start several processes, but starts one without a `distributed_type` for them"
            " in its config: give --num_processes 1 (and unset MASTER_PORT), or multi_gpu.yaml, or use torchrun."
        )


def check_sharding(accelerator: Accelerator, optimizer: str) -> None:
    """Raise a ValueError if the sharded parameters could not be saved whole, or not updated by the optimizer."""
    kind, advice = accelerator.distributed_type, None
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        advice = "FSDP 1, which the config asks for: set `fsdp_version: 2`, as in train_scripts/accelerate/fsdp2.yaml"
    elif kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        advice = "ZeRO-3, which the config asks for: use stage 2, as in train_scripts/accelerate/deepspeed_zero2.yaml"
    if advice:
        raise ValueError(f"The network could not be saved under {advice}.")
    if optimizer == "muon" and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("`--optimizer muon` needs whole kernels, which FSDP and DeepSpeed cut up: use adamw.")


def check_agreement(resume_path: Path | None, goes_on: bool) -> None:
    """Raise a ValueError in every process unless all would start from the same place. All must call it."""
    starts = gather_object([(resume_path.name if resume_path else "the beginning", goes_on)])
    if len(set(starts)) > 1:
        places = " and ".join(sorted({name for name, _ in starts}))
        raise ValueError(
            f"The processes would start from {places}, as each sees `--output_dir`: it must be one folder, which all"
            " machines share and can read."
        )


def check_data(data: str) -> None:
    """Raise a ValueError in every process unless all pass the same `data`, the text that identifies the images.

    Every process must call it.
    """
    found = sorted(set(gather_object([data])))
    if len(found) > 1:
        raise ValueError(f"The machines have different images ({' and '.join(found)}): give all of them the same.")


def check_engine(accelerator: Accelerator, gradient_accumulation_steps: int, max_grad_norm: float) -> None:
    """Raise a ValueError if accelerate departs from its config or the flags. Call it after `accelerator.prepare`."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("The accelerate config asks for FSDP, which accelerate has on GPUs alone: use another.")
    if accelerator.gradient_accumulation_steps != gradient_accumulation_steps:
        raise ValueError(
            f"`--gradient_accumulation_steps` is {gradient_accumulation_steps}, but accelerate was told"
            f' {accelerator.gradient_accumulation_steps}: write "auto" in the DeepSpeed config, and unset'
            " ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        clipping = accelerator.deepspeed_config.get("gradient_clipping", 0.0)
        if clipping != max_grad_norm:
            raise ValueError(
                f"`--max_grad_norm` is {max_grad_norm}, but DeepSpeed clips to {clipping}: launch with"
                f" `accelerate launch --gradient_clipping {max_grad_norm}`; a DeepSpeed config of your own must have"
                ' `"gradient_clipping": "auto"`.'
            )


def let_go(accelerator: Accelerator) -> None:
    """Free what was prepared, and end the tracking. Call it once nothing holds the prepared network.

    Otherwise torch's DDP reducer would destroy gloo's process group at exit while holding the GIL, which gloo's thread
    may be waiting for to drop its last tensors: a deadlock.
    """
    accelerator.free_memory()
    disconnect()
    accelerator.end_training()


def disconnect() -> None:
    """Wait for the other processes, and end the connection to them, if there is one. Call it before Python exits.

    gloo's thread drops its last tensors a moment after an exchange. If it asked for the GIL once Python is shutting
    down, it would be ended, and abort the process ("terminate called without an active exception").
    """
    if torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        time.sleep(0.2)  # for that moment
        torch.distributed.destroy_process_group()
