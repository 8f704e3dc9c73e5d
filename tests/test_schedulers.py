"""Every scheduler against a network that cannot err: the exact denoiser of Gaussian data.

With x_0 ~ N(MEAN, STD^2), E[x_0 | x_t] is linear in x_t, so a sampler's result has a mean and a spread that show the
sampler alone: a missing input scale, a wrong initial noise or another noise schedule moves them.
"""

import inspect
import warnings
from functools import cache

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.pipeline_pixel_diffusion import set_timesteps
from ddpm_diffusers.schedulers import name_and_options, rehearse

MEAN, STD = 0.2, 0.5
STEPS = (10, 20, 50)
NO_SAMPLE_PREDICTION = {"pndm", "euler_ancestral", "dpmsolver_sde", "kdpm2", "kdpm2_ancestral"}

# |spread / STD - 1| at 10, 20 and 50 trailing steps: each solver's discretization error as measured, and a margin.
# First-order solvers are held to their closed form besides (below).
TOLERANCE = {
    "ddpm": (0.36, 0.24, 0.13),
    "ddim": (0.28, 0.16, 0.08),
    "pndm": (0.20, 0.11, 0.06),
    "lms": (0.09, 0.03, 0.02),
    "euler": (0.28, 0.16, 0.08),
    "euler_ancestral": (0.36, 0.24, 0.13),
    "heun": (0.15, 0.06, 0.03),
    "dpmsolver++": (0.21, 0.07, 0.02),
    "dpmsolver++_singlestep": (0.27, 0.13, 0.05),
    "dpmsolver_sde": (0.22, 0.10, 0.04),
    "kdpm2": (0.18, 0.07, 0.03),
    "kdpm2_ancestral": (0.11, 0.03, 0.03),
    "deis": (0.22, 0.05, 0.03),
    "unipc": (0.20, 0.06, 0.02),
    "sa_solver": (0.11, 0.03, 0.04),
    "tcd": (0.27, 0.16, 0.08),
}


