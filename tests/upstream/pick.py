"""Pytest plugin that makes only the test cases of a plan, and keeps a journal of their results.

    pytest -p pick --pick PLAN --journal FILE TEST_FILE

PLAN is JSON, ``{test function: [[index into axis 0, index into axis 1, ...], ...]}`` with the axes of
axes.py. A function that is not in the plan makes no cases. Pytest itself would first make every combination,
a million objects and many minutes for upstream's file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from axes import axes_of


def pytest_addoption(parser) -> None:
    group = parser.getgroup("pick", "run a planned subset of the parameter combinations")
    group.addoption("--pick", metavar="PLAN", type=Path, help="JSON file with the combinations to run")
    group.addoption(
        "--journal", metavar="FILE", type=Path, help="append one JSON line for each finished test"
    )


class Picker:
    def __init__(self, plan: dict[str, list[list[int]]]) -> None:
        self.plan = plan

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector, name: str, obj):
        if not (name.startswith("test_") and callable(obj)):
            return None
        chosen = self.plan.get(name, [])
        if not chosen:
            return []
        axes = axes_of(obj)
        if axes:
            names = [name for axis_names, _, _ in axes for name in axis_names]
            values = [sum((axis[1][i] for axis, i in zip(axes, index)), ()) for index in chosen]
            ids = ["-".join(axis[2][i] for axis, i in zip(axes, index)) for index in chosen]
            obj.pytestmark = [m for m in obj.pytestmark if m.name != "parametrize"]
            obj.pytestmark.append(pytest.mark.parametrize(names, values, ids=ids).mark)
        return None


class Journal:
    """Writes one line for each test at once, so that a stopped run loses no finished result."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report) -> None:
        # A test's result is that of its call phase; setup and teardown count if they fail or skip.
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            message = (
                ""
                if report.passed
                else str(getattr(report.longrepr, "reprcrash", None) or report.longrepr or "").strip()
            )
            line = {
                "id": name,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "message": message[-500:],
            }
            self.file.write(json.dumps(line) + "\n")


def pytest_configure(config) -> None:
    if plan := config.getoption("--pick"):
        config.pluginmanager.register(Picker(json.loads(plan.read_text(encoding="utf-8"))))
    # With pytest-xdist the controlling process gets every report, so the workers keep no journal.
    if (journal := config.getoption("--journal")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Journal(journal))
