"""The flags of the scripts, named as in diffusers' own where it has them, and their rules."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml
from launch import PRECISIONS
from trackers import TRACKERS
from transformers import HfArgumentParser

from ddpm_diffusers.hub import is_hub_id

# what must not change between a checkpoint and the run that goes on from it; the first three are made by the script
DEFINES_THE_RUN = (
    "data", "global_batch_size", "mixed_precision", "resolution", "random_flip", "prediction_type", "ddpm_num_steps",
    "ddpm_beta_schedule", "snr_gamma", "seed", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_epsilon", "max_grad_norm", "use_ema", "ema_max_decay",
)  # fmt: skip


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    # data
    dataset_name: str = arg(
        "zalando-datasets/fashion_mnist", "Hub name, local folder, or synthetic-fashion (built in)"
    )
    dataset_config_name: str | None = arg(None, "configuration of a data set that has several")
    dataset_id: str | None = arg(None, "what a local data set is called on the Hub, for the card")
    train_data_dir: str | None = arg(None, "folder of images, in place of --dataset_name")
    split: str = arg("train", "split of the data set")
    image_column: str = arg("image", "column that holds the images")
    max_train_samples: int | None = arg(None, "use the first so many images only")
    resolution: int = arg(16, "height and width that images are resized to")
    center_crop: bool = arg(False, "cut each image to its central square first")
    random_flip: bool = arg(False, "mirror images at random; hurts where things face one way, as shoes do")
    cache_dir: str | None = arg(None, "cache of datasets")
    streaming: bool = arg(False, "read the data as it comes, for what does not fit the disk; needs --max_train_steps")
    shuffle_buffer_size: int = arg(10_000, "images that --streaming shuffles at a time, each process and worker")
    dataloader_num_workers: int = arg(0, "worker processes; a batch is one gather, so 0 is mostly fastest")
    # model and noise schedule
    unet_config: str | None = arg(None, "JSON file or text with arguments of the U-Net (train_scripts/configs)")
    prediction_type: str = arg("epsilon", "epsilon, v_prediction or sample: what the network predicts")
    ddpm_num_steps: int = arg(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: str = arg("scaled_linear", "linear, scaled_linear or squaredcos_cap_v2")
    snr_gamma: float | None = arg(None, "Min-SNR loss weighting, 5.0 in its paper; none by default")
    # optimization
    output_dir: str = arg("ddpm-model", "folder of the pipeline, the checkpoints and the logs")
    overwrite_output_dir: bool = arg(False, "clear what a training wrote there before: weights, checkpoints, samples")
    seed: int = arg(0, "of the weights, the data order, the noise and the timesteps")
    train_batch_size: int = arg(64, "images a process and step")
    num_epochs: int = arg(5, "passes over the data")
    max_train_steps: int | None = arg(None, "optimizer steps, in place of --num_epochs")
    gradient_accumulation_steps: int = arg(1, "batches an optimizer step")
    learning_rate: float = arg(2e-3, "peak learning rate of AdamW")
    lr_scheduler: str = arg(
        "cosine", "cosine, linear, constant, constant_with_warmup or polynomial, over optimizer steps"
    )
    lr_warmup_steps: int | None = arg(None, "optimizer steps of linear warm-up; a tenth of all by default")
    adam_beta1: float = arg(0.9, "AdamW")
    adam_beta2: float = arg(0.999, "AdamW")
    adam_weight_decay: float = arg(1e-2, "AdamW")
    adam_epsilon: float = arg(1e-8, "AdamW")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    use_ema: bool = arg(True, "average the weights over steps; the average is what is saved")
    ema_max_decay: float = arg(0.999, "decay of that average; 0.9999 for runs of over 50,000 steps")
    mixed_precision: str | None = arg(
        None, "auto (bf16 where the hardware has it), no, fp16 or bf16; accelerate's setting by default"
    )
    compile: bool = arg(False, "torch.compile the network; for GPUs, a CPU gains nothing")
    gradient_checkpointing: bool = arg(False, "less memory for a fifth more time")
    # output
    logging_steps: int = arg(20, "optimizer steps between two lines of metrics.jsonl")
    logger: str = arg("tensorboard", "tracker: tensorboard, wandb, trackio or none, beside metrics.jsonl")
    validation_steps: int | None = arg(None, "optimizer steps between two sample grids; only at the end by default")
    eval_batch_size: int = arg(64, "images of a sample grid")
    ddpm_num_inference_steps: int = arg(20, "DPM-Solver++ steps of a sample grid")
    checkpointing_steps: int | None = arg(None, "optimizer steps between two checkpoints; none by default")
    checkpoints_total_limit: int | None = arg(None, "how many checkpoints to keep")
    resume_from_checkpoint: str | None = arg(None, "a folder checkpoint-STEP, or latest")
    # the Hub
    push_to_hub: bool = arg(False, "push the pipeline and its card when the training is done")
    hub_model_id: str | None = arg(None, "repository to push to; the name of --output_dir by default")
    hub_token: str | None = arg(None, "better by `hf auth login` or HF_TOKEN: others can see a command line")
    hub_private_repo: bool = arg(False, "make the repository private")

    def __post_init__(self):
        def check(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise ValueError(f"`--{name}` is {getattr(self, name)!r}; it must {rule}.")

        least = {"seed": 0, "dataloader_num_workers": 0, "lr_warmup_steps": 0}
        for name in [option.name for option in fields(self) if option.type in (int, int | None)]:
            value, at_least = getattr(self, name), least.get(name, 1)
            whole = isinstance(value, int) and not isinstance(value, bool)  # a file may hold anything
            check(value is None or (whole and value >= at_least), name, f"be a whole number of at least {at_least}")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon"):
            value = getattr(self, name)
            check(value is None or (math.isfinite(value) and value > 0), name, "be a positive number")
        check(0 <= self.ema_max_decay < 1, "ema_max_decay", "be in [0, 1)")
        check(self.seed < 2**32, "seed", "be in [0, 2^32)")
        check(self.ddpm_num_inference_steps <= self.ddpm_num_steps, "ddpm_num_inference_steps",
              f"not exceed `--ddpm_num_steps`, {self.ddpm_num_steps}")  # fmt: skip
        for name, choices in {
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "ddpm_beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            "lr_scheduler": ("cosine", "linear", "constant", "constant_with_warmup", "polynomial"),
            "mixed_precision": PRECISIONS,
            "logger": (*TRACKERS, "none"),
        }.items():
            check(getattr(self, name) in choices, name, f"be one of {', '.join(filter(None, choices))}")
        if self.dataset_id is not None and (self.train_data_dir is not None or not is_hub_id(self.dataset_id)):
            raise ValueError(
                f"`--dataset_id` is {self.dataset_id!r}; it must be owner/name on the Hub, of what `--dataset_name` is"
                " a local copy of."
            )
        if self.streaming and self.max_train_steps is None:
            raise ValueError("`--streaming` needs `--max_train_steps`: how long an epoch is cannot be known.")
        if self.streaming and (self.max_train_samples is not None or self.dataset_name == "synthetic-fashion"):
            raise ValueError("`--streaming` reads a whole data set, of the Hub or of files: no `--max_train_samples`.")
        if self.logger != "none" and importlib.util.find_spec(self.logger) is None:
            raise ValueError(f"`--logger {self.logger}` needs a package: pip install {self.logger}, or --logger none.")


def settings_of(args: TrainingArguments) -> dict:
    """All but the token, for files, trackers and cards."""
    return {name: value for name, value in asdict(args).items() if name != "hub_token"}


def settings_for_card(run: dict) -> dict:
    """What of a run's record tells how the model was trained."""
    names = [field.name for field in fields(TrainingArguments)]
    elsewhere = {
        "dataset_id",
        "image_column",
        "cache_dir",
        "dataloader_num_workers",
        "shuffle_buffer_size",
        "unet_config",
    }
    elsewhere |= {"overwrite_output_dir", "num_epochs", *names[names.index("logging_steps") :]}
    return {name: value for name, value in run.items() if name not in elsewhere and value is not False}


