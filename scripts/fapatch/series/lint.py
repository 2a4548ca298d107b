"""Check everything about the patch set that can be checked without upstream's source, in seconds.

Rules: lint_patch.py (each patch) and lint_project.py (series, overlay, lock, submodule, attributes). Every
finding is printed as `file:line: rule: message`. Exit code 0 if there are none, else 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base.lock import Family
from ..base.process import run
from ..base.project import Project
from . import lint_patch, lint_project


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}: {self.rule}: {self.message}"
            if self.line
            else f"{self.file}: {self.rule}: {self.message}"
        )


def check_patch(path: Path, root: Path, family: Family) -> Iterator[Finding]:
    """Apply every patch rule to the file at ``path``."""
    patch = lint_patch.PatchFile(path.name, path.read_bytes(), family, root)
    shown = path.relative_to(root).as_posix()
    for name, rule in lint_patch.RULES.items():
        for line, message in rule(patch):
            yield Finding(shown, line, name, message)


def check_project(checkout: lint_project.Checkout) -> Iterator[Finding]:
    """Apply every rule to ``checkout`` and to each of its patches."""
    for name, rule in lint_project.RULES.items():
        for file, line, message in rule(checkout):
            yield Finding(file, line, name, message)
    for family in checkout.lock.families:
        for path in checkout.patches(family):
            yield from check_patch(path, checkout.root, family)


def gitlinks(root: Path) -> dict[str, str]:
    """Path -> commit of every submodule in the index of the repository at ``root``."""
    listed = run("git", "ls-files", "--stage", "-z", cwd=root).stdout.decode().split("\0")
    entries = (line.split(None, 3) for line in listed if line.startswith("160000 "))
    return {path: commit for _, commit, _, path in entries}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(project: Project, args: argparse.Namespace) -> int:
    checkout = lint_project.Checkout(project.root, project.lock, gitlinks(project.root))
    findings = sorted(set(check_project(checkout)))
    for finding in findings:
        print(finding)
    patches = sum(len(checkout.patches(f)) for f in project.lock.families)
    print(
        f"lint: {patches} patches, {len(lint_patch.RULES) + len(lint_project.RULES)} rules, "
        f"{len(findings) or 'no'} findings"
    )
    return 1 if findings else 0
