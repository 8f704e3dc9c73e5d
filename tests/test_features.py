"""The frozen feature extractor: what is shipped, what else can be loaded, and the script that trains one."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_feature_extractor
from command_line import parse_arguments
from conftest import ROOT, reset_accelerate
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from files import lock
from hub_server import HubServer, Repo
from huggingface_hub import constants
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import features
from ddpm_diffusers.evaluation.features import FASHION_MNIST, extract_features, load_feature_extractor
from ddpm_diffusers.synthetic_fashion import CLASS_NAMES, draw_garments

SHIPPED = Path(features.__file__).parent / "fashion_mnist_classifier"
SIZES = [(16, 16), (28, 28), (9, 33), (64, 64)]


@pytest.fixture(scope="module")
def extractor():
    return load_feature_extractor()


def garments(count: int, resolution: int = 28, channels: int = 1) -> torch.Tensor:
    return torch.from_numpy(draw_garments(range(count), resolution=resolution, channels=channels)[0])


def tiny_resnet(folder: Path, **config) -> Path:
    torch.manual_seed(0)
    layers = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**layers, **config)).save_pretrained(folder)
    return folder


def classify(extractor, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Classes by the last layer of the saved classifier, which reads the features."""
    weights = load_file(folder / "model.safetensors")
    return (
        extract_features(extractor, images) @ weights["classifier.1.weight"].T + weights["classifier.1.bias"]
    ).argmax(1)


def test_what_is_shipped_is_small_and_is_what_its_card_says(extractor):
    weights, card = SHIPPED / "model.safetensors", (SHIPPED / "README.md").read_text()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.digest == digest[:12] and digest in card
    assert weights.stat().st_size <= 1_000_000
    assert (extractor.name, extractor.num_channels) == (FASHION_MNIST, 1) and 64 <= extractor.num_features <= 128
    assert "zalando-datasets/fashion_mnist" in card and "_name_or_path" not in (SHIPPED / "config.json").read_text()
    assert {path.name for path in SHIPPED.iterdir()} == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.parametrize("size", SIZES)
def test_features_are_those_of_transformers_alone_at_any_resolution(extractor, size):
    images = torch.randint(256, (12, 1, *size), dtype=torch.uint8)
    model = AutoModelForImageClassification.from_pretrained(SHIPPED).eval()
    side = model.config.image_size
    inputs = F.interpolate(images / 127.5 - 1, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        expected = model(inputs, output_hidden_states=True).hidden_states[-1].mean(dim=(2, 3))
    found = extract_features(extractor, images)
    assert found.dtype == torch.float32 and found.shape == (12, extractor.num_features)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_image_depend_on_neither_the_batch_nor_autocast_nor_train(extractor):
    images = garments(30)
    whole = extract_features(extractor, images)
    extractor.train()
    for batch_size in (1, 7):
        torch.testing.assert_close(extract_features(extractor, images, batch_size), whole, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extract_features(extractor, images.flip(0)).flip(0), whole, rtol=1e-4, atol=1e-5)
    assert not extractor(images).requires_grad and not any(p.requires_grad for p in extractor.parameters())


def test_a_model_of_transformers_gets_the_size_and_the_scale_of_its_configs(tmp_path):
    grey = garments(5)
    folder = tiny_resnet(tmp_path / "rgb")
    plain = load_feature_extractor(f"{folder}/")
    assert (plain.name, plain.num_channels, plain.num_features) == ("rgb", 3, 16)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    scaled = load_feature_extractor(str(folder))
    model = ResNetModel.from_pretrained(folder).eval()
    for extractor, m, s in ((plain, [0.5] * 3, [0.5] * 3), (scaled, mean, std)):
        inputs = F.interpolate(grey / 255, size=(224, 224), mode="bilinear", align_corners=False)
        inputs = (inputs - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
        with torch.no_grad():
            expected = model(inputs).pooler_output.flatten(1)
        torch.testing.assert_close(extract_features(extractor, grey), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(extractor(grey.repeat(1, 3, 1, 1)), extractor(grey))
    assert not torch.allclose(plain(grey), scaled(grey), atol=1e-2)


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(2, 1, 8, 8), TypeError, "torch.float32; they must be a torch.uint8 tensor"),
        (np.zeros((2, 1, 8, 8), np.uint8), TypeError, "ndarray; they must be a torch.uint8 tensor"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), ValueError, r"\(2, 8, 8\); it must be \(B, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), ValueError, r"\(0, 1, 8, 8\); it must be"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), ValueError, "C being 1 or 3"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "3 channels, and 'fashion-mnist-classifier' takes 1"),
    ],
)
def test_images_that_cannot_serve_are_refused(extractor, images, error, text):
    with pytest.raises(error, match=text):
        extract_features(extractor, images)


