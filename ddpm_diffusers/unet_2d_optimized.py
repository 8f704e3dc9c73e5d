"""The U-Net of the optimizations guide, and what was measured to be better, as one diffusers model.

This file stands alone (torch, einops, diffusers): a copy of it beside the weights makes a Hub repository self-contained.

References: the guide "From Pixelated to Crisp" (cells of its notebook are named below); DDPM, Ho et al. 2020
(arXiv:2006.11239); ADM, Dhariwal and Nichol 2021 (arXiv:2105.05233); pre-norm residuals, He et al. 2016
(arXiv:1603.05027); Group Normalization, Wu and He 2018 (arXiv:1803.08494); GELU, Hendrycks and Gimpel 2016
(arXiv:1606.08415); ICNR, Aitken et al. 2017 (arXiv:1707.02937).
"""

import json
import shutil
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
    "upsample_type": ("rearrange", "conv_transpose"),
}


def make_norm(norm_type: str, channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if norm_type == "group" else nn.BatchNorm2d(channels)


def scale_and_shift(hidden: torch.Tensor, projection: nn.Linear | None, temb: torch.Tensor) -> torch.Tensor:
    """hidden * (1 + scale) + shift, both read off the time embedding (ADM, section 3); hidden itself without one."""
    if projection is None:
        return hidden
    scale, shift = projection(temb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
    return torch.addcmul(shift, hidden, 1 + scale)


class ConvBlock(nn.Module):
    """conv 3x3 - norm - (scale and shift) - act: the guide's GELUConvBlock (cell 12). (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, temb_channels=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = make_norm(norm_type, out_channels, groups)
        self.act = get_activation(act_fn)
        self.time_scale_shift = nn.Linear(temb_channels, 2 * out_channels) if temb_channels else None

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.norm(self.conv(hidden))
        hidden = scale_and_shift(hidden, self.time_scale_shift, temb)
        return self.act(hidden)


class ResnetBlock(nn.Module):
    """input + (norm - act - conv 3x3 - norm - (scale and shift) - act - conv 3x3); starts as the identity.

    Without `residual` the plain stack, then with torch's own initialisation: zeros would block every gradient.
    """

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, temb_channels=None, residual=True):
        super().__init__()
        self.norm1 = make_norm(norm_type, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm_type, out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = get_activation(act_fn)
        self.time_scale_shift = nn.Linear(temb_channels, 2 * out_channels) if temb_channels else None
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


class LinearTimesteps(nn.Module):
    """t/T through a linear layer: time before the guide's change. (B,) -> (B, dim)."""

    def __init__(self, dim, num_train_timesteps):
        super().__init__()
        self.linear = nn.Linear(1, dim)
        self.num_train_timesteps = num_train_timesteps

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        fraction = timesteps.float() / self.num_train_timesteps
        return self.linear(fraction[:, None].to(self.linear.weight.dtype))


class ConvStem(nn.Module):
    """The guide's ResidualConvBlock (cell 31): x1 = conv(x), x2 = conv(x1), x1 + x2; without `residual` x2 alone."""

    def __init__(self, in_channels, out_channels, norm_type, groups, act_fn, residual):
        super().__init__()
        self.conv1 = ConvBlock(in_channels, out_channels, norm_type, groups, act_fn)
        self.conv2 = ConvBlock(out_channels, out_channels, norm_type, groups, act_fn)
        self.residual = residual

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x1 = self.conv1(sample)
        x2 = self.conv2(x1)
        return x1 + x2 if self.residual else x2


class RearrangeUpsample(nn.Module):
    """conv 1x1 to 4 C_out, then depth to space: the inverse of the rearrange pooling. (B, C_in, H, W) -> (B, C_out, 2H, 2W)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 1)
        self.rearrange = Rearrange("b (c p1 p2) h w -> b c (h p1) (w p2)", p1=2, p2=2)
        # ICNR: the four phases of a channel start equal, as nearest-neighbour upsampling, so no checkerboard at the start
        for parameter in (self.conv.weight, self.conv.bias):
            parameter.data = parameter.data[::4].repeat_interleave(4, dim=0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.rearrange(self.conv(hidden))


class DownBlock(nn.Module):
    """Layers at full size, then half the size (guide, cells 17 and 19). (B, C_in, H, W) -> (B, C_out, H/2, W/2)."""

    def __init__(self, layers: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.downsample = downsample

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, temb)
        return self.downsample(hidden)


class MidBlock(nn.Module):
    """Layers at the lowest resolution. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, temb)
        return hidden


class UpBlock(nn.Module):
    """cat(x [+ time], skip), twice the size, then layers. (B, C_in, H, W) twice -> (B, C_out, 2H, 2W)."""

    def __init__(self, upsample: nn.Module, layers: list[nn.Module], time_embedding: nn.Module | None):
        super().__init__()
        self.time_embedding = time_embedding
        self.upsample = upsample
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        if self.time_embedding is not None:
            hidden = hidden + self.time_embedding(temb)[:, :, None, None]  # (B, C, 1, 1)
        hidden = self.upsample(torch.cat([hidden, skip], dim=1))
        for layer in self.layers:
            hidden = layer(hidden, temb)
        return hidden


class OutBlock(nn.Module):
    """The layers given on cat(x, stem): the global skip (guide, cell 34). (B, C, H, W) twice -> (B, out_channels, H, W)."""

    def __init__(self, layers: list[nn.Module], global_skip: bool):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.global_skip = global_skip

    def forward(self, hidden: torch.Tensor, stem: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([hidden, stem], dim=1) if self.global_skip else hidden)


class OptimizedUNet2DModel(ModelMixin, ConfigMixin):
    r"""A small fully convolutional U-Net for denoising diffusion: the guide's five changes, each one argument.

    With all six switches of the guide off it is the guide's "before" (`train_scripts/configs/baseline.json`), with
    `guide.json` its "after", and by default the best network measured here.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 16): Height and width that a pipeline samples
            at. The network itself takes any height and width divisible by 2^(levels - 1).
        in_channels, out_channels (`int`, defaults to 1): Channels of the sample and of the prediction.
        block_out_channels (`tuple[int, ...]`, defaults to `(64, 64, 128)`): Width at each resolution, highest first;
            at least two.
        norm_type (`"group"` | `"batch"`): Guide section "Group Normalization".
        act_fn (`"gelu"` | `"relu"`): Guide section "GELU".
        downsample_type (`"rearrange"` | `"max_pool"`): Space to depth and a convolution, or the maximum of 2x2. Guide
            section "RearrangePooling".
        time_embedding_type (`"sinusoidal"` | `"linear"`): A sinusoid of the timestep, or t/T through a linear layer.
            Guide section "Sinusoidal Position Embeddings".
        residual_blocks (`bool`): `x1 + x2` in the guide's residual block, the identity path in `block_type="resnet"`.
        global_skip (`bool`): `cat(x, stem)` before the output block. Guide section "Residual Connections".
        block_type (`"resnet"` | `"conv"`): Pre-norm residual blocks of two convolutions, or the guide's conv - norm -
            act stack (with a residual stem of two, and a hidden convolution before the output).
        time_injection (`"every_block"` | `"decoder"`): Time as scale and shift after the (second) norm of every block,
            or added to what enters an up block (the guide).
        time_embedding_dim (`int`, even, at least 4): Width of the time features; the guide's is 8.
        normalize_timesteps (`bool`): Divide by `num_train_timesteps` before the sinusoid, as the guide does. Most
            frequencies then hardly turn. The linear embedding always divides.
        upsample_type (`"rearrange"` | `"conv_transpose"`): 1x1 convolution and depth to space, or a transposed 2x2
            convolution of stride 2.
        norm_num_groups (`int`): Groups of the first and last norms.
        block_norm_num_groups (`int`): Groups of the norms inside the down, middle and up blocks.
        down_layers_per_block, up_layers_per_block (`int`): Blocks of `block_type` in a down and in an up block.
        num_train_timesteps (`int`): T of t/T.

    Raises:
        ValueError: If a configuration cannot work; the message names the argument, its value and the rule.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConvStem", "DownBlock", "MidBlock", "UpBlock", "OutBlock"]
    _repeated_blocks = ["ConvBlock", "ResnetBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time"]

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
        upsample_type: str = "rearrange",
        norm_num_groups: int = 8,
        block_norm_num_groups: int = 8,
        down_layers_per_block: int = 1,
        up_layers_per_block: int = 2,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        check_config(self.config)
        channels = tuple(block_out_channels)
        temb_channels = 4 * channels[0] if time_injection == "every_block" else None

        def conv(in_channels, out_channels, temb=None):
            return ConvBlock(in_channels, out_channels, norm_type, block_norm_num_groups, act_fn, temb)

        def layers(in_channels, out_channels, count):
            widths = [in_channels] + [out_channels] * count
            if block_type == "conv":
                return [conv(a, b, temb_channels) for a, b in zip(widths, widths[1:], strict=False)]
            return [
                ResnetBlock(a, b, norm_type, block_norm_num_groups, act_fn, temb_channels, residual_blocks)
                for a, b in zip(widths, widths[1:], strict=False)
            ]

        def downsample(width):
            if downsample_type == "max_pool":
                return nn.MaxPool2d(2)
            rearrange = Rearrange("b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)
            return nn.Sequential(
                rearrange, conv(4 * width, width) if block_type == "conv" else nn.Conv2d(4 * width, width, 1)
            )

        def upsample(in_channels, out_channels):
            if upsample_type == "conv_transpose":
                return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
            return RearrangeUpsample(in_channels, out_channels)

        # time
        if time_embedding_type == "sinusoidal":
            scale = 1 / num_train_timesteps if normalize_timesteps else 1
            self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=scale)
        else:
            self.time_proj = LinearTimesteps(time_embedding_dim, num_train_timesteps)
        self.time_embedding = None
        if time_injection == "every_block":
            self.time_embedding = TimestepEmbedding(time_embedding_dim, temb_channels, act_fn, post_act_fn=act_fn)

        # stem, down, middle
        if block_type == "conv":
            self.stem = ConvStem(in_channels, channels[0], norm_type, norm_num_groups, act_fn, residual_blocks)
        else:
            self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(layers(a, b, down_layers_per_block), downsample(b))
            for a, b in zip(channels, channels[1:], strict=False)
        )
        self.mid_block = MidBlock(layers(channels[-1], channels[-1], 2))

        # up, out
        self.up_blocks = nn.ModuleList()
        for a, b in zip(channels[:0:-1], channels[-2::-1], strict=True):
            embedding = TimestepEmbedding(time_embedding_dim, a, act_fn) if time_injection == "decoder" else None
            self.up_blocks.append(UpBlock(upsample(2 * a, b), layers(b, b, up_layers_per_block), embedding))
        width = 2 * channels[0] if global_skip else channels[0]
        out = [nn.Conv2d(width, channels[0], 3, padding=1)] if block_type == "conv" else []
        width = channels[0] if out else width
        out += [make_norm(norm_type, width, norm_num_groups), get_activation(act_fn)]
        out += [nn.Conv2d(width, out_channels, 3, padding=1)]
        if block_type == "resnet":  # the first prediction is 0, so the loss starts at the target's variance
            nn.init.zeros_(out[-1].weight)
            nn.init.zeros_(out[-1].bias)
        self.out_block = OutBlock(out, global_skip)

        self.gradient_checkpointing = False

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float | int, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict what the noise schedule asks for (noise, image or velocity).

        Args:
            sample: Noisy images, (B, in_channels, H, W), floating point; H and W divisible by 2^(levels - 1).
            timestep: In [0, num_train_timesteps), fractions allowed: a number, a 0-d tensor, or one a sample, (B,).
            return_dict: `UNet2DOutput` if true, else a tuple of one tensor.

        Returns:
            The prediction, (B, out_channels, H, W).

        Raises:
            ValueError: On a wrong rank, channel count, height, width or number of timesteps.
            TypeError: On a sample that is not floating point.
        """
        check_sample(sample, self.config.in_channels, 2 ** len(self.down_blocks))
        timestep = torch.as_tensor(timestep, device=sample.device)
        if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, sample.shape[0])):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}; it must be a number or hold one value a sample,"
                f" ({sample.shape[0]},)."
            )
        timestep = timestep.expand(sample.shape[0])  # (B,)

        # features in float32 whatever the weights: bfloat16 cannot tell neighbouring timesteps apart
        temb = self.time_proj(timestep).to(sample.dtype)  # (B, time_embedding_dim)
        if self.time_embedding is not None:
            temb = self.time_embedding(temb)  # (B, temb_channels)

        run = self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else call
        hidden = stem = self.stem(sample)  # (B, C0, H, W)
        skips = []
        for block in self.down_blocks:
            hidden = run(block, hidden, temb)
            skips.append(hidden)
        hidden = run(self.mid_block, hidden, temb)
        for block in self.up_blocks:
            hidden = run(block, hidden, skips.pop(), temb)
        hidden = self.out_block(hidden, stem)  # (B, out_channels, H, W)

        return UNet2DOutput(sample=hidden) if return_dict else (hidden,)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `config.json` and, beside it, this file, so that the folder loads where the package is not installed."""
        if type(self).__module__ == __name__:  # a user's subclass is not in this file
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, Path(save_directory) / f"{__name__.rpartition('.')[2]}.py")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, without `_name_or_path`, which would publish a path of this machine."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def call(block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    return block(*args)


def check_config(config) -> None:
    """ValueError with argument, value and rule for what cannot work."""
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise ValueError(f"`{name}` is {config[name]!r}; it must be one of {', '.join(map(repr, choices))}.")
    channels = config["block_out_channels"]
    if not isinstance(channels, (tuple, list)) or len(channels) < 2:
        raise ValueError(f"`block_out_channels` is {channels!r}; it must hold at least two widths, one a resolution.")
    positive = {f"block_out_channels[{i}]": width for i, width in enumerate(channels)}
    names = ("in_channels", "out_channels", "time_embedding_dim", "norm_num_groups", "block_norm_num_groups")
    names += ("down_layers_per_block", "up_layers_per_block", "num_train_timesteps")
    positive |= {name: config[name] for name in names}
    size = config["sample_size"]
    if size is not None:
        positive |= (
            {"sample_size": size}
            if not isinstance(size, (tuple, list))
            else {f"sample_size[{i}]": side for i, side in enumerate(size)}
        )
    for name, value in positive.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a positive integer.")
    if isinstance(size, (tuple, list)) and len(size) != 2:
        raise ValueError(f"`sample_size` is {size!r}; it must be one side or (height, width).")
    factor = 2 ** (len(channels) - 1)
    sides = [] if size is None else size if isinstance(size, (tuple, list)) else [size]
    if any(side % factor for side in sides):
        raise ValueError(
            f"`sample_size` is {size!r}; height and width must be divisible by {factor}, 2^(levels - 1) for the"
            f" {len(channels)} levels of `block_out_channels`."
        )
    if config["time_embedding_dim"] % 2 or config["time_embedding_dim"] < 4:
        raise ValueError(f"`time_embedding_dim` is {config['time_embedding_dim']}; it must be even and at least 4.")
    if config["norm_type"] == "group":
        groups = {"norm_num_groups": channels[:1], "block_norm_num_groups": channels}
        for name, widths in groups.items():
            for width in widths:
                if width % config[name]:
                    raise ValueError(
                        f"`{name}` is {config[name]}; it must divide every width it normalizes, and"
                        f" `block_out_channels` {tuple(channels)} holds {width}."
                    )


def check_sample(sample: torch.Tensor, in_channels: int, factor: int) -> None:
    if not torch.is_floating_point(sample):
        raise TypeError(f"`sample` is of {sample.dtype}; it must be floating point: images scaled to [-1, 1], noised.")
    if sample.ndim != 4 or sample.shape[1] != in_channels:
        raise ValueError(
            f"`sample` has shape {tuple(sample.shape)}; it must be (batch, {in_channels}, height, width), {in_channels}"
            " being the model's `in_channels`."
        )
    if sample.shape[2] % factor or sample.shape[3] % factor:
        raise ValueError(
            f"`sample` is {sample.shape[2]}x{sample.shape[3]}; height and width must be divisible by {factor},"
            " 2^(levels - 1): pad or resize it."
        )
