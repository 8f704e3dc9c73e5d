"""Training checkpoints: folders of safetensors and JSON, without pickle, written completely or not at all.

`checkpoint-STEP/` holds `unet/` and, with EMA, `unet_ema/` (both for `from_pretrained`), `optimizer.safetensors`,
`training_state.json` (position, learning-rate schedule, gradient scaler, optimizer settings, the run's configuration,
versions) and `manifest.json`, which lists the size and SHA-256 of every other file, so that damage is detected.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from .optimizer_state import gather_optimizer_state, restore_optimizer_state, sharded_like, whole
from .pipeline_pixel_diffusion import check_positive

logger = logging.getLogger(__name__)
STATE_FILE = "training_state.json"
MANIFEST = "manifest.json"


def versions() -> dict:
    """The software versions and the CPU thread count, on which the last bits of a run depend."""
    packages = ("torch", "diffusers", "accelerate", "numpy")
    found = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {**found, "CPU threads": torch.get_num_threads()}  # sums are split over them


# finding checkpoints


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps, damaged ones included (see `find_damage`)."""
    found = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in found if path.name.removeprefix("checkpoint-").isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_damage(path: Path) -> str | None:
    """What is missing or wrong in a checkpoint, or None if every file is as it was written."""
    try:
        if not (path / MANIFEST).is_file():
            return f"it has no {MANIFEST}, so it is incomplete"
        manifest = json.loads((path / MANIFEST).read_text())
        for name, written in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != written["size"]:
                return f"{name} has {size} bytes in place of {written['size']}"
            if checksum(path / name) != written["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except (ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def resolve_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint's folder, given its name in the run's folder, a path, or "latest" (None if there is none yet).

    "latest" skips damaged checkpoints with a warning and takes the newest intact one.

    Raises:
        ValueError: If the name or path is not a complete checkpoint, or if "latest" finds only damaged ones.
    """
    if resume_from_checkpoint != "latest":
        path = Path(output_dir, resume_from_checkpoint)
        if not path.is_dir():
            path = Path(resume_from_checkpoint)
        damage = find_damage(path)
        if damage is not None:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, which is no complete checkpoint: {damage}."
                " Give a folder checkpoint-STEP, or 'latest'."
            )
        return path
    checkpoints = list_checkpoints(output_dir)
    for path in reversed(checkpoints):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning(f"{path} is damaged, and passed over: {damage}.")
    if checkpoints:
        raise ValueError(
            f"All {len(checkpoints)} checkpoint(s) in {output_dir} are damaged: remove them to begin again, or give an"
            " intact one as `resume_from_checkpoint`."
        )
    return None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, renaming it first so that what a kill leaves behind is not taken for a complete one."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run had not finished writing or deleting."""
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover)


# writing


