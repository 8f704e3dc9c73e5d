"""Guidance by a weaker network: what it computes, and what it needs."""

import json
import shutil
from types import SimpleNamespace

import evaluate as evaluate_script
import generate as generate_script
import numpy as np
import pytest
import torch
from conftest import TINY, randomize, reset_accelerate
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, EDMEulerScheduler
from evaluation_arguments import digest_of
from hub_server import HubServer
from huggingface_hub import ModelCard
from interpreter import Interpreter
from PIL import Image
from test_schedulers import ExactDenoiser, mean_and_spread, sample
from unets import load_unet

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.evaluation import Reference, evaluate_images, load_feature_extractor
from ddpm_diffusers.hub import model_card, pipeline_files
from ddpm_diffusers.pipeline_pixel_diffusion import only_variant, pipeline_card
from ddpm_diffusers.sampling import sample_images


@pytest.fixture
def guided(tiny_pipe) -> PixelDiffusionPipeline:
    tiny_pipe.guiding_unet = randomize(OptimizedUNet2DModel(**{**TINY, "block_out_channels": (4, 8)}), seed=1)
    return tiny_pipe


def call(pipe, guidance_scale: float = 1.0, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(2, steps, generator, guidance_scale=guidance_scale, output_type="latent").images


@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "heun", "euler_ancestral"])
def test_guidance_is_sampling_with_the_extrapolated_network(guided, name):
    guided.scheduler = make_scheduler(name, guided.scheduler)
    images = call(guided, 1.5)
    strong, weak = guided.unet.forward, guided.guiding_unet
    guided.unet.forward = lambda x, t: SimpleNamespace(sample=1.5 * strong(x, t).sample - 0.5 * weak(x, t).sample)
    torch.testing.assert_close(images, call(guided), atol=1e-4, rtol=1e-5)


def test_an_error_that_the_weaker_network_makes_twice_as_large_is_gone_at_a_scale_of_two():
    def with_error(size: float) -> ExactDenoiser:
        network = ExactDenoiser(beta_schedule="linear")
        exact = network.forward
        network.forward = lambda x, t: SimpleNamespace(sample=exact(x, t).sample + size)
        return network

    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = PixelDiffusionPipeline(with_error(0.05), scheduler, with_error(0.1))
    pipe.set_progress_bar_config(disable=True)
    exact = PixelDiffusionPipeline(ExactDenoiser(), scheduler)
    exact.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(300, 20, generator, guidance_scale=2, output_type="latent").images
    assert mean_and_spread(images) == pytest.approx(mean_and_spread(sample(exact, 20)), abs=1e-4)
    assert abs(mean_and_spread(sample(pipe, 20))[0] - mean_and_spread(images)[0]) > 0.05


def test_without_it_the_weaker_network_is_not_evaluated(guided):
    evaluated = []
    guided.guiding_unet.register_forward_hook(lambda *args: evaluated.append(1))
    plain = call(PixelDiffusionPipeline(guided.unet, guided.scheduler))
    assert torch.equal(call(guided), plain) and not evaluated
    assert not torch.equal(call(guided, 1.25), plain) and len(evaluated) == 4


def test_the_weaker_network_is_saved_only_if_there_is_one(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    assert "guiding_unet/unet_2d_optimized.py" in pipeline_files(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded, 1.25), call(guided, 1.25))
    assert "`guiding_unet`" in str(pipeline_card(loaded, "user/guided"))
    assert DDPMPipeline.from_pretrained(tmp_path).unet.num_parameters() == guided.unet.num_parameters()
    assert PixelDiffusionPipeline.from_pipe(loaded).guiding_unet is loaded.guiding_unet

    loaded.guiding_unet = None
    loaded.save_pretrained(tmp_path)
    assert "guiding_unet" not in json.loads((tmp_path / "model_index.json").read_text())
    assert not any(file.startswith("guiding_unet") for file in pipeline_files(tmp_path))
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert plain.guiding_unet is None and "`guiding_unet`" not in str(pipeline_card(plain, "user/plain"))
    again = DiffusionPipeline.from_pretrained(tmp_path, guiding_unet=guided.guiding_unet)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(again, 1.25), call(guided, 1.25))
    guided.save_pretrained(tmp_path)
    assert PixelDiffusionPipeline.from_pretrained(tmp_path, guiding_unet=None).guiding_unet is None
    assert DDPMPipeline(**plain.components).unet is plain.unet


PUSH = """
from ddpm_diffusers import PixelDiffusionPipeline
pipe = PixelDiffusionPipeline.from_pretrained(folder)
pipe.push_to_hub("user/guided")
pipe.guiding_unet = None
pipe.save_pretrained(folder, push_to_hub=True, repo_id="user/plain")
"""


