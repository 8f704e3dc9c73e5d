"""Checkpoints: exact to the bit, without pickle, damaged ones passed over, those of another run refused."""

import gc
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS
from safetensors import safe_open
from toy_training import Run

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.checkpointing import list_checkpoints, resolve_checkpoint


def assert_same(first, second):
    torch.testing.assert_close(first.everything(), second.everything(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "with_ema"),
    [("adamw", True), ("adamw", False), ("amsgrad", True), ("muon", True), ("momentum", True), ("stateless", True)],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(optimizer, with_ema, tmp_path):
    uninterrupted = Run(0, optimizer, with_ema).train(6)
    saving = Run(0, optimizer, with_ema).train(3)
    path = saving.save(tmp_path)
    resumed = Run(1, optimizer, with_ema).train(1)  # other weights, moments and position, all to be replaced
    assert resumed.load(path)["note"] == "kept"
    assert_same(resumed, saving)
    assert_same(resumed.train(3), uninterrupted)
    assert_same(saving.train(3), uninterrupted)  # saving itself changes nothing


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped shows on Linux alone")
def test_nothing_stays_mapped_of_a_checkpoint_that_may_be_deleted(tmp_path):
    path = Run(0).train(1).save(tmp_path)
    resumed = Run(1)
    resumed.load(path)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_weights_and_their_average_load_as_models(tmp_path):
    run = Run().train(5)
    path = run.save(tmp_path)
    for name, expected in (("unet", run.unet.parameters()), ("unet_ema", run.ema.shadow_params)):
        loaded = OptimizedUNet2DModel.from_pretrained(path / name).parameters()
        assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))
    assert not torch.equal(run.ema.shadow_params[0], next(run.unet.parameters()))


def test_every_file_is_json_safetensors_or_source(tmp_path):
    path = Run().train(2).save(tmp_path)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".py"}
    for file in files:
        assert not zipfile.is_zipfile(file)  # torch.save's container
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert tensors.keys()
        else:
            compile(file.read_text(), file.name, "exec")


# which are kept, and which is meant


def steps(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("total_limit", "kept"), [(None, [8, 9, 10, 11]), (1, [11]), (3, [9, 10, 11]), (9, [8, 9, 10, 11])]
)
def test_total_limit_keeps_the_newest(total_limit, kept, tmp_path):
    run = Run()
    for run.step in (8, 9, 10, 11):  # 9 before 10: by number
        run.save(tmp_path, total_limit)
    assert steps(tmp_path) == kept
    with pytest.raises(ValueError, match="`total_limit` is 0; it must be a positive integer"):
        run.save(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_latest_and_paths(tmp_path, caplog):
    assert resolve_checkpoint(tmp_path, "latest") is None
    assert resolve_checkpoint(tmp_path / "not there yet", "latest") is None
    run = Run()
    for run.step in (9, 10):
        path = run.save(tmp_path)
    for stranger in ("checkpoint-best", ".checkpoint-98.partial", "checkpoint-"):
        (tmp_path / stranger).mkdir()
        (tmp_path / stranger / "manifest.json").write_text("{}")
    assert steps(tmp_path) == [9, 10]
    assert resolve_checkpoint(tmp_path, "latest") == path and not caplog.messages
    assert resolve_checkpoint("elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    for missing in (tmp_path / "checkpoint-7", "last"):
        with pytest.raises(ValueError) as error:
            resolve_checkpoint(tmp_path, str(missing))
        for words in (repr(str(missing)), "no complete checkpoint", "manifest.json", "'latest'"):
            assert words in str(error.value)


DAMAGES = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"uni'), "manifest.json cannot be read"),
    "a missing file": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "a cut file": (lambda path: os.truncate(path / WEIGHTS, 100), f"{WEIGHTS} has 100 bytes in place of"),
    "a flipped bit": (lambda path: flip_a_bit(path / WEIGHTS), f"{WEIGHTS} is not what was written"),
    "an edited state": (lambda path: flip_a_bit(path / "training_state.json"), "training_state.json is not what was"),
}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(damage, tmp_path, caplog):
    run = Run()
    for run.step in (1, 2, 3):
        run.save(tmp_path)
    inflict, reason = DAMAGES[damage]
    inflict(tmp_path / "checkpoint-3")
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    (message,) = caplog.messages
    assert "checkpoint-3 is damaged" in message and reason in message and "passed over" in message
    with pytest.raises(ValueError, match="is no complete checkpoint") as error:
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
    assert reason in str(error.value)
    for step in (1, 2):
        inflict(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"All 3 checkpoint\(s\) in .* are damaged: remove them to begin again"):
        resolve_checkpoint(tmp_path, "latest")


def test_of_other_versions_the_resume_tells(tmp_path, caplog):
    path = Run().save(tmp_path)
    state = json.loads((path / "training_state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__
    Run().load(path)
    assert not caplog.messages
    state["versions"]["torch"] = "1.0"
    (path / "training_state.json").write_text(json.dumps(state))
    Run().load(path)
    assert f"torch: '1.0' there, '{torch.__version__}' here" in caplog.text


def test_a_checkpoint_of_another_config_is_refused_with_the_differences(tmp_path):
    path = Run().save(tmp_path)
    other = Run(1, block_out_channels=(8, 16), act_fn="relu")
    untouched = other.unet.state_dict()["stem.weight"].clone()
    with pytest.raises(ValueError) as error:
        other.load(path)
    message = str(error.value)
    assert str(path) in message
    assert "act_fn: 'gelu' there, 'relu' here" in message
    assert "block_out_channels: [8, 8] there, [8, 16] here" in message
    assert "norm_num_groups" not in message  # what is the same is not listed
    assert torch.equal(other.unet.state_dict()["stem.weight"], untouched)


def test_a_checkpoint_of_other_arguments_is_refused_and_changes_nothing(tmp_path):
    path = Run().train(2).save(tmp_path)
    other = Run(seed=1)
    before = other.everything()
    with pytest.raises(ValueError, match=r"another run \(seed: 0 there, 1 here\): give the same arguments"):
        other.load(path, seed=1)
    torch.testing.assert_close(other.everything(), before, rtol=0, atol=0)
