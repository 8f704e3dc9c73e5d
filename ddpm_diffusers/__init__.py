"""Small-image diffusion as a plugin for Hugging Face diffusers: a U-Net, a pipeline, schedulers and training."""

from .pipeline_pixel_diffusion import PixelDiffusionPipeline
from .registration import register
from .schedulers import SCHEDULERS, make_scheduler
from .unet_2d_optimized import OptimizedUNet2DModel

__version__ = "0.1.0"
__all__ = ["OptimizedUNet2DModel", "PixelDiffusionPipeline", "SCHEDULERS", "make_scheduler"]

register()
