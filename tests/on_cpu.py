"""Starts a script under accelerate's FSDP2 or DeepSpeed on the CPU, where accelerate by itself has neither.

accelerate launch --config_file train_scripts/accelerate/fsdp2.yaml tests/on_cpu.py fsdp SCRIPT FLAG …
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

kind, script, *flags = sys.argv[1:]
if kind == "fsdp":  # connect over gloo, then pass for GPUs where accelerate decides on FSDP
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
else:
    PartialState(backend="gloo")
sys.argv = [script, *flags]
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
