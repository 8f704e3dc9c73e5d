"""Stopped by a signal or killed: the same bits in the end, and a line that says how to go on."""

import os
import signal
import time

import psutil
import pytest
from kill_and_resume import kill_and_compare, results, said, start

from ddpm_diffusers.checkpointing import find_damage, list_checkpoints


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert start(folder, processes=1).wait() == 0, said(folder).read_text()
    return results(folder)


def wait_for_a_checkpoint(folder, training, more_than=0):
    while len(list_checkpoints(folder)) <= more_than or list_checkpoints(folder)[-1].name == "checkpoint-3":
        assert training.poll() is None, said(folder).read_text()
        time.sleep(0.001)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(number, alone, tmp_path):
    folder = tmp_path / "run"
    training = start(folder, processes=1)
    wait_for_a_checkpoint(folder, training)
    time.sleep(0.05)  # away from the checkpoint
    os.killpg(training.pid, number)  # as a terminal does: the loader's worker is told, too
    assert training.wait(30) == 128 + number
    log = said(folder).read_text()
    last = list_checkpoints(folder)[-1]
    assert find_damage(last) is None and "Traceback" not in log
    step = last.name.removeprefix("checkpoint-")
    assert f"{number.name}: stopped after step {step} of 300, and wrote {last}." in log
    assert "To go on from there, run the same command with `--resume_from_checkpoint latest`." in log
    assert not (folder / "model_index.json").exists()
    assert start(folder, processes=1).wait() == 0
    assert results(folder) == alone


@pytest.mark.slow
def test_all_processes_stop_together_when_one_is_told(tmp_path):
    folder = tmp_path / "run"
    launcher = start(folder, processes=2)
    wait_for_a_checkpoint(folder, launcher)
    psutil.Process(launcher.pid).children()[-1].send_signal(signal.SIGTERM)
    launcher.wait(60)
    assert "SIGTERM: stopped after step" in said(folder).read_text()
    last = list_checkpoints(folder)[-1]
    assert find_damage(last) is None
    assert start(folder, processes=2).wait() == 0
    log = said(folder).read_text()
    assert f"Resumed from {last}" in log and (folder / "model_index.json").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    folder = tmp_path / "run"
    first = start(folder, processes=1)
    wait_for_a_checkpoint(folder, first)
    first.send_signal(signal.SIGSTOP)
    try:
        assert start(folder, processes=1).wait(60) == 1
        assert f"Another process writes into {folder}: wait for it to end, or stop it." in said(folder).read_text()
    finally:
        first.kill()


@pytest.mark.slow
def test_ten_kills_change_no_bit(tmp_path):
    assert kill_and_compare(tmp_path, kills=10, processes=1, seed=1) == []


@pytest.mark.slow
def test_kills_of_two_processes_change_no_bit(tmp_path):
    assert kill_and_compare(tmp_path, kills=2, processes=2, seed=0) == []
