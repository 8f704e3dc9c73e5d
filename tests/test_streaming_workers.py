"""Worker processes of a stream: they outlive an interrupt, and end with the process that they work for."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import psutil
import pytest
import torch
from image_sets import random_images, store
from torch.utils.data._utils import worker as torch_worker

from ddpm_diffusers.streaming import StreamedBatches, open_stream


@pytest.fixture
def folder(tmp_path):
    return store(random_images(43), tmp_path / "source")["dataset_name"]


def run_of(folder, **arguments):
    return StreamedBatches(open_stream(folder), (1, 8, 8), 4, buffer_size=7, seed=0, num_workers=2, **arguments)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_interrupts_do_not_stop_a_worker_and_closing_does(folder, monkeypatch):
    expected = list(islice(run_of(folder), 12))
    iterator = iter(run_of(folder))
    batches = [next(iterator), next(iterator)]  # one of each worker, so both are ready
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    batches += islice(iterator, 10)
    assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))
    assert all(worker.is_alive() for worker in workers)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 60)  # seconds until torch kills a worker
    start = time.monotonic()
    iterator.close()
    assert multiprocessing.active_children() == [] and time.monotonic() - start < 30


def test_a_killed_process_leaves_no_worker_and_its_run_goes_on_exactly(folder, monkeypatch):
    monkeypatch.setattr(torch_worker, "MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds between looks for the parent; 5 else
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def start_a_run():
        run = run_of(folder)
        iterator = iter(run)
        for _ in range(9):
            next(iterator)
        there.send(([worker.pid for worker in multiprocessing.active_children()], run.state_dict()))
        time.sleep(100)

    process = fork.Process(target=start_a_run)
    process.start()
    try:
        assert here.poll(60)
        workers, state = here.recv()
        assert all(map(is_running, workers)) and len(workers) == 2
    finally:
        process.kill()  # by SIGKILL, which no handler sees
        process.join()
    whole = list(islice(run_of(folder), 20))
    assert torch.equal(torch.cat(list(islice(run_of(folder, state=state), 11))), torch.cat(whole[9:]))
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


FAILING = """
import json, multiprocessing, sys
from ddpm_diffusers.streaming import StreamedBatches, open_stream
run = StreamedBatches(open_stream(sys.argv[1]), (1, 8, 8), 4, buffer_size=7, seed=0, num_workers=2)
iterator = iter(run)
next(iterator)
print(json.dumps([worker.pid for worker in multiprocessing.active_children()]))
raise RuntimeError("bye")
"""


def test_a_process_that_fails_ends_with_its_workers(folder, tmp_path):
    output, errors = tmp_path / "output", tmp_path / "errors"
    with output.open("w") as to, errors.open("w") as told:  # a pipe would be waited for while a worker holds it
        result = subprocess.run([sys.executable, "-c", FAILING, folder], stdout=to, stderr=told, timeout=120)
    workers = json.loads(output.read_text())
    assert len(workers) == 2 and not any(map(is_running, workers))
    assert result.returncode == 1 and errors.read_text().endswith("RuntimeError: bye\n")
