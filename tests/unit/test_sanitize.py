"""Test reading the output of compute-sanitizer. Running it needs a GPU (`make sanitize`); its calls run here
on the CPU backend.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fapatch.base.errors import FapError, UsageError
from fapatch.kernels import sanitize

SHAPES = Path(__file__).parents[1] / "gpu" / "small_shapes.py"


@pytest.mark.parametrize(
    "summary, errors",
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 3),
    ],
)
def test_summaries(summary, errors):
    finding = sanitize.parse("memcheck", "64", f"========= COMPUTE-SANITIZER\n66 calls, 2 wrong\n{summary}\n")
    assert (finding.errors, finding.calls, finding.wrong) == (errors, 66, 2)


@pytest.mark.parametrize("output", ["66 calls, 0 wrong\n", "========= ERROR SUMMARY: 0 errors\n", "Killed\n"])
def test_a_run_that_ended_early_is_no_clean_run(output):
    with pytest.raises(FapError, match="without a summary"):
        sanitize.parse("memcheck", "64", output)


def test_findings_of_several_runs_are_kept_in_order(tmp_path):
    path = tmp_path / "findings.json"
    for tool, head_dim, errors in [
        ("racecheck", "64", 0),
        ("memcheck", "256", 0),
        ("racecheck", "64", 7),
        ("memcheck", "32", 0),
    ]:
        sanitize.keep(path, {"tool": tool, "head_dim": head_dim, "errors": errors})
    found = [(f["tool"], f["head_dim"], f["errors"]) for f in json.loads(path.read_text())]
    assert found == [("memcheck", "32", 0), ("memcheck", "256", 0), ("racecheck", "64", 7)]


def test_a_run_that_ended_early_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def watch(project, sanitizer, tool, head_dim, dtypes, log):
        if head_dim == "96":
            raise FapError("racecheck at head dimension 96 ended without a summary")
        return sanitize.Finding(tool, head_dim, 0, 66, 0)

    monkeypatch.setattr(sanitize, "watch", watch)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitize, "run", lambda *argv, **options: SimpleNamespace(stdout=b"a GPU"))
    path = tmp_path / "findings.json"
    project = SimpleNamespace(root=tmp_path, build=tmp_path / "build")
    args = argparse.Namespace(tools="racecheck", head_dims="32,96,64", dtypes="fp16", jobs=1, json=path)
    assert sanitize.main(project, args) == 1
    assert [f["head_dim"] for f in json.loads(path.read_text())] == ["32", "64"]
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "a GPU: 132 calls under 1 tools, 1 ended early: see build/sanitize"
    )
    args.head_dims = "64"
    assert sanitize.main(project, args) == 0


def test_unknown_tool_is_named():
    with pytest.raises(UsageError, match="--tools memchek: memchek is not among memcheck"):
        sanitize.chosen("memchek", sanitize.TOOLS, "--tools")


def test_calls_are_right_on_the_cpu():
    pytest.importorskip("flash_attn", reason="needs the wheel: make wheel")
    argv = [sys.executable, SHAPES, "--device", "cpu", "--head-dims", "32", "--dtypes", "bf16"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" calls, 0 wrong\n")
