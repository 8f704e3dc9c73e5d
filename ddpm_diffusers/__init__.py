"""Small-image diffusion for Hugging Face diffusers: an optimized U-Net, a pipeline for any scheduler, and their training."""

from .pipeline_pixel_diffusion import PixelDiffusionPipeline
from .registration import register
from .schedulers import SCHEDULERS, make_scheduler
from .unet_2d_optimized import OptimizedUNet2DModel

__version__ = "0.1.0"
__all__ = ["OptimizedUNet2DModel", "PixelDiffusionPipeline", "SCHEDULERS", "make_scheduler"]

register()
