"""The U-Net of the optimizations guide, and what was measured to be better, as one diffusers model.

This file is self-contained (it needs torch, einops and diffusers): with a copy of it beside the weights, the Hub
repository of a pipeline is complete.

The classes of the guide "From Pixelated to Crisp", by the cell of its notebook, and what they are here: 12
GELUConvBlock is `ConvBlock`; 17 RearrangePoolBlock is made by `pool` in the model; 19 DownBlock is `DownBlock`; 25
SinusoidalPositionEmbedBlock is diffusers' `Timesteps`; 31 ResidualConvBlock is `ConvStem`; 34 UNet is
`OptimizedUNet2DModel`, whose `stem` makes its down0. What it calls group size is a number of groups.

References: DDPM, Ho et al. 2020 (arXiv:2006.11239); ADM, Dhariwal and Nichol 2021 (arXiv:2105.05233); pre-norm
residuals, He et al. 2016 (arXiv:1603.05027); Group Normalization, Wu and He 2018 (arXiv:1803.08494); GELU, Hendrycks
and Gimpel 2016 (arXiv:1606.08415); ICNR, Aitken et al. 2017 (arXiv:1707.02937).
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from einops.layers.torch import Rearrange
from torch import nn

CHOICES = {
    "norm_type": ("group", "batch"),
    "act_fn": ("gelu", "relu"),
    "downsample_type": ("rearrange", "max_pool"),
    "time_embedding_type": ("sinusoidal", "linear"),
    "block_type": ("resnet", "conv"),
    "time_injection": ("every_block", "decoder"),
    "skip_type": ("before_pool", "after_pool"),
    "upsample_type": ("rearrange", "conv_transpose"),
}


def make_norm(norm_type: str, channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if norm_type == "group" else nn.BatchNorm2d(channels)


def scale_and_shift(hidden: torch.Tensor, projection: nn.Linear | None, temb: torch.Tensor) -> torch.Tensor:
    """hidden * (1 + scale) + shift, both projected from temb (ADM, section 3); hidden itself without `projection`."""
    if projection is None:
        return hidden
    scale, shift = projection(temb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
    return torch.addcmul(shift, hidden, 1 + scale)


class ConvBlock(nn.Module):
    """conv 3x3 - norm - (scale and shift) - act, the guide's GELUConvBlock (cell 12).

    (B, C_in, H, W) -> (B, C_out, H, W).
    """

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, temb_channels=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = make_norm(norm_type, out_channels, groups)
        self.time_scale_shift = nn.Linear(temb_channels, 2 * out_channels) if temb_channels else None
        self.act = get_activation(act_fn)

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.norm(self.conv(hidden))
        hidden = scale_and_shift(hidden, self.time_scale_shift, temb)
        return self.act(hidden)


class ResnetBlock(nn.Module):
    """input + (norm - act - conv 3x3 - norm - (scale and shift) - act - conv 3x3). (B, C_in, H, W) -> (B, C_out, H, W)

    It starts as the identity, or, where the width changes, as a 1x1 convolution. Without `residual`, the plain stack,
    whose last convolution keeps torch's initialization: zeros would block every gradient.
    """

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, temb_channels=None, residual=True):
        super().__init__()
        self.norm1 = make_norm(norm_type, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm_type, out_channels, groups)
        self.time_scale_shift = nn.Linear(temb_channels, 2 * out_channels) if temb_channels else None
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = get_activation(act_fn)
        self.residual = residual
        if residual:
            self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        branch = self.conv1(self.act(self.norm1(hidden)))
        branch = scale_and_shift(self.norm2(branch), self.time_scale_shift, temb)
        branch = self.conv2(self.act(branch))
        return self.shortcut(hidden) + branch if self.residual else branch


class ConvStem(nn.Module):
    """The guide's ResidualConvBlock (cell 31): x1 = conv(x), x2 = conv(x1), x1 + x2; without `residual`, x2 alone."""

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, residual):
        super().__init__()
        self.conv1 = ConvBlock(in_channels, out_channels, norm_type, groups, act_fn)
        self.conv2 = ConvBlock(out_channels, out_channels, norm_type, groups, act_fn)
        self.residual = residual

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x1 = self.conv1(sample)
        x2 = self.conv2(x1)
        return x1 + x2 if self.residual else x2


