"""The released models: small, whole, in step with the code, and what they draw are garments of every kind."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from evaluate import CARD_FIGURES
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from ddpm_diffusers import make_scheduler
from ddpm_diffusers.evaluation.features import SHIPPED, to_input
from ddpm_diffusers.sampling import sample_images

SCALES = {"16": 1.15, "28": 1.4}  # of guidance, recommended
FOLDERS = sorted(path for path in (ROOT / "pretrained").iterdir() if path.is_dir())
pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_it_is_small_and_loads_in_single_and_half_precision(folder):
    assert all(path.stat().st_size < 8e6 for path in folder.rglob("*"))
    for pattern in ("*.fp16.safetensors", "*_model.safetensors"):  # each form, of both networks
        assert 0 < sum(path.stat().st_size for path in folder.rglob(pattern)) < 8e6
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    half = DiffusionPipeline.from_pretrained(str(folder), variant="fp16", dtype=torch.float16)
    for name in ("unet", "guiding_unet"):
        one, other = getattr(pipe, name), getattr(half, name)
        assert (one.dtype, other.dtype) == (torch.float32, torch.float16)
        for weights, rounded in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(weights, rounded.float())


def test_it_carries_the_code_of_the_package(folder):
    for path in ("pipeline_pixel_diffusion.py", "unet/unet_2d_optimized.py", "guiding_unet/unet_2d_optimized.py"):
        code = (ROOT / "ddpm_diffusers" / Path(path).name).read_text()
        assert (folder / path).read_text() == code, f"copy {path} into {folder.name} again: save_pretrained does"


def test_its_card_says_what_it_was_trained_on_and_how_it_was_judged(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["zalando-datasets/fashion_mnist"] and card.data.license == "mit"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    size = folder.name.rpartition("-")[2]
    record = json.loads((ROOT / "train_scripts" / "results" / f"released_{size}" / "evaluation.json").read_text())
    for metric, (_, group, name) in CARD_FIGURES.items():
        assert found[metric] == float(f"{record['figures'][group][name]['mean']:.4g}")
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    assert record["weights"] == hashlib.sha256(safetensors.torch.save(pipe.unet.state_dict())).hexdigest()[:12]
    guiding_weights = hashlib.sha256(safetensors.torch.save(pipe.guiding_unet.state_dict())).hexdigest()[:12]
    told = {f"scale-{SCALES[size]}-{size}": "{:.4g}, {:.4g} times that of real test images"}
    if size == "28":
        told["30-steps-28"] = "in 30 steps {:.4g}, {:.4g} times"
    for name, text in told.items():
        guided = json.loads((ROOT / "train_scripts" / "results" / "guidance" / name / "evaluation.json").read_text())
        assert (guided["weights"], guided["guiding_weights"]) == (record["weights"], guiding_weights)
        figures = [guided["figures"][group]["frechet_distance"]["mean"] for group in ("train", "to_floor")]
        assert text.format(*figures) in " ".join(card.text.split())
    assert f'from_pretrained("./pretrained/{folder.name}")' in card.text
    assert min(Image.open(folder / "samples.png").size) > 100


@pytest.mark.parametrize("guided", [False, True])
def test_it_draws_garments_of_every_kind(folder, guided):
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    guidance_scale = SCALES[folder.name.rpartition("-")[2]] if guided else 1
    images = sample_images(pipe, 64, 6, batch_size=32, guidance_scale=guidance_scale)
    classifier = AutoModelForImageClassification.from_pretrained(SHIPPED).eval()
    noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sure, kinds = classifier(to_input(images, classifier.config.image_size)).logits.softmax(1).max(1)
        kinds_of_noise = classifier(to_input(noise, classifier.config.image_size)).logits.argmax(1)
    assert sure.mean() > 0.85 and kinds.unique().numel() == 10
    assert kinds_of_noise.unique().numel() < 5  # the classifier does not see every kind in anything
