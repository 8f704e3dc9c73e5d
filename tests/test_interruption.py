"""Stopped by a signal or killed: the same bits in the end, and a line that says how to go on."""

import os
import signal
import time
from types import SimpleNamespace

import interruption
import kill_and_resume
import psutil
import pytest
import torch.distributed as dist
from files import lock
from interruption import StopRequest
from kill_and_resume import FLAGS, LONG, kill_and_compare, results, said
from small_runs import train_here

from ddpm_diffusers.checkpointing import find_damage, list_checkpoints

STEPS = 40


@pytest.fixture(scope="module")
def start():
    """Starts the training; what still runs at the end of the tests, they having failed, is killed."""
    started = []

    def run(folder, processes: int = 1):
        started.append(kill_and_resume.start(folder, processes, STEPS))
        return started[-1]

    yield run
    for training in started:
        if training.poll() is None:
            for process in [*psutil.Process(training.pid).children(recursive=True), training]:
                process.kill()
            training.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a training in this process leaves, which nobody stops."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(*FLAGS, "--max_train_steps", STEPS, "--output_dir", folder)
    return results(folder)


def wait_for_a_checkpoint(folder, training):
    """Past the first, which is not to be the last."""
    end = time.monotonic() + LONG
    while not list_checkpoints(folder) or list_checkpoints(folder)[-1].name == "checkpoint-3":
        assert training.poll() is None and time.monotonic() < end, said(folder).read_text()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(number, start, alone, tmp_path):
    folder = tmp_path / "run"
    training = start(folder)
    wait_for_a_checkpoint(folder, training)
    os.killpg(training.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    with pytest.raises(ValueError, match="Another process writes into"):
        lock(folder)
    os.killpg(training.pid, number)  # as a terminal does: the loader's worker is told, too
    os.killpg(training.pid, signal.SIGCONT)
    assert training.wait(30) == 128 + number
    log = said(folder).read_text()
    last = list_checkpoints(folder)[-1]
    assert find_damage(last) is None and "Traceback" not in log
    step = last.name.removeprefix("checkpoint-")
    assert f"{number.name}: stopped after step {step} of {STEPS}, and wrote {last}." in log
    assert "To go on from there, run the same command with `--resume_from_checkpoint latest`." in log
    assert not (folder / "model_index.json").exists()
    assert start(folder).wait(LONG) == 0
    assert results(folder) == alone


@pytest.mark.slow
def test_all_processes_stop_together_when_one_is_told(start, tmp_path):
    folder = tmp_path / "run"
    launcher = start(folder, processes=2)
    wait_for_a_checkpoint(folder, launcher)
    psutil.Process(launcher.pid).children()[-1].send_signal(signal.SIGTERM)
    launcher.wait(60)
    assert "SIGTERM: stopped after step" in said(folder).read_text()
    last = list_checkpoints(folder)[-1]
    assert find_damage(last) is None
    assert start(folder, processes=2).wait(LONG) == 0
    log = said(folder).read_text()
    assert f"Resumed from {last}" in log and (folder / "model_index.json").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_step(monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    request = StopRequest(num_processes=1)
    try:
        assert request.agreed() is None
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: request.since + 0.99))
        signal.raise_signal(signal.SIGINT)  # as launchers do
        assert request.agreed() == signal.SIGINT
        monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: request.since + 1.01))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        request.restore()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture
def gloo():
    """Connects this process with itself alone, by what connects several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_signal_that_comes_while_the_processes_agree_counts_after_the_next_step(gloo, monkeypatch):
    def all_reduce(*args):
        exchange(*args)
        signal.raise_signal(signal.SIGTERM)

    exchange, request = dist.all_reduce, StopRequest(num_processes=2)
    try:
        assert request.agreed() is None
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(dist, "all_reduce", all_reduce)
            assert request.agreed() is None
        assert request.agreed() == signal.SIGTERM
    finally:
        request.restore()


@pytest.mark.slow
def test_ten_kills_change_no_bit(tmp_path):
    assert kill_and_compare(tmp_path, kills=10, processes=1, seed=1) == []


@pytest.mark.slow
def test_kills_of_two_processes_change_no_bit(tmp_path):
    assert kill_and_compare(tmp_path, kills=2, processes=2, seed=0) == []