def test_names_and_models_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="no feature extractor 'fashion-mnits'.*'fashion-mnist-classifier', which comes"
    ):
        load_feature_extractor("fashion-mnits")
    with pytest.raises(ValueError, match="no feature extractor"):
        load_feature_extractor(str(tmp_path / "nowhere"))
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")  # its pooler would be made at random
    with pytest.raises(ValueError, match="lack pooler.dense.bias.*would be random"):
        load_feature_extractor(str(tmp_path / "vit"))
    pickled = tiny_resnet(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_feature_extractor(str(pickled))
    (pickled / "model.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_feature_extractor(str(pickled))


def test_a_hub_id_is_loaded_without_its_code_and_pickles_and_an_unknown_one_is_refused(tmp_path, monkeypatch):
    folder = tiny_resnet(tmp_path / "local", num_channels=1, image_size=32)
    names = ("config.json", "model.safetensors")
    with HubServer() as hub:
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.repos["user/small"] = Repo("user/small")
        files = {name: (folder / name).read_bytes() for name in names}
        hub.repos["user/small"].commit("model", {**files, "pytorch_model.bin": b"pickle", "modeling.py": b"code"})
        loaded = load_feature_extractor("user/small")
        with pytest.raises(ValueError, match="no feature extractor 'user/other': give 'fashion-mnist-classifier'"):
            load_feature_extractor("user/other")
        assert {path.rsplit("/", 1)[1] for _, path, _ in hub.requests if "/resolve/" in path} == set(names)
        assert (loaded.name, loaded.digest) == ("small", load_feature_extractor(str(folder)).digest)
        hub.fault = lambda method, path: 503
        assert load_feature_extractor("user/small").digest == loaded.digest  # from the cache
        with pytest.raises(ConnectionError, match="'user/third' is no local folder, and the Hub cannot be asked"):
            load_feature_extractor("user/third")


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_given_as_inception_is_refused_and_not_run(tmp_path, monkeypatch):
    constants = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")  # all that is asked of it before
    constants.URL_INCEPTION_V3 = "https://github.com/weights-inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, constants.__name__, constants)
    file, made = tmp_path / "weights.pth", tmp_path / "made"
    torch.save({"weight": Touching(made)}, file)
    with pytest.raises(ValueError, match="cannot be read as .* Inception weights .*: give the file that is at https"):
        load_feature_extractor(f"inception:{file}")
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_to_install(tmp_path):
    for name in ("inception", f"inception:{tmp_path / 'weights.pth'}"):
        with pytest.raises(ImportError, match="needs torch-fidelity: pip install torch-fidelity"):
            load_feature_extractor(name)


@pytest.mark.parametrize("resolution", [28, 16])
def test_the_shipped_one_tells_the_classes_of_real_test_images_apart(extractor, fashion_mnist, resolution):
    dataset = load_images(fashion_mnist, resolution=resolution, split="test", max_samples=2000)
    images = ImageArrays(dataset, (1, resolution, resolution)).__getitems__(range(2000))
    right = classify(extractor, SHIPPED, images) == torch.tensor(dataset["label"])
    assert right.float().mean() > 0.9


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory) -> Path:
    columns = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "text": Value("string")})
    splits = {}
    for split, numbers in (("train", range(400)), ("test", range(400, 600))):
        images, labels = draw_garments(numbers, resolution=16)
        pictures = [PILImage.fromarray(image[0]) for image in images]
        rows = {"image": pictures, "label": labels, "text": [""] * len(labels)}
        splits[split] = Dataset.from_dict(rows, features=columns)
    folder = tmp_path_factory.mktemp("data") / "garments"
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture
def script():
    """The script, to run here."""
    reset_accelerate()
    return train_feature_extractor


