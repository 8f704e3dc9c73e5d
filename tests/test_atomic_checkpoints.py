"""Checkpoints and pipelines are whole or not there: whenever the process dies, and where nothing can be written."""

import errno
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, WEIGHTS
from run_folder import save_pipeline
from toy_training import Run

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.checkpointing import find_damage, list_checkpoints


def in_a_fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def fork_and_kill(work, folder, at_event=1, operations=("open", *OPERATIONS)):
    """Run `work` in a forked process that kills itself before file operation number `at_event`; True if it was killed.

    The operations are those that Python announces to audit hooks; of "open" those to write.
    """
    pid = os.fork()
    if pid == 0:
        events = 0

        def hook(event, arguments):
            nonlocal events
            writes = event == "open" and str(folder) in str(arguments[0]) and "w" in (arguments[1] or "")
            if event in operations and (writes or event != "open"):
                events += 1
                if events == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_file_operation_every_checkpoint_listed_is_whole(tmp_path):
    before, folder = tmp_path / "before", tmp_path / "run"
    run = Run()
    for _ in range(2):
        run.train(1).save(before)
    run.train(1)

    at_event, killed, seen = 0, True, set()
    while killed:
        at_event += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        killed = fork_and_kill(lambda: run.save(folder, total_limit=2), folder, at_event)
        listed = list_checkpoints(folder)
        assert not any(find_damage(path) for path in listed)
        seen.add(tuple(path.name[-1] for path in listed))
        assert f"checkpoint-{Run().load(listed[-1])['step']}" == listed[-1].name
    assert at_event > 20
    assert seen == {("1", "2"), ("1", "2", "3"), ("2", "3")}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_killed_at_any_file_operation_a_pipeline_is_whole_and_no_card_is_of_other_weights(tiny_pipe, tmp_path):
    before, new = tmp_path / "before", tiny_pipe.unet.state_dict()
    PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY), tiny_pipe.scheduler).save_pretrained(before)
    (before / "README.md").write_text("of the weights before")
    old, folder = (before / WEIGHTS).read_bytes(), tmp_path / "run"
    for source in (tmp_path / "nothing", before):
        at_event, killed, seen = 0, True, []
        while killed:
            at_event += 1
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if source.exists():
                shutil.copytree(source, folder, dirs_exist_ok=True)
            killed = fork_and_kill(lambda: save_pipeline(tiny_pipe, folder), folder, at_event)
            if (folder / "model_index.json").exists():
                loaded = PixelDiffusionPipeline.from_pretrained(folder).unet.state_dict()
                is_old = (folder / WEIGHTS).read_bytes() == old
                assert is_old or all(torch.equal(tensor, new[name]) for name, tensor in loaded.items())
                assert is_old or not (folder / "README.md").exists()
                seen.append(is_old)
        assert at_event > 10 and seen == sorted(seen, reverse=True) and not seen[-1]


def test_the_next_save_clears_what_a_killed_one_left(tmp_path):
    run = Run().train(1)
    run.save(tmp_path)
    run.train(1)
    assert fork_and_kill(lambda: run.save(tmp_path), tmp_path, operations=["os.rename"])
    assert any(path.name.startswith(".") for path in tmp_path.iterdir())
    run.train(1).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_drive_that_flushes_no_folders_serves(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []

    def flush_files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush_files_alone)
    assert find_damage(Run().train(1).save(tmp_path)) is None and refused


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_what_cannot_be_written_says_how_to_go_on_and_loses_nothing(trouble):
    with tempfile.TemporaryDirectory() as folder:  # in reach of another user, as pytest's own are not
        folder = Path(folder)
        run = Run().train(1)
        run.save(folder, total_limit=1)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        reader, writer = os.pipe()

        def save():
            if trouble == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes a file
            else:
                os.chmod(folder, 0o555)
                os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())  # root may write anywhere
            with pytest.raises(OSError) as error:
                run.save(folder, total_limit=1)
            os.write(writer, str(error.value).encode())

        run.train(1)
        in_a_fork(save)
        said = os.read(reader, 10_000).decode()
        os.chmod(folder, 0o755)
        assert f"checkpoint-2 cannot be written to {folder}" in said and "is intact: make room or mend" in said
        assert ("File too large" if trouble == "full" else "Permission denied") in said
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
        assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
