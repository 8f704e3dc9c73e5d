"""The output folder of a run: which run owns it, its configuration, its log lines, its final pipeline and card."""

import json
import os
import shutil
import uuid
from pathlib import Path

from arguments import DEFINES_THE_RUN, TrainingArguments, settings_for_card
from files import holds_files, write_text
from huggingface_hub import ModelCard

from ddpm_diffusers.checkpointing import (
    explain_write_errors,
    flush,
    list_checkpoints,
    list_differences,
    remove_checkpoint,
    remove_leftovers,
    resolve_checkpoint,
    step_of,
)
from ddpm_diffusers.hub import model_card
from ddpm_diffusers.pipeline_pixel_diffusion import README, SAMPLES, set_card_aside

RUN_FILE = "run.json"


def choose_start(output_dir: Path, resume_from_checkpoint: str | None, overwrite: bool) -> tuple[Path | None, bool]:
    """The checkpoint to start from, if any, and whether the run goes on in this folder. Nothing is written.

    Raises:
        ValueError: If the folder holds another run and `overwrite` is false, or holds anything but a run.
    """
    resume_path = None
    if resume_from_checkpoint is not None:
        resume_path = resolve_checkpoint(output_dir, resume_from_checkpoint)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`--output_dir` {output_dir} is a file: choose another.")
    goes_on = resume_path is not None and resume_path.resolve().parent == output_dir.resolve()
    if goes_on and resume_from_checkpoint != "latest":
        last = [path.resolve() for path in list_checkpoints(output_dir)[-1:]]
        if resume_path.resolve() not in last:
            raise ValueError(
                f"`--resume_from_checkpoint` {resume_path} is not the last checkpoint of {output_dir}: choose another"
                " `--output_dir` to start from it again, or remove those after it."
            )
    if resume_from_checkpoint == "latest" and resume_path is None:
        # a run that was killed before its first checkpoint starts over
        goes_on = (output_dir / RUN_FILE).is_file() and not (output_dir / "model_index.json").exists()
    if holds_files(output_dir) and not goes_on:  # what is there would have to be deleted
        if not (output_dir / RUN_FILE).is_file():
            raise ValueError(
                f"`--output_dir` {output_dir} is not empty, and has no {RUN_FILE}, so it may hold something other than"
                " a training: choose another, or empty it."
            )
        if not overwrite:
            raise ValueError(
                f"`--output_dir` {output_dir} is not empty: choose another, or pass `--overwrite_output_dir`."
                " (`--resume_from_checkpoint latest` goes on if there is a checkpoint in it.)"
            )
    return resume_path, goes_on


