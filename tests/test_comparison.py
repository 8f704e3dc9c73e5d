"""Schedulers compared at equal numbers of evaluations: the records, and what is refused or left out."""

import diffusers
import numpy as np
import pytest
import torch

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline
from ddpm_diffusers.evaluation import Reference, load_feature_extractor
from ddpm_diffusers.evaluation.comparison import best_settings, compare_schedulers, label_of, most_steps, plan
from ddpm_diffusers.schedulers import count_evaluations, make_scheduler
from ddpm_diffusers.synthetic_fashion import draw_garments

# with the noise of 1,000, for which some schedulers take long to make
HUNDRED_TIMESTEPS = diffusers.DDPMScheduler(100, beta_end=0.2, timestep_spacing="trailing")


def garments(first: int, count: int) -> np.ndarray:
    return draw_garments(range(first, first + count), resolution=8)[0]  # (N, 1, 8, 8)


@pytest.fixture(scope="module")
def reference(extractor_folder) -> Reference:
    extractor = load_feature_extractor(str(extractor_folder))
    return Reference(torch.from_numpy(garments(0, 60)), torch.from_numpy(garments(60, 40)), extractor)


@pytest.fixture
def calls(tiny_unet) -> list[torch.Tensor]:
    """What the network was given, call by call."""
    inputs = []
    tiny_unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    return inputs


@pytest.mark.filterwarnings("ignore:Should have t")
def test_every_scheduler_starts_from_the_same_noise_and_takes_the_evaluations_of_its_record(tiny_unet, calls, caplog):
    pipe = PixelDiffusionPipeline(tiny_unet, HUNDRED_TIMESTEPS)
    records = compare_schedulers(pipe, list(SCHEDULERS), evaluations=(4, 13), num_images=3)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    del calls[:1]  # to warm up
    for record in records:
        started = [calls.pop(0) for _ in range(record["evaluations"])][0]
        assert torch.allclose(started, noise, atol=0.01), label_of(record)
        assert record["seconds_per_image"] > 0 and record["images"].shape == (3, 1, 8, 8)
        assert "figures" not in record
    assert not calls
    found = {name: [record["evaluations"] for record in records if record["name"] == name] for name in SCHEDULERS}
    second_order = {"heun", "kdpm2", "kdpm2_ancestral", "dpmsolver_sde"}
    assert found == {name: [3, 13] if name in second_order else [4, 13] for name in found} | {"pndm": [13]}
    [told] = [message for message in caplog.messages if "Left out" in message]
    assert "pndm" in told  # its warm-up takes 13


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm", "kdpm2_ancestral", "dpmsolver++_singlestep"])
def test_one_step_more_would_take_too_many_evaluations(name):
    settings, _ = plan(HUNDRED_TIMESTEPS, [name], range(1, 40))
    scheduler = make_scheduler(name, HUNDRED_TIMESTEPS)
    for setting in settings:
        assert setting.evaluations == count_evaluations(scheduler, setting.num_inference_steps)
    steps = [setting.num_inference_steps for setting in settings]
    assert steps == list(range(steps[0], steps[-1] + 1))  # none is passed over
    assert count_evaluations(scheduler, steps[-1] + 1) > 39


def test_records_are_the_protocols_and_options_reach_the_scheduler(tiny_pipe, reference):
    karras = ("dpmsolver++", {"use_karras_sigmas": True})
    clipped = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample_range=0.5)
    own = tiny_pipe.scheduler
    records = compare_schedulers(
        tiny_pipe, [karras, clipped, "ddim"], reference, evaluations=(3,), num_images=30, seeds=(0, 1)
    )
    labels = ["dpmsolver++:use_karras_sigmas=true", "ddim:clip_sample_range=0.5", "ddim"]
    assert [label_of(record) for record in records] == labels and tiny_pipe.scheduler is own
    assert records[0]["scheduler_config"]["use_karras_sigmas"]
    assert records[1]["images"].float().std() < records[2]["images"].float().std()
    for record in records:
        assert record["figures"]["train"]["frechet_distance"].keys() == {"mean", "sd"}
        assert len(record["per_seed"]) == 2


