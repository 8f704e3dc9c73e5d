"""The U-Net: the default and the guide's networks written down, every switch, and clear errors."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, randomize
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.unet_2d_optimized import RearrangeUpsample, ResnetBlock

CONFIGS = ROOT / "train_scripts" / "configs"
GUIDE, BASELINE = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("guide", "baseline"))
STEPS = 400  # of the guide's network below: not the default
SWITCHES = {
    "norm_type": "batch",
    "act_fn": "relu",
    "downsample_type": "max_pool",
    "time_embedding_type": "linear",
    "residual_blocks": False,
    "global_skip": False,
    "block_type": "conv",
    "time_injection": "decoder",
    "normalize_timesteps": True,
    "skip_type": "after_pool",
    "upsample_type": "conv_transpose",
}


def make(seed: int = 0, **config) -> OptimizedUNet2DModel:
    torch.manual_seed(seed)
    return randomize(OptimizedUNet2DModel(**{**TINY, **config}))


def inputs(batch: int = 2, channels: int = 1, height: int = 8, width: int = 8):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, channels, height, width, generator=generator)
    return sample, torch.randint(1000, (batch,), generator=generator)


LEVELS = {"block_out_channels": (8, 8, 16), "down_layers_per_block": (0, 1), "up_layers_per_block": (1, 2)}


def written_down(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    def linear(h, name):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(h, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(h, name):
        return F.group_norm(h, 4, state[f"{name}.weight"], state[f"{name}.bias"])

    def layers(h, name):
        for j in range(sum(key.startswith(f"{name}.layers.") and key.endswith("conv1.weight") for key in state)):
            block = f"{name}.layers.{j}"
            inner = norm(conv(F.gelu(norm(h, f"{block}.norm1")), f"{block}.conv1"), f"{block}.norm2")
            scale, shift = linear(time, f"{block}.time_scale_shift")[:, :, None, None].chunk(2, 1)
            inner = conv(F.gelu(inner * (1 + scale) + shift), f"{block}.conv2")
            h = inner + (conv(h, f"{block}.shortcut") if f"{block}.shortcut.weight" in state else h)
        return h

    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(32.0) / 31)
    time = torch.cat((angles.sin(), angles.cos()), 1)
    time = F.gelu(linear(F.gelu(linear(time, "time_embedding.linear_1")), "time_embedding.linear_2"))
    h = stem = conv(x, "stem")
    skips = []
    for i in range(2):
        h = layers(h, f"down_blocks.{i}")
        skips.append(h)
        h = conv(F.pixel_unshuffle(h, 2), f"down_blocks.{i}.pool.1")
    h = layers(h, "mid_block")
    for i in range(2):
        h = F.pixel_shuffle(conv(h, f"up_blocks.{i}.upsample.conv"), 2)
        h = layers(torch.cat((h, skips.pop()), 1), f"up_blocks.{i}")
    return conv(F.gelu(norm(torch.cat((h, stem), 1), "out_block.layers.0")), "out_block.layers.2")


@torch.no_grad()
def test_the_default_network_is_what_its_docstrings_say():
    torch.manual_seed(0)
    model = randomize(OptimizedUNet2DModel(**TINY | LEVELS))
    x, t = torch.randn(2, 1, 8, 16), torch.tensor([3, 951])
    expected = written_down(model.state_dict(), x, t)
    torch.testing.assert_close(model(x, t).sample, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01


class CourseUNet(nn.Module):
    """The guide's network written down from its cells in functional torch, on the weights of one of ours."""

    def __init__(
        self, model: OptimizedUNet2DModel, norm, act, pool, sinusoid: bool, residual: bool, global_skip: bool
    ):
        super().__init__()
        self.state = {name: tensor for name, tensor in model.state_dict().items()}
        self.norm, self.act, self.pool = norm, act, pool
        self.sinusoid, self.residual, self.global_skip = sinusoid, residual, global_skip

    def weights(self, prefix):
        return self.state[f"{prefix}.weight"], self.state[f"{prefix}.bias"]

    def conv_block(self, x, prefix, groups):
        x = F.conv2d(x, *self.weights(f"{prefix}.conv"), padding=1)
        return self.act(self.norm(x, self.state, f"{prefix}.norm", groups))

    def embed(self, t, prefix):
        return F.linear(
            self.act(F.linear(t, *self.weights(f"{prefix}.linear_1"))), *self.weights(f"{prefix}.linear_2")
        )

    def forward(self, x, t):
        x1 = self.conv_block(x, "stem.conv1", 8)
        x2 = self.conv_block(x1, "stem.conv2", 8)
        down0 = x1 + x2 if self.residual else x2
        downs = [down0]
        for i in range(2):
            h = self.conv_block(downs[-1], f"down_blocks.{i}.layers.0", 32)
            h = self.conv_block(h, f"down_blocks.{i}.layers.1", 32)
            downs.append(self.pool(self, h, f"down_blocks.{i}.pool.1"))
        h = downs[-1]
        for i in range(2):
            h = self.conv_block(h, f"mid_block.layers.{i}", 32)
        t = t.float() / STEPS
        if self.sinusoid:
            frequencies = torch.exp(torch.arange(4) * -(math.log(10000) / 3))
            t = torch.cat(((t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()), dim=-1)
        else:
            t = F.linear(t[:, None], *self.weights("time_proj.linear"))
        for i in range(2):
            h = h + self.embed(t, f"up_blocks.{i}.time_embedding")[:, :, None, None]
            h = F.conv_transpose2d(torch.cat((h, downs[2 - i]), 1), *self.weights(f"up_blocks.{i}.upsample"), stride=2)
            for j in range(4):
                h = self.conv_block(h, f"up_blocks.{i}.layers.{j}", 32)
        h = torch.cat((h, down0), 1) if self.global_skip else h
        h = F.conv2d(h, *self.weights("out_block.layers.0"), padding=1)
        h = self.act(self.norm(h, self.state, "out_block.layers.1", 8))
        return F.conv2d(h, *self.weights("out_block.layers.3"), padding=1)


def group_norm(x, state, prefix, groups):
    return F.group_norm(x, groups, state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def batch_norm(x, state, prefix, groups):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{prefix}.{name}"] for name in names))


def rearrange_pool(self, x, prefix):
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    return self.conv_block(x, prefix, 32)


@pytest.mark.parametrize("config, course", [
    (GUIDE, {"norm": group_norm, "act": F.gelu, "pool": rearrange_pool, "sinusoid": True, "residual": True,
             "global_skip": True}),
    (BASELINE, {"norm": batch_norm, "act": F.relu, "pool": lambda self, x, prefix: F.max_pool2d(x, 2),
                "sinusoid": False, "residual": False, "global_skip": False}),
], ids=["guide", "baseline"])  # fmt: skip
def test_guide_and_baseline_are_the_networks_of_the_guide(config, course):
    model = randomize(OptimizedUNet2DModel(**config, num_train_timesteps=STEPS))
    sample, timestep = inputs(2, 1, 16, 16)
    timestep %= STEPS
    with torch.no_grad():
        expected = CourseUNet(model, **course)(sample, timestep)
        torch.testing.assert_close(model(sample, timestep).sample, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_alone_trains_every_parameter_and_changes_the_network(name):
    sample, timestep = inputs()
    torch.manual_seed(0)
    model = OptimizedUNet2DModel(**{**TINY, name: SWITCHES[name]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # the zero-initialized layers open step by step
        optimizer.zero_grad()
        (model(sample, timestep).sample - sample).square().mean().backward()
        optimizer.step()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    dead = [key for key, p in model.named_parameters() if not p.grad.any()]
    # GroupNorm and BatchNorm remove the bias of the convolution before them
    assert not [key for key in dead if not key.endswith("bias")]
    default = make()
    model = make(**{name: SWITCHES[name]})
    shared = {key: value for key, value in default.state_dict().items()
              if key in model.state_dict() and model.state_dict()[key].shape == value.shape}  # fmt: skip
    model.load_state_dict(shared, strict=False)
    with torch.no_grad():
        assert not torch.allclose(model(sample, timestep).sample, default(sample, timestep).sample, atol=1e-3)


@pytest.mark.parametrize("height, width, config", [
    (28, 28, {}),
    (16, 8, {"down_layers_per_block": (0, 2), "up_layers_per_block": (1, 3), "mid_block_layers": 1}),
    (4, 20, {"block_type": "conv", "skip_type": "after_pool", "time_injection": "decoder"}),
])  # fmt: skip
def test_any_size_channels_levels_and_batch(config, height, width):
    model = make(**config, block_out_channels=(4, 8, 8), in_channels=3, out_channels=6, sample_size=None)
    for batch in (1, 3):
        sample, timestep = inputs(batch, 3, height, width)
        assert model(sample, timestep).sample.shape == (batch, 6, height, width)


def test_the_first_prediction_is_zero_and_every_block_starts_as_the_identity():
    sample, timestep = inputs()
    model = OptimizedUNet2DModel(**TINY)
    assert not model(sample, timestep).sample.any()
    block = ResnetBlock(8, 8, "group", 4, "gelu")
    hidden = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(hidden), hidden)


def test_upsampling_starts_as_nearest_neighbour_so_without_a_checkerboard():
    upsample = RearrangeUpsample(6, 3)
    hidden = torch.randn(2, 6, 4, 5)
    with torch.no_grad():
        conv = F.conv2d(hidden, upsample.conv.weight[::4], upsample.conv.bias[::4])
        torch.testing.assert_close(upsample(hidden), F.interpolate(conv, scale_factor=2, mode="nearest"))


def test_most_layers_of_the_default_are_in_the_middle():
    model = OptimizedUNet2DModel()
    assert [len(block.layers) for block in model.down_blocks] == [0, 1]
    assert [len(block.layers) for block in model.up_blocks] == [2, 1]
    assert len(model.mid_block.layers) == 6
    assert OptimizedUNet2DModel.from_config({"_class_name": "OptimizedUNet2DModel"}).config.mid_block_layers == 6


@pytest.mark.parametrize("skip_type, down, up, expected_down, expected_up", [
    ("before_pool", 1, 2, [1, 1, 1], [2, 2, 2]),
    ("before_pool", (0, 2), (1, 3), [0, 2, 2], [3, 3, 1]),
    ("after_pool", (0, 2), (1, 3), [0, 2, 2], [3, 3, 1]),
    ("after_pool", [2, 1, 0, 5], [3, 2, 1, 5], [2, 1, 0], [1, 2, 3]),
])  # fmt: skip
def test_layers_level_by_level(skip_type, down, up, expected_down, expected_up):
    widths = {"before_pool": (8, 16, 16, 16), "after_pool": (8, 8, 16, 16)}[skip_type]
    layers = {"down_layers_per_block": down, "up_layers_per_block": up}
    model = make(**layers, mid_block_layers=3, skip_type=skip_type, block_out_channels=widths)
    assert len(model.mid_block.layers) == 3
    assert [len(block.layers) for block in model.down_blocks] == expected_down
    assert [len(block.layers) for block in model.up_blocks] == expected_up  # the lowest resolution comes first
    sample, timestep = inputs()
    assert model(sample, timestep).sample.shape == sample.shape


def test_a_timestep_may_be_a_number_a_scalar_or_one_a_sample():
    sample, _ = inputs(3)
    model = make()
    forms = (250, 250.0, torch.tensor(250), torch.tensor([250]), torch.full((3,), 250), torch.full((3,), 250.0))
    outputs = [model(sample, form).sample for form in forms]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    assert not torch.allclose(outputs[0], model(sample, 251).sample)
    assert not torch.allclose(outputs[0], model(sample, 250.5).sample)


def test_neighbouring_timesteps_stay_apart_in_bfloat16():
    """bfloat16 rounds 998 and 999 to one number; the features are computed in float32 before."""
    model = make().to(torch.bfloat16)
    sample = inputs()[0].to(torch.bfloat16)
    assert not torch.equal(model(sample, 998).sample, model(sample, 999).sample)


def test_the_output_is_diffusers_or_a_tuple():
    sample, timestep = inputs()
    model = make()
    output, (alone,) = model(sample, timestep), model(sample, timestep, return_dict=False)
    assert type(output) is UNet2DOutput and torch.equal(alone, output.sample)


# errors


@pytest.mark.parametrize("config, message", [
    ({"norm_type": "layer"}, "`norm_type` is 'layer'; it must be one of 'group', 'batch'"),
    ({"act_fn": "swish"}, "`act_fn` is 'swish'"),
    ({"downsample_type": None}, "`downsample_type` is None"),
    ({"global_skip": "no"}, "`global_skip` is 'no'; it must be True or False"),
    ({"skip_type": "none"}, "`skip_type` is 'none'"),
    ({"block_out_channels": (8,)}, r"`block_out_channels` is \(8,\); it must hold at least two widths"),
    ({"block_out_channels": 8}, "`block_out_channels` is 8; it must hold at least two widths"),
    ({"block_out_channels": (8, 0)}, r"`block_out_channels` is \(8, 0\); it must hold positive integers"),
    ({"block_out_channels": (8, 6)}, r"`block_norm_num_groups` is 4; it must divide .* \(8, 6\)"),
    ({"norm_num_groups": 3}, r"`norm_num_groups` is 3; it must divide .* \(8,\)"),
    ({"in_channels": 0}, "`in_channels` is 0; it must be a positive integer"),
    ({"out_channels": 1.0}, "`out_channels` is 1.0; it must be a positive integer"),
    ({"up_layers_per_block": -1}, "`up_layers_per_block` is -1; it must be an integer of at least 1"),
    ({"up_layers_per_block": (1, 0)}, r"`up_layers_per_block` is \(1, 0\); it must be an integer of at least 1"),
    ({"down_layers_per_block": ()}, r"`down_layers_per_block` is \(\); it must .* hold such integers"),
    ({"down_layers_per_block": 0, "skip_type": "after_pool"}, "at each level whose width changes, 8 to 16"),
    ({"mid_block_layers": 0}, "`mid_block_layers` is 0; it must be a positive integer"),
    ({"time_embedding_dim": 7}, "`time_embedding_dim` is 7; it must be even"),
    ({"time_embedding_dim": 2}, "`time_embedding_dim` is 2; it must be even and at least 4"),
    ({"sample_size": 9}, r"`sample_size` is 9; it must be divisible by 2, 2\^\(levels - 1\)"),
    ({"sample_size": (8, 8, 8)}, r"is \(8, 8, 8\); it must be a positive integer or \(height, width\)"),
])  # fmt: skip
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        OptimizedUNet2DModel(**{**TINY, **config})


def test_groups_are_free_where_nothing_is_grouped():
    OptimizedUNet2DModel(**{**TINY, "norm_type": "batch", "norm_num_groups": 3, "block_norm_num_groups": 5})


@pytest.mark.parametrize("sample, timestep, error, message", [
    (torch.zeros(1, 1, 9, 8), 0, ValueError, "`sample` is 9x8; height and width must be divisible by 2"),
    (torch.zeros(1, 3, 8, 8), 0, ValueError, r"`sample` has shape \(1, 3, 8, 8\); it must be \(batch, 1"),
    (torch.zeros(1, 8, 8), 0, ValueError, r"`sample` has shape \(1, 8, 8\)"),
    (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0, TypeError, "`sample` is of torch.uint8"),
    (torch.zeros(4, 1, 8, 8), torch.zeros(3), ValueError, r"`timestep` has shape \(3,\).*\(4,\)"),
    (torch.zeros(4, 1, 8, 8), torch.zeros(4, 1), ValueError, r"`timestep` has shape \(4, 1\)"),
])  # fmt: skip
def test_inputs_that_cannot_work_are_refused(sample, timestep, error, message):
    with pytest.raises(error, match=message):
        make()(sample, timestep)
