"""What the figures were measured on, and what it could do at most."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from windows import time_arms

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "denoising-diffusion-pytorch")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


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
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([names[0] if names else platform.processor(), *extras])


def matrix_peak(device: torch.device, windows: int, window_seconds: float, size: int | None = None) -> dict[str, dict]:
    """Operations a second of square matrix products, by precision: what a network's share is taken of."""
    size = size or (8192 if device.type == "cuda" else 2048)
    factors = {name: torch.randn(2, size, size, device=device, dtype=dtype) for name, dtype in DTYPES.items()}
    arms = {name: lambda pair=pair: torch.mm(pair[0], pair[1]) for name, pair in factors.items()}
    times = time_arms(arms, windows, window_seconds)
    return {name: {**result, "size": size, "per_second": 2 * size**3 / min(result["windows"])}
            for name, result in times.items()}  # fmt: skip
