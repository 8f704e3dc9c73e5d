"""How close generated images are to a data set: features, distances, spectra, and the protocol that combines them."""

try:
    import torchmetrics  # noqa: F401 (said here once, for all that need it)
except ImportError as error:
    raise ImportError('ddpm_diffusers.evaluation needs torchmetrics: pip install "ddpm-diffusers[eval]"') from error

from .comparison import compare_schedulers
from .features import FASHION_MNIST, FeatureExtractor, extract_features, load_feature_extractor
from .protocol import Reference, evaluate_images, evaluate_pipeline

__all__ = [
    "FASHION_MNIST",
    "FeatureExtractor",
    "Reference",
    "compare_schedulers",
    "evaluate_images",
    "evaluate_pipeline",
    "extract_features",
    "load_feature_extractor",
]
