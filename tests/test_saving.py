"""The pipeline saved, with the code that runs and no path of this machine, and made from others."""

import copy
import importlib
import sys

import diffusers
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline, UNet2DModel

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.hub import pipeline_files


def test_a_subclass_with_an_optional_component_can_be_saved(tiny_pipe, tmp_path):
    class WithExtra(PixelDiffusionPipeline):
        _optional_components = ["extra"]

        def __init__(self, unet, scheduler, extra=None):
            super().__init__(unet, scheduler)
            self.register_modules(extra=extra)

    WithExtra(tiny_pipe.unet, tiny_pipe.scheduler).save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "unet_2d_optimized.py").is_file()
    assert not (tmp_path / "pipeline_pixel_diffusion.py").exists()


def test_a_network_set_in_place_of_none_is_saved_and_none_is_not_pushed(tiny_pipe, tmp_path):
    unet = tiny_pipe.unet
    tiny_pipe.save_pretrained(tmp_path / "whole")
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "whole", unet=None)
    with pytest.raises(ValueError, match="has no `unet` to push"):
        pipe.push_to_hub("user/empty", token="hf_token")
    with pytest.raises(ValueError, match="has no `unet` to sample: set `pipe.unet` first"):
        pipe()
    with pytest.raises(ValueError, match="was saved without its `unet`"):
        pipe.save_pretrained(tmp_path / "empty")
        pipeline_files(tmp_path / "empty")
    pipe.unet = unet
    pipe.save_pretrained(tmp_path / "set")
    loaded = PixelDiffusionPipeline.from_pretrained(tmp_path / "set").unet
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in unet.state_dict().items())


def test_what_is_saved_names_no_path_of_this_machine(tmp_path):
    stock = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(8, 1, 1, norm_num_groups=4, **stock)
    PixelDiffusionPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "first")
    PixelDiffusionPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    saved = [path for path in (tmp_path / "second").rglob("*") if path.is_file()]
    assert saved and not [path for path in saved if str(tmp_path).encode() in path.read_bytes()]
    again = PixelDiffusionPipeline.from_pretrained(tmp_path / "second")
    assert again.unet.config.block_out_channels == [8]


def test_a_card_of_weights_that_are_replaced_is_set_aside(tiny_pipe, tmp_path, caplog):
    def save(**kwargs) -> set[str]:
        tiny_pipe.save_pretrained(tmp_path, **kwargs)
        return {path.name for path in tmp_path.iterdir() if "md" in path.name or "png" in path.name}

    save()
    (tmp_path / "README.md").write_text("Its distance is 0.1.")
    (tmp_path / "samples.png").write_bytes(b"made by it")
    assert save() == save(variant="fp16") == {"README.md", "samples.png"}  # the same weights
    with torch.no_grad():
        next(tiny_pipe.unet.parameters()).add_(1)
    assert save() == {"README.before.md", "samples.before.png"}
    assert (tmp_path / "README.before.md").read_text() == "Its distance is 0.1."
    assert "README.md is of the networks that are replaced now" in caplog.text
    (tmp_path / "samples.png").write_bytes(b"made by these")
    with torch.no_grad():
        next(tiny_pipe.unet.parameters()).add_(1)
    assert save() == {"README.before.md", "samples.before.png", "samples.before1.png"}


def test_the_same_weights_in_another_precision_keep_their_card(tiny_pipe, tmp_path):
    (tmp_path / "README.md").write_text("Its distance is 0.1.")
    half = PixelDiffusionPipeline(tiny_pipe.unet, tiny_pipe.scheduler)
    half.unet = copy.deepcopy(tiny_pipe.unet).half()
    for pipe, kwargs in ((half, {"variant": "fp16"}), (tiny_pipe, {}), (half, {"variant": "fp16"}), (half, {})):
        pipe.save_pretrained(tmp_path, **kwargs)
    assert (tmp_path / "README.md").exists()


