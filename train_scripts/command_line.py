"""Flags of the scripts, from a dataclass, the command line and an optional YAML or JSON file."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from launch import disconnect
from transformers import HfArgumentParser


def arg(default, help):
    return field(default=default, metadata={"help": help})


def check(args, condition: bool, name: str, rule: str) -> None:
    """Raise a ValueError about the flag `name` of `args` unless the condition holds."""
    if not condition:
        raise ValueError(f"`--{name}` is {getattr(args, name)!r}; it must {rule}.")


def run_script(main: Callable, arguments_class: type, doc: str) -> None:
    """Run `main` with the command line's flags; those that break a rule end the script with one line, no traceback.

    Launched several times, the processes end together. One that raises ends at once, and its launcher ends the others.
    """
    try:
        args = parse_arguments(arguments_class, sys.argv[1:], doc)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}") from None  # YAML's has several
    try:
        main(args)
    except (Exception, KeyboardInterrupt):
        if torch.distributed.is_initialized():
            print(traceback.format_exc(), end="", file=sys.stderr, flush=True)
            os._exit(1)  # Python's own end may wait for gloo for ever, and the others for this process (see `let_go`)
        raise
    disconnect()


def parse_arguments(arguments_class: type, argv: list[str], doc: str):
    """Parse an optional YAML or JSON file of arguments, then flags, which override it, into an `arguments_class`."""
    parser = HfArgumentParser(arguments_class, description=doc.splitlines()[0], allow_abbrev=False)
    if argv and not argv[0].startswith("-") and argv[0].endswith((".yaml", ".yml", ".json")):
        if not Path(argv[0]).is_file():
            raise ValueError(f"There is no file {argv[0]}; what stands first may be a YAML or JSON file of arguments.")
        read = json.loads if argv[0].endswith(".json") else yaml.safe_load  # for YAML, 1e-05 is a string
        try:
            values = read(Path(argv[0]).read_text("utf-8")) or {}
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{argv[0]} cannot be read ({error}): give flags by name.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{argv[0]} holds a {type(values).__name__}; it must hold arguments by name.")
        if values.get("mixed_precision") is False:
            values["mixed_precision"] = "no"  # YAML reads `no` as False
        unknown = set(values) - {f.name for f in fields(arguments_class)}
        if unknown:
            raise ValueError(f"{argv[0]} holds {sorted(unknown)}, which are no arguments (see --help).")
        check_types(arguments_class, values, argv[0])
        flags = {text.partition("=")[0].replace("-", "_") for text in argv[1:]}  # argparse takes --num-epochs, too
        for given, other in (("num_epochs", "max_train_steps"), ("max_train_steps", "num_epochs")):
            if f"__{given}" in flags:  # one length replaces the other
                values.pop(other, None)
        values = {name: with_home(value) if isinstance(value, str) else value for name, value in values.items()}
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        argv = argv[1:]
    argv = [with_home(text) for text in argv]
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:  # without their values, which may be tokens
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        raise ValueError(f"{', '.join(flags) or 'What stands without a flag'} is no flag of this script (see --help).")
    if getattr(args, "hub_token", None):  # wandb records the command line it finds here
        sys.argv[:] = [text.replace(args.hub_token, "<token>") for text in sys.argv]
    return args


def with_home(text: str) -> str:
    """A path with `~` expanded where no shell does it: in a file, and after `--flag=`."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return flag + equals + os.path.expanduser(value)


def check_types(arguments_class: type, values: dict, path: str) -> None:
    """Raise a ValueError for a file's value of another type than the argument's; the parser converts strings."""
    hints = get_type_hints(arguments_class)  # HfArgumentParser has changed the fields' own
    for name, value in values.items():
        hint = hints[name]
        is_list = any(get_origin(kind) is list for kind in (hint, *get_args(hint)))
        converted = (isinstance(value, str) and not is_list) or (isinstance(value, dict) and name == "unet_config")
        if not (converted or fits(value, hint)):
            rule = ", and not empty" if value == [] else ""
            kind = hint if get_args(hint) else hint.__name__
            raise ValueError(f"`{name}` in {path} is {value!r}; it must be of type {kind}{rule}.")


def fits(value, hint) -> bool:
    """Whether a value is of this type; a whole number is a float, too."""
    if isinstance(hint, UnionType):
        return any(fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is list:
        return type(value) is list and value != [] and all(fits(part, *get_args(hint)) for part in value)
    return type(value) in ((int, float) if hint is float else (hint,))
