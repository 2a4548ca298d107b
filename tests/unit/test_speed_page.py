"""Test that the figures in docs are those of their records: each page and section equals its script's
output.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
SECTIONS = {
    "gpu_vs_softmax": "gpu_tables",
    "fa4_tflops": "fa4_tables",
    "linear_vs_quadratic_h100": "linear_tables",
    "cpu_vs_sdpa": "plot_cpu",
}
if (RESULTS / "train_step.json").exists():  # needs a run on a Hopper GPU
    SECTIONS["train_step"] = "train_step"
PAGES = {
    **SECTIONS,
    "linear_vs_quadratic_cpu": "linear_tables",
    "hstu_movielens": "movielens_page",
    "hstu_tflops": "hstu",
}


def record(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("name", SECTIONS)
def test_speed_page_holds_the_figures_of_the_record(name):
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert f"<!-- from results/{name}.json -->" in page
    text = importlib.import_module(SECTIONS[name]).summary(record(name))
    assert importlib.import_module("results_page").with_section(page, name, text) == page


@pytest.mark.parametrize("name", sorted(PAGES.keys() - {"cpu_vs_sdpa"}))
def test_page_of_results_holds_the_figures_of_the_record(name):
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert importlib.import_module(PAGES[name]).markdown(record(name)) == page
