"""Test that the smoke test of a wheel whose kernels are compiled when called reports what it could not
check.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAP = Path(__file__).resolve().parents[2] / "scripts" / "fap.py"
METADATA = "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36+nosoftmax.1\nRequires-Dist: {}\n"


class Installed:
    """A small flash_attn.cute, ahead of all other packages, whose import raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "flash_attn" / "cute" / "__init__.py"
        self.info = folder / "flash_attn_4-4.0.0b36+nosoftmax.1.dist-info"
        self.file.parent.mkdir(parents=True)
        self.info.mkdir()
        (folder / "triton-3.dist-info").mkdir()  # a requirement that the lock adds
        (folder / "triton-3.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: triton\nVersion: 3\n"
        )
        (folder / "flash_attn" / "__init__.py").touch()
        self.file.write_text("raise RuntimeError('imported')\n")
        (self.info / "RECORD").write_text("flash_attn/cute/__init__.py,,\n")

    def smoke(self, requires: str = "no-such-compiler>=4") -> tuple[int, str]:
        """Run the smoke test with a package that has this requirement; returns (exit code, output)."""
        (self.info / "METADATA").write_text(METADATA.format(requires))
        command = [sys.executable, FAP, "--family", "flash-attn-4", "smoke"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(self.folder)}
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def test_without_the_compiler_it_says_what_was_not_checked(installed):
    code, said = installed.smoke()
    assert code == 0
    assert "flash_attn_4 4.0.0b36+nosoftmax.1: 1 Python files are installed and parse" in said
    assert (
        "not compiled and not run: .venv lacks no-such-compiler>=4 (make toolchain FAMILY=flash-attn-4"
        in said
    )


def test_with_the_compiler_the_package_is_called_and_its_error_not_swallowed(installed):
    code, said = installed.smoke(requires="pytest")
    assert code == 1 and "RuntimeError: imported" in said


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("def")], ids=["gone", "broken"])
def test_a_damaged_installation_is_noticed(installed, damage):
    damage(installed.file)
    code, said = installed.smoke()
    assert code == 1 and "the installed flash_attn_4 cannot be read" in said


def test_another_package_of_that_name_is_noticed(installed):
    (installed.info / "RECORD").write_text("flash_attn/__init__.py,,\n")
    code, said = installed.smoke()
    assert code == 1 and "which is not of flash_attn_4" in said
