"""SIGTERM and Ctrl-C end a training after its step, not in the middle of one."""

import signal
import time

import torch
import torch.distributed as dist


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C; a Ctrl-C more than a second later ends the process at once.

    With several processes one may be told before the others, so they agree after each step: by one integer over gloo,
    which waits for no GPU.
    """

    def __init__(self, num_processes: int):
        self.signal, self.since = None, 0.0
        self.group = dist.new_group(backend="gloo") if num_processes > 1 else None
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame) -> None:
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:  # launchers repeat the first at once
            raise KeyboardInterrupt

    def agreed(self) -> signal.Signals | None:
        """The signal that any of the processes was sent. Every process must call it."""
        if self.group is not None:
            number = torch.tensor(self.signal or 0)
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
            self.signal = signal.Signals(int(number)) if number else None
        return self.signal

    def restore(self) -> None:
        """Signals act as before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