def test_a_push_takes_it_along_only_if_there_is_one(guided, tmp_path):
    guided.save_pretrained(tmp_path / "guided")
    with HubServer() as hub, Interpreter(hub.env(tmp_path / "client", token=True)) as python:
        python(PUSH, folder=tmp_path / "guided")
    pushed = {name: [file for file in repo.files if file.startswith("guiding")] for name, repo in hub.repos.items()}
    assert len(pushed["user/guided"]) == 3 and not pushed["user/plain"]


def test_each_network_keeps_its_own_dtype(guided):
    images = call(guided, 1.25)
    seen = []
    for network in (guided.unet, guided.guiding_unet.to(torch.bfloat16)):
        network.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    torch.testing.assert_close(call(guided, 1.25), images, atol=0.2, rtol=0)
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_the_card_is_of_both_networks(guided, tmp_path):
    guided.save_pretrained(tmp_path / "first")
    card = tmp_path / "first" / "README.md"
    card.write_text("figures")
    loaded = PixelDiffusionPipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").exists()
    loaded.guiding_unet = None
    loaded.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "README.md").exists()
    loaded.guiding_unet = randomize(guided.guiding_unet, seed=2)
    loaded.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "README.md").exists()
    shutil.copytree(tmp_path / "first", tmp_path / "removed")
    without = PixelDiffusionPipeline.from_pretrained(tmp_path / "removed", guiding_unet=None)
    without.save_pretrained(tmp_path / "removed")  # a folder of it stays there, but the index does not name it
    assert (tmp_path / "removed" / "README.before.md").exists()
    shutil.copytree(tmp_path / "first", tmp_path / "variant")
    without.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant" / "README.md").exists()
    (tmp_path / "removed" / "README.md").write_text("figures of the unet")
    again = PixelDiffusionPipeline.from_pretrained(tmp_path / "removed")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "figures of the unet"
    loaded.save_pretrained(tmp_path / "first")
    assert not card.exists() and card.with_name("README.before.md").exists()


def test_a_copied_card_tells_of_a_weaker_network_that_was_added(guided, tmp_path):
    PixelDiffusionPipeline(guided.unet, guided.scheduler).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("# figures\n")
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "plain", guiding_unet=guided.guiding_unet)
    pipe.save_pretrained(tmp_path / "added")
    card = (tmp_path / "added" / "README.md").read_text()
    assert card.startswith("# figures\n\n## Guidance\n") and "`guiding_unet`" in card
    PixelDiffusionPipeline.from_pretrained(tmp_path / "added").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    pipe.save_pretrained(tmp_path / "plain")  # in place, too
    assert (tmp_path / "plain" / "README.md").read_text() == card


def test_a_training_starts_from_the_network_alone(guided, tmp_path):
    guided.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "guiding_unet")
    unet = load_unet(str(tmp_path), guided.scheduler, 8)
    assert torch.equal(unet.stem.weight, guided.unet.stem.weight)


def test_records_name_weights_whether_compiled_or_not(guided):
    names = [digest_of(network) for network in guided.networks().values()]
    assert names == [digest_of(torch.compile(network)) for network in guided.networks().values()]
    assert names[0] != names[1]