class ExactDenoiser(diffusers.ModelMixin, ConfigMixin):
    """The best possible prediction for pixels drawn from N(MEAN, STD^2), at any real timestep."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, prediction_type: str = "epsilon",
                 beta_schedule: str = "linear"):  # fmt: skip
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        alphas_cumprod = diffusers.DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod.double()
        self.log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))

    def forward(self, sample, timestep):
        timestep = torch.as_tensor(timestep).double()
        low, high = timestep.floor().long(), timestep.ceil().long()
        log_snr = torch.lerp(self.log_snr[low], self.log_snr[high], timestep - low)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        sample = sample.double()
        image = MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (sample - alpha * MEAN)
        noise = (sample - alpha * image) / sigma
        velocity = alpha * noise - sigma * image
        prediction = {"epsilon": noise, "sample": image, "v_prediction": velocity}[self.config.prediction_type]
        return UNet2DOutput(sample=prediction.float())


def make_pipe(name: str, prediction_type: str = "epsilon", **scheduler_kwargs) -> PixelDiffusionPipeline:
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction_type, **{"timestep_spacing": "trailing", "clip_sample": False, **scheduler_kwargs}
    )
    pipe = PixelDiffusionPipeline(ExactDenoiser(prediction_type=prediction_type), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(name, pipe.scheduler)
    return pipe


def sample(pipe, steps: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchsde speaks of rounding in its time interval
        return pipe(300, steps, torch.Generator().manual_seed(0), output_type="latent").images


def mean_and_spread(images: torch.Tensor) -> tuple[float, float]:
    return images.mean().item(), images.std().item() / STD


@cache
def sampled(name: str, steps: int, prediction_type: str = "epsilon") -> tuple[torch.Tensor, torch.Tensor]:
    """The samples, and what the network was given first."""
    pipe, inputs = make_pipe(name, prediction_type), []
    pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return sample(pipe, steps), inputs[0]


PNDM_OF_VELOCITIES = ("pndm", "v_prediction")  # a method of its own: it combines its last four outputs as they are


@pytest.mark.parametrize("name, prediction_type", [*((name, "epsilon") for name in SCHEDULERS), PNDM_OF_VELOCITIES])
def test_samples_of_an_exact_denoiser_have_the_mean_and_spread_of_the_data(name, prediction_type):
    errors = []
    for steps, tolerance in zip(STEPS, TOLERANCE[name], strict=True):
        samples, first_input = sampled(name, steps, prediction_type)
        assert first_input.std() == pytest.approx(1, abs=0.02)
        mean, spread = mean_and_spread(samples)
        assert abs(mean - MEAN) < 0.03, (steps, mean)
        assert abs(spread - 1) < tolerance, (steps, spread)
        errors.append(abs(spread - 1))
    assert errors[2] < errors[0]  # more steps, less error


@pytest.mark.parametrize("name, prediction_type", [
    (name, kind) for name in SCHEDULERS for kind in ("sample", "v_prediction") if (name, kind) != PNDM_OF_VELOCITIES
])  # fmt: skip
def test_whatever_the_network_predicts_the_samples_are_the_same(name, prediction_type):
    if prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
        with pytest.raises((ValueError, NotImplementedError), match="sample"):  # diffusers' own, at the first step
            sampled(name, 10, prediction_type)
        return
    torch.testing.assert_close(sampled(name, 10, prediction_type), sampled(name, 10), atol=1e-5, rtol=0)


WITHOUT_NOISE_LEVELS = ("ddpm", "ddim", "pndm", "tcd")  # the others go from level to level (`sigmas`)


@pytest.mark.parametrize("name", [*WITHOUT_NOISE_LEVELS, "euler", "dpmsolver++"])
def test_steps_that_do_not_divide_the_timesteps_leave_noise_in_two_schedulers_alone(name):
    (_, spread), (_, dividing) = (mean_and_spread(sampled(name, steps)[0]) for steps in (91, 100))
    if name in ("ddim", "pndm"):
        assert spread > dividing + 0.05  # as `make_scheduler` says
    else:
        assert spread == pytest.approx(dividing, abs=0.02)


def test_no_number_of_steps_goes_beyond_the_last_timestep():
    """1000 - 61 * (1000 / 61) is not 0 in floating point, so "trailing" spacing has one more there: -1."""
    for name in SCHEDULERS:
        assert set_timesteps(make_pipe(name).scheduler, 61).min() >= 0, name
    for name in (*WITHOUT_NOISE_LEVELS, "euler", "dpmsolver++", "sa_solver"):
        mean, spread = mean_and_spread(sampled(name, 61)[0])
        assert abs(mean - MEAN) < 0.03, name
        assert spread == pytest.approx(mean_and_spread(sampled(name, 50)[0])[1], abs=0.1), name


def test_timesteps_below_0_of_another_kind_of_schedule_stay(tiny_pipe):
    pipe = PixelDiffusionPipeline(tiny_pipe.unet, scheduler := diffusers.EDMEulerScheduler())
    pipe(1, 5)
    expected = diffusers.EDMEulerScheduler()
    expected.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, expected.timesteps) and scheduler.timesteps[-1] < 0


def closed_form_spread(steps: int, eta: float) -> float:
    """The spread after DDIM (eta 0) or ancestral sampling (eta 1; DDPM), by its recursion (DDIM, eq. 12 and 16)."""
    alphas_cumprod = diffusers.DDPMScheduler().alphas_cumprod.double()
    stride = 1000 // steps
    variance = 1.0
    for t in range(999, -1, -stride):
        a = alphas_cumprod[t]
        previous = alphas_cumprod[t - stride] if t >= stride else torch.tensor(1.0)
        sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)).sqrt()
        gain = STD**2 * a.sqrt() / (a * STD**2 + 1 - a)  # of the predicted image
        factor = previous.sqrt() * gain + (1 - previous - sigma**2).sqrt() * (1 - a.sqrt() * gain) / (1 - a).sqrt()
        variance = factor**2 * variance + sigma**2
    return float(variance**0.5 / STD)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name, eta", [("ddim", 0), ("euler", 0), ("ddpm", 1), ("euler_ancestral", 1)])
def test_first_order_samplers_follow_their_closed_form(name, eta, steps):
    _, spread = mean_and_spread(sampled(name, steps)[0])
    assert spread == pytest.approx(closed_form_spread(steps, eta), abs=0.02)


TRAINED_WITH = {
    "num_train_timesteps": 20,
    "beta_start": 0.001,
    "beta_end": 0.05,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
SAMPLED_WITH = {
    "timestep_spacing": "linspace",
    "steps_offset": 1,
    "clip_sample": False,
    "clip_sample_range": 2.0,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
}


OWN_BETAS = {"trained_betas": torch.linspace(0.002, 0.03, 20).tolist()}


@pytest.mark.parametrize("first, betas", [*((first, {}) for first in SCHEDULERS), ("unipc", OWN_BETAS)])
def test_what_the_network_was_trained_with_is_carried_over_from_any_scheduler_to_any_other(first, betas):
    """By name and by diffusers' `from_config`."""
    given = {**TRAINED_WITH, **SAMPLED_WITH, **betas}
    original = diffusers.DDPMScheduler(**given)
    pipe = PixelDiffusionPipeline(ExactDenoiser(), original)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[first]).from_config(pipe.scheduler.config)
    first_by_class, first_by_name = pipe.scheduler, make_scheduler(first, original)
    for second in SCHEDULERS:
        by_name = make_scheduler(second, first_by_name)
        by_class = getattr(diffusers, SCHEDULERS[second]).from_config(first_by_class.config)
        assert type(by_name) is type(by_class)
        for scheduler in (by_name, by_class):
            assert torch.equal(scheduler.alphas_cumprod, original.alphas_cumprod)
            assert {key: scheduler.config[key] for key in given} == given


