"""Training checkpoints: folders of safetensors and JSON, complete or absent, no pickle.

`checkpoint-STEP/` holds `unet/` and `unet_ema/` (both for `from_pretrained`), `optimizer.safetensors` and
`training_state.json` (position, learning-rate schedule, gradient scaler, optimizer settings, the run's configuration).
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STATE_FILE = "training_state.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    return sorted((path for path in found if path.name[11:].isdigit()), key=lambda path: int(path.name[11:]))


def resolve_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` means: a path, or "latest" (None where there is none yet).

    Raises:
        ValueError: If a path holds no complete checkpoint.
    """
    if resume_from_checkpoint == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    path = Path(resume_from_checkpoint)
    if not (path / STATE_FILE).is_file():
        raise ValueError(
            f"`--resume_from_checkpoint` is {resume_from_checkpoint!r}, which holds no complete checkpoint (no"
            f" {STATE_FILE}); give a folder checkpoint-STEP, or 'latest'."
        )
    return path


def save_checkpoint(output_dir, step: int, unet, ema, optimizer, state: dict, total_limit: int | None = None) -> Path:
    """Write `checkpoint-STEP` whole or not at all, then delete the oldest ones beyond `total_limit`.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        unet: The model.
        ema: diffusers' `EMAModel` of its parameters, or None.
        optimizer: Saved as tensors, and its settings as JSON.
        state: JSON-able rest: "arguments" (see `load_checkpoint`), schedule, scaler.
        total_limit: How many checkpoints to keep, or None for all.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f".{final.name}.partial")
    for leftover in final.parent.glob(".checkpoint-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)

    unet.save_pretrained(partial / "unet")
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        unet.save_pretrained(partial / "unet_ema")
        ema.restore(unet.parameters())
        state = {**state, "ema_optimization_step": ema.optimization_step}
    optimizer_state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in optimizer_state["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                scalars[f"{index}.{key}"] = value
    save_file(tensors, partial / "optimizer.safetensors")
    state = {**state, "step": step, "optimizer_scalars": scalars, "param_groups": optimizer_state["param_groups"]}
    # the state file makes a checkpoint complete, so it comes last
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    folder = os.open(output_dir, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, survives a power cut
    os.close(folder)

    if total_limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path != final]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            remove_checkpoint(old)
    return final


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; its name goes first, so that what a kill leaves is not taken for a whole one."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))


def load_checkpoint(path: str | Path, unet, ema, optimizer, arguments: dict) -> dict:
    """Put a checkpoint's weights and optimizer state back; returns its `state`.

    Args:
        path: Folder of the checkpoint.
        unet, ema, optimizer: As given to `save_checkpoint`; changed in place.
        arguments: What the checkpoint's `state["arguments"]` must agree with: data, objective, seed …

    Raises:
        ValueError: If the checkpoint is of another U-Net config or of other arguments; the message lists the
            differences.
    """
    path = Path(path)
    state = json.loads((path / STATE_FILE).read_text())
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    differences = list_differences(unet.load_config(path / "unet"), config)
    differences += list_differences(state["arguments"], arguments)
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(differences)}): give the same arguments, or start a"
            " new run in another folder."
        )

    unet.load_state_dict(type(unet).from_pretrained(path / "unet", use_safetensors=True).state_dict())
    if ema is not None:
        averaged = type(unet).from_pretrained(path / "unet_ema", use_safetensors=True)
        ema.shadow_params = [
            p.to(s.device, s.dtype) for p, s in zip(averaged.parameters(), ema.shadow_params, strict=True)
        ]
        ema.optimization_step = state["ema_optimization_step"]
    optimizer_state = {}
    for key, value in {**load_file(path / "optimizer.safetensors"), **state["optimizer_scalars"]}.items():
        index, name = key.split(".", 1)
        optimizer_state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["param_groups"]})
    return state


def list_differences(saved: dict, current: dict) -> list[str]:
    current = json.loads(json.dumps(current))  # tuples become lists, as in the file
    differing = {key: value for key, value in current.items() if saved.get(key) != value}
    return [f"{key}: {saved.get(key)!r} there, {value!r} here" for key, value in differing.items()]
