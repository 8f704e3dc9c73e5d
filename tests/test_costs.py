"""What training and sampling cost, counted: regressions in speed that no clock is needed for."""

import pytest
import torch
import train_unconditional as script
from command_line import parse_arguments
from conftest import TINY, UNET, reset_accelerate
from counts import aten_calls, count
from networks import make_network, make_training_step

from ddpm_diffusers import OptimizedUNet2DModel, make_scheduler
from ddpm_diffusers.muon import Muon

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def costs() -> dict:
    """Of a training step, one image of 16x16: in float32 by name, in bf16 with ", bf16" after it."""
    found = {}
    for name in ("default", "guide", "baseline", "stock"):
        network = make_network(name, 16)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found[name] = {"parameters": parameters, **count(make_training_step(network, 1, 16, "no", CPU))}
        step = make_training_step(network, 1, 16, "bf16", CPU)
        step()  # it makes the optimizer's state
        found[f"{name}, bf16"] = aten_calls(step)
    return found


def test_the_default_is_cheaper_than_its_peers(costs):
    assert costs["default"]["parameters"] < 0.95 * costs["stock"]["parameters"]
    assert costs["default"]["operations"] < 0.53 * costs["stock"]["operations"]
    assert costs["default"]["operations"] < 0.59 * costs["guide"]["operations"]
    for precision, share in (("", 0.9), (", bf16", 0.95)):
        ours, theirs = costs[f"default{precision}"], costs[f"stock{precision}"]
        assert ours["kernels"] < 1.05 * theirs["kernels"]
        assert ours["allocations"] < 0.95 * theirs["allocations"]
        assert ours["allocated_bytes"] < share * theirs["allocated_bytes"]


# a little more than was counted: GFLOP, aten calls and allocations in float32, aten calls in bf16
@pytest.mark.parametrize("name, operations, kernels, allocations, kernels_in_bf16", [
    ("default", 0.48, 350, 615, 520), ("guide", 0.83, 175, 385, 285), ("baseline", 0.66, 175, 350, 285),
])  # fmt: skip
def test_no_training_step_costs_more_than_it_did(costs, name, operations, kernels, allocations, kernels_in_bf16):
    assert costs[name]["operations"] < operations * 1e9
    assert costs[name]["kernels"] < kernels and costs[name]["allocations"] < allocations
    assert costs[f"{name}, bf16"]["kernels"] < kernels_in_bf16


def test_gradient_checkpointing_computes_the_forward_pass_once_more(costs):
    network = make_network("default", 16)
    forward = count(lambda: network(torch.zeros(1, 1, 16, 16), 5))["operations"]
    network.enable_gradient_checkpointing()
    plain = costs["default"]["operations"]
    checkpointed = count(make_training_step(network, 1, 16, "no", CPU))["operations"]
    assert plain + 0.8 * forward < checkpointed <= plain + forward


def test_a_step_of_muon_waits_for_nothing_and_takes_the_kernels_of_one_shape_together():
    network = make_network("default", 16)
    optimizer = Muon(network.parameters(), lr=1e-3, fused=True)

    def step(update=optimizer.step) -> None:
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)  # Muon frees those of kernels
        update()

    muon, gradients = count(step), count(lambda: step(lambda: None))
    assert muon["syncs"] == 0
    assert muon["kernels"] - gradients["kernels"] < 375


@torch.no_grad()
def test_sampling_holds_less_than_stock():
    networks = [make_network(name, 28).eval() for name in ("default", "stock")]
    default, stock = (
        aten_calls(lambda network=network: network(torch.zeros(1, 1, 28, 28), 5))["peak_bytes"] for network in networks
    )
    assert default < 0.93 * stock


def test_a_training_step_waits_for_nothing(costs):
    assert {name: cost["syncs"] for name, cost in costs.items()} == dict.fromkeys(costs, 0)


def test_operations_are_those_of_the_layers():
    """A multiply and an add for each weight and pixel, forward and again for the gradient of the weights."""
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    images = torch.randn(2, 3, 8, 8)
    assert count(lambda: convolution(images).sum().backward())["operations"] == 2 * 2 * (2 * 8 * 8) * (5 * 3 * 3 * 3)