def test_a_scheduler_assigned_to_the_pipeline_hands_on_its_defaults():
    pipe = PixelDiffusionPipeline(ExactDenoiser(), diffusers.DDPMScheduler())
    pipe.scheduler = diffusers.DDIMScheduler()
    heun = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(heun.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def test_without_the_pipeline_make_scheduler_keeps_defaults_that_from_config_drops():
    original = diffusers.DDPMScheduler()
    assert torch.equal(make_scheduler("heun", original).alphas_cumprod, original.alphas_cumprod)


@pytest.mark.parametrize("name, kwargs, overrides, message", [
    ("dpm", {}, {}, r"'dpm' is unknown; it must be one of ddpm, ddim"),
    ("ipndm", {}, {}, "noise schedule of its own"),
    ("lcm", {}, {}, "needs a consistency-distilled network"),
    ("ddim", {}, {"order": 2}, "`order` is no argument of DDIMScheduler"),
    ("ddim", {}, {"beta_end": 0.012}, "`beta_end` is 0.02 in the scheduler that the network was trained with"),
    ("heun", {"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr"),
    ("heun", {"beta_schedule": "sigmoid"}, {}, "sigmoid"),
    ("unipc", {}, {"use_flow_sigmas": True}, "`use_flow_sigmas` is False in the scheduler that the network was"),
])  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(name, kwargs, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, diffusers.DDPMScheduler(**kwargs), **overrides)


def test_a_flow_is_followed_by_what_knows_it_alone():
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0)
    made = make_scheduler("unipc", flow)
    assert made.config.use_flow_sigmas and made.config.flow_shift == 3.0
    with pytest.raises(ValueError, match="DDIMScheduler cannot be used: .* a schedule with `use_flow_sigmas=True`"):
        make_scheduler("ddim", flow)


def test_clipping_survives_a_scheduler_that_knows_none():
    original = diffusers.DDPMScheduler(clip_sample=False)
    assert make_scheduler("ddim", make_scheduler("unipc", original)).config.clip_sample is False


def test_a_scheduler_without_a_discrete_noise_schedule_cannot_be_followed():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no discrete noise schedule to follow"):
        make_scheduler("ddim", diffusers.FlowMatchEulerDiscreteScheduler())


def test_an_option_with_a_value_that_cannot_serve_shows_in_a_rehearsal():
    wrong = make_scheduler("ddpm", diffusers.DDPMScheduler(), clip_sample_range="wide")
    with pytest.raises(ValueError, match="Scheduler 'ddpm' cannot sample .*: change its options"):
        rehearse(wrong, "ddpm")
    fine = make_scheduler("ddpm", diffusers.DDPMScheduler())
    rehearse(fine, "ddpm")
    assert len(fine.timesteps) == 1000  # it is as it was


SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in ("dpmsolver++", "dpmsolver++_singlestep", "unipc", "deis", "sa_solver", "kdpm2")),
    ("dpmsolver++", SDE),
])  # fmt: skip
def test_noise_levels_of_one_timestep_are_all_passed(name, options):
    """The last timesteps of this schedule hold so little signal that Karras' first noise levels share one."""
    noise = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False, **noise)
    pipe = PixelDiffusionPipeline(ExactDenoiser(**noise), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(name, scheduler, use_karras_sigmas=True, **options)
    rehearse(pipe.scheduler, name)
    mean, spread = mean_and_spread(sample(pipe, 100))
    timesteps = pipe.scheduler.timesteps.long().tolist()
    assert len(set(timesteps)) < len(timesteps)
    assert abs(mean - MEAN) < 0.03 and abs(spread - 1) < 0.05


def test_the_variance_is_of_the_network_if_learned_and_else_of_the_class():
    wide = diffusers.DDPMScheduler(variance_type="fixed_large")
    assert make_scheduler("ddpm", wide).config.variance_type == "fixed_large"
    assert make_scheduler("dpmsolver++", wide).config.variance_type is None
    learned = make_scheduler("dpmsolver++", diffusers.DDPMScheduler(variance_type="learned_range"))
    assert make_scheduler("ddpm", learned).config.variance_type == learned.config.variance_type == "learned_range"
    rehearse(learned, "dpmsolver++")
    without = make_scheduler("ddim", learned)  # which knows none, and hands it on
    assert make_scheduler("ddpm", without).config.variance_type == "learned_range"
    rehearse(without, "ddim")  # the pipeline refuses it for the network's channels, and says so better


def test_options_are_those_of_the_class_not_what_it_holds_for_others():
    trained = diffusers.DDPMScheduler(timestep_spacing="trailing")
    unclipped = diffusers.DDPMScheduler.from_config(trained.config, clip_sample=False)
    euler = diffusers.EulerDiscreteScheduler.from_config(unclipped.config, use_karras_sigmas=True)
    assert euler.config.clip_sample is False and "clip_sample" not in inspect.signature(type(euler)).parameters
    assert name_and_options(unclipped, trained) == ("ddpm", {"clip_sample": False})
    assert name_and_options(euler, trained) == ("euler", {"use_karras_sigmas": True})


def test_overrides_reach_the_scheduler():
    scheduler = make_scheduler("dpmsolver++", diffusers.DDPMScheduler(), use_karras_sigmas=True, solver_order=3)
    assert scheduler.config.use_karras_sigmas and scheduler.config.solver_order == 3