def test_offloading_both_networks_to_the_same_files_is_refused(guided, tmp_path):
    images, options = call(guided, 1.25), {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    with pytest.raises(ValueError, match="`offload_to_disk_path` is given, but files of `unet` and `guiding_unet`"):
        guided.enable_group_offload(**options, offload_to_disk_path=str(tmp_path))
    unet = str(tmp_path / "unet")
    guided.enable_group_offload(**options, offload_to_disk_path=unet, exclude_modules="guiding_unet")
    guided.guiding_unet.enable_group_offload(**options, offload_to_disk_path=str(tmp_path / "guiding_unet"))
    torch.testing.assert_close(call(guided, 1.25), images)


def test_a_weaker_network_of_another_training_is_told_once(guided, tmp_path, caplog):
    guided.save_pretrained(tmp_path / "guided")
    velocity = PixelDiffusionPipeline(guided.unet, DDPMScheduler(prediction_type="v_prediction"))
    velocity.save_pretrained(tmp_path / "guiding_unet")  # a folder of the name of a component
    other = OptimizedUNet2DModel.from_pretrained(tmp_path / "guiding_unet", subfolder="unet")

    def told(act) -> list[str]:
        caplog.clear()
        act()
        return [record.message for record in caplog.records if "prediction_type" in record.message]

    plain = PixelDiffusionPipeline(guided.unet, guided.scheduler)
    for pipe in (guided, plain):
        (message,) = told(lambda pipe=pipe: setattr(pipe, "guiding_unet", other))
        assert "where the scheduler saved with the `guiding_unet` had {'prediction_type': 'v_prediction'}" in message
    assert not told(lambda: PixelDiffusionPipeline.from_pretrained(tmp_path / "guided"))
    edm = PixelDiffusionPipeline(guided.unet, EDMEulerScheduler())  # another kind of noise
    edm.save_pretrained(tmp_path / "edm")
    other = OptimizedUNet2DModel.from_pretrained(tmp_path / "edm", subfolder="unet")
    caplog.clear()
    plain.guiding_unet = other
    assert "where the scheduler saved with the `guiding_unet` had {'beta_schedule': None}" in caplog.text
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    (message,) = told(lambda: PixelDiffusionPipeline.from_pretrained(tmp_path / "guided", scheduler=scheduler))
    assert "saved with the network" in message


def test_a_subclass_may_take_none(guided, tmp_path):
    class Plain(PixelDiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__(unet, scheduler)

    plain = Plain.from_pipe(guided)
    plain.set_progress_bar_config(disable=True)
    assert plain.guiding_unet is None and torch.equal(call(plain), call(guided))
    plain.save_pretrained(tmp_path)
    assert not [name for name in json.loads((tmp_path / "model_index.json").read_text()) if "guiding" in name]
    assert torch.equal(Plain.from_pretrained(tmp_path).unet.stem.weight, guided.unet.stem.weight)
    with pytest.raises(ValueError, match="Plain cannot have a `guiding_unet`"):
        plain.guiding_unet = guided.guiding_unet


@pytest.mark.parametrize("files, variant", [
    (["unet/a.safetensors", "guiding_unet/a.safetensors", "guiding_unet/a.fp16.safetensors"], None),
    (["unet/a.safetensors", "unet/a.fp16.safetensors", "guiding_unet/a.fp16.safetensors"], "fp16"),
])  # fmt: skip
def test_the_variant_that_the_snippets_ask_for_is_one_of_both_networks(files, variant):
    assert only_variant(files) == variant


@pytest.mark.parametrize("scale, message", [
    (0.5, "`guidance_scale` is 0.5; it must be a number from 1"),
    (float("nan"), "`guidance_scale` is nan; it must be a number from 1"),
    ("2", "`guidance_scale` is '2'; it must be a number from 1"),
    (2, "`guidance_scale` is 2, but the pipeline has no `guiding_unet`"),
])  # fmt: skip
def test_what_cannot_guide_is_refused(tiny_pipe, scale, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_pipe, scale)


def test_networks_that_do_not_fit_together_are_refused(guided):
    with pytest.raises(ValueError, match="takes a learned `variance_type`"):
        guided.unet.register_to_config(out_channels=2)
        guided.guiding_unet.register_to_config(out_channels=2)
        guided.scheduler.register_to_config(variance_type="learned")
        call(guided, 2)
    guided.guiding_unet.register_to_config(sample_size=16)
    with pytest.raises(ValueError, match="was made for images of 16x16 and the `unet` for 8x8"):
        call(guided, 2)
    guided.guiding_unet.register_to_config(in_channels=3)
    with pytest.raises(ValueError, match="The `guiding_unet` has 3 `in_channels` and the `unet` 1; they must"):
        call(guided, 2)


def test_the_scripts_sample_with_it(guided, garments, tmp_path):
    for network in (guided.unet, guided.guiding_unet):
        network.register_to_config(sample_size=16)
    guided.save_pretrained(tmp_path / "model")
    expected = sample_images(guided, 3, 3, guidance_scale=2)
    model = {"model": str(tmp_path / "model"), "num_inference_steps": 3, "guidance_scale": 2.0}
    reset_accelerate()
    generate_script.main(generate_script.GenerateArguments(num_images=3, output_dir=str(tmp_path / "images"), **model))
    made = [np.asarray(Image.open(tmp_path / "images" / f"00000{i}.png")) for i in range(3)]
    np.testing.assert_array_equal(made, expected[:, 0])

    model_card(guided, "user/guided").save(tmp_path / "model" / "README.md")
    reset_accelerate()
    evaluate_script.main(evaluate_script.EvaluateArguments(
        dataset_name=garments, num_images=150, batch_size=150, output_dir=str(tmp_path / "evaluation"),
        dataset_id="user/garments", write_card=True, **model,
    ))  # fmt: skip
    record = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    reference = Reference.of_dataset(garments, load_feature_extractor(), resolution=16)
    expected = evaluate_images(sample_images(guided, 150, 3, batch_size=150, guidance_scale=2), reference)
    assert record["per_seed"] == [expected] and record["guidance_scale"] == 2
    assert record["guiding_weights"] != record["weights"]
    row = (tmp_path / "evaluation" / "row.md").read_text()
    assert "3 evaluations of the network and of the weaker one, guidance scale 2" in row
    (result, *_) = ModelCard.load(tmp_path / "model" / "README.md").data.eval_results
    assert result.metric_args["guidance_scale"] == 2
