"""Test that examples/context_parallel.py runs over two processes, and trains as on one device, and that the
scripts for GPUs run on gloo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*start, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp",)], ids=["all-reduce", "fsdp"])
def test_the_example(more):
    out = run("examples/context_parallel.py", "--steps", "3", "--seqlen", "101", *more)
    assert out.startswith("state over 2 ranks: ") and "largest difference" in out


@pytest.mark.slow
def test_the_comparison_with_one_device():
    script = "tests/gpu/context_parallel_nccl.py"
    out = run(script, "--tokens", "101", "--head-dim", "8", "--scores", "rows", "window", "hstu", "intervals")
    assert "0 beyond the bound" in out and out.count("does not apply") == 2 + 2 * 4


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    """The bytes of the profiler are those of the formulas, and a second run measures nothing again."""
    path = tmp_path / "record.json"
    sizes = ("--linear-tokens", "64", "--quadratic-tokens", "64", "--heads", "2", "--head-dim", "8")
    for _ in range(2):
        run("benchmarks/context_parallel.py", *sizes, "--json", str(path))
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        assert len(rows) == 2 * 3 + 2 * 4
    for row in rows:
        computed = dict(row["computed"])
        if row["method"] == "allgather":  # rank 1's queries see half of rank 0's keys, whose record this is
            computed["forward+backward"] -= computed["forward"] // 2
        assert row["received"] == computed and min(row["ms"].values()) > 0
    assert "| linear | 64 | state, zigzag |" in path.with_suffix(".md").read_text(encoding="utf-8")
