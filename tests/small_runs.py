"""Small trainings in the process of the test, whose import takes longer than they do, and what they leave."""

import gc
import json
from pathlib import Path

import train_unconditional as script
from command_line import parse_arguments
from conftest import SMALL_RUN, UNET, reset_accelerate

gc.freeze()  # a training ends with a collection of garbage: it need not go through all that is imported, too


def parse(*argv: str) -> script.TrainingArguments:
    return parse_arguments(script.TrainingArguments, list(argv), script.__doc__)


def train_here(*flags) -> script.TrainingArguments:
    """Run the script with these flags alone; it starts, and leaves accelerate, as in a fresh process."""
    reset_accelerate()
    try:
        args = parse(*map(str, flags))
        script.main(args)
    finally:
        reset_accelerate()
    return args


def train_in(folder: Path, *flags: str) -> Path:
    """Three steps, or as the flags say, into `run` in the folder, or where the flags say; returns that folder."""
    defaults = [flag for flag in SMALL_RUN if flag not in ("--unet_config", UNET, "--resolution", "8")]
    if "--pretrained_model_name_or_path" not in flags:
        defaults += ["--unet_config", UNET, "--resolution", "8"]
    if "--num_epochs" not in flags:
        defaults += ["--max_train_steps", "3"]
    return Path(train_here(*defaults, "--output_dir", folder / "run", *flags).output_dir)


def metrics_of(output_dir: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output_dir / file).read_text().splitlines()]