def test_calls_waits_and_allocations_are_counted():
    values = torch.arange(4.0)
    counts = {"kernels": 2, "syncs": 0, "allocations": 2, "allocated_bytes": 2 * 16, "peak_bytes": 2 * 16}
    assert aten_calls(lambda: (values + 1).view(2, 2) * 2) == counts
    nothing = {"allocations": 0, "allocated_bytes": 0, "peak_bytes": 0}
    assert aten_calls(lambda: values.mul_(2).t()) == {"kernels": 1, "syncs": 0, **nothing}
    grown = aten_calls(lambda: torch.add(values, 1, out=torch.empty(0)))
    assert grown["allocated_bytes"] == 16
    assert aten_calls(lambda: [values + number for number in range(4)])["peak_bytes"] == 4 * 16
    assert aten_calls(lambda: [(values + number).sum() for number in range(4)])["peak_bytes"] == 16 + 4 * 4
    waits = (values.tolist, values.cpu, values.numpy, values[0].item, values.nonzero, lambda: bool(values[0]),
             lambda: float(values[0]), lambda: values.masked_select(values > 1),
             lambda: values.equal(values), lambda: values[values > 1],
             lambda: values.index_put_((values > 1,), values[0]),
             lambda: values.repeat_interleave(torch.tensor([1, 2, 1, 0])))  # fmt: skip
    assert [aten_calls(wait)["syncs"] for wait in waits] == [1] * len(waits)


@pytest.fixture
def train(tmp_path):
    """Runs the training script here, for so many steps."""

    def run(steps: int) -> None:
        reset_accelerate()
        flags = ["--dataset_name", "synthetic-fashion", "--max_train_samples", "64", "--resolution", "8",
                 "--unet_config", UNET, "--train_batch_size", "8", "--max_train_steps", str(steps),
                 "--logging_steps", "100", "--logger", "none", "--eval_batch_size", "1",
                 "--ddpm_num_inference_steps", "1", "--output_dir", str(tmp_path / str(steps))]  # fmt: skip
        script.main(parse_arguments(script.TrainingArguments, flags, script.__doc__))

    return run


def test_the_training_script_adds_few_kernels_to_the_step_and_no_wait(train):
    train(1)  # fills the caches
    few, more = aten_calls(lambda: train(3)), aten_calls(lambda: train(7))
    bare = count(make_training_step(OptimizedUNet2DModel(**TINY), 8, 8, "no", CPU))
    assert more["syncs"] == few["syncs"]
    assert (more["kernels"] - few["kernels"]) / 4 < bare["kernels"] + 60  # noise, losses by quarter, clipping
    assert (more["allocations"] - few["allocations"]) / 4 < bare["allocations"] + 120  # a norm of each parameter, too
    assert (more["allocated_bytes"] - few["allocated_bytes"]) / 4 < 1.2 * bare["allocated_bytes"]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "euler"])
def test_sampling_adds_to_network_and_scheduler_one_copy_a_step(tiny_pipe, name):
    tiny_pipe.scheduler = scheduler = make_scheduler(name, tiny_pipe.scheduler)

    def ours(steps: int) -> None:
        tiny_pipe(2, steps, torch.Generator().manual_seed(0), output_type="latent")

    @torch.no_grad()
    def bare(steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        latents = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            predicted = tiny_pipe.unet(scheduler.scale_model_input(latents, t), t).sample
            latents = scheduler.step(predicted, t, latents, generator=generator).prev_sample

    def of_a_step(loop) -> dict:
        few, more = aten_calls(lambda: loop(10)), aten_calls(lambda: loop(20))
        return {name: (more[name] - few[name]) / 10 for name in few}

    with_pipeline, without = of_a_step(ours), of_a_step(bare)
    assert with_pipeline["kernels"] - without["kernels"] <= 1
    assert with_pipeline["allocations"] - without["allocations"] <= 1
    assert with_pipeline["syncs"] <= without["syncs"]
