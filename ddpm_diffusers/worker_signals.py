"""Loader workers that survive a signal to the whole process group until the main process has finished its step."""

import atexit
import os
import signal
from multiprocessing.sharedctypes import RawValue


class LeaveSignalsToMain:
    """`worker_init_fn` of a DataLoader: workers ignore Ctrl-C, and SIGTERM until the main process calls `finish()`."""

    def __init__(self):
        self.done = RawValue("b", False)  # in memory shared with the workers
        atexit.register(self.finish)  # runs before `multiprocessing` terminates and joins the workers

    def finish(self) -> None:
        self.done.value = True

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0) if self.done.value else None)
