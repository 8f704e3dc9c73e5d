"""The training script in the process of the test: its import, which takes longest, is paid for once."""

import train_unconditional as script
from command_line import parse_arguments
from conftest import reset_accelerate


def train_here(*flags) -> None:
    """Run the script with these flags alone; it starts, and leaves accelerate, as in a fresh process."""
    reset_accelerate()
    try:
        script.main(parse_arguments(script.TrainingArguments, [str(flag) for flag in flags], script.__doc__))
    finally:
        reset_accelerate()
