"""Features of images from a frozen network, in which generated images are compared with real ones.

The network that comes with the package is a Fashion-MNIST classifier, trained by
`train_scripts/train_feature_extractor.py`. Figures from different extractors cannot be compared: name the extractor
and its digest with each.
"""

import io
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import AutoModel
from transformers.utils import logging

from ..checkpointing import checksum
from ..pipeline_pixel_diffusion import check_positive

FASHION_MNIST = "fashion-mnist-classifier"
SHIPPED = Path(__file__).parent / "fashion_mnist_classifier"
INCEPTION = "inception"
CHOICES = (
    f"{FASHION_MNIST!r}, which comes with the package; a local folder or a Hub id 'owner/name' of an image model of"
    f" transformers with config.json and model.safetensors; or {INCEPTION!r} or 'inception:PATH', PATH being"
    " torch-fidelity's weights"
)


class FeatureExtractor(torch.nn.Module):
    """A frozen network, always in evaluation mode, as returned by `load_feature_extractor`.

    Attributes:
        name: Name of the extractor, or of its folder or repository, without the path or owner before it.
        digest: The first 12 hexadecimal digits of the SHA-256 of its weights file.
        num_channels: Channels of the images that the network was made for: 1 (grey) or 3 (RGB).
        num_features: Features per image.
    """

    def __init__(self, network: torch.nn.Module, name: str, weights_file: Path, num_channels: int):
        super().__init__()
        self.network, self.name, self.num_channels = network, name, num_channels
        self.digest = checksum(weights_file)[:12]
        self.requires_grad_(False).eval()
        self.num_features = self(torch.zeros(1, num_channels, 32, 32, dtype=torch.uint8)).shape[1]

    def train(self, mode: bool = True) -> "FeatureExtractor":
        return super().train(False)

    def check_channels(self, channels: int) -> None:
        """Raise a ValueError if images of so many channels cannot be used."""
        if channels > self.num_channels:
            raise ValueError(
                f"The images have {channels} channels, and {self.name!r} takes {self.num_channels}: make the images"
                " grey (PIL's convert('L')), or choose an extractor of 3 channels."
            )

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 (B, C, H, W), of any H and W, to float32 (B, num_features); an RGB network also takes grey images.

        Raises:
            TypeError: If the images are not a uint8 tensor.
            ValueError: If they are not (B, C, H, W), or are RGB and the network is for grey images.
        """
        self.check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.expand(-1, self.num_channels, -1, -1)).float()

    def check_images(self, images: torch.Tensor) -> None:
        """Raise what `forward` does for images that it cannot take."""
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"The images are {kind}; they must be a torch.uint8 tensor of values from 0 to 255.")
        if images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
            raise ValueError(
                f"The images are of shape {tuple(images.shape)}; it must be (B, C, H, W), C being 1 or 3."
            )
        self.check_channels(images.shape[1])


class PooledFeatures(torch.nn.Module):
    """The `pooler_output` of a transformers model, for uint8 images."""

    def __init__(self, model: torch.nn.Module, image_size, mean, std):
        super().__init__()
        self.model, self.image_size, self.mean, self.std = model, image_size, mean, std

    def extra_repr(self) -> str:  # in the key of cached features, so that it covers the preprocessing
        return f"image_size={self.image_size}, mean={self.mean}, std={self.std}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=to_input(images, self.image_size, self.mean, self.std)).pooler_output.flatten(1)


def to_input(images: torch.Tensor, image_size, mean=0.5, std=0.5) -> torch.Tensor:
    """Resize uint8 (B, C, H, W) to float32 of `image_size`, one number or two (bilinear, antialiased).

    With the default mean and std (numbers, or one per channel), values are in [-1, 1].
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    mean, std = (torch.tensor(value, device=images.device).reshape(-1, 1, 1) for value in (mean, std))
    images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return (images / 255 - mean) / std


