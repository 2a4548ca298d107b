"""Test the project's environment: made once, completed after an interruption, and clear about packages that
it cannot get.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from fapatch import workers
from fapatch.base import env, files
from fapatch.base.errors import FapError
from fapatch.base.process import run
from fapatch.workers.missing import unmet

pytestmark = pytest.mark.slow

PYPROJECT = """
[project]
name = "x"
[project.optional-dependencies]
torch = [{torch}]
build = ["pip>=1", "no-such-thing; python_version < '3'"]
"""
GROUPS = ["torch", "build"]
LOCKED = "no-such-package-at-all==3.1 \\\n    --hash=sha256:" + "0" * 64 + "\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    for name in [n for n in os.environ if n.startswith(("PIP_", "PYTHON"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PYTHON", sys._base_executable)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.format(torch=""))
    (tmp_path / env.LOCK).write_text(LOCKED)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment to copy: making one takes seconds."""
    folder = tmp_path_factory.mktemp("made") / ".venv"
    run(sys._base_executable, "-m", "venv", folder)
    return folder


@pytest.fixture
def wheels(root: Path, made: Path, monkeypatch) -> Path:
    """The only folder that pip looks into, beside an empty .venv. The lock has top 1.0, which needs below,
    and below, but not top 2.0.
    """
    shutil.copytree(made, root / ".venv", symlinks=True)
    folder = root / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    below = make_wheel(folder, "below", "1.2")
    top = make_wheel(folder, "top", "1.0", "below>=1", "no-such-thing; extra == 'more'")
    make_wheel(folder, "top", "2.0")
    (root / env.LOCK).write_text(f"# locked\n{entry(below)}{entry(top)}")
    return folder


def install_top(root: Path) -> bool:
    return env.install_missing(env.venv_python(root / ".venv"), root / env.LOCK, ["top"])


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Path(wheel.filename)


def entry(*wheels: Path) -> str:
    """Make the lock's entry for builds of one version."""
    name, version = wheels[0].name.split("-")[:2]
    hashes = [f"--hash=sha256:{files.sha256(wheel)}" for wheel in wheels]
    return f"{name}=={version} \\\n    " + " \\\n    ".join(hashes) + "\n"


def have(root: Path, *packages: str) -> list[str]:
    """The versions of ``packages`` in .venv."""
    code = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    return run(env.venv_python(root / ".venv"), "-c", code, *packages).stdout.decode().split()


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

    # After an interrupted run, whose stamp has no hash, .venv is completed but not made anew.
    (venv / env.STAMP).write_text(json.dumps({"base": os.environ["PYTHON"]}))
    mark = venv / "mark"
    mark.touch()
    assert ensure(root).startswith(".venv is ready")
    assert mark.exists()

    # Another list of packages is noticed.
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'pip'"))
    assert ensure(root).startswith(".venv is ready")

    # If the interpreter is gone, as after an upgrade or a move, .venv is made anew.
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


def test_pip_shows_what_it_does(root, wheels, capfd):
    install_top(root)
    assert "Installing collected packages: top" in capfd.readouterr().out


def test_what_cannot_be_had_is_named_with_a_way_out(root):
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'no-such-package-at-all==3.1', 'pip'"))
    with pytest.raises(FapError) as caught:
        ensure(root)
    assert caught.value.message.startswith("pip could not get no-such-package-at-all==3.1, which .venv lacks")
    assert "PIP_FIND_LINKS" in caught.value.hint
    assert "\n" not in str(caught.value)
    with pytest.raises(FapError):  # and .venv does not count as ready
        ensure(root)


def test_the_lock_gives_the_versions_and_all_that_they_need(root, wheels):
    assert install_top(root) and have(root, "top", "below") == ["1.0", "1.2"]
    assert not install_top(root)
    # A renewed lock is followed.
    (root / env.LOCK).write_text(entry(wheels / "top-2.0-py3-none-any.whl"))
    assert install_top(root) and have(root, "top", "below") == ["2.0", "1.2"]


def test_a_file_that_is_not_the_one_of_the_lock_is_not_installed(root, wheels):
    make_wheel(wheels, "below", "1.2", "no-such-thing; extra == 'another'")
    with pytest.raises(FapError, match="DO NOT MATCH THE HASHES.*->.*do not use that file") as caught:
        install_top(root)
    assert "\n" not in str(caught.value)
    with pytest.raises(FapError):
        have(root, "below")


