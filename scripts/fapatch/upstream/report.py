"""Judge a run of upstream's tests, and report it as text and JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import files
from ..base.errors import FapError
from ..base.lock import tomllib
from .sample import Case

OUTCOMES = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Result:
    """``outcome``: passed, failed or skipped; ``seconds``: how long the call took; ``message``: why it failed
    or was skipped.
    """

    id: str
    outcome: str
    seconds: float
    message: str


@dataclass(frozen=True)
class KnownFailure:
    """A failure that is upstream's own, for ``reason``.

    ``id``: regular expression for the whole id of the case; ``message``: for a part of its error message.
    """

    id: str
    message: str
    reason: str

    def covers(self, result: Result) -> bool:
        return (
            re.fullmatch(self.id, result.id) is not None
            and re.search(self.message, result.message) is not None
        )


def read_journal(path: Path) -> dict[str, Result]:
    """Read the latest result of every case from a journal of tests/upstream/pick.py. A line cut short by a
    kill is skipped.
    """
    results: dict[str, Result] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = Result(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue
            results[result.id] = result
    return results


def read_known_failures(path: Path) -> list[KnownFailure]:
    """Read the ``[[failure]]`` tables at ``path``. Raises FapError for an entry that lacks id, message or
    reason.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("failure", [])
        return [
            KnownFailure(re.compile(e["id"]).pattern, re.compile(e["message"]).pattern, e["reason"])
            for e in entries
        ]
    except (tomllib.TOMLDecodeError, KeyError, re.error) as e:
        raise FapError(
            f"{path} cannot be read: {type(e).__name__} {e}",
            "each [[failure]] needs id and message (regular expressions) and a reason",
        ) from e


@dataclass(frozen=True)
class Outcome:
    """The chosen cases, sorted by their outcome. ``missing``: chosen, but never finished."""

    results: Mapping[str, Result]
    failed: tuple[str, ...]
    known: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failed and not self.missing


def judge(
    chosen: Iterable[Case], journal: Mapping[str, Result], known_failures: Sequence[KnownFailure]
) -> Outcome:
    """Sort the results of ``chosen``. A failure that no entry of ``known_failures`` covers counts as
    failed.
    """
    ids = [case.id for case in chosen]
    results = {i: journal[i] for i in ids if i in journal}
    failed, known = [], []
    for result in results.values():
        if result.outcome == "failed":
            reason = next((k.reason for k in known_failures if k.covers(result)), None)
            if reason is None:
                failed.append(result.id)
            else:
                known.append((result.id, reason))
    return Outcome(results, tuple(failed), tuple(known), tuple(i for i in ids if i not in journal))


def counts(chosen: Iterable[Case], results: Mapping[str, Result]) -> dict[tuple[str, bool], Counter[str]]:
    """Count results: (test function, use_softmax) -> how many passed, failed and were skipped, and their
    seconds.
    """
    table: dict[tuple[str, bool], Counter[str]] = {}
    for case in chosen:
        if result := results.get(case.id):
            row = table.setdefault((case.function, case.use_softmax), Counter())
            row[result.outcome] += 1
            row["seconds"] += result.seconds
    return table


def totals(chosen: Iterable[Case], results: Mapping[str, Result]) -> dict[bool, Counter[str]]:
    """Sum the counts over all test functions: use_softmax -> counts; "ran" is passed + failed."""
    total: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for (_, use_softmax), row in counts(chosen, results).items():
        total[use_softmax].update(row)
        total[use_softmax]["ran"] += row["passed"] + row["failed"]
    return total


def table(chosen: Sequence[Case], outcome: Outcome) -> str:
    """Format passed, failed and skipped for each test function, with softmax and without, as text."""
    rows = counts(chosen, outcome.results)
    functions = sorted({function for function, _ in rows})
    width = max((len(f) for f in functions), default=0)
    head = f"{'':{width}}  {'use_softmax=True':^24}  {'use_softmax=False':^24}\n"
    head += (
        f"{'test function':{width}}  "
        + "  ".join(["".join(f"{o:>8}" for o in OUTCOMES)] * 2)
        + f"{'seconds':>9}"
    )
    lines = [head]
    for name, pick in [(f, [f]) for f in functions] + [("all", functions)]:
        sides = [sum((rows.get((f, on), Counter()) for f in pick), Counter()) for on in (True, False)]
        numbers = "  ".join("".join(f"{side[o]:>8}" for o in OUTCOMES) for side in sides)
        lines.append(f"{name:{width}}  {numbers}{sum(s['seconds'] for s in sides):>9.1f}")
    return "\n".join(lines)


def failures(outcome: Outcome, limit: int = 20) -> str:
    """List the ids of failed cases with the last line of their message, and known failures with their
    reason.
    """
    lines = []
    for title, ids in (("failed", outcome.failed), ("not finished", outcome.missing)):
        for i in ids[:limit]:
            message = outcome.results[i].message.splitlines() if i in outcome.results else []
            lines.append(f"{title}: {i}" + (f"\n    {message[-1]}" if message else ""))
        if len(ids) > limit:
            lines.append(f"... and {len(ids) - limit} more {title}")
    lines += [f"known failure: {i}  ({reason})" for i, reason in outcome.known[:limit]]
    return "\n".join(lines)


def document(chosen: Sequence[Case], outcome: Outcome, facts: Mapping[str, object]) -> dict[str, object]:
    """Collect everything but the single results, to be written as JSON."""
    by_function = [
        {
            "function": f,
            "use_softmax": on,
            **{o: row[o] for o in OUTCOMES},
            "seconds": round(row["seconds"], 1),
        }
        for (f, on), row in sorted(counts(chosen, outcome.results).items())
    ]
    total = {str(on): dict(row) for on, row in totals(chosen, outcome.results).items()}
    return {
        **facts,
        "ok": outcome.ok,
        "total": total,
        "functions": by_function,
        "failed": list(outcome.failed),
        "not_finished": list(outcome.missing),
        "known_failures": [{"id": i, "reason": r} for i, r in outcome.known],
    }


def write_json(path: Path, document: Mapping[str, object]) -> None:
    files.write(path, json.dumps(document, indent=1) + "\n")
