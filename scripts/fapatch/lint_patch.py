"""Rules for one patch file. A rule is a generator function of (line number, message); line 0 is the file as a
whole.

Add a rule: write the function with ``@rule("its-id")``, and put ``its-id.pass.patch`` and
``its-id.fail.patch`` (or folders of that name) into tests/unit/fixtures/lint. A rule that needs a patch that
can be read at all stays silent when it cannot: `encoding`, `header-fields` and `diff-parses` report that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

from . import header, testids
from .globs import matches
from .lock import Family

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
    def header(self) -> header.Header:
        return header.parse(self.raw)

    @cached_property
    def diff_start(self) -> int:
        """Index of the first line of the diff, or the number of lines when there is none."""
        return next(
            (i for i, line in enumerate(self.lines) if line.startswith("diff --git ")), len(self.lines)
        )

    @cached_property
    def diff(self) -> PatchSet | None:
        """The parsed diff; None when it cannot be parsed."""
        try:
            return PatchSet("\n".join(self.lines[self.diff_start :]))
        except UnidiffParseError:
            return None

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


@rule("line-ends")
def ends_lines_with_lf(patch: PatchFile) -> Iterator[Complaint]:
    if b"\r" in patch.raw:
        yield (
            patch.raw[: patch.raw.index(b"\r")].count(b"\n") + 1,
            "carriage return: lines must end with LF alone",
        )
    if not patch.raw.endswith(b"\n"):
        yield len(patch.lines), "the last line does not end with LF"


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
    for field in header.REQUIRED:
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


@rule("test-exists")
def test_exists(patch: PatchFile) -> Iterator[Complaint]:
    line = patch.line_of("Test:")
    for test in re.split(r"[\s,]+", patch.header.fields.get("Test", "").strip()):
        if test and not testids.exists(patch.root, test):
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
    if not any(specifier.contains(r.version, prereleases=True) for r in patch.family.releases):
        yield line, f"Applies-To {text} matches no release of {patch.family.name} in the lock"


@rule("no-patch-name")
def trailer_is_stripped(patch: PatchFile) -> Iterator[Complaint]:
    if line := patch.line_of("Patch-Name:"):
        yield line, "Patch-Name belongs into the commit only; `make refresh` strips it"


@rule("deterministic")
def is_exported_deterministically(patch: PatchFile) -> Iterator[Complaint]:
    """The commit id is zeros (--zero-commit) and blob ids are whole (--full-index), so that a refresh changes
    nothing by itself.
    """
    if not re.match(r"From 0{40} ", patch.lines[0]):
        yield 1, "the first line must be `From 0000...`: export with `make refresh`"
    for number, line in patch.diff_lines():
        if line.startswith("index ") and not re.fullmatch(
            r"index [0-9a-f]{40}\.\.[0-9a-f]{40}( \d{6})?", line
        ):
            yield number, "abbreviated blob ids: export with `make refresh`"


@rule("diff-parses")
def diff_parses(patch: PatchFile) -> Iterator[Complaint]:
    if patch.diff is None:
        yield patch.diff_start + 1, "the diff cannot be parsed: a hunk is cut short or its counts are wrong"
    elif not patch.diff:
        yield 0, "there is no diff in this patch"


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


@rule("no-fuzz")
def was_made_by_git(patch: PatchFile) -> Iterator[Complaint]:
    for number, line in enumerate(patch.lines, 1):
        if re.search(r"Hunk #\d+ (succeeded|FAILED)|with fuzz \d|\.(rej|orig)$", line):
            yield number, "what another patch program said or left behind has got into the patch"


@rule("paths")
def touches_allowed_paths_only(patch: PatchFile) -> Iterator[Complaint]:
    for path in sorted({f.path for f in patch.diff or ()}):
        if not matches(path, patch.family.include) or matches(path, patch.family.exclude):
            yield 0, f"{path} is not among the files taken from upstream (include and exclude in the lock)"


@rule("no-new-files")
def creates_and_renames_nothing(patch: PatchFile) -> Iterator[Complaint]:
    for file in patch.diff or ():
        if file.is_added_file:
            yield 0, f"{file.path} is a new file: put it into {patch.family.overlay}/ at the same path"
        elif file.is_removed_file or file.is_rename:
            yield 0, f"{file.path} is removed or renamed, which no later release of upstream will follow"
