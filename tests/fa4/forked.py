"""Run programs in forks of one interpreter that has imported flash_attn.cute, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import count
from pathlib import Path

from fapatch.wheel.smoke import FOR_HOPPER

SERVER = """
import json, os, sys, traceback
import torch
import flash_attn.cute
from flash_attn.cute.nosoftmax import launch, ops, plan, public
from torch._subclasses.fake_tensor import FakeTensorMode

def run(program, out, err):
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    status = 1
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forked:
    """An interpreter that has imported flash_attn.cute from `tree`."""

    def __init__(self, python: Path, tree: Path, folder: Path) -> None:
        self._folder, self._numbers = folder, count()
        environment = {**FOR_HOPPER, "PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"}
        with (folder / "server").open("w") as errors:
            self._server = subprocess.Popen(
                [python, "-W", "ignore", "-c", SERVER], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def run(self, program: str):
        """Return the JSON that a program prints. Raises AssertionError with what it says if it fails."""
        out, err = (self._folder / f"{next(self._numbers)}.{name}" for name in ("out", "err"))
        try:
            self._server.stdin.write(json.dumps([program, str(out), str(err)]) + "\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            pass
        status = self._server.stdout.readline()
        assert status, (self._folder / "server").read_text()
        assert int(status) == 0, f"status {os.waitstatus_to_exitcode(int(status))}: {err.read_text()}"
        return json.loads(out.read_text().splitlines()[-1])

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()