def save_checkpoint(
    output_dir,
    step: int,
    unet,
    ema,
    optimizer,
    state: dict,
    total_limit: int | None = None,
    is_main_process: bool = True,
) -> Path:
    """Write `checkpoint-STEP` completely or not at all, then delete the oldest checkpoints beyond `total_limit`.

    Every process must call it, since each holds a part of any sharded tensors; the main process writes.

    Args:
        output_dir: Folder of the run, in which there is no checkpoint of this step.
        step: Number of optimizer steps done.
        unet: The model, as `accelerator.unwrap_model` gives it.
        ema: diffusers' `EMAModel` of its parameters, or None.
        optimizer: Optimizer of `unet.parameters()`; its state is saved as safetensors, its settings as JSON.
        state: The rest, JSON-serializable: "arguments" (see `load_checkpoint`), schedule, scaler.
        total_limit: How many checkpoints to keep, at least 1, or None for all.
        is_main_process: Whether this process writes.

    Raises:
        OSError: If the folder cannot be written to; earlier checkpoints stay intact.
        ValueError: If `total_limit` is below 1.
    """
    if total_limit is not None:
        check_positive(total_limit=total_limit)
    copies = {"unet": plain_copy(unet)}
    if ema is not None:
        copies["unet_ema"] = plain_copy(unet, ema.shadow_params)
        state = {**state, "ema_optimization_step": ema.optimization_step}
    tensors, param_groups = gather_optimizer_state(unet, optimizer)
    state = {**state, "step": step, "param_groups": param_groups, "versions": versions()}

    final = Path(output_dir) / f"checkpoint-{step}"
    if not is_main_process:
        return final
    partial = final.with_name(f".{final.name}.partial")
    with explain_write_errors(f"{final.name} cannot be written to {output_dir}", partial):
        remove_leftovers(final.parent)
        partial.mkdir(parents=True)
        for name, copy in copies.items():
            copy.save_pretrained(partial / name)
        save_file(tensors, partial / "optimizer.safetensors")
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        manifest = {
            file.relative_to(partial).as_posix(): {"size": file.stat().st_size, "sha256": checksum(file)}
            for file in files
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        partial.rename(final)
        flush(final.parent)  # so that the new name survives a power cut, too

    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            remove_checkpoint(old)
    return final


@contextmanager
def explain_write_errors(failure: str, half_written: Path | None = None):
    """Turn a failed write into an OSError that says how to continue, and remove what was half written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if half_written is not None:
            shutil.rmtree(half_written, ignore_errors=True)
        raise OSError(
            f"{failure} ({error}). What was complete before is intact: make room or mend the folder's rights, then go"
            " on from there."
        ) from error


def plain_copy(unet, parameters: Iterable[torch.Tensor] | None = None):
    """A full copy of the model on the CPU, sharing no memory with it; `parameters`, if given, replace its own.

    Every process must call it; each gets a copy.
    """
    with torch.device("meta"):
        copy = unsharded_class(unet).from_config(unet.config)
    weights = unet.state_dict()
    if parameters is not None:
        weights |= zip([name for name, _ in unet.named_parameters()], parameters, strict=True)
    weights = {name: whole(weight) for name, weight in weights.items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def unsharded_class(unet) -> type:
    """The class that a model had before FSDP replaced it with a subclass."""
    return next(c for c in type(unet).__mro__ if not issubclass(c, FSDPModule))


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Flush `path`, a file or a folder, to disk, so that it survives a power cut."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # opens no folders
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):  # as some network drives do
            raise
    finally:
        os.close(handle)


# reading


def load_checkpoint(path: str | Path, unet, ema, optimizer, arguments: dict) -> dict:
    """Restore a checkpoint's weights and optimizer state and return its `state`; every process must call it.

    Args:
        path: Folder of the checkpoint.
        unet, ema, optimizer: As given to `save_checkpoint`; changed in place.
        arguments: What the checkpoint's `state["arguments"]` must match: data, objective, seed …

    Raises:
        ValueError: If the checkpoint has another U-Net config or other arguments; the message lists the
            differences.
    """
    path = Path(path)
    state = json.loads((path / STATE_FILE).read_text())
    differences = list_differences(unet.load_config(path / "unet"), config_of(unet))
    differences += list_differences(state["arguments"], arguments)
    if differences:
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(differences)}): give the same arguments, or start a"
            " new run in another folder."
        )
    changed = list_differences(state["versions"], versions())
    if changed:
        logger.warning(f"{path} is of other versions ({'; '.join(changed)}): the bits may differ from here.")

    unet_class = unsharded_class(unet)
    fill(unet.state_dict(), unet_class.from_pretrained(path / "unet", use_safetensors=True).state_dict())
    if ema is not None:
        averaged = unet_class.from_pretrained(path / "unet_ema", use_safetensors=True)
        fill({name: p for (name, _), p in zip(unet.named_parameters(), ema.shadow_params, strict=True)},
             averaged.state_dict())  # fmt: skip
        ema.optimization_step = state["ema_optimization_step"]
    # copied: else they would stay mapped from a file that the run deletes, which some file systems refuse
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "optimizer.safetensors").items()}
    restore_optimizer_state(unet, optimizer, tensors, state["param_groups"])
    return state


def fill(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.detach().copy_(sharded_like(values[name], tensor))


def config_of(unet) -> dict:
    """The network's arguments, as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in unet.config.items() if not key.startswith("_")}))


def list_differences(saved: dict, current: dict) -> list[str]:
    """What differs, as texts; only the keys of `current` are compared, others in `saved` do not matter."""
    current = json.loads(json.dumps(current))  # tuples become lists, as in the file
    differing = {key: value for key, value in current.items() if saved.get(key) != value}
    return [f"{key}: {saved.get(key)!r} there, {value!r} here" for key, value in differing.items()]
