"""What diffusers and torch ask of the U-Net: compiled, exported, in other precisions, offloaded, saved and loaded."""

import json
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, randomize

from ddpm_diffusers import OptimizedUNet2DModel

CONFIGS = ROOT / "train_scripts" / "configs"
GUIDE, BASELINE = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("guide", "baseline"))
GUIDE |= {"block_out_channels": (32, 32)}


def make(**config) -> OptimizedUNet2DModel:
    torch.manual_seed(0)
    return randomize(OptimizedUNet2DModel(**{**TINY, **config}))


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(1000, (batch,), generator=generator)


@pytest.mark.parametrize("config", [{}, GUIDE], ids=["default", "guide"])
def test_gradient_checkpointing_gives_the_same_gradients(config):
    sample, timestep = inputs()
    model = make(**config).train()
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: calls.append(block))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        calls.clear()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(sample, timestep).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert [calls.count(block) for block in blocks] == [1 + checkpointing] * len(blocks)  # again, going backward
    torch.testing.assert_close(*gradients)


SHALLOW = {"down_layers_per_block": 1, "up_layers_per_block": 1, "mid_block_layers": 1}


@pytest.mark.parametrize("config", [{}, BASELINE | {"normalize_timesteps": True}], ids=["default", "all else"])
def test_compiles_whole_and_once_for_all_batch_sizes(config):
    torch._dynamo.reset()
    model = make(**config | SHALLOW)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 7):
            sample, timestep = inputs(batch)
            torch.testing.assert_close(compiled(sample, timestep).sample, model(sample, timestep).sample)


def test_exports():
    model = make(**SHALLOW)
    sample, timestep = inputs(3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model,
        (sample, timestep, False),
        dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}, "return_dict": None},
    )
    sample, timestep = inputs(5)
    torch.testing.assert_close(program.module()(sample, timestep, False)[0], model(sample, timestep).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast(dtype):
    sample, timestep = inputs()
    model = make()
    full = model(sample, timestep).sample
    with torch.autocast("cpu", dtype):
        cast = model(sample, timestep).sample
    half = model.to(dtype)(sample.to(dtype), timestep).sample
    assert half.dtype == dtype
    for output in (cast, half):
        assert F.cosine_similarity(output.float().flatten(), full.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("compute_dtype, time", [
    (torch.float32, {}), (torch.bfloat16, {"time_embedding_type": "linear"}),
])  # fmt: skip
def test_layerwise_casting_keeps_norms_and_stays_near(compute_dtype, time):
    sample, timestep = inputs()
    model = make(**time)
    expected = model(sample, timestep).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    assert model.down_blocks[0].layers[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert model.down_blocks[0].layers[0].norm1.weight.dtype == torch.float32
    found = model(sample.to(compute_dtype), timestep).sample.float()
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def test_the_blocks_are_what_must_not_be_split_over_devices():
    model = make(**GUIDE)
    blocks = [model.stem, *model.down_blocks, model.mid_block, *model.up_blocks, model.out_block]
    assert {type(block).__name__ for block in blocks} == set(model._no_split_modules)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offloading(offload_type, tmp_path):
    sample, timestep = inputs()
    model = make()
    expected = model(sample, timestep).sample
    kwargs = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    held = []  # parameters in memory after each block of the middle

    def count(*_):
        held.append(sum(parameter.numel() for parameter in model.parameters() if not parameter.isnan().all()))

    for block in model.mid_block.layers:
        block.register_forward_hook(count)
    torch.use_deterministic_algorithms(True)  # fills the empty tensors that stand for offloaded weights with NaN
    try:
        model.enable_group_offload(
            torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **kwargs
        )
        assert all(parameter.isnan().all() for parameter in model.parameters())
        torch.testing.assert_close(model(sample, timestep).sample, expected)
        assert max(held) < model.num_parameters() / 2  # not the whole middle, which is most of the network
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_repeated_blocks():
    torch._dynamo.reset()
    sample, timestep = inputs()
    model = make(**SHALLOW, block_out_channels=(8, 8, 16))
    expected = model(sample, timestep).sample
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    with torch.no_grad():
        torch.testing.assert_close(model(sample, timestep).sample, expected)


@torch.no_grad()
def test_channels_last_computes_the_same():
    sample, timestep = inputs()
    model = make()
    expected = model(sample, timestep).sample
    model.to(memory_format=torch.channels_last)
    found = model(sample.to(memory_format=torch.channels_last), timestep).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"variant": "fp16"}, {"max_shard_size": "10KB"}])
def test_saved_and_loaded_it_is_the_same_network(tmp_path, kwargs):
    sample, timestep = inputs()
    model = make()
    model.save_pretrained(tmp_path, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OptimizedUNet2DModel.from_pretrained(tmp_path, variant=kwargs.get("variant"))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in kwargs)
    assert torch.equal(loaded(sample, timestep).sample, model(sample, timestep).sample)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"
    }


def test_the_checkpoint_of_an_older_version_still_loads():
    """Names of modules, classes and parameters are part of the format: this folder is never written again."""
    folder = Path(__file__).parent / "checkpoint_v0.1"
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    images = pipe(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    expected = json.loads((folder / "expected.json").read_text())
    torch.testing.assert_close(images.flatten(1)[:, ::7], torch.tensor(expected), atol=1e-3, rtol=0)
