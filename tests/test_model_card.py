"""Model cards: what they say, that their snippets run, and how they go along, also where the package is not."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from arguments import TrainingArguments
from conftest import TINY
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from hub_server import HubServer, Repo, files_of
from interpreter import Interpreter

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.hub import add_figures, model_card
from ddpm_diffusers.pipeline_pixel_diffusion import pipeline_card

FIGURE = {
    "dataset_type": "zalando-datasets/fashion_mnist", "dataset_name": "Fashion-MNIST", "dataset_split": "test",
    "metric_type": "frechet_distance", "metric_name": "Frechet distance", "metric_value": 2.5,
    "metric_args": {"samples": 10_000},
}  # fmt: skip
HIDE = "import sys; sys.modules['ddpm_diffusers'] = None"  # `import ddpm_diffusers` now raises ImportError


def front_matter(card: str) -> tuple[dict, str]:
    """The metadata and the body of a card."""
    _, metadata, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(metadata), body


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def absent(hub, tmp_path_factory):
    """Without the package and without a token."""
    with Interpreter(hub.env(tmp_path_factory.mktemp("absent")), first=HIDE) as python:
        yield python


@pytest.fixture
def saved(tiny_pipe, tmp_path) -> Path:
    """A pipeline with a card, in which there are figures, and its grid."""
    folder = tmp_path / "saved"
    tiny_pipe.save_pretrained(folder)
    card = add_figures(str(model_card(tiny_pipe, "user/source", has_samples=True)), [FIGURE])
    (folder / "README.md").write_text(card)
    (folder / "samples.png").write_bytes(b"\x89PNG\0")
    return folder


def publish(hub: HubServer, repo_id: str, folder: Path) -> Repo:
    repo = hub.repos[repo_id] = Repo(repo_id)
    repo.commit("upload", files_of(folder))
    return repo


def test_a_card_is_made_from_the_pipeline(tiny_pipe):
    metadata, body = front_matter(str(pipeline_card(tiny_pipe, "user/plain")))
    assert metadata == {
        "library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddpm", "diffusion", "pixel-space", "unconditional-image-generation"],
    }  # fmt: skip
    parameters = tiny_pipe.unet.num_parameters()
    for fact in ("OptimizedUNet2DModel", f"{parameters:,} parameters", "8x8 pixels", "grey", "1,000"):
        assert fact in body
    assert "samples.png" not in body


def test_the_second_snippet_of_a_card_runs_as_it_stands(hub, absent, tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    card = pipeline_card(tiny_pipe, "user/plain")
    card.save(tmp_path / "README.md")
    publish(hub, "user/plain", tmp_path)
    snippet = snippets(str(card))[1]
    facts = "print(len(images), *images[0].size, type(pipe).__module__.split('.')[0], type(pipe.scheduler).__name__)"
    assert absent(snippet + facts) == "16 8 8 diffusers_modules DDPMScheduler\n"
    assert "not found in your environment" not in absent.stderr  # diffusers' warning of what a file imports


CHAIN = """
from diffusers import DiffusionPipeline

def load(source):
    return DiffusionPipeline.from_pretrained(source, trust_remote_code=True)

pipe = load("user/source")
pipe.push_to_hub("user/direct", token=token)
pipe.save_pretrained(folder)
load(folder).push_to_hub("user/relayed", token=token)
load(plain).push_to_hub("user/absent", token=token)
"""


def test_a_card_goes_along_from_repository_to_folder_to_repository(hub, absent, saved, tiny_pipe, tmp_path):
    source = publish(hub, "user/source", saved).files
    tiny_pipe.save_pretrained(tmp_path / "plain")
    absent(CHAIN, folder=tmp_path / "folder", plain=tmp_path / "plain", token=hub.token)
    card = source["README.md"].decode()
    assert '"user/source"' in card and "Measured figures" in card
    for name in ("user/direct", "user/relayed"):
        assert hub.repos[name].files == {**source, "README.md": card.replace("user/source", name).encode()}
        assert len(hub.repos[name].commits) == 2
    made = str(pipeline_card(tiny_pipe, "user/absent")).encode()  # with the package
    assert hub.repos["user/absent"].files["README.md"] == made


PRIVATE = """
import os
from diffusers import DiffusionPipeline
os.environ["HF_TOKEN"] = token  # the only one by which diffusers asks for a pipeline's code
pipe = DiffusionPipeline.from_pretrained("user/private", trust_remote_code=True)
del os.environ["HF_TOKEN"]
pipe.save_pretrained(folder, token=token)
pipe.push_to_hub("user/private", token=token)
"""


def test_the_card_of_a_private_repository_is_found_by_the_token_given(hub, absent, saved, tmp_path):
    repo = publish(hub, "user/private", saved)
    repo.private = True
    card = repo.files["README.md"] + b"My own words.\n"
    repo.commit("edit", {"README.md": card})
    absent(PRIVATE, folder=tmp_path / "copy", token=hub.token)
    assert (tmp_path / "copy" / "README.md").read_bytes() == repo.files["README.md"] == card


VARIANT = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.unet.half()
pipe.push_to_hub("user/half", variant="fp16", token=token)
"""