def test_the_card_of_a_folder_goes_along_whatever_its_name(tiny_pipe, tmp_path):
    source = tmp_path / "models--user--name" / "snapshots" / "revision"  # as `snapshot_download` names it
    tiny_pipe.save_pretrained(source)
    (source / "README.md").write_text("Its distance is 0.1.")
    PixelDiffusionPipeline.from_pretrained(source).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "Its distance is 0.1."


def test_a_card_that_cannot_be_read_is_told(tiny_pipe, tmp_path, caplog):
    tiny_pipe.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").mkdir()
    PixelDiffusionPipeline.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "README.md").exists() and "was not copied: IsADirectoryError" in caplog.text


def test_weights_that_stay_beside_others_keep_their_card_until_they_are_replaced(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("Its distance is 0.1.")
    with torch.no_grad():
        next(tiny_pipe.unet.parameters()).add_(1)
    for kwargs in ({"variant": "non_ema"}, {"safe_serialization": False}):
        tiny_pipe.save_pretrained(tmp_path, **kwargs)
        assert (tmp_path / "README.md").exists()
    tiny_pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_pickles_cannot_be_compared_so_their_card_does_not_go_along(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    (tmp_path / "pickled" / "README.md").write_text("Its distance is 0.1.")
    loaded = PixelDiffusionPipeline.from_pretrained(tmp_path / "pickled")
    loaded.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "README.md").exists()
    loaded.save_pretrained(tmp_path / "pickled")
    assert (tmp_path / "pickled" / "README.before.md").exists()


@pytest.mark.parametrize("network", ["ours", "stock"])
def test_from_pipe_takes_a_network_of_any_class(tiny_pipe, network):
    if network == "stock":
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        tiny_pipe.unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    stock = DDPMPipeline(tiny_pipe.unet, tiny_pipe.scheduler)
    ddim = make_scheduler("ddim", tiny_pipe.scheduler)
    for pipe in (PixelDiffusionPipeline.from_pipe(stock), PixelDiffusionPipeline.from_pipe(tiny_pipe, scheduler=ddim)):
        assert type(pipe) is PixelDiffusionPipeline and pipe.unet is tiny_pipe.unet
    assert pipe.scheduler is ddim and tiny_pipe.scheduler is stock.scheduler
    transformer = diffusers.DiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, norm_num_groups=4)
    other = diffusers.DiTPipeline(transformer, diffusers.AutoencoderKL(), tiny_pipe.scheduler)  # it has no `unet`
    assert PixelDiffusionPipeline.from_pipe(other, unet=tiny_pipe.unet).unet is tiny_pipe.unet


CUSTOM = """
from diffusers import DiffusionPipeline


class Custom(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
"""


def test_from_pipe_takes_a_custom_pipeline_that_knows_no_guidance(tiny_pipe, tmp_path):
    (tmp_path / "custom.py").write_text(CUSTOM)
    custom = PixelDiffusionPipeline.from_pipe(
        tiny_pipe, custom_pipeline=str(tmp_path / "custom.py"), trust_remote_code=True
    )
    assert type(custom).__name__ == "Custom" and custom.unet is tiny_pipe.unet


@pytest.mark.parametrize("name, class_name", [
    ("pipeline_pixel_diffusion", "PixelDiffusionPipeline"), ("unet_2d_optimized", "OptimizedUNet2DModel"),
])  # fmt: skip
def test_the_code_that_is_saved_is_what_runs(tiny_pipe, tmp_path, monkeypatch, name, class_name):
    code = (ROOT / "ddpm_diffusers" / f"{name}.py").read_text()
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    copied = getattr(importlib.import_module(name), class_name)
    file.write_text("changed while it ran")
    made = copied(**tiny_pipe.components) if class_name == "PixelDiffusionPipeline" else copied()
    made.save_config(tmp_path / "saved")
    assert (tmp_path / "saved" / f"{name}.py").read_text() == code
    made.save_config(tmp_path)  # beside itself
    assert file.read_text() == code
    del sys.modules[name]
