"""The noise schedule, and the network to train: what `--unet_config` describes, or that of a saved pipeline."""

import inspect
import json
import logging
from pathlib import Path

import diffusers
import torch
from arguments import TrainingArguments
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.pipeline_pixel_diffusion import height_and_width, other_noise

logger = logging.getLogger(__name__)

UNETS = {"OptimizedUNet2DModel": OptimizedUNet2DModel, "UNet2DModel": UNet2DModel}


# the flags that set what a network was trained with
FLAGS = {
    "num_train_timesteps": "ddpm_num_steps",
    "beta_schedule": "ddpm_beta_schedule",
    "prediction_type": "prediction_type",
}


def make_noise_schedule(args: TrainingArguments) -> DDPMScheduler:
    """The scheduler of the training; warns if its last timestep leaves too much of the image, or too little."""
    scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        timestep_spacing="trailing",
    )
    signal_left = scheduler.alphas_cumprod[-1].item()  # share of the image's variance
    if signal_left > 0.01:
        logger.warning(
            f"After {args.ddpm_num_steps} timesteps of `--ddpm_beta_schedule` {args.ddpm_beta_schedule},"
            f" {signal_left**0.5:.0%} of the image is left, and sampling starts from pure noise, which the network"
            " never saw: give more `--ddpm_num_steps`, or squaredcos_cap_v2 with v_prediction."
        )
    if (args.ddpm_beta_schedule, args.prediction_type) == ("squaredcos_cap_v2", "epsilon"):
        logger.warning(
            "`--ddpm_beta_schedule` squaredcos_cap_v2 leaves so little of the image at its last timestep that, with"
            " predicted noise, schedulers that do not clip diverge, such as the DPM-Solver++ of the sample grids:"
            " train with `--prediction_type v_prediction`, or sample with `ddpm` or `ddim`."
        )
    return scheduler


def open_unet(args: TrainingArguments, scheduler: DDPMScheduler, checkpoint: Path | None) -> ModelMixin:
    """The network that the flags ask for: a new one, that of a saved pipeline, or of the checkpoint to resume from.

    Raises:
        ValueError: If it cannot be made, loaded or trained with the scheduler, or the run would overwrite its source.
    """
    pretrained = args.pretrained_model_name_or_path
    if pretrained is None:
        return make_unet(args.unet_config, args.resolution, args.ddpm_num_steps, args.gradient_checkpointing)
    if checkpoint is not None:  # it has the weights, and the source may be gone
        return unet_of_checkpoint(checkpoint, args.resolution, args.gradient_checkpointing)
    if Path(pretrained).resolve() == Path(args.output_dir).resolve():
        raise ValueError(f"`--output_dir` is {pretrained}, which the run would start from: choose another.")
    return load_unet(pretrained, scheduler, args.resolution, args.gradient_checkpointing)


def make_unet(
    unet_config: str | dict | None, resolution: int, num_train_timesteps: int, gradient_checkpointing: bool = False
) -> ModelMixin:
    """A new network; ValueError if it cannot be made or trained."""
    config = unet_config or {}
    if isinstance(config, str):
        is_text = config.lstrip().startswith("{")
        if not is_text and not Path(config).is_file():
            raise ValueError(f"`--unet_config` is {config!r}, which is no file; give a JSON file or JSON text.")
        try:
            config = json.loads(config if is_text else Path(config).read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"`--unet_config` {unet_config!r} is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--unet_config` holds {config!r}; it must be a JSON object of arguments.")
    class_name = config.get("_class_name", "OptimizedUNet2DModel")
    if class_name not in UNETS:
        raise ValueError(f"`_class_name` in `--unet_config` is {class_name!r}; it must be one of {', '.join(UNETS)}.")
    saved = {key: config[key] for key in ("_class_name", "_diffusers_version") if key in config}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    warn_of_another_size(config, "unet_config", resolution)
    config |= {"sample_size": resolution, "num_train_timesteps": num_train_timesteps}
    unknown = set(config) - set(inspect.signature(UNETS[class_name].__init__).parameters)
    if unknown:
        raise ValueError(f"`--unet_config` holds {sorted(unknown)}, which are no arguments of {class_name}.")
    try:
        unet = UNETS[class_name].from_config({**saved, **config})
    except Exception as error:
        if class_name == "OptimizedUNet2DModel":
            raise
        # UNet2DModel leaves it to torch to find what does not fit
        raise ValueError(f"`--unet_config` describes no {class_name} ({error}): change what it names.") from error
    return ready(unet, "unet_config", resolution, gradient_checkpointing)


