"""The project's environment: made once, mended when it was left half made, and clear about what it cannot
get.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from fapatch import workers
from fapatch.base import env
from fapatch.base.errors import FapError
from fapatch.base.process import run
from fapatch.workers.missing import Requirement, is_met

pytestmark = pytest.mark.slow

PYPROJECT = """
[project]
name = "x"
[project.optional-dependencies]
torch = [{torch}]
build = ["pip>=1", "no-such-thing; python_version < '3'"]
"""
GROUPS = ["torch", "build"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    for name in [n for n in os.environ if n.startswith(("PIP_", "PYTHON"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PYTHON", sys._base_executable)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.format(torch=""))
    return tmp_path


def ensure(root: Path) -> str:
    return env.ensure(root, root / ".venv", GROUPS)


def state(venv: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_mtime_ns for p in venv.rglob("*") if "__pycache__" not in p.parts}


def test_made_once_then_left_alone_and_mended_after_a_cut(root):
    assert ensure(root).startswith(".venv is ready: Python 3.")
    venv = root / ".venv"
    before = state(venv)
    assert ensure(root).startswith(".venv is up to date: Python 3.")
    assert state(venv) == before

    # An interrupted run leaves a stamp without the hash: gone through again, but not made anew.
    (venv / env.STAMP).write_text(json.dumps({"base": os.environ["PYTHON"]}))
    mark = venv / "mark"
    mark.touch()
    assert ensure(root).startswith(".venv is ready")
    assert mark.exists()

    # Another list of packages is noticed.
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'pip'"))
    assert ensure(root).startswith(".venv is ready")

    # An interpreter that is gone, as after an upgrade or a move: made anew.
    env.venv_python(venv).unlink()
    assert ensure(root).startswith(".venv is ready")
    assert not mark.exists()


def test_python_is_remembered_and_another_one_clears_nothing_without_a_word(root, monkeypatch, capsys):
    ensure(root)
    mark = root / ".venv" / "mark"
    mark.touch()
    other = root / "other-python"
    other.symlink_to(sys._base_executable)
    monkeypatch.delenv("PYTHON")
    monkeypatch.setattr(sys, "executable", str(other))
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'pip'"))
    assert ensure(root).startswith(".venv is ready") and mark.exists()
    assert "anew" not in capsys.readouterr().out

    monkeypatch.setenv("PYTHON", str(other))
    ensure(root)
    assert f"made from {sys._base_executable}, and PYTHON={other} asks for another" in capsys.readouterr().out
    assert not mark.exists()
    monkeypatch.delenv("PYTHON")
    assert ensure(root).startswith(".venv is up to date")

    (root / ".venv" / env.STAMP).unlink()
    ensure(root)
    assert "anew" in (said := capsys.readouterr().out) and "this command has not made it" in said


def test_the_python_of_the_environment_itself_is_refused(root, monkeypatch):
    ensure(root)
    monkeypatch.setenv("PYTHON", str(env.venv_python(root / ".venv")))
    with pytest.raises(FapError, match="lies in .venv itself"):
        ensure(root)


def test_pip_shows_what_it_does(root, monkeypatch, capfd):
    (root / "one.py").touch()
    (root / "setup.py").write_text("import setuptools; setuptools.setup(name='one', py_modules=['one'])")
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch=f"'one @ file://{root}'"))
    with pytest.raises(FapError, match="pip could not get one @"):  # without network there is no setuptools
        ensure(root)
    assert f"Processing {root}" in capfd.readouterr().out


def test_what_cannot_be_had_is_named_with_a_way_out(root):
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'no-such-package-at-all==3.1', 'pip'"))
    with pytest.raises(FapError) as caught:
        ensure(root)
    assert caught.value.message.startswith("pip could not get no-such-package-at-all==3.1, which .venv lacks")
    assert "PIP_FIND_LINKS" in caught.value.hint
    assert "\n" not in str(caught.value)
    with pytest.raises(FapError):  # and it does not count as made
        ensure(root)


def test_a_torch_that_is_there_is_shared(root, tmp_path, monkeypatch):
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cu128'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'torch==2.13.0'"))
    said = ensure(root)
    assert "torch 2.9.1+cu128, shared with" in said
    assert "include-system-site-packages = true" in (root / ".venv" / "pyvenv.cfg").read_text()


def test_the_packages_of_a_virtual_environment_are_shared_too(root, tmp_path, monkeypatch):
    """--system-site-packages shares those of the interpreter beneath it, not its own."""
    parent = tmp_path / "parent"
    run(sys.executable, "-m", "venv", parent)
    site = next((parent / "lib").glob("python*/site-packages"))
    (site / "torch.py").write_text("__version__ = '9.9.0'\n")
    monkeypatch.setenv("PYTHON", str(env.venv_python(parent)))
    assert "torch 9.9.0, shared with" in ensure(root)


@pytest.mark.parametrize(
    "version, usable",
    [
        ("2.4.0", True),
        ("2.13.0+cpu", True),
        ("2.10.1", True),
        ("2.3.1", False),
        ("1.13", False),
        ("", False),
    ],
)
def test_which_torch_is_usable(version, usable):
    assert env.has_usable_torch(version) is usable


def test_a_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\necho \'{"python": [3, 9, 18], "torch": ""}\'\n')
    old.chmod(0o755)
    with pytest.raises(FapError, match="3.9.18"):
        env.about(old)


def test_the_list_of_missing_packages_needs_no_package(root):
    """missing.py runs before anything is installed: -S leaves out all of site-packages but what it
    is shown.
    """
    pip_home = (
        run(sys.executable, "-c", "import pip, pathlib; print(pathlib.Path(pip.__file__).parents[1])")
        .stdout.decode()
        .strip()
    )
    only_pip = root / "only"
    only_pip.mkdir()
    (only_pip / "pip").symlink_to(Path(pip_home) / "pip")
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'torch==2.13.0'"))
    script = workers.HERE / "missing.py"
    said = run(
        sys.executable, "-S", script, root / "pyproject.toml", *GROUPS, env={"PYTHONPATH": str(only_pip)}
    ).stdout
    assert json.loads(said) == ["torch==2.13.0", "pip>=1"]


def test_an_extra_is_met_when_what_it_brings_is_there(tmp_path, monkeypatch):
    def install(name: str, *lines: str) -> None:
        (tmp_path / f"{name}-1.dist-info").mkdir()
        text = "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: 1", *lines, ""])
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(text)

    monkeypatch.syspath_prepend(str(tmp_path))
    install("parent", "Provides-Extra: more", "Requires-Dist: child<2; extra == 'more'")
    assert is_met(Requirement("parent")) and not is_met(Requirement("parent[more]"))
    install("child")
    assert is_met(Requirement("parent[more]")) and not is_met(Requirement("parent[more]>1"))
