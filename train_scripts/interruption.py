"""SIGTERM and Ctrl-C end a training after the current step, not in the middle of it."""

import signal
import time

import torch
import torch.distributed as dist
from launch import PATIENCE


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C; a Ctrl-C more than a second later ends the process at once.

    With several processes, the signal may reach one before the others, so they agree after each step: by one integer
    over gloo, which does not wait for the GPU.
    """

    def __init__(self, num_processes: int):
        self.signal, self.since = None, 0.0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if num_processes > 1 else None
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame) -> None:
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:  # launchers repeat the first one at once
            raise KeyboardInterrupt

    def agreed(self) -> signal.Signals | None:
        """The signal that any process received, or None. Every process must call it."""
        if self.group is None:
            return self.signal
        number = torch.tensor(self.signal or 0)  # one that comes meanwhile counts after the next step, if any
        dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return signal.Signals(int(number)) if number else None

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
