"""The machine that the figures were measured on, and its peak speed."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch
from windows import time_arms

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))
from launch import keep_freed_memory  # noqa: E402

PACKAGES = ("ddpm-diffusers", "torch", "diffusers", "accelerate", "datasets", "denoising-diffusion-pytorch")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def set_up() -> None:
    """Keep freed memory, as the scripts do."""
    keep_freed_memory()


def describe(device: torch.device) -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in features]
    return " ".join([names[0] if names else platform.processor(), *extras])


def matrix_peak(device: torch.device, precisions: list[str], windows: int, window_seconds: float) -> dict[str, dict]:
    """Operations per second of square matrix products, by precision: the peak to compare networks with."""
    size = 8192 if device.type == "cuda" else 2048
    factors = {name: torch.randn(2, size, size, device=device, dtype=DTYPES[name]) for name in precisions}
    arms = {name: lambda pair=pair: torch.mm(pair[0], pair[1]) for name, pair in factors.items()}
    as_before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do unless told otherwise
    times = time_arms(arms, windows, window_seconds)
    torch.backends.cuda.matmul.allow_tf32 = as_before
    return {name: {**result, "size": size, "per_second": 2 * size**3 / min(result["windows"])}
            for name, result in times.items()}  # fmt: skip
