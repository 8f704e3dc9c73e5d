"""Build the network that `--unet_config` describes."""

import inspect
import json
import logging
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ddpm_diffusers import OptimizedUNet2DModel

logger = logging.getLogger(__name__)

UNETS = {"OptimizedUNet2DModel": OptimizedUNet2DModel, "UNet2DModel": UNet2DModel}


def make_unet(
    unet_config: str | dict | None, resolution: int, num_train_timesteps: int, gradient_checkpointing: bool = False
):
    config = unet_config or {}
    if isinstance(config, str):
        is_text = config.lstrip().startswith("{")
        if not is_text and not Path(config).is_file():
            raise ValueError(f"`--unet_config` is {config!r}, which is no file; give a JSON file or JSON text.")
        try:
            config = json.loads(config if is_text else Path(config).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"`--unet_config` {unet_config!r} is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--unet_config` holds {config!r}; it must be a JSON object of arguments.")
    class_name = config.get("_class_name", "OptimizedUNet2DModel")
    if class_name not in UNETS:
        raise ValueError(f"`_class_name` in `--unet_config` is {class_name!r}; it must be one of {', '.join(UNETS)}.")
    saved = {key: config[key] for key in ("_class_name", "_diffusers_version") if key in config}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if config.get("sample_size", resolution) not in (resolution, None, [resolution] * 2):
        logger.warning(
            f"The network of `--unet_config` was for images of `sample_size` {config['sample_size']}; this one is for"
            f" `--resolution` {resolution}."
        )
    config |= {"sample_size": resolution, "num_train_timesteps": num_train_timesteps}
    unknown = set(config) - set(inspect.signature(UNETS[class_name].__init__).parameters)
    if unknown:
        raise ValueError(f"`--unet_config` holds {sorted(unknown)}, which are no arguments of {class_name}.")
    unet = UNETS[class_name].from_config({**saved, **config})
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise ValueError(
            f"`in_channels` and `out_channels` in `--unet_config` are {channels[0]} and {channels[1]}; both must be 1"
            " (grey) or both 3 (RGB)."
        )
    try:
        with torch.no_grad():
            unet.eval()(torch.zeros(1, channels[0], resolution, resolution), 0)
    except Exception as error:  # UNet2DModel does not check shapes up front
        raise ValueError(
            f"The network of `--unet_config` cannot take images of `--resolution` {resolution} ({error}): choose"
            " another resolution or network, without classes or other conditions."
        ) from error
    if gradient_checkpointing:
        if config.get("norm_type") == "batch":
            raise ValueError(
                "`--gradient_checkpointing` runs each block twice, so the running statistics of `norm_type` 'batch'"
                " would be updated twice a step: leave it out, or use `norm_type` 'group'."
            )
        unet.enable_gradient_checkpointing()
    return unet.train()