def unet_of_checkpoint(checkpoint: Path, resolution: int | None, gradient_checkpointing: bool) -> ModelMixin:
    """A new network by a checkpoint's own config: `--unet_config` does not describe one that was fine-tuned."""
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    unet = getattr(diffusers, config["_class_name"]).from_config(config)
    return ready(unet, "resume_from_checkpoint", resolution or unet.config.sample_size, gradient_checkpointing)


def load_unet(
    name_or_path: str, scheduler: DDPMScheduler, resolution: int | None, gradient_checkpointing: bool = False
) -> ModelMixin:
    """The network of a saved pipeline, with its weights, for its own resolution unless another is given.

    Raises:
        ValueError: If it cannot be loaded, or trained with `scheduler`, has no resolution of its own, or is of a class
            that neither diffusers nor this package has.
    """
    flag = "pretrained_model_name_or_path"
    try:
        pipe = PixelDiffusionPipeline.from_pretrained(
            name_or_path, guiding_unet=None, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--{flag}` {name_or_path} cannot be loaded ({error}): give a saved pipeline, with weights in safetensors"
            " (`PixelDiffusionPipeline.from_pretrained(A).save_pretrained(B)` makes them of others)."
        ) from error
    class_name = type(pipe.unet).__name__
    if not hasattr(diffusers, class_name):  # a checkpoint names its class alone
        raise ValueError(
            f"The network of `--{flag}` is of class {class_name}, which is neither diffusers' nor this package's, so"
            " that a checkpoint of its training could not be resumed: give a pipeline whose network is."
        )
    was, now = pipe.scheduler.config, scheduler.config
    if "beta_schedule" not in was:
        raise ValueError(f"`--{flag}` {name_or_path} has {type(pipe.scheduler).__name__}, of another kind of noise.")
    if changed := other_noise(was, now):
        key = changed[0]
        advice = f"pass `--{FLAGS[key]} {was[key]}`" if key in FLAGS else "there is no flag for it"
        raise ValueError(
            f"The network of `--{flag}` was trained with `{key}` {was.get(key)}, and would go on with {now.get(key)}:"
            f" {advice}."
        )
    if resolution is None:
        resolution, width = height_and_width(pipe.unet.config.get("sample_size"))
        if resolution is None or resolution != width:
            raise ValueError(
                f"The network of `--{flag}` has a `sample_size` of {pipe.unet.config.get('sample_size')}: give"
                " `--resolution`, the side of the square images to train on."
            )
    warn_of_another_size(pipe.unet.config, flag, resolution)
    # without `_name_or_path`, which would be saved and pushed with the network
    config = {key: value for key, value in pipe.unet.config.items() if key != "_name_or_path"}
    unet = type(pipe.unet).from_config({**config, "sample_size": resolution})
    unet.load_state_dict(pipe.unet.state_dict())
    return ready(unet, flag, resolution, gradient_checkpointing)


def warn_of_another_size(config: dict, flag: str, resolution: int) -> None:
    if config.get("sample_size", resolution) not in (resolution, None, [resolution] * 2, (resolution, resolution)):
        logger.warning(
            f"The network of `--{flag}` was for images of `sample_size` {config['sample_size']}; this one is for"
            f" `--resolution` {resolution}."
        )


def ready(unet: ModelMixin, flag: str, resolution: int, gradient_checkpointing: bool) -> ModelMixin:
    """The network in training mode; ValueError if it cannot be trained on such images."""
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise ValueError(
            f"`in_channels` and `out_channels` in `--{flag}` are {channels[0]} and {channels[1]}; both must be 1"
            " (grey) or both 3 (RGB)."
        )
    try:
        with torch.no_grad():
            unet.eval()(torch.zeros(1, channels[0], resolution, resolution), 0)
    except Exception as error:  # UNet2DModel does not check shapes up front
        raise ValueError(
            f"The network of `--{flag}` cannot take images of `--resolution` {resolution} ({error}): choose"
            " another resolution or network, without classes or other conditions."
        ) from error
    if gradient_checkpointing:
        if unet.config.get("norm_type") == "batch":
            raise ValueError(
                "`--gradient_checkpointing` runs each block twice, so the running statistics of `norm_type` 'batch'"
                " would be updated twice a step: leave it out, or use `norm_type` 'group'."
            )
        unet.enable_gradient_checkpointing()
    return unet.train()