class LinearTimesteps(nn.Module):
    """t/T through a linear layer: the time features before the guide's change. (B,) -> (B, dim).

    In bfloat16, as under autocast, t/T near 1 is rounded to multiples of 1/256, each of which then stands for about
    four of 1,000 timesteps.
    """

    def __init__(self, dim, num_train_timesteps):
        super().__init__()
        self.linear = nn.Linear(1, dim)
        self.num_train_timesteps = num_train_timesteps

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        fraction = timesteps.float()[:, None] / self.num_train_timesteps
        return self.linear(fraction.to(self.linear.bias.dtype))  # the weights' may be an integer's, if quantized


class RearrangeUpsample(nn.Module):
    """conv 1x1 to 4 C_out, then depth to space, the inverse of the rearrange pooling.

    (B, C_in, H, W) -> (B, C_out, 2H, 2W).
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 1)
        self.rearrange = Rearrange("b (c p1 p2) h w -> b c (h p1) (w p2)", p1=2, p2=2)
        # ICNR: the four phases of a channel start equal, as in nearest-neighbour upsampling, to avoid a checkerboard
        for parameter in (self.conv.weight, self.conv.bias):
            parameter.data = parameter.data[::4].repeat_interleave(4, dim=0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.rearrange(self.conv(hidden))


class DownBlock(nn.Module):
    """Layers, then pooling (guide, cell 19). (B, C_in, H, W) -> (B, C_out, H/2, W/2) and the skip connection."""

    def __init__(self, layers: list[nn.Module], pool: nn.Module, skip_type: str):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pool = pool
        self.skip_type = skip_type

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden = layer(hidden, temb)
        pooled = self.pool(hidden)
        skip = hidden if self.skip_type == "before_pool" else pooled
        return pooled, skip


class MidBlock(nn.Module):
    """Layers at the lowest resolution. (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, temb)
        return hidden


class UpBlock(nn.Module):
    """Upsampling, with the skip connection concatenated at its own resolution, then layers.

    (B, C_in, H, W) and the skip, (B, C_out, 2H, 2W) or, with "after_pool", (B, C_in, H, W) -> (B, C_out, 2H, 2W).
    """

    def __init__(self, upsample: nn.Module, layers: list[nn.Module], skip_type: str, time_embedding: nn.Module | None):
        super().__init__()
        self.time_embedding = time_embedding
        self.upsample = upsample
        self.layers = nn.ModuleList(layers)
        self.skip_type = skip_type

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if self.time_embedding is not None:
            hidden = hidden + self.time_embedding(temb)[:, :, None, None]  # (B, C, 1, 1)
        if self.skip_type == "after_pool":
            hidden = self.upsample(torch.cat([hidden, skip], dim=1))
        else:
            hidden = torch.cat([self.upsample(hidden), skip], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, temb)
        return hidden


class OutBlock(nn.Module):
    """norm - act - conv 3x3 on cat(hidden, stem), the global skip (guide, cell 34), or on hidden alone.

    In the guide's network another conv 3x3 comes before. (B, C, H, W) each -> (B, out_channels, H, W).
    """

    def __init__(self, layers: list[nn.Module], global_skip: bool):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.global_skip = global_skip

    def forward(self, hidden: torch.Tensor, stem: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([hidden, stem], dim=1) if self.global_skip else hidden)


