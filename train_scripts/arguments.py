"""The training script's flags, most of them named as diffusers' own, and their rules."""

import importlib.util
import math
from dataclasses import asdict, dataclass, fields

from command_line import arg, check
from files import check_apart
from launch import PRECISION_HELP, PRECISIONS
from trackers import TRACKERS

from ddpm_diffusers.hub import has_form_of_hub_id
from ddpm_diffusers.synthetic_fashion import SYNTHETIC

# must not change between a checkpoint and the run resumed from it; the script sets the first three itself
DEFINES_THE_RUN = (
    "data", "global_batch_size", "mixed_precision", "resolution", "random_flip", "prediction_type", "ddpm_num_steps",
    "ddpm_beta_schedule", "snr_gamma", "seed", "optimizer", "learning_rate", "lr_scheduler", "adam_beta1",
    "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "use_ema", "ema_max_decay",
)  # fmt: skip


@dataclass
class TrainingArguments:
    # data
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub id, local folder, or synthetic-fashion (built in)")
    dataset_config_name: str | None = arg(None, "configuration of a data set that has several")
    dataset_id: str | None = arg(None, "Hub id of a local data set, for the model card")
    train_data_dir: str | None = arg(None, "folder of images, in place of --dataset_name")
    split: str = arg("train", "split of the data set")
    image_column: str = arg("image", "column that holds the images")
    max_train_samples: int | None = arg(None, "use only the first N images (of data sorted by class, a few classes)")
    resolution: int | None = arg(None, "side to resize images to: that of a pretrained network, or 16, by default")
    center_crop: bool = arg(False, "crop each image to its central square first")
    random_flip: bool = arg(False, "flip images horizontally at random; hurts if objects face one way, as shoes do")
    cache_dir: str | None = arg(None, "cache folder for data sets and decoded images")
    streaming: bool = arg(False, "stream the data set, for one that does not fit on disk; needs --max_train_steps")
    shuffle_buffer_size: int = arg(
        10_000, "with --streaming: images shuffled at a time, per process and worker; twice as many are in memory"
    )
    dataloader_num_workers: int = arg(0, "data-loading worker processes; 0 is usually fastest without --streaming")
    # model and noise schedule
    unet_config: str | None = arg(None, "U-Net arguments, as a JSON file (see train_scripts/configs) or JSON text")
    pretrained_model_name_or_path: str | None = arg(
        None, "folder or Hub id of a pipeline, whose network and weights to start from in place of new ones"
    )
    prediction_type: str = arg("epsilon", "what the network predicts: epsilon, v_prediction or sample")
    ddpm_num_steps: int = arg(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: str = arg("scaled_linear", "linear, scaled_linear or, with v_prediction, squaredcos_cap_v2")
    snr_gamma: float | None = arg(None, "gamma of Min-SNR loss weighting, 5.0 in its paper; no weighting by default")
    # optimization
    output_dir: str = arg("ddpm-model", "folder for the pipeline, checkpoints and logs")
    overwrite_output_dir: bool = arg(
        False, "delete an earlier training's files there, unless --resume_from_checkpoint goes on"
    )
    seed: int = arg(0, "seed for weights, data order, noise and timesteps")
    train_batch_size: int = arg(64, "batch size per process")
    num_epochs: int | None = arg(None, "passes over the data, 5 by default")
    max_train_steps: int | None = arg(None, "total optimizer steps, in place of --num_epochs")
    gradient_accumulation_steps: int = arg(1, "batches per optimizer step")
    optimizer: str = arg("adamw", "adamw, or muon, which has Muon for the kernels of convolutions, AdamW for the rest")
    learning_rate: float = arg(2e-3, "peak learning rate")
    lr_scheduler: str = arg(
        "cosine", "schedule over optimizer steps: cosine, linear, constant, constant_with_warmup or polynomial"
    )
    lr_warmup_steps: int | None = arg(
        None, "optimizer steps of linear warm-up; by default a tenth of all steps, with `constant` none"
    )
    adam_beta1: float = arg(0.9, "beta1 of AdamW")
    adam_beta2: float = arg(0.999, "beta2 of AdamW")
    adam_weight_decay: float = arg(1e-2, "weight decay of AdamW, and of Muon")
    adam_epsilon: float = arg(1e-8, "epsilon of AdamW")
    max_grad_norm: float = arg(1.0, "clip gradients to this norm")
    use_ema: bool = arg(True, "keep an exponential moving average (EMA) of the weights, and save it in the pipeline")
    ema_max_decay: float = arg(0.999, "maximum decay of the EMA; 0.9999 for runs of over 50,000 steps")
    mixed_precision: str | None = arg(None, PRECISION_HELP)
    compile: bool = arg(False, "torch.compile the network: for GPUs, and CPUs with AMX in bf16")
    cuda_graph: bool = arg(
        True, "on one GPU, launch each step as a whole; not with fp16, gradient accumulation or gradient checkpointing"
    )
    gradient_checkpointing: bool = arg(False, "save memory, at the cost of time")
    # output; from here on left out of model cards, by `settings_for_card`
    logging_steps: int = arg(20, "optimizer steps between lines of metrics.jsonl")
    logger: str = arg("tensorboard", "tracker besides metrics.jsonl: tensorboard, wandb, trackio or none")
    validation_steps: int | None = arg(None, "optimizer steps between sample grids; by default one grid at the end")
    eval_batch_size: int = arg(64, "images per sample grid")
    ddpm_num_inference_steps: int = arg(20, "DPM-Solver++ steps for the sample grids")
    checkpointing_steps: int | None = arg(
        None,
        "optimizer steps between checkpoints; by default a stop by a signal writes one, and the end of a resumed run",
    )
    checkpoints_total_limit: int | None = arg(None, "how many checkpoints to keep; all by default")
    resume_from_checkpoint: str | None = arg(None, "checkpoint-STEP folder to resume from, or latest")
    # the Hub
    push_to_hub: bool = arg(False, "push the pipeline and its model card after training")
    hub_model_id: str | None = arg(None, "repository to push to; the name of --output_dir by default")
    hub_token: str | None = arg(
        None, "token for the push; prefer `hf auth login` or HF_TOKEN, which serve private data, too"
    )
    hub_private_repo: bool = arg(False, "create the repository as private")
    hub_license: str | None = arg(None, "license of the model for its card, as the Hub abbreviates it, such as mit")

    def __post_init__(self):
        least = {"seed": 0, "dataloader_num_workers": 0, "lr_warmup_steps": 0}
        for name in [option.name for option in fields(self) if option.type in (int, int | None)]:
            value, at_least = getattr(self, name), least.get(name, 1)
            check(self, value is None or value >= at_least, name, f"be a whole number of at least {at_least}")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon"):
            value = getattr(self, name)
            check(self, value is None or (math.isfinite(value) and value > 0), name, "be a positive number")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            check(self, 0 <= getattr(self, name) < 1, name, "be in [0, 1)")
        check(self, 0 <= self.adam_weight_decay < math.inf, "adam_weight_decay", "be a number of at least 0")
        check(self, self.seed < 2**32, "seed", "be in [0, 2^32)")
        check(self, self.ddpm_num_inference_steps <= self.ddpm_num_steps, "ddpm_num_inference_steps",
              f"not exceed `--ddpm_num_steps`, {self.ddpm_num_steps}")  # fmt: skip
        for name, choices in {
            "prediction_type": ("epsilon", "v_prediction", "sample"),
            "ddpm_beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            "lr_scheduler": ("cosine", "linear", "constant", "constant_with_warmup", "polynomial"),
            "optimizer": ("adamw", "muon"),
            "mixed_precision": PRECISIONS,
            "logger": (*TRACKERS, "none"),
        }.items():
            check(self, getattr(self, name) in choices, name, f"be one of {', '.join(filter(None, choices))}")
        if self.unet_config is not None and self.pretrained_model_name_or_path is not None:
            raise ValueError(
                "Give `--unet_config` or `--pretrained_model_name_or_path`, which brings its own, not both."
            )
        if self.resolution is None and self.pretrained_model_name_or_path is None:
            self.resolution = 16
        if self.lr_scheduler == "constant":
            check(self, not self.lr_warmup_steps, "lr_warmup_steps",
                  "be 0 with `--lr_scheduler constant`, which does not warm up: use constant_with_warmup")  # fmt: skip
        if self.dataset_id is not None:
            check(self, has_form_of_hub_id(self.dataset_id), "dataset_id", "be owner/name on the Hub")
        if self.num_epochs is not None and self.max_train_steps is not None:
            raise ValueError(
                f"`--num_epochs` is {self.num_epochs} and `--max_train_steps` {self.max_train_steps}: give one alone."
            )
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 5
        check_apart(self.output_dir, self.dataset_name, self.train_data_dir)
        if self.streaming and self.max_train_steps is None:
            raise ValueError("`--streaming` needs `--max_train_steps`: how long an epoch is cannot be known.")
        if self.streaming and self.max_train_samples is not None:
            raise ValueError("`--streaming` reads the whole data set: leave out `--max_train_samples`.")
        if self.streaming and self.train_data_dir is None and self.dataset_name == SYNTHETIC:
            raise ValueError(f"`--streaming` needs a `--dataset_name` or `--train_data_dir`: {SYNTHETIC} is drawn.")
        if self.logger != "none" and importlib.util.find_spec(self.logger) is None:
            raise ValueError(f"`--logger {self.logger}` needs a package: pip install {self.logger}, or --logger none.")


def settings_of(args: TrainingArguments) -> dict:
    """All arguments but the token, for files, trackers and model cards."""
    return {name: value for name, value in asdict(args).items() if name != "hub_token"}


def settings_for_card(run: dict) -> dict:
    """The settings in a run's record that say how the model was trained."""
    names = [field.name for field in fields(TrainingArguments)]
    left_out = {"dataset_name", "dataset_id", "pretrained_model_name_or_path", "base_model"}  # told by the card's text
    left_out |= {"unet_config"}  # `unet/config.json` has it
    left_out |= {"image_column", "cache_dir", "dataloader_num_workers", "shuffle_buffer_size", "cuda_graph"}
    left_out |= {"num_epochs"}  # `max_train_steps` says it
    left_out |= {"overwrite_output_dir", *names[names.index("logging_steps") :]}  # output and the Hub
    left_out |= {"data"} if run["streaming"] else set()  # it names the folder
    return {name: value for name, value in run.items() if name not in left_out and value is not False}
