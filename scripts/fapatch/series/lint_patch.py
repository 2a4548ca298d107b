"""Define the rules for one patch file. A rule yields (line number, message); line 0 is the whole file.

Add a rule: write the function with ``@rule("its-id")``, and put ``its-id.pass.patch`` and
``its-id.fail.patch`` (or folders of that name) into tests/unit/fixtures/lint.

No rule checks that a patch can be read, applies, changes only lines of upstream's files, and is written as
`make refresh` writes it: tests/patches/test_series.py shows that on every release.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from ..base.lock import Family
from .series import REQUIRED_FIELDS, Header, parse_header

Complaint = tuple[int, str]


@dataclass(frozen=True)
class PatchFile:
    """One patch as it is committed, and the project that it belongs to."""

    name: str
    raw: bytes
    family: Family
    root: Path

    @cached_property
    def lines(self) -> list[str]:
        return self.raw.decode("utf-8", "replace").split("\n")

    @cached_property
    def header(self) -> Header:
        return parse_header(self.raw)

    @cached_property
    def diff_start(self) -> int:
        """Index of the first line of the diff, or the number of lines when there is none."""
        return next(
            (i for i, line in enumerate(self.lines) if line.startswith("diff --git ")), len(self.lines)
        )

    def line_of(self, start: str) -> int:
        """Number, counted from 1, of the first header line that begins with ``start``; 0 when there
        is none.
        """
        return next(
            (i for i, line in enumerate(self.lines[: self.diff_start], 1) if line.startswith(start)), 0
        )

    def diff_lines(self) -> Iterator[tuple[int, str]]:
        return enumerate(self.lines[self.diff_start :], self.diff_start + 1)


RULES: dict[str, Callable[[PatchFile], Iterator[Complaint]]] = {}


def rule(name: str) -> Callable:
    def register(
        function: Callable[[PatchFile], Iterator[Complaint]],
    ) -> Callable[[PatchFile], Iterator[Complaint]]:
        RULES[name] = function
        return function

    return register


@rule("name")
def name_says_area_and_change(patch: PatchFile) -> Iterator[Complaint]:
    # No number in front: two branches that append would collide, and an insertion would rename everything
    # after it.
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+\.patch", patch.name):
        yield (
            0,
            "the name must be <area>-<what>.patch, lower case letters, digits and dashes, no number in front",
        )


@rule("encoding")
def is_utf8(patch: PatchFile) -> Iterator[Complaint]:
    try:
        patch.raw.decode("utf-8")
    except UnicodeDecodeError as e:
        yield patch.raw[: e.start].count(b"\n") + 1, f"not UTF-8: {e.reason}"


@rule("subject")
def subject_is_short_and_has_an_area(patch: PatchFile) -> Iterator[Complaint]:
    subject = patch.header.subject
    line = patch.line_of("Subject:")
    if not re.match(r"\[[a-z][a-z0-9-]*\] [A-Z`\"]", subject):
        yield line, f"the subject must be `[area] Imperative ...`, found {subject!r}"
    if len(subject) > 72:
        yield line, f"the subject has {len(subject)} characters, 72 are allowed"
    if subject.endswith("."):
        yield line, "the subject ends with a full stop"


@rule("header-fields")
def header_is_complete(patch: PatchFile) -> Iterator[Complaint]:
    for field in REQUIRED_FIELDS:
        if not patch.header.fields.get(field, "").strip():
            yield patch.line_of(f"{field}:"), f"the field `{field}:` is missing or empty"


@rule("upstream-status")
def upstream_status_is_one_of(patch: PatchFile) -> Iterator[Complaint]:
    status = patch.header.fields.get("Upstream-Status")
    if status and not re.fullmatch(
        r"Pending|(Submitted|Denied) \[https?://[^\s\]]+\]|(Backport|Inappropriate) \[[^\]]+\]", status
    ):
        yield (
            patch.line_of("Upstream-Status:"),
            (
                f"Upstream-Status is {status!r}; write Pending, Submitted [url], Backport [version or "
                "commit], Denied [url] or Inappropriate [reason]"
            ),
        )


@lru_cache(maxsize=None)
def _tests(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{n.name}"
                for n in node.body
                if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test"))


def _is_test(root: Path, test_id: str) -> bool:
    """Whether ``test_id`` is a test below ``root``: ``tests/x.py::test_y`` or ``tests/x.py::TestZ::test_y``,
    ``[parameters]`` or not. Read from the syntax tree: nothing is imported, so it needs no torch.
    """
    file, _, name = test_id.partition("::")
    path = root / file
    return file.startswith("tests/") and path.is_file() and name.partition("[")[0] in _tests(path)


@rule("test-exists")
def test_exists(patch: PatchFile) -> Iterator[Complaint]:
    line = patch.line_of("Test:")
    for test in re.split(r"[\s,]+", patch.header.fields.get("Test", "").strip()):
        if test and not _is_test(patch.root, test):
            yield line, f"Test names {test}, which is not the id of a test in tests/"


@rule("applies-to")
def applies_to_a_release(patch: PatchFile) -> Iterator[Complaint]:
    text = patch.header.fields.get("Applies-To")
    if not text:
        return
    line = patch.line_of("Applies-To:")
    try:
        specifier = SpecifierSet(text)
    except InvalidSpecifier:
        yield line, f"Applies-To {text!r} is not a version specifier such as >=2.8.0,<2.9"
        return
    known = [r.version for r in patch.family.releases]
    starts = [Version(c.version.removesuffix(".*")) for c in specifier if c.operator in (">=", "==")]
    ahead = any(start > max(map(Version, known)) for start in starts)  # a form for a user's checkout
    if not ahead and not any(specifier.contains(version, prereleases=True) for version in known):
        yield line, f"Applies-To {text} matches no release of {patch.family.name} in the lock"


@rule("whitespace")
def added_lines_end_without_whitespace(patch: PatchFile) -> Iterator[Complaint]:
    for number, line in patch.diff_lines():
        if line.startswith("+") and not line.startswith("+++ ") and line != line.rstrip():
            yield number, "the added line ends with whitespace"


@rule("conflict-markers")
def has_no_conflict_markers(patch: PatchFile) -> Iterator[Complaint]:
    for number, line in patch.diff_lines():
        if re.match(r"\+(<{7}|>{7}|\|{7})( |$)|\+={7}$", line):
            yield number, "conflict marker in an added line"