def load_feature_extractor(name_or_path: str | Path = FASHION_MNIST) -> FeatureExtractor:
    """Load a feature extractor, on the CPU.

    Args:
        name_or_path: `"fashion-mnist-classifier"`; a local folder or a Hub id of a transformers image model, whose
            `pooler_output` gives the features; or `"inception"`, torchmetrics' Inception v3 with torch-fidelity's
            weights, which are downloaded once, or `"inception:PATH"` if they are in a file.

    Of a transformers model, only configs and model.safetensors are read, never code. Images are resized to its
    `config.image_size`, or to 224x224 if it has none, and scaled to [-1, 1], or by the mean and standard deviation in
    its preprocessor_config.json if there is one.

    Raises:
        ValueError: If the name is unknown or the model cannot be used; the message says what can be given.
        ImportError: For Inception, if torch-fidelity is not installed.
        ConnectionError: If a necessary download fails.
    """
    name_or_path = str(name_or_path)
    if name_or_path.partition(":")[0] == INCEPTION:
        return load_inception(name_or_path.partition(":")[2])
    folder = SHIPPED if name_or_path == FASHION_MNIST else find_folder(name_or_path)
    weights_file = folder / "model.safetensors"
    for file in (folder / "config.json", weights_file):
        if not file.is_file():
            raise ValueError(f"{name_or_path!r} has no {file.name}: give {CHOICES}.")
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        preprocessor = folder / "preprocessor_config.json"
        settings = json.loads(preprocessor.read_text("utf-8")) if preprocessor.is_file() else {}
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name_or_path!r} cannot be loaded ({error}): give {CHOICES}.") from error
    if info["missing_keys"]:
        raise ValueError(
            f"The weights of {name_or_path!r} lack {', '.join(sorted(info['missing_keys']))}, so that its features"
            " would be random: give a model whose pooled output was trained, such as a ResNet."
        )
    size = getattr(model.config, "image_size", None) or 224
    network = PooledFeatures(
        model.to(memory_format=torch.channels_last),  # twice as fast on a CPU
        size,
        settings.get("image_mean", 0.5),
        settings.get("image_std", 0.5),
    )
    name = FASHION_MNIST if folder == SHIPPED else Path(name_or_path).resolve().name
    try:
        return FeatureExtractor(network, name, weights_file, getattr(model.config, "num_channels", 3))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name_or_path!r}, a {type(model).__name__}, gives no `pooler_output` for images ({error}):"
            f" give {CHOICES}."
        ) from error


@contextmanager
def quiet():
    """Suppress the report of transformers that the classifier's last layer is not used."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()


def find_folder(name_or_path: str) -> Path:
    """A local folder, or the cache folder of a Hub id, whose files are downloaded if they are not there."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    unknown = f"There is no feature extractor {name_or_path!r}: give {CHOICES}."
    if name_or_path.count("/") != 1:
        raise ValueError(unknown)
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=files))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(unknown) from error
    except (httpx.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{name_or_path!r} is no local folder, and the Hub cannot be asked ({error}): give {CHOICES}."
        ) from error


def load_inception(path: str) -> FeatureExtractor:
    """Inception v3 as Frechet distances mostly use it: 2048 features, with its own resizing to 299x299."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise ImportError(f"{INCEPTION!r} needs torch-fidelity: pip install torch-fidelity.") from error
    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2]))
    if not path and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, file, hash_prefix=file.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:  # unreachable, or not matching the hash in its name
            raise ConnectionError(
                f"{URL_INCEPTION_V3} cannot be downloaded ({error}): get it where you can, and give 'inception:PATH'."
            ) from error
    # torch-fidelity unpickles whatever it is given, so it gets a copy that holds only tensors
    plain = io.BytesIO()
    try:
        torch.save(torch.load(file, weights_only=True), plain)
        plain.seek(0)
        network = NoTrainInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=plain)
    except Exception as error:  # torch raises many types, and advises unpickling
        raise ValueError(
            f"{file} cannot be read as torch-fidelity's Inception weights ({type(error).__name__}): give the file that"
            f" is at {URL_INCEPTION_V3}."
        ) from error
    return FeatureExtractor(network, INCEPTION, file, num_channels=3)


def extract_features(extractor: FeatureExtractor, images: torch.Tensor, batch_size: int = 100) -> torch.Tensor:
    """The features of many images, in float32 even under autocast.

    Args:
        extractor: As returned by `load_feature_extractor`; the features are computed on its device.
        images: uint8 (N, C, H, W), N at least 1, of any H and W.
        batch_size: Images at a time; the features depend on it only by rounding.

    Returns:
        float32 (N, num_features), on the CPU.

    Raises:
        TypeError, ValueError: If the extractor refuses the images, or the batch size is no positive integer.
    """
    check_positive(batch_size=batch_size)
    extractor.check_images(images)
    device = next(extractor.parameters()).device
    return torch.cat([extractor(batch.to(device)).cpu() for batch in images.split(batch_size)])