def test_what_the_lock_does_not_give_is_named(root, wheels):
    top = entry(wheels / "top-1.0-py3-none-any.whl")
    too_old = entry(make_wheel(wheels, "below", "0.2"))
    for lock, told in (
        (top.replace("1.0", "1.0 ; python_version < '3'"), "top"),
        (top, "below>=1"),
        (top + too_old, "below>=1"),
    ):
        (root / env.LOCK).write_text(lock)
        with pytest.raises(FapError, match=f"requirements.lock has no {told} for this.*->.*make lock-tools"):
            install_top(root)


def test_a_build_of_a_locked_version_may_come_from_a_folder(root, wheels, monkeypatch):
    """For instance torch 2.13.0+cpu, whose hash is in the lock beside those of the index. By itself pip would
    take the index's file, whose page names the hash.
    """
    for wheel in list(wheels.glob("*-1.*.whl")):
        page = root / "simple" / wheel.name.partition("-")[0] / "index.html"
        page.parent.mkdir(parents=True)
        wheel = wheel.rename(page.with_name(wheel.name))
        page.write_text(f'<a href="{wheel.name}#sha256={files.sha256(wheel)}">{wheel.name}</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (root / "simple").as_uri())
    built = make_wheel(wheels, "top", "1.0+cpu", "below")
    (root / env.LOCK).write_text(
        entry(root / "simple" / "below" / "below-1.2-py3-none-any.whl")
        + entry(root / "simple" / "top" / "top-1.0-py3-none-any.whl", built)
    )
    assert install_top(root) and have(root, "top", "below") == ["1.0+cpu", "1.2"]


def test_beside_a_shared_torch_only_what_is_missing_is_installed(root, wheels, made, tmp_path, monkeypatch):
    """The base is a virtual environment, whose packages --system-site-packages skips. It has a package in a
    suitable version that is not the lock's, without that package's dependency.
    """
    shutil.rmtree(root / ".venv")
    parent = shutil.copytree(made, tmp_path / "parent", symlinks=True)
    site = next((parent / "lib").glob("python*/site-packages"))
    (site / "torch.py").write_text("__version__ = '9.9.0'\n")
    old = make_wheel(tmp_path, "below", "1.1", "what-its-owner-does-not-have")
    run(env.venv_python(parent), "-m", "pip", "install", "--no-deps", old)
    monkeypatch.setenv("PYTHON", str(env.venv_python(parent)))
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'torch==2.13.0', 'top'"))
    assert "torch 9.9.0, shared with" in ensure(root)
    assert have(root, "top", "below") == ["1.0", "1.1"]


def test_a_torch_that_is_there_is_shared(root, tmp_path, monkeypatch):
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cu128'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    (root / "pyproject.toml").write_text(PYPROJECT.format(torch="'torch==2.13.0'"))
    said = ensure(root)
    assert "torch 2.9.1+cu128, shared with" in said
    assert "include-system-site-packages = true" in (root / ".venv" / "pyvenv.cfg").read_text()


@pytest.mark.parametrize(
    "version, usable",
    [("2.4.0", True), ("2.13.0+cpu", True), ("2.10.1", True), ("2.3.1", False), ("1.13", False), ("", False)],
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
    """missing.py runs before anything is installed. -S leaves out site-packages, except the folder that the
    test adds.
    """
    pip_home = (
        run(sys.executable, "-c", "import pip, pathlib; print(pathlib.Path(pip.__file__).parents[1])")
        .stdout.decode()
        .strip()
    )
    only_pip = root / "only"
    only_pip.mkdir()
    (only_pip / "pip").symlink_to(Path(pip_home) / "pip")
    script, wanted = workers.HERE / "missing.py", ["torch==2.13.0", "pip>=1", "x; python_version < '3'"]
    said = run(
        sys.executable, "-S", script, root / env.LOCK, *wanted, env={"PYTHONPATH": str(only_pip)}
    ).stdout
    assert json.loads(said) == ["pip>=1", "torch==2.13.0"]


def test_an_extra_is_met_when_what_it_brings_is_there(tmp_path, monkeypatch):
    def install(name: str, *lines: str) -> None:
        (tmp_path / f"{name}-1.dist-info").mkdir()
        text = "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: 1", *lines, ""])
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(text)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    install("parent", "Provides-Extra: more", "Requires-Dist: child<2; extra == 'more'")
    assert unmet(["parent"], {}) == [] and unmet(["parent[more]"], {}) == ["child<2"]
    install("child")
    assert unmet(["parent[more]"], {}) == [] and unmet(["parent[more]>1"], {}) == ["parent>1"]
