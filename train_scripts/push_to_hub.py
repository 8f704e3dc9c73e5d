"""Upload a saved pipeline and its model card to the Hub, for example after a failed push.

    python train_scripts/push_to_hub.py --model runs/first --hub_model_id user/first

Checkpoints, logs and any other files in the folder are not uploaded.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from command_line import arg, run_script

from ddpm_diffusers.hub import PushError, push_folder


@dataclass
class PushArguments:
    model: str = field(metadata={"help": "folder of a saved pipeline, such as the --output_dir of a training"})
    hub_model_id: str = field(metadata={"help": "repository: owner/name, or a name in your own namespace"})
    hub_token: str | None = arg(None, "token with write access; by default HF_TOKEN, or that of `hf auth login`")
    hub_private_repo: bool = arg(False, "create the repository as private")


def main(args: PushArguments) -> None:
    try:
        print(push(args.model, args.hub_model_id, args.hub_token, args.hub_private_repo))
    except ValueError as error:
        sys.exit(str(error))


def push(folder: str | Path, hub_model_id: str, hub_token: str | None, hub_private_repo: bool) -> str:
    """Push, and return the repository's URL; if it fails, end the script with the command to try again."""
    try:
        return push_folder(folder, hub_model_id, hub_token, hub_private_repo or None)
    except PushError as error:
        again = ["python", "train_scripts/push_to_hub.py", "--model", str(folder), "--hub_model_id", hub_model_id]
        again += ["--hub_private_repo"] if hub_private_repo else []
        raise SystemExit(f"{error}; to try again: {shlex.join(again)}") from None


if __name__ == "__main__":
    run_script(main, PushArguments, __doc__)
