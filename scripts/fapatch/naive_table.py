"""What became of each test with the right kernel and with the naive ones, and whether that is what it should
be.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .errors import FapError
from .lock import tomllib

RIGHT = "right"
VARIANTS = ("minus-infinity", "masked-with-zero")
TITLES = {RIGHT: "right kernel", "minus-infinity": "masked with -inf", "masked-with-zero": "masked with 0"}
NOT_RUN = "not run"

Column = Mapping[str, Counter[str]]


def read_junit(path: Path) -> dict[str, Counter[str]]:
    """module.function -> how many cases passed, failed, broke or were skipped, from pytest's JUnit XML.

    Failed is an assertion that did not hold. Broken is any other end, such as a CUDA error, which says
    nothing about the test.
    """
    column: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        function = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name', '').partition('[')[0]}"
        column.setdefault(function, Counter())[_outcome(case)] += 1
    return column


def _outcome(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    if case.find("error") is not None:
        return "broken"
    failure = case.find("failure")
    if failure is None:
        return "passed"
    return "failed" if failure.get("message", "").startswith(("assert", "AssertionError")) else "broken"


def cell(counts: Counter[str]) -> str:
    """Such as "fails 5 of 6", "passes 8" or "not run"."""
    ran = counts["passed"] + counts["failed"] + counts["broken"]
    if not ran:
        return NOT_RUN
    broken = f", {counts['broken']} broke" if counts["broken"] else ""
    return (
        f"fails {counts['failed']} of {ran}" if counts["failed"] else f"passes {counts['passed']}"
    ) + broken


def read_reasons(path: Path) -> dict[tuple[str, str], str]:
    """(variant, module.function) -> why that naive kernel passes it. Raises FapError for an entry that lacks
    a part.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("right", [])
        reasons = {(v, t): e["reason"] for e in entries for v in e["variants"] for t in e["tests"]}
    except (tomllib.TOMLDecodeError, KeyError) as e:
        raise FapError(
            f"{path} cannot be read: {type(e).__name__} {e}",
            "each [[right]] needs variants, tests and a reason",
        ) from e
    if unknown := sorted({variant for variant, _ in reasons} - set(VARIANTS)):
        raise FapError(f"{path} names the variant {unknown[0]}", f"choose among {', '.join(VARIANTS)}")
    return reasons


def complaints(columns: Mapping[str, Column], reasons: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """What is not as it should be: the right kernel passes everything, a naive one fails every test that has
    no reason to pass.
    """
    for name, column in columns.items():
        for function, counts in sorted(column.items()):
            expected = name == RIGHT or (name, function) in reasons
            if counts["broken"]:
                yield (
                    f"{function} with {TITLES[name]}: {counts['broken']} cases ended without an assertion "
                    "that failed"
                )
            elif counts["failed"] and expected:
                yield f"{function} with {TITLES[name]}: {cell(counts)}, and should pass"
            elif counts["passed"] and not counts["failed"] and not expected:
                yield f"{function} with {TITLES[name]}: {cell(counts)}, and no reason is given for it"


def markdown(
    columns: Mapping[str, Column], reasons: Mapping[tuple[str, str], str], facts: Mapping[str, str]
) -> str:
    """The whole page: ``facts`` (such as device, date and command), the table, the reasons, and what did not
    run.
    """
    functions = sorted({function for column in columns.values() for function in column})
    cells = {f: [cell(column.get(f, Counter())) for column in columns.values()] for f in functions}
    idle = [f for f in functions if set(cells[f]) == {NOT_RUN}]
    lines = [
        "# The tests on naive kernels",
        "",
        "What somebody gets who comments the softmax out of upstream's kernels by hand, and then lets the "
        "mask write 0 for -inf and mends",
        "nothing else (tests/naive/*.patch). Each test that is about NaN and each test that catches a "
        "mutant, on the GPU: number of cases.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        *_table(
            ["test", *(TITLES[name] for name in columns)],
            [[f, *cells[f]] for f in functions if f not in idle],
        ),
    ]
    given: dict[tuple[str, str], list[str]] = {}
    for (variant, function), reason in reasons.items():
        if _passes(columns.get(variant, {}).get(function, Counter())):
            given.setdefault((reason, TITLES[variant]), []).append(function)
    if given:
        lines += ["", "## Right anyway", "", "Mistakes that a naive kernel does not make:", ""]
        lines += [
            f"- {title}: {', '.join(sorted(tests))}: {reason}." for (reason, title), tests in given.items()
        ]
    if idle:
        lines += [
            "",
            "## Not run",
            "",
            f"{', '.join(idle)}: no build here has kernels for them. The same tests run on the CPU, where",
            "tests/attention/test_mutations.py shows them failing for mutants.",
        ]
    return "\n".join(lines) + "\n"


def _passes(counts: Counter[str]) -> bool:
    return counts["passed"] > 0 and not counts["failed"] + counts["broken"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
