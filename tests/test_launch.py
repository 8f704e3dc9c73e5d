"""Precision by `auto`, memory that is kept, and a compiled network: each against the plain way."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from command_line import parse_arguments
from conftest import ROOT, SMALL_RUN, WEIGHTS, reset_accelerate, run_training, torchrun
from generate import GenerateArguments
from launch import choose_precision, make_accelerator
from safetensors.torch import load_file
from small_runs import train_here

SCRIPTS = ROOT / "train_scripts"


@pytest.mark.parametrize("name", sorted(path.name for path in (SCRIPTS / "accelerate").glob("*.yaml")))
def test_accelerate_knows_every_setting_in_the_configs(name):
    config = load_config_from_file(str(SCRIPTS / "accelerate" / name))
    assert config.use_cpu == (name == "cpu.yaml") and config.num_processes >= 1
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()


def test_the_quickstarts_training_runs(tmp_path, caplog):
    flags = ["--max_train_samples", "64", "--max_train_steps", "2", "--eval_batch_size", "2"]
    flags += ["--ddpm_num_inference_steps", "2", "--output_dir", tmp_path / "run"]
    train_here(SCRIPTS / "configs" / "quickstart.yaml", *flags)
    assert Path(caplog.text.rpartition("Samples: ")[2].strip()).is_file()
    assert f"precision {choose_precision('auto')};" in caplog.text


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file() or not hasattr(torch.cpu, "get_capabilities"),
    reason="this system or this torch does not tell the processor's features",
)
def test_auto_is_bf16_where_the_processor_calculates_with_it():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert choose_precision("auto", use_cpu=True) == ("bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "no")


@pytest.mark.parametrize("supported, precision", [(True, "bf16"), (False, "fp16")])
def test_auto_is_half_precision_on_any_gpu(monkeypatch, supported, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_precision("auto", use_cpu=False) == precision


def test_processes_that_accelerate_would_not_start_are_missed(monkeypatch):
    """Two that were asked for with a config for one, of which accelerate starts one and says nothing."""
    for name in ("MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    flags = "--cpu --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"
    for processes in "12":
        argv = [*flags.split(), "--num_processes", processes, "script.py"]
        _, environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(argv))
        monkeypatch.setattr(os, "environ", environment)
        reset_accelerate()
        if processes == "1":
            make_accelerator()
    with pytest.raises(ValueError, match="was to start several processes, but starts one .*: give --num_processes 1"):
        make_accelerator()
    reset_accelerate()


def test_fp16_is_refused_where_accelerate_would_compute_in_float32():
    reset_accelerate()
    with pytest.raises(ValueError, match="`--mixed_precision` is fp16, which accelerate has on GPUs alone"):
        make_accelerator("fp16", cpu=True)
    reset_accelerate()


def test_a_home_folder_is_found_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/runs")
    flags = [str(tmp_path / "run.yaml"), "--model=~/model"]
    args = parse_arguments(GenerateArguments, flags, "?")
    assert (args.output_dir, args.model) == (str(tmp_path / "runs"), str(tmp_path / "model"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "000000.png").touch()
    for asked in (flags, ["--output_dir=~/runs", "--model=~/model"]):
        with pytest.raises(ValueError, match="is not empty"):
            parse_arguments(GenerateArguments, asked, "?")


KEEPING = """
import ctypes, sys
import psutil
sys.path.insert(0, sys.argv[1])
from launch import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def is_kept():
    before = psutil.Process().memory_info().rss
    block = libc.malloc(2**28)
    ctypes.memset(block, 1, 2**28)
    libc.free(block)
    return psutil.Process().memory_info().rss - before > 2**27

plainly = is_kept()
keep_freed_memory()
print(plainly, is_kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the system's allocator is another one")
def test_freed_memory_is_kept():
    result = subprocess.run([sys.executable, "-c", KEEPING, SCRIPTS], capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_run_is_the_plain_one_and_goes_on(tmp_path):
    flags = ["--max_train_steps", "4", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    train_here(*SMALL_RUN, "--output_dir", tmp_path / "plain", *flags)
    flags += ["--compile", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    for steps in ("2", "4"):
        result = run_training(tmp_path / "compiled", *flags, "--max_train_steps", steps, launcher=[sys.executable],
                              TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "kernels"))  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert list((tmp_path / "kernels").rglob("*.py")), "nothing was compiled"
    plain, compiled = load_file(tmp_path / "plain" / WEIGHTS), load_file(tmp_path / "compiled" / WEIGHTS)
    assert plain.keys() == compiled.keys()
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_processes_that_would_start_from_different_checkpoints_or_data_end_with_an_error(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from launch import check_agreement, check_data, make_accelerator\n"
        "make_accelerator(cpu=True)\n"
        "check_agreement(Path('checkpoint-7'), True)\n"
        "rank = int(os.environ['RANK'])\n"
        "check_data('9 images')\n"
        "try: check_data(f'{9 - rank} images')\n"
        "except ValueError as error: assert '(8 images and 9 images)' in str(error)\n"
        "else: raise SystemExit('not told')\n"
        "check_agreement([None, Path('checkpoint-7')][rank], True)\n"
    )
    command = [*torchrun(2), str(script), str(SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode and "ValueError: The processes would start from checkpoint-7 and the" in result.stderr


@pytest.mark.slow
def test_processes_end_together_and_their_connection_before_python_does(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(
        "import atexit, sys, time\n"
        "import torch\n"
        "from dataclasses import dataclass\n"
        "sys.path.insert(0, sys.argv.pop())\n"
        "from command_line import run_script\n"
        "from launch import make_accelerator\n"
        "from accelerate.utils import gather_object\n"
        "@dataclass\n"
        "class NoArguments: pass\n"
        "def main(args):\n"
        "    accelerator = make_accelerator(cpu=True)\n"
        "    assert len(gather_object([b'0' * 200_000])) == 2 and torch.distributed.is_initialized()\n"
        "    if accelerator.is_main_process:\n"
        "        time.sleep(2)\n"
        "        print('written')\n"
        "atexit.register(lambda: sys.stdout.write(f'connected: {torch.distributed.is_initialized()}\\n'))\n"
        "run_script(main, NoArguments, 'Exchange, then write.')\n"
    )
    result = subprocess.run([*torchrun(2), script, SCRIPTS], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "written\n" + 2 * "connected: False\n"