def run_script(main: Callable, arguments_class: type, doc: str) -> None:
    """`main` with the flags of the command line; wrong ones end the script with one line in place of a traceback."""
    try:
        args = parse_arguments(arguments_class, sys.argv[1:], doc)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    main(args)


def parse_arguments(arguments_class: type, argv: list[str], doc: str):
    """Flags, after an optional YAML or JSON file of the same names, as an `arguments_class`."""
    parser = HfArgumentParser(arguments_class, description=doc.splitlines()[0], allow_abbrev=False)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        if not Path(argv[0]).is_file():
            raise ValueError(f"There is no file {argv[0]}; what stands first may be a YAML or JSON file of arguments.")
        values = yaml.safe_load(Path(argv[0]).read_text()) or {}  # JSON is YAML
        if not isinstance(values, dict):
            raise ValueError(f"{argv[0]} holds a {type(values).__name__}; it must hold arguments by name.")
        if values.get("mixed_precision") is False:
            values["mixed_precision"] = "no"  # which YAML takes for False
        unknown = set(values) - {f.name for f in fields(arguments_class)}
        if unknown:
            raise ValueError(f"{argv[0]} holds {sorted(unknown)}, which are no arguments (see --help).")
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        argv = argv[1:]
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:  # their values, which may be tokens, are not shown
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        raise ValueError(f"{', '.join(flags) or 'What stands without a flag'} is no flag of this script (see --help).")
    if getattr(args, "hub_token", None):  # wandb keeps the command line that it finds here
        sys.argv[:] = [text.replace(args.hub_token, "<token>") for text in sys.argv]
    return args