def test_samples_that_are_not_finite_are_left_out_and_the_others_measured(tiny_pipe, caplog):
    overflows = ("kdpm2_ancestral", {"timestep_spacing": "linspace"})  # in two steps
    records = compare_schedulers(tiny_pipe, [overflows, "ddim"], evaluations=(3,), num_images=2)
    assert [record["name"] for record in records] == ["ddim"]
    left_out = "Left out: kdpm2_ancestral:timestep_spacing=linspace, 3 evaluations: "
    assert f"{left_out}KDPM2AncestralDiscreteScheduler made images with NaN or infinity in 2 steps" in caplog.text


def test_the_pipeline_has_its_scheduler_back_after_an_error(tiny_pipe, calls):
    own, config = tiny_pipe.scheduler, dict(tiny_pipe.scheduler.config)

    def fail(module, args):
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    tiny_pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_schedulers(tiny_pipe, ["ddim", "unipc"], evaluations=(3,), num_images=2)
    assert tiny_pipe.scheduler is own and dict(own.config) == config


@pytest.mark.parametrize("scheduler, message", [
    (("unipc", {"timestep_spacing": "even"}), r"'unipc:timestep_spacing=even' cannot sample \(even"),
    (("ddpm", {"clip_sample_range": "wide"}), "'ddpm:clip_sample_range=wide' cannot sample"),
    (diffusers.DDIMScheduler(beta_end=0.01), "`beta_end` is 0.02 in the scheduler that the network was trained"),
    (diffusers.LCMScheduler(), "LCMScheduler cannot be used; use one of DDPMScheduler"),
])  # fmt: skip
def test_names_and_options_are_refused_before_any_sampling(tiny_pipe, calls, scheduler, message):
    with pytest.raises(ValueError, match=message):
        compare_schedulers(tiny_pipe, ["ddim", scheduler], evaluations=(3,), num_images=2)
    assert not calls


@pytest.mark.parametrize("arguments, message", [
    ({"evaluations": (5, 0)}, r"`evaluations` is \[5, 0\]"),
    ({"schedulers": ["pndm"], "evaluations": (5,)}, "PNDMScheduler needs more than 5 evaluations"),
    ({"seeds": (0, 0)}, r"`seeds` is \[0, 0\]"),
    ({"num_images": 4}, "There are 4 images to evaluate"),
    ({"batch_size": 0}, "`batch_size` is 0"),
])  # fmt: skip
def test_numbers_are_refused_before_any_sampling(tiny_pipe, calls, reference, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_schedulers(tiny_pipe, **{"schedulers": ["ddim"], "reference": reference, **arguments})
    assert not calls


def made_up(name: str, evaluations: int, distance: float) -> dict:
    figures = {"train": {"frechet_distance": {"mean": distance}}}
    return {"name": name, "options": {}, "evaluations": evaluations, "figures": figures}


def test_the_best_settings_are_the_cheapest_near_the_yardstick_and_the_nearest_of_the_cheap():
    yardstick = made_up("ddpm", 1000, 2.0)
    slow, near, nearer, cheap = (made_up("ddim", 50, 1.9), made_up("unipc", 20, 2.2), made_up("deis", 20, 2.1),
                                 made_up("lms", 15, 2.3))  # fmt: skip
    records = [slow, near, nearer, cheap, made_up("euler", 10, 2.4)]
    assert best_settings(records, yardstick) == {"fewest": nearer, "best": cheap}
    assert best_settings([slow]) == {"fewest": None, "best": None}


def test_steps_are_as_many_as_fit_for_a_scheduler_that_cannot_take_all():
    offset = diffusers.DDPMScheduler(20, steps_offset=1, timestep_spacing="leading")  # it has no timestep 20
    assert most_steps(offset, 20) == most_steps(offset, 19) == 19


def test_of_all_schedulers_those_that_cannot_follow_the_network_are_left_out_with_the_reason():
    predicts_samples = diffusers.DDPMScheduler(100, prediction_type="sample")
    settings, left_out = plan(predicts_samples, list(SCHEDULERS), [20], leave_out_unusable=True)
    kept = {setting.name for setting in settings}
    assert "ddim" in kept and len(kept) + len(left_out) == len(SCHEDULERS)
    reasons = {record["name"]: record["left_out"] for record in left_out}
    assert "prediction_type given as sample must be one of" in reasons["pndm"]