def open_run(output_dir: Path, goes_on: bool, step: int, configs: dict) -> dict:
    """Prepare the folder for this run, and return the run's record with its id, as in `run.json`.

    Args:
        output_dir: The folder, locked.
        goes_on: As `choose_start` returned it; if false, what a run left in the folder is deleted.
        step: Optimizer step at which the run starts.
        configs: "arguments", and "unet", the U-Net's config.

    Raises:
        ValueError: If the folder holds a run with other arguments; the message lists the differences.
        OSError: If the folder cannot be written to.
    """
    with explain_write_errors(f"{RUN_FILE} cannot be written to {output_dir}"):
        if goes_on and (output_dir / RUN_FILE).is_file():
            record = json.loads((output_dir / RUN_FILE).read_text())
            saved, differences = record["arguments"], []
            if step == 0:  # it starts over, from the same weights; else its checkpoint was compared when it was loaded
                names = (*DEFINES_THE_RUN, "pretrained_model_name_or_path")
                differences = list_differences(saved, {name: configs["arguments"][name] for name in names})
                differences += list_differences(record["unet"], configs["unet"])
                if saved["resume_from_checkpoint"] not in (None, "latest"):
                    differences.append(f"it began at {saved['resume_from_checkpoint']} and has no checkpoint yet")
            if differences:
                raise ValueError(
                    f"`--output_dir` {output_dir} holds another run ({'; '.join(differences)}): give the same"
                    " arguments, choose another folder, or start again in this one with `--overwrite_output_dir` and"
                    " without `--resume_from_checkpoint latest`."
                )
        else:
            record = {"id": uuid.uuid4().hex[:8]}
        remove_leftovers(output_dir)
        for path in list_checkpoints(output_dir):
            if not goes_on:
                remove_checkpoint(path)
            elif step_of(path) > step:  # damaged, so "latest" skipped it
                damaged = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
        if not goes_on:  # delete what might be taken for this run's
            for damaged in output_dir.glob("damaged-checkpoint-*"):
                shutil.rmtree(damaged, ignore_errors=True)
            for name in ("model_index.json", README, SAMPLES, "metrics.jsonl", "speed.jsonl"):
                (output_dir / name).unlink(missing_ok=True)
            for card in (*output_dir.glob("README.before*.md"), *output_dir.glob("samples.before*.png")):
                card.unlink()
            for name in ("samples", "logs", "unet", "guiding_unet", "scheduler"):  # with any variants of the weights
                shutil.rmtree(output_dir / name, ignore_errors=True)
        record |= configs
        write_text(output_dir / RUN_FILE, json.dumps(record, indent=2) + "\n")
    return record


class LogLines:
    """A file of one JSON object per line; opening cuts it at the first line past `last_step` or half written."""

    def __init__(self, path: Path, last_step: float):
        self.path, kept = path, 0
        with explain_write_errors(f"{path} cannot be written"):
            self.file = open(path, "a+b")
            self.file.seek(0)
            for line in self.file:
                if not line.endswith(b"}\n") or json.loads(line)["step"] > last_step:
                    break
                kept += len(line)
            self.file.truncate(kept)

    def write(self, values: dict) -> None:
        with explain_write_errors(f"{self.path} cannot be written"):
            self.file.write(json.dumps(values).encode() + b"\n")
            self.file.flush()

    def flush(self) -> None:
        """Flush to disk: a checkpoint must not outlive the lines before it."""
        os.fsync(self.file.fileno())


def save_pipeline(pipe, output_dir: Path) -> None:
    """`save_pretrained`, replacing files atomically: each old file stays until its successor is complete.

    If the folder has other weights, their card is renamed first, and at the end other files of them, such as variants,
    are removed.
    """
    partial = output_dir / ".pipeline.partial"
    with explain_write_errors(f"The pipeline cannot be written to {output_dir}", partial):
        shutil.rmtree(partial, ignore_errors=True)
        pipe.save_pretrained(partial)
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        replaced = set_card_aside(pipe.networks(), output_dir)
        for path in sorted(files, key=lambda path: path.name == "model_index.json"):  # last: it makes them a pipeline
            flush(partial / path)
            target = output_dir / path
            target.parent.mkdir(exist_ok=True)
            os.replace(partial / path, target)
        shutil.rmtree(partial)
        if "unet" in replaced:
            for path in output_dir.glob("unet/*.safetensors*"):
                if path.relative_to(output_dir) not in files:
                    path.unlink()


def write_card(path: Path, pipe, repo_id: str, args: TrainingArguments, settings: dict, has_samples: bool) -> None:
    """Write the run's model card; one that is there, and may have gained figures, only gets the license, if any.

    `settings` are the flags as they were resolved.
    """
    if not path.exists():
        card = model_card(
            pipe,
            repo_id,
            dataset_name=args.dataset_name if args.train_data_dir is None else None,
            dataset_id=args.dataset_id,
            base_model=settings["base_model"],
            settings=settings_for_card(settings),
            has_samples=has_samples,
            license=args.hub_license,
        )
        write_text(path, str(card))
    elif args.hub_license:
        card = ModelCard.load(path)
        card.data.license = args.hub_license
        write_text(path, str(card))
