"""A Python of its own that stays: its start and the import of diffusers, which take longest, are paid for once.

    with Interpreter(hub.env(cache), first="import ddpm_diffusers") as python:
        assert python("print(type(folder).__name__)", folder=tmp_path) == "str\\n"

Imported modules, and what was changed in them, stay as they are; names do not.
"""

import contextlib
import io
import json
import linecache
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from types import ModuleType


class Interpreter:
    """`python(code, name=value)` runs code there as a new `__main__` with these names, and returns what it printed.

    What the code raises fails the calling test, with its traceback; a process that has ended is started anew for the
    next one. `stderr` is what the last code wrote there, and `printed_first` what `first` printed, which begins each
    process.
    """

    def __init__(self, env: dict, first: str = ""):
        self.env, self.first = {**os.environ, **env}, first

    def __enter__(self) -> "Interpreter":
        self.log = tempfile.TemporaryFile("a+")
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # by itself it would take two seconds to end
        self.process.communicate()
        self.log.close()

    def start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        # from where the package does not lie in the path by chance
        self.process = subprocess.Popen([sys.executable, __file__], env=self.env, cwd="/", **pipes)
        self.printed_first = self(self.first)

    def __call__(self, code: str, /, **names) -> str:
        if self.process.poll() is not None:
            self.start()
        begin = self.log.seek(0, os.SEEK_END)
        limit = threading.Timer(300, self.process.kill)
        limit.start()
        try:
            self.process.stdin.write(json.dumps([code, names], default=str) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            limit.cancel()
        self.log.seek(begin)
        self.stderr = self.log.read()
        if not answer:
            raise AssertionError(f"The other Python ended with {self.process.wait()}:\n{self.stderr}")
        answer = json.loads(answer)
        if answer["traceback"]:
            raise AssertionError(f"In the other Python:\n{answer['traceback']}")
        return answer["printed"]


def serve() -> None:
    """The other end: run what comes in, a line of JSON each, and answer with what it printed or raised."""
    answers = sys.stdout
    for line in sys.stdin:
        code, names = json.loads(line)
        main = sys.modules["__main__"] = ModuleType("__main__")
        vars(main).update(names)
        linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")  # shown in tracebacks
        printed, error = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "<code>", "exec"), vars(main))
        except BaseException:  # SystemExit, too
            error = traceback.format_exc()
        print(json.dumps({"printed": printed.getvalue(), "traceback": error}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
