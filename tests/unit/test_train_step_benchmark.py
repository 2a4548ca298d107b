"""Test the steps, the record and the page of benchmarks/train_step.py without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("flash_attn.masks", reason="needs the installed flash_attn: run `make wheel`")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("train_step", "gpu_record", "gpu_device", "gpu_tables", "resumed", "results_page", "language_model")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield importlib.import_module("train_step")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def on_cpu(bench, monkeypatch):
    """A tiny model on the CPU, for which the GPU's questions are answered."""
    for name, value in dict(
        DEVICE="cpu",
        COMPILER="aot_eager",
        LAYERS=2,
        WIDTH=16,
        HEADS=2,
        TOKENS=64,
        SEQLENS=(16, 32),
        QUICK=(16,),
    ).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "on_hopper", lambda: True)
    answers = dict(
        get_device_name=lambda: "A Device",
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 3 * 2**30,
    )
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return bench


@pytest.mark.slow
def test_every_variant_makes_steps(on_cpu, monkeypatch, tmp_path):
    """Eager and compiled; FA4 is not on a CPU, and its row says so. A stopped run goes on."""
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    (tmp_path / "results").mkdir()
    target = tmp_path / "results" / "train_step.json"
    speed = tmp_path / "speed.md"
    speed.write_text("before\n<!-- from results/train_step.json -->\nold\n<!-- end -->\nafter\n")
    command = ["--json", str(target)]
    assert on_cpu.main([*command, "--quick", "--modes", "eager"]) == 0
    first = json.loads(target.read_text())["rows"]
    assert [row["variant"] for row in first] == list(on_cpu.VARIANTS)
    assert on_cpu.main(command) == 0
    rows = json.loads(target.read_text())["rows"]
    assert rows[: len(first)] == first and len(rows) == 2 * 2 * len(on_cpu.VARIANTS)
    assert {(row["mode"], row["seqlen"]) for row in rows} == {
        (mode, n) for mode in on_cpu.MODES for n in (16, 32)
    }
    for row in rows:
        if row["variant"] == "softmax, FA4":
            assert row["ms"] is None and "flash_attn.cute" in row["why_not"]
        else:
            assert row["tokens_per_second"] == pytest.approx(64 / row["ms"] * 1e3), row
    ran = {row["variant"]: (row["kernels"], row["parameters"]) for row in rows if row["ms"]}
    assert ran["softmax, torch"] == ("torch", ran["softmax, FA2"][1]) and ran["silu"][0] == "cpu"
    assert ran["retention"][1] - ran["identity"][1] == 2 * 16 * 16  # the gates
    page = target.with_suffix(".md").read_text()
    assert page == on_cpu.markdown(json.loads(target.read_text()))
    assert "- softmax, FA4, first at N = 16, eager: " in page and "| compiled | N = 16 | N = 32 |" in page
    assert "old" not in speed.read_text() and "A Device" in speed.read_text()


@pytest.mark.slow
def test_steps_change_every_weight_and_blocks_are_compiled_once(on_cpu, monkeypatch):
    compiled, models = [], []

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward

    made = on_cpu.LanguageModel

    def keeping(*args):
        models.append(made(*args))
        before.update({name: p.detach().clone() for name, p in models[-1].named_parameters()})
        return models[-1]

    before: dict = {}
    monkeypatch.setattr(on_cpu, "LanguageModel", keeping)
    monkeypatch.setattr(on_cpu, "COMPILER", compiler)
    on_cpu.measure("compiled", 16, "retention")
    assert len(compiled) == 1  # two blocks, seven steps
    moved = [name for name, p in models[0].named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    on_cpu.measure("eager", 16, "retention")
    assert len(compiled) == 1
    # FA4's softmax is no operator: a block becomes several graphs, for all blocks the same.
    stand_in = SimpleNamespace(flash_attn_func=lambda q, k, v, causal: (on_cpu.causal_sdpa(q, k, v), None))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", stand_in)
    assert on_cpu.measure("compiled", 16, "softmax, FA4")["kernels"] == "FA4"
    several = len(compiled) - 1
    monkeypatch.setattr(on_cpu, "LAYERS", 1)
    on_cpu.measure("compiled", 16, "softmax, FA4")
    assert len(compiled) - 1 == 2 * several > 2


def test_a_row_is_compared_with_the_fastest_softmax_beside_it(bench):
    def row(variant, speed, seqlen=4096, mode="eager"):
        return {
            "mode": mode, "seqlen": seqlen, "variant": variant, "ms": 1.0, "tokens_per_second": speed,
            "peak_bytes": 2 * 2**30, "parameters": 10**6, "kernels": "fa4", "first_seconds": 1.0,
        }  # fmt: skip

    rows = [row("softmax, torch", 1e5), row("softmax, FA2", 2e5), row("silu", 3e5), row("silu", 1e5, 16384)]
    rows += [
        row("softmax, torch", 9e5, mode="compiled"),
        {**row("identity", 0), "ms": None, "why_not": "none"},
    ]
    said = dict.fromkeys(("date", "command", "device", "torch"), "said")
    text = bench.markdown({**said, "packages": {}, "rows": rows})
    lines = text.splitlines()
    assert "| softmax, torch | 100k (0.50×), 2 GiB | – |" in lines
    assert "| silu | 300k (1.50×), 2 GiB | 100k, 2 GiB |" in lines
    assert "| softmax, torch | 900k (1.00×), 2 GiB |" in lines
    assert "- identity, first at N = 4k, eager: none" in lines
    assert "16 heads of 128" in text and "64k tokens a step" in text


def test_a_run_is_bounded_and_needs_a_hopper_gpu(on_cpu, monkeypatch, tmp_path, capsys):
    target = tmp_path / "none.json"
    assert on_cpu.main(["--seconds", "-1", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rows"] == []
    monkeypatch.setattr(on_cpu, "on_hopper", lambda: False)
    assert on_cpu.main([]) == 2 and "needs a Hopper GPU" in capsys.readouterr().err
    assert on_cpu.main(["--tables", "--json", str(target)]) == 0  # anywhere
