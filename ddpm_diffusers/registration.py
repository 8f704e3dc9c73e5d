"""Make the package's classes known to diffusers, so that `DiffusionPipeline.from_pretrained` uses the installed ones.

A saved pipeline names its classes by the files in its folder (`pipeline_pixel_diffusion.py`,
`unet/unet_2d_optimized.py`). Without this module, diffusers would load those copies, and rightly ask for
`trust_remote_code=True` first. With it, no code from a repository is run once the package is imported.
"""

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from . import unet_2d_optimized
from .pipeline_pixel_diffusion import PixelDiffusionPipeline, with_this_class

logger = logging.get_logger(__name__)


def register() -> None:
    """Register the U-Net's module, and the classes of U-Net and pipeline, on `diffusers` (idempotent)."""
    # diffusers looks these names of model_index.json up among its pipelines: our pipeline writes "unet_2d_optimized",
    # a stock one "ddpm_diffusers.unet_2d_optimized"
    diffusers.pipelines.unet_2d_optimized = unet_2d_optimized
    setattr(diffusers.pipelines, unet_2d_optimized.__name__, unet_2d_optimized)
    diffusers.PixelDiffusionPipeline = PixelDiffusionPipeline
    diffusers.OptimizedUNet2DModel = unet_2d_optimized.OptimizedUNet2DModel

    # A private hook: diffusers offers no public way from a `_class_name` of [module, class] to an installed class.
    read_index = getattr(DiffusionPipeline, "_dict_from_json_file", None)
    if read_index is None:
        logger.warning(
            f"diffusers {diffusers.__version__} reads model_index.json in a way that ddpm-diffusers does not know:"
            " load pipelines by `PixelDiffusionPipeline.from_pretrained`, not by `DiffusionPipeline.from_pretrained`."
        )
    elif getattr(read_index, "__module__", None) != __name__:  # not yet replaced by ours
        read_index = read_index.__func__

        def read_index_with_installed_class(cls, json_file):
            return with_this_class(read_index(cls, json_file))

        DiffusionPipeline._dict_from_json_file = classmethod(read_index_with_installed_class)