@pytest.mark.slow
def test_the_script_trains_one_that_loads_and_classifies_and_again_to_the_bit(drawn_data, tmp_path, script):
    flags = ["--dataset_name", str(drawn_data), "--resolution", "16", "--image_size", "32", "--train_batch_size", "32"]
    flags += ["--num_epochs", "4"]
    command = [sys.executable, str(ROOT / "train_scripts" / "train_feature_extractor.py"), *flags]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "a")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    extractor = load_feature_extractor(str(tmp_path / "a"))
    assert f"digest {extractor.digest}" in result.stdout
    images, labels = draw_garments(range(400, 600), resolution=16)
    right = (classify(extractor, tmp_path / "a", torch.from_numpy(images)).numpy() == labels).mean()
    assert right > 0.5 and f"Test accuracy at 16x16: {right:.4f}" in result.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "a", "config.json", "model.safetensors"]
    for file in ("README.md", "config.json"):
        text = (tmp_path / "a" / file).read_text()
        assert str(drawn_data) not in text and str(tmp_path) not in text
    for seed, same in (("0", True), ("1", False)):
        parsed = parse_arguments(
            script.FeatureExtractorArguments, [*flags, "--seed", seed, "--output_dir", str(tmp_path / seed)], "?"
        )
        script.main(parsed)
        assert (load_feature_extractor(str(tmp_path / seed)).digest == extractor.digest) is same


def test_two_trainings_cannot_write_into_one_folder(drawn_data, tmp_path, script):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "model.safetensors").write_bytes(b"of the first")
    first = lock(tmp_path / ".new.partial")
    arguments = script.FeatureExtractorArguments(dataset_name=str(drawn_data), output_dir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match="Another process writes into"):
        script.main(arguments)
    first.release()
    assert (tmp_path / ".new.partial" / "model.safetensors").exists() and not (tmp_path / "new").exists()


def test_the_script_refuses_what_it_cannot_use_before_it_writes(drawn_data, tmp_path, script):
    def refused(text: str, **arguments) -> None:
        arguments = {"dataset_name": str(drawn_data), "output_dir": str(tmp_path / "out" / "new"), **arguments}
        with pytest.raises(ValueError, match=text):
            script.main(script.FeatureExtractorArguments(**arguments))
        assert not (tmp_path / "out").exists()

    both = DatasetDict.load_from_disk(drawn_data)
    variants = {
        "no-test": DatasetDict(train=both["train"]),
        "no-label": both.remove_columns("label"),
        "text-label": both.remove_columns("label").rename_column("text", "label"),
        "other-classes": DatasetDict(
            train=both["train"], test=both["test"].cast_column("label", ClassLabel(names=CLASS_NAMES[::-1]))
        ),
        "unlabelled": DatasetDict(
            train=both["train"], test=both["test"].remove_columns("label").add_column("label", [None] * 200)
            .cast_column("label", both["train"].features["label"]),
        ),
    }  # fmt: skip
    for name, data in variants.items():
        data.save_to_disk(tmp_path / name)
    for split, data in both.items():
        data.sort("label").to_parquet(tmp_path / "sorted" / f"{split}.parquet")
    refused("no split 'test', but train", dataset_name=str(tmp_path / "no-test"))
    refused("no split 'seen', but ", train_split="seen")
    refused("no split 'unseen', but ", test_split="unseen")
    refused("no column `label` of classes", dataset_name=str(tmp_path / "no-label"))
    refused("no column `label` of classes", dataset_name=str(tmp_path / "text-label"))
    refused("have different classes", dataset_name=str(tmp_path / "other-classes"))
    refused("Image 0 of split 'test' has no label", dataset_name=str(tmp_path / "unlabelled"))
    first_class = {"dataset_name": str(tmp_path / "sorted"), "train_split": "train[:10%]"}
    refused("The split train.:10%. has no image of .*, and test has: add some", **first_class)
    refused("is not an empty folder", output_dir=str(drawn_data))
    refused("`--lowest_resolution` is 12; it must not exceed 8", resolution=8)
    refused("`--learning_rate` is nan", learning_rate=float("nan"))
