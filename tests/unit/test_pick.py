"""Test the plugins that run a planned subset of a test file: pytest's own names, only planned cases, a
complete journal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PLUGINS = Path(__file__).resolve().parents[1] / "upstream"
TEST_FILE = """
import pytest

class Thing:
    pass

@pytest.mark.parametrize("kind", [Thing(), Thing(), None, 0.5, "word"])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 128), (64, 2048)])
def test_many(seqlen_q, seqlen_k, flag, kind):
    assert seqlen_q < seqlen_k
    assert not flag, "flag was set"

@pytest.mark.parametrize("d", [32, 64])
def test_single(d):
    if d == 64:
        pytest.skip("too large")

def test_plain():
    pass
"""
NO_GPU = """
def activate():
    pass

def on_gpu():
    return False
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_file.py").write_text(TEST_FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # axes.py imports these two, but the parameters of a file do not depend on them.
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "cpu_as_cuda.py").write_text(NO_GPU)
    (tmp_path / "stand_in" / "flash_attn.py").write_text("")
    return tmp_path


def python(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "stand_in"), str(PLUGINS)])
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    # A worker of an outer pytest-xdist must not count as a worker of the run under test.
    env = {k: v for k, v in env.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=folder, env=env, capture_output=True, text=True
    )


def axes(folder: Path) -> dict:
    script = (
        f"import sys; sys.path[:0] = ['stand_in', {str(PLUGINS)!r}]; import axes; "
        "sys.exit(axes.main(['test_file.py']))"
    )
    done = python(folder, "-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["functions"]


def run_picked(
    folder: Path, plan: dict, *options: str
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    (folder / "plan.json").write_text(json.dumps(plan))
    journal = folder / "journal.jsonl"
    done = python(
        folder,
        "-m",
        "pytest",
        "-q",
        "-c",
        "pytest.ini",
        "-p",
        "no:cacheprovider",
        "-p",
        "pick",
        "--pick",
        "plan.json",
        "--journal",
        journal,
        *options,
        "test_file.py",
    )
    lines = journal.read_text().splitlines() if journal.exists() else []
    return done, [json.loads(line) for line in lines]


def test_labels_are_those_of_pytest(folder):
    from fapatch.upstream.sample import Axis, case_id, eligible

    collected = python(
        folder, "-m", "pytest", "--collect-only", "-q", "-c", "pytest.ini", "test_file.py"
    ).stdout
    by_pytest = {line.partition("::")[2] for line in collected.splitlines() if "::" in line}
    ours = set()
    for name, described in axes(folder).items():
        found = [Axis(tuple(a["names"]), tuple(a["labels"])) for a in described]
        ours |= {case_id(name, found, index) for index in eligible(name, found)}
    assert len(by_pytest) == 23
    assert ours == by_pytest


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_only_the_plan_runs_and_everything_is_in_the_journal(folder, options):
    # axes from the innermost decorator on: seqlens, flag, kind
    done, journal = run_picked(folder, {"test_many": [[1, 0, 3], [0, 1, 0]], "test_single": [[1]]}, *options)
    assert done.returncode == 1, done.stdout
    assert {(line["id"], line["outcome"]) for line in journal} == {
        ("test_many[64-2048-False-0.5]", "passed"),
        ("test_many[1-128-True-kind0]", "failed"),
        ("test_single[64]", "skipped"),
    }
    assert len(journal) == 3
    assert "flag was set" in next(line["message"] for line in journal if line["outcome"] == "failed")


def test_a_function_without_parameters_can_be_picked(folder):
    done, journal = run_picked(folder, {"test_plain": [[]]})
    assert done.returncode == 0, done.stdout
    assert [line["id"] for line in journal] == ["test_plain"]
