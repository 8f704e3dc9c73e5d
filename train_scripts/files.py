"""Output folders that hold nothing else and have one writer, and files that appear complete or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ddpm_diffusers.checkpointing import explain_write_errors, flush
from ddpm_diffusers.synthetic_fashion import SYNTHETIC


def check_empty(folder: Path) -> None:
    """Raise a ValueError if the folder holds anything but hidden files."""
    if holds_files(folder):
        raise ValueError(f"`--output_dir` {folder} is not empty: choose another, or pass `--overwrite`.")


def check_apart(output_dir: str, dataset_name: str, train_data_dir: str | None = None) -> None:
    """Raise a ValueError if the output folder lies in that of the images, or that is an empty name."""
    if train_data_dir == "":
        raise ValueError("`--train_data_dir` is empty (by an unset variable?): give a folder, or leave it out.")
    images = train_data_dir or dataset_name
    is_drawn = train_data_dir is None and dataset_name == SYNTHETIC
    if not is_drawn and Path(images).is_dir() and Path(output_dir).resolve().is_relative_to(Path(images).resolve()):
        raise ValueError(
            f"The output folder {output_dir} lies in {images}, where the images are, and its pictures would join them:"
            " choose another."
        )


def holds_files(folder: Path) -> bool:
    """Whether it is a folder that holds anything but hidden files."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def lock(output_dir: Path, must_be_empty: bool = False) -> FileLock:
    """Make the folder, and keep other processes from writing into it for as long as the returned lock lives.

    Raises:
        ValueError: If another process holds the lock, or has left files since the folder was found empty.
        OSError: If the folder cannot be written to.
    """
    with explain_write_errors(f"{output_dir} cannot be written to"):
        output_dir.mkdir(parents=True, exist_ok=True)
        folder_lock = FileLock(output_dir / ".lock")
        try:
            folder_lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another process writes into {output_dir}: wait for it to end, or stop it. (If none does, remove"
                f" {output_dir / '.lock'}: some network drives keep the lock of a process that was killed.)"
            ) from error
    if must_be_empty:
        check_empty(output_dir)
    return folder_lock


def write_text(path: Path, text: str) -> None:
    """Write the text to `path`, completely or not at all."""
    write_file(path, lambda partial: partial.write_text(text, "utf-8"))


def write_file(path: Path, write: Callable[[Path], object], to_disk: bool = True) -> None:
    """Have `write` make the file under a temporary name: it appears completely or not at all.

    Without `to_disk` this holds if the process is killed, but not if the machine is.
    """
    partial = path.with_name(f".partial-{path.name}")  # with the suffix, from which PIL takes the format
    with explain_write_errors(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        write(partial)
        if to_disk:
            flush(partial)
        os.replace(partial, path)
