"""Test that requirements.lock satisfies pyproject.toml, and that renewing it keeps the hashes of builds on
other machines.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fapatch.base import env, lock_tools
from fapatch.base.files import sha256
from fapatch.base.project import Project

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = env.entries((ROOT / env.LOCK).read_text())
VERSIONS: dict[str, list[str]] = {}
for name, version in map(lock_tools.key, ENTRIES):
    VERSIONS.setdefault(name, []).append(version)


def test_the_lock_has_a_hash_for_every_version_and_names_no_host():
    assert (ROOT / env.LOCK).read_text() == lock_tools.HEADER + "".join(ENTRIES)
    assert all(re.fullmatch(r".+==.+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry) for entry in ENTRIES)


@pytest.mark.parametrize("group", env.dependencies(ROOT / "pyproject.toml"))
def test_the_lock_answers_pyproject(group):
    for line in env.dependencies(ROOT / "pyproject.toml")[group]:
        wanted = Requirement(line)
        versions = VERSIONS[env.canonical(wanted.name)]
        assert all(wanted.specifier.contains(version) for version in versions), line


def test_the_page_of_the_hopper_kernels_says_the_locked_versions():
    page = (ROOT / "docs" / "fa4.md").read_text().partition("## Requirements")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z].+) \| (\d\S+) \|$", page, re.MULTILINE)
    said = {name: version for names, version in rows for name in re.findall(r"[a-z]+(?:-\w+)+|^\w+$", names)}
    assert said == {name: VERSIONS[name][0] for name in said} and len(said) == 10


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch) -> Project:
    """A pyproject.toml that asks for top, its lock, and a uv that finds the same top or a new one."""
    python = env.venv_python(tmp_path / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "upstream.toml").write_bytes((ROOT / "upstream.toml").read_bytes())
    (tmp_path / "pyproject.toml").write_text("[project]\n[project.optional-dependencies]\nlock = ['top']\n")
    (tmp_path / env.LOCK).write_text("top==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n")
    monkeypatch.setattr(env, "install_missing", lambda *asked: False)
    monkeypatch.setattr(lock_tools, "local_wheels", lambda python: [])
    monkeypatch.setattr(lock_tools, "resolve", resolve)
    return Project.open(tmp_path)


def resolve(root: Path, python: Path, old: str, upgrade: bool) -> str:
    assert "top==1.0" in old
    return f"top=={'2.0' if upgrade else '1.0'} \\\n    --hash=sha256:aa\n"


def renew(project: Project, *options: str) -> str:
    parser = lock_tools.argparse.ArgumentParser()
    lock_tools.add_arguments(parser)
    assert lock_tools.main(project, parser.parse_args(options)) == 0
    return (project.root / env.LOCK).read_text().removeprefix(lock_tools.HEADER)


def test_a_build_that_this_machine_does_not_have_stays_known(checkout, capsys):
    assert renew(checkout) == "top==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    assert "no version changed" in capsys.readouterr().out
    assert renew(checkout, "--upgrade") == "top==2.0 \\\n    --hash=sha256:aa\n"
    assert "changed: top" in capsys.readouterr().out


def test_a_local_build_of_a_locked_version_joins_its_hashes(checkout, monkeypatch):
    wheels = [checkout.root / f"top-{version}-py3-none-any.whl" for version in ("1.0+cpu", "3.0+cpu")]
    for wheel in wheels:
        wheel.write_text(wheel.name)
    monkeypatch.setattr(lock_tools, "local_wheels", lambda python: wheels)
    found = renew(checkout)
    assert f"--hash=sha256:{sha256(wheels[0])}" in found and sha256(wheels[1]) not in found
