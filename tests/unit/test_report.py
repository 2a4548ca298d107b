"""Test that the summary of a run of upstream's tests counts every result in the journal."""

from __future__ import annotations

import json

import pytest

from fapatch.base.errors import FapError
from fapatch.upstream import report
from fapatch.upstream.sample import Case

CHOSEN = [
    Case("test_a", "test_a[True]", (0,), True),
    Case("test_a", "test_a[False]", (1,), False),
    Case("test_b", "test_b[1]", (0,), True),
    Case("test_b", "test_b[2]", (1,), True),
]
KNOWN = [report.KnownFailure(r"test_b\[\d\]", r"0\.0\d+ <= 0\.04", "too few draws")]


def result(case_id: str, outcome: str, message: str = "") -> report.Result:
    return report.Result(case_id, outcome, 1.5, message)


def journal(*results: report.Result) -> dict[str, report.Result]:
    return {r.id: r for r in results}


def test_a_failure_counts_unless_it_is_known():
    results = journal(
        result("test_a[True]", "passed"),
        result("test_a[False]", "failed", "assert nan <= 1"),
        result("test_b[1]", "failed", "assert 0.0415 <= 0.04"),
        result("test_b[2]", "skipped"),
    )
    outcome = report.judge(CHOSEN, results, KNOWN)
    assert outcome.failed == ("test_a[False]",)
    assert outcome.known == (("test_b[1]", "too few draws"),)
    assert not outcome.ok
    text = report.failures(outcome)
    assert "failed: test_a[False]" in text and "assert nan <= 1" in text and "too few draws" in text


def test_a_known_case_that_fails_otherwise_counts():
    outcome = report.judge(CHOSEN[2:3], journal(result("test_b[1]", "failed", "assert 0.9 <= 0.04")), KNOWN)
    assert outcome.failed == ("test_b[1]",) and not outcome.ok


def test_a_case_that_never_finished_is_no_success():
    outcome = report.judge(CHOSEN, journal(*(result(c.id, "passed") for c in CHOSEN[:3])), [])
    assert outcome.missing == ("test_b[2]",) and not outcome.ok
    assert "not finished: test_b[2]" in report.failures(outcome)


def test_all_passed_is_ok():
    outcome = report.judge(CHOSEN, journal(*(result(c.id, "passed") for c in CHOSEN)), [])
    assert outcome.ok and report.failures(outcome) == ""


def test_the_table_is_split_by_use_softmax():
    results = journal(
        result("test_a[True]", "passed"), result("test_a[False]", "failed"), result("test_b[1]", "skipped")
    )
    outcome = report.judge(CHOSEN, results, [])
    lines = {line.split()[0]: line.split()[1:] for line in report.table(CHOSEN, outcome).splitlines()[2:]}
    assert lines == {
        "test_a": ["1", "0", "0", "0", "1", "0", "3.0"],
        "test_b": ["0", "0", "1", "0", "0", "0", "1.5"],
        "all": ["1", "0", "1", "0", "1", "0", "4.5"],
    }
    total = report.totals(CHOSEN, outcome.results)
    assert (total[True]["ran"], total[False]["ran"]) == (1, 1)


def test_the_latest_line_of_a_case_wins_and_a_cut_line_is_passed_over(tmp_path):
    lines = [
        json.dumps({"id": "test_x", "outcome": o, "seconds": 1.0, "message": ""})
        for o in ("failed", "passed")
    ]
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join([*lines, lines[0][:20]]))
    assert report.read_journal(path) == {"test_x": report.Result("test_x", "passed", 1.0, "")}
    assert report.read_journal(tmp_path / "none") == {}


def test_results_are_written_for_machines(tmp_path):
    outcome = report.judge(
        CHOSEN[:2], journal(result("test_a[True]", "passed"), result("test_a[False]", "passed")), []
    )
    report.write_json(tmp_path / "results.json", report.document(CHOSEN[:2], outcome, {"seed": 3}))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["ok"] and written["seed"] == 3
    assert written["total"]["False"]["ran"] == written["total"]["True"]["ran"] == 1


@pytest.mark.parametrize(
    "text", ["[[failure]]\nid = 'x'", "[[failure]]\nid = '['\nmessage = ''\nreason = ''", "not toml"]
)
def test_a_bad_list_of_known_failures_is_refused(tmp_path, text):
    (tmp_path / "known.toml").write_text(text)
    with pytest.raises(FapError, match="known.toml"):
        report.read_known_failures(tmp_path / "known.toml")