def test_the_snippets_load_a_repository_of_a_variant_alone(hub, absent, saved, tiny_unet):
    absent(VARIANT, source=saved, token=hub.token)
    files = hub.repos["user/half"].files
    assert [name for name in files if name.endswith(".safetensors")] == [
        "unet/diffusion_pytorch_model.fp16.safetensors"
    ]
    [first, second] = snippets(files["README.md"].decode())
    assert all('from_pretrained("user/half", variant="fp16"' in snippet for snippet in (first, second))
    loading = second.partition("images =")[0]
    assert absent(loading + "print(pipe.unet.num_parameters())") == f"{tiny_unet.num_parameters()}\n"


OLDER = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("user/older", revision=revision, trust_remote_code=True)
pipe.save_pretrained(folder)
"""


def test_the_card_of_an_older_revision_is_its_own(hub, absent, saved, tmp_path):
    repo = publish(hub, "user/older", saved)
    older = repo.commits[-1]
    repo.commit("newer weights", {"README.md": b"---\n---\nOf newer weights.\n"})
    absent(OLDER, revision=older.sha, folder=tmp_path / "older")
    assert (tmp_path / "older" / "README.md").read_bytes() == older.files["README.md"]


def test_a_card_does_not_go_along_with_another_network(saved, tmp_path, monkeypatch):
    pipe = DiffusionPipeline.from_pretrained(saved)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_bytes() == (saved / "README.md").read_bytes()
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.001)  # trained further
    pipe.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "README.md").exists()
    half = DiffusionPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "README.md").read_bytes() == (saved / "README.md").read_bytes()
    pipe.unet = other = OptimizedUNet2DModel(**TINY)
    monkeypatch.chdir(saved)
    loaded = [DiffusionPipeline.from_pretrained(source, unet=other) for source in (saved, ".")]
    for number, another in enumerate((pipe, *loaded)):
        another.save_pretrained(tmp_path / f"other-{number}")
        assert not {"README.md", "samples.png"} & {path.name for path in (tmp_path / f"other-{number}").iterdir()}


def test_the_card_of_a_training_says_what_is_known_and_names_no_path(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garments").mkdir()
    settings = {
        "learning_rate": 2e-3, "use_ema": True, "lr_scheduler": "cosine", "betas": [0.9, 0.999], "snr_gamma": None,
        "output_dir": "somewhere", "cache": str(tmp_path), "hub_token": "secret", "x": "hf_secret",
    }  # fmt: skip
    for name, published in (
        ("zalando-datasets/fashion_mnist", ["zalando-datasets/fashion_mnist"]), ("mnist", ["mnist"]),
        ("garments", None), (str(tmp_path), None), ("./garments", None), ("synthetic-fashion", None), (None, None),
    ):  # fmt: skip
        card = str(model_card(tiny_pipe, "user/name", dataset_name=name, settings=settings, license="mit"))
        metadata, body = front_matter(card)
        assert metadata["license"] == "mit" and "license" not in front_matter(str(model_card(tiny_pipe, "a/b")))[0]
        assert metadata.get("datasets") == published and "model-index" not in metadata
        assert ("not on the Hub" in body) == (published is None and name != "synthetic-fashion")
        assert not re.search(f"{tmp_path}|secret|somewhere|snr_gamma|None|`?garments`? *\\|", card)
        assert "| learning_rate | 0.002 |" in body and "| use_ema | True |" in body and "[0.9, 0.999]" in body
        assert body.index("## Training") < body.index("## Limits")
    copy = model_card(tiny_pipe, "user/name", dataset_name="garments", dataset_id="user/garments")
    (tmp_path / "user" / "garments").mkdir(parents=True)  # whether or not there is a folder of that name
    assert copy.data.datasets == ["user/garments"]
    again = model_card(tiny_pipe, "user/name", dataset_name="./user/garments", dataset_id="user/garments")
    assert str(again) == str(copy)
    assert TrainingArguments(dataset_name="./user/garments", dataset_id="user/garments", logger="none")


@pytest.mark.parametrize("unet, scheduler, shown, not_shown", [
    ({}, {}, "DPMSolverMultistepScheduler", "output_type"),
    ({"in_channels": 5, "out_channels": 5}, {}, 'num_inference_steps=15, output_type="np")', "=50).images"),
    ({}, {"beta_schedule": "sigmoid"}, "num_inference_steps=50).images", "DPMSolverMultistepScheduler"),
    ({}, {"rescale_betas_zero_snr": True}, "DPMSolverMultistepScheduler", "output_type"),
    ({}, {"beta_schedule": "squaredcos_cap_v2"}, "num_inference_steps=50).images", "DPMSolverMultistepScheduler"),
    ({"sample_size": None}, {}, "of any size", "from_pretrained"),
])  # fmt: skip
def test_the_snippets_of_a_card_suit_the_pipeline(unet, scheduler, shown, not_shown):
    pipe = PixelDiffusionPipeline(OptimizedUNet2DModel(**{**TINY, **unet}), DDPMScheduler(**scheduler))
    card = str(model_card(pipe, "user/name"))
    assert shown in card and not_shown not in card


def test_no_card_shows_noise_levels_of_another_kind_than_the_networks():
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    card = str(model_card(PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY), flow), "user/name"))
    assert "num_inference_steps=50" in card and "use_karras_sigmas" not in card


def test_the_card_names_the_model_of_the_hub_that_a_training_started_from(tiny_pipe, tmp_path):
    metadata, body = front_matter(str(model_card(tiny_pipe, "user/name", base_model="google/ddpm-cifar10-32")))
    assert metadata["base_model"] == "google/ddpm-cifar10-32"
    assert "(https://huggingface.co/google/ddpm-cifar10-32)" in body
    metadata, body = front_matter(str(model_card(tiny_pipe, "user/name", base_model=str(tmp_path))))
    assert "base_model" not in metadata and "a model that is not on the Hub" in body and str(tmp_path) not in body


def test_figures_replace_earlier_ones_in_the_metadata_and_the_body(tiny_pipe):
    plain = str(model_card(tiny_pipe, "user/name", dataset_name="mnist"))
    better = {**FIGURE, "metric_value": 2.25}
    card = add_figures(add_figures(plain, [FIGURE]), [better, {**FIGURE, "metric_type": "kid", "metric_value": 0.5}])
    metadata, body = front_matter(card)
    [model] = metadata["model-index"]
    [result] = model["results"]
    assert result["task"]["type"] == "unconditional-image-generation"
    assert result["dataset"] == {"type": FIGURE["dataset_type"], "name": "Fashion-MNIST", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("frechet_distance", 2.25), ("kid", 0.5),
    ]  # fmt: skip
    rows = "| metric | value |\n| --- | --- |\n| Frechet distance | 2.25 |\n| Frechet distance | 0.5 |\n"
    assert f"On Fashion-MNIST test, measured with samples 10000:\n\n{rows}" in body and "2.5 |" not in body
    other = add_figures(card, [better, {**FIGURE, "metric_args": {"samples": 97}}])
    assert other.count("| metric | value |") == 2 and "measured with samples 97:\n\n" in other
    assert body.count("## Measured figures") == 1
    assert add_figures(card, [better]) == add_figures(plain, [better]) and add_figures(card, []) == plain


@pytest.mark.parametrize(
    "wrong",
    [{"metric_value": float("nan")}, {"metric_value": float("inf")}, {"dataset_type": "/data/mnist"}, {"metrik": 1}],
)
def test_a_figure_that_is_none_is_refused(tiny_pipe, wrong):
    with pytest.raises(ValueError, match="figure|dataset_type"):
        add_figures(str(model_card(tiny_pipe, "user/name")), [{**FIGURE, **wrong}])