class OptimizedUNet2DModel(ModelMixin, ConfigMixin):
    r"""A small fully convolutional U-Net for denoising diffusion, with the guide's five changes as six switches.

    `train_scripts/configs/baseline.json`, with all six off, is the guide's "before", `guide.json` its "after"; the
    defaults are the cheapest of the networks that were measured to come closest to real images.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*): Height and width of a pipeline's samples. The network
            accepts any that are divisible by 2^(levels - 1).
        in_channels, out_channels (`int`): Channels of the sample and of the prediction.
        block_out_channels (`tuple[int, ...]`): Channels at each level, highest resolution first; at least two levels.
        norm_type (`"group"` | `"batch"`): Guide section "Group Normalization". Not `"batch"` together with gradient
            checkpointing, which would update its running statistics twice a step.
        act_fn (`"gelu"` | `"relu"`): Guide section "GELU".
        downsample_type (`"rearrange"` | `"max_pool"`): Space to depth and a convolution, or 2x2 max pooling. Guide
            section "RearrangePooling".
        time_embedding_type (`"sinusoidal"` | `"linear"`): A sinusoid of t, or t/T through a linear layer. Guide
            section "Sinusoidal Position Embeddings".
        residual_blocks (`bool`): `x1 + x2` in the stem of `block_type="conv"`, or the identity paths of `"resnet"`.
        global_skip (`bool`): `cat(x, stem)` before the output. Guide section "Residual Connections".
        block_type (`"resnet"` | `"conv"`): Pre-norm residual blocks of two convolutions, or the guide's conv - norm -
            act stack with a stem of two of them and a hidden convolution before the output.
        time_injection (`"every_block"` | `"decoder"`): Time as scale and shift after the (second) norm of every block,
            or, as in the guide, added to the input of each up block.
        time_embedding_dim (`int`): Width of the time features, even and at least 4; 8 in the guide.
        normalize_timesteps (`bool`): Divide t by T before the sinusoid, as the guide does; most of its sinusoids
            then hardly vary. The linear embedding always divides.
        skip_type (`"before_pool"` | `"after_pool"`): Skip connections at the resolution of the layers that made them,
            or, as in the guide, pooled and concatenated before the upsampling.
        upsample_type (`"rearrange"` | `"conv_transpose"`): 1x1 convolution and depth to space, or a transposed 2x2
            convolution of stride 2.
        norm_num_groups (`int`): Groups of the norms before the output and in the guide's stem, not of the blocks.
        block_norm_num_groups (`int`): Groups of the norms in the blocks; 32 in the guide.
        down_layers_per_block, up_layers_per_block (`int` or `tuple[int, ...]`): Blocks of `block_type` on the way
            down and up: one number for all levels, or one per level, highest resolution first. The last number also
            applies to all levels below; excess numbers are ignored. Down, a level that keeps the width may have 0.
        mid_block_layers (`int`): Blocks at the lowest resolution; 2 in the guide.
        num_train_timesteps (`int`): Number of training timesteps, T, by which `"linear"` and `normalize_timesteps`
            divide.

    Raises:
        ValueError: If the configuration is invalid; the message names argument, value and rule.
    """

    _code = Path(__file__).read_bytes()  # as it runs; by the time of saving, the file may be another
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConvStem", "DownBlock", "MidBlock", "UpBlock", "OutBlock"]  # one device each (`device_map`)
    _repeated_blocks = ["DownBlock", "MidBlock", "UpBlock"]  # what `compile_repeated_blocks` compiles
    _group_offload_block_modules = ["mid_block"]  # which `enable_group_offload` looks for blocks in, beside lists
    _skip_layerwise_casting_patterns = ["norm", "time_proj"]  # what `enable_layerwise_casting` does not cast

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 16,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (64, 64, 128),
        norm_type: str = "group",
        act_fn: str = "gelu",
        downsample_type: str = "rearrange",
        time_embedding_type: str = "sinusoidal",
        residual_blocks: bool = True,
        global_skip: bool = True,
        block_type: str = "resnet",
        time_injection: str = "every_block",
        time_embedding_dim: int = 64,
        normalize_timesteps: bool = False,
        skip_type: str = "before_pool",
        upsample_type: str = "rearrange",
        norm_num_groups: int = 8,
        block_norm_num_groups: int = 8,
        down_layers_per_block: int | tuple[int, ...] = (0, 1),
        up_layers_per_block: int | tuple[int, ...] = (1, 2),
        mid_block_layers: int = 6,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        check_config(self.config)
        self.gradient_checkpointing = False
        temb_channels = 4 * block_out_channels[0] if time_injection == "every_block" else None

        def layers(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
            args = (norm_type, block_norm_num_groups, act_fn, temb_channels)
            widths = [in_channels] + [out_channels] * count
            if block_type == "conv":
                return [ConvBlock(a, b, *args) for a, b in pairwise(widths)]
            return [ResnetBlock(a, b, *args, residual_blocks) for a, b in pairwise(widths)]

        def pool(channels: int) -> nn.Module:  # halves height and width
            if downsample_type == "max_pool":
                return nn.MaxPool2d(2)
            if block_type == "conv":
                conv = ConvBlock(4 * channels, channels, norm_type, block_norm_num_groups, act_fn)
            else:
                conv = nn.Conv2d(4 * channels, channels, 1)
            return nn.Sequential(Rearrange("b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2), conv)

        def upsample(in_channels: int, out_channels: int) -> nn.Module:
            if upsample_type == "conv_transpose":
                return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
            return RearrangeUpsample(in_channels, out_channels)

        # time
        if time_embedding_type == "linear":
            self.time_proj = LinearTimesteps(time_embedding_dim, num_train_timesteps)
        else:  # sines, then cosines, of t (or t/T) times 10000^(-i / (dim / 2 - 1))
            scale = 1 / num_train_timesteps if normalize_timesteps else 1
            self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=scale)
        self.time_embedding = None
        if time_injection == "every_block":
            self.time_embedding = TimestepEmbedding(time_embedding_dim, temb_channels, act_fn, post_act_fn=act_fn)

        # stem
        first = block_out_channels[0]
        if block_type == "conv":
            self.stem = ConvStem(in_channels, first, norm_type, norm_num_groups, act_fn, residual_blocks)
        else:
            self.stem = nn.Conv2d(in_channels, first, 3, padding=1)

        # down: with "after_pool", as in the guide, the layers of a level output the channels of the level below;
        # with "before_pool", those of their own level
        widths = block_out_channels[1:] if skip_type == "after_pool" else block_out_channels[:-1]
        self.down_blocks = nn.ModuleList()
        previous = first
        counts = layers_by_level(down_layers_per_block, len(widths))
        for width, count in zip(widths, counts, strict=True):
            self.down_blocks.append(DownBlock(layers(previous, width, count), pool(width), skip_type))
            previous = width

        # middle
        last = block_out_channels[-1]
        self.mid_block = MidBlock(layers(previous, last, mid_block_layers))

        # up, lowest resolution first: from the channels of the level `below` to those of the level
        self.up_blocks = nn.ModuleList()
        counts = layers_by_level(up_layers_per_block, len(widths))
        levels = list(zip(block_out_channels[1:], block_out_channels[:-1], counts, strict=True))
        for below, width, count in reversed(levels):
            embedding = TimestepEmbedding(time_embedding_dim, below, act_fn) if time_injection == "decoder" else None
            if skip_type == "after_pool":  # the skip is concatenated, then both are upsampled
                block = UpBlock(upsample(2 * below, width), layers(width, width, count), skip_type, embedding)
            else:  # upsampled, then the skip is concatenated
                block = UpBlock(upsample(below, width), layers(2 * width, width, count), skip_type, embedding)
            self.up_blocks.append(block)

        # out
        width = 2 * first if global_skip else first
        out = []
        if block_type == "conv":
            out, width = [nn.Conv2d(width, first, 3, padding=1)], first
        out += [make_norm(norm_type, width, norm_num_groups), get_activation(act_fn)]
        out += [nn.Conv2d(width, out_channels, 3, padding=1)]
        if block_type == "resnet":  # the first prediction is 0, so the loss starts at the mean square of its target
            nn.init.zeros_(out[-1].weight)
            nn.init.zeros_(out[-1].bias)
        self.out_block = OutBlock(out, global_skip)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict noise, image or velocity, whichever the network was trained for.

        Args:
            sample: Noisy images, (B, in_channels, H, W), floating point; H and W divisible by 2^(levels - 1).
            timestep: In [0, num_train_timesteps), fractions allowed: a number, a 0-d tensor, or one per sample, (B,).
            return_dict: Whether to return a `UNet2DOutput` instead of a tuple.

        Returns:
            The prediction, (B, out_channels, H, W).

        Raises:
            ValueError: If rank, channel count, height, width or number of timesteps is wrong.
            TypeError: If the sample is not floating point.
        """
        timestep = torch.as_tensor(timestep, device=sample.device)
        check_inputs(sample, timestep, self.config.in_channels, 2 ** len(self.down_blocks))

        # sinusoids in float32 whatever the weights' dtype: bfloat16 cannot tell neighbouring timesteps apart
        temb = self.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype)  # (B, time_embedding_dim)
        if self.time_embedding is not None:
            temb = self.time_embedding(temb)  # (B, temb_channels)

        checkpoint = self.gradient_checkpointing and torch.is_grad_enabled()
        run = self._gradient_checkpointing_func if checkpoint else lambda block, *args: block(*args)

        hidden = stem = self.stem(sample)  # (B, C0, H, W)
        skips = []
        for block in self.down_blocks:
            hidden, skip = run(block, hidden, temb)
            skips.append(skip)
        hidden = run(self.mid_block, hidden, temb)
        for block in self.up_blocks:
            hidden = run(block, hidden, skips.pop(), temb)
        sample = self.out_block(hidden, stem)  # (B, out_channels, H, W)

        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `config.json`, and this file: then a `PixelDiffusionPipeline` with it loads without the package."""
        if type(self).__module__ == __name__:  # a user's subclass is not in this file
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            Path(save_directory, f"{__name__.rpartition('.')[2]}.py").write_bytes(self._code)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, without `_name_or_path`, which would publish a path of this machine."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def layers_by_level(layers_per_block: int | tuple[int, ...], levels: int) -> list[int]:
    """One number per level; the last one given also applies to all levels below it."""
    counts = [layers_per_block] if isinstance(layers_per_block, int) else list(layers_per_block)
    return (counts + counts[-1:] * levels)[:levels]


def check_config(config: dict) -> None:
    """Raise a ValueError that names argument, value and rule if the configuration is invalid."""

    def check(condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise ValueError(f"`{name}` is {config[name]!r}; it must {rule}.")

    def whole(*values, least: int = 1) -> bool:
        return all(isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values)

    for name, choices in CHOICES.items():
        check(config[name] in choices, name, f"be one of {', '.join(map(repr, choices))}")
    for name in ("in_channels", "out_channels", "time_embedding_dim", "norm_num_groups", "block_norm_num_groups",
                 "mid_block_layers", "num_train_timesteps"):  # fmt: skip
        check(whole(config[name]), name, "be a positive integer")
    for name in ("residual_blocks", "global_skip", "normalize_timesteps"):
        check(isinstance(config[name], bool), name, "be True or False")
    dim = config["time_embedding_dim"]
    check(dim % 2 == 0 and dim >= 4, "time_embedding_dim", "be even and at least 4")

    widths, size = config["block_out_channels"], config["sample_size"]
    is_sequence = isinstance(widths, (tuple, list))
    check(is_sequence and len(widths) > 1, "block_out_channels", "hold at least two widths, one per level")
    check(whole(*widths), "block_out_channels", "hold positive integers")
    factor = 2 ** (len(widths) - 1)
    if size is not None:
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        check(len(sides) == 2 and whole(*sides), "sample_size", "be a positive integer or (height, width)")
        rule = f"be divisible by {factor}, 2^(levels - 1) with the {len(widths)} levels of `block_out_channels`"
        check(sides[0] % factor == 0 and sides[1] % factor == 0, "sample_size", rule)
    for name, least in (("down_layers_per_block", 0), ("up_layers_per_block", 1)):
        counts = config[name] if isinstance(config[name], (tuple, list)) else [config[name]]
        rule = f"be an integer of at least {least}, or hold such integers, the highest resolution first"
        check(len(counts) > 0 and whole(*counts, least=least), name, rule)
    leaving = widths[1:] if config["skip_type"] == "after_pool" else widths[:-1]  # after the layers of each level
    entering = (widths[0], *leaving[:-1])  # before them: the stem's, then those of the level above
    counts = layers_by_level(config["down_layers_per_block"], len(leaving))
    for entered, left, count in zip(entering, leaving, counts, strict=True):
        check(count > 0 or entered == left, "down_layers_per_block",
              f"be at least 1 at each level whose width changes, {entered} to {left}")  # fmt: skip
    if config["norm_type"] == "group":
        for name, normalized in (("norm_num_groups", widths[:1]), ("block_norm_num_groups", widths)):
            rule = f"divide the widths that it normalizes, {tuple(normalized)} of `block_out_channels`"
            check(all(width % config[name] == 0 for width in normalized), name, rule)


def check_inputs(sample: torch.Tensor, timestep: torch.Tensor, in_channels: int, factor: int) -> None:
    if not torch.is_floating_point(sample):
        raise TypeError(f"`sample` is of {sample.dtype}; it must be floating point: images in [-1, 1], noised.")
    if sample.ndim != 4 or sample.shape[1] != in_channels:
        shape = tuple(sample.shape)
        raise ValueError(
            f"`sample` has shape {shape}; it must be (batch, {in_channels} `in_channels`, height, width)."
        )
    if sample.shape[2] % factor or sample.shape[3] % factor:
        raise ValueError(
            f"`sample` is {sample.shape[2]}x{sample.shape[3]}; height and width must be divisible by {factor},"
            " 2^(levels - 1): resize or pad it."
        )
    if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, sample.shape[0])):
        raise ValueError(
            f"`timestep` has shape {tuple(timestep.shape)}; it must be a number or hold one per sample,"
            f" ({sample.shape[0]},)."
        )
