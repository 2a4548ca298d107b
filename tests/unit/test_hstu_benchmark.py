"""Test the arithmetic and the record of benchmarks/hstu.py without a GPU."""

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
NAMES = ("hstu", "gpu_record", "gpu_device", "gpu_tables", "resumed")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("hstu")
    for name in NAMES:
        sys.modules.pop(name, None)


def test_work_of_masks(bench):
    """Counted by hand: 4 keys of history and 2 candidates; and in tiles of two by two."""
    mask = bench.HSTU(2)
    assert bench.visible_scores([6], [mask]) == 1 + 2 + 3 + 4 + 5 + 5
    assert bench.scores_of_tiles([6], [mask], 2, 2) == 4 * (1 + 2 + 3)
    assert bench.scores_of_tiles([6], [bench.HSTU(4)], 2, 2) == 4 * (1 + 2 + 2)
    assert bench.flops(10, 64, bench.FORWARD) == 4 * 10 * 4 * 64
    assert bench.flops(10, 64, bench.BACKWARD) == 2.5 * bench.flops(10, 64, bench.FORWARD)


@pytest.mark.parametrize("batch, seqlen", [(512, 256), (32, 16384)])
def test_batches_are_jagged_and_the_same_in_every_run(bench, batch, seqlen):
    lengths, targets = bench.drawn(batch, seqlen)
    assert bench.drawn(batch, seqlen) == (lengths, targets) and len(lengths) == batch
    assert int(0.9 * seqlen) <= min(lengths) < max(lengths) < seqlen
    assert 1 <= min(targets) < max(targets) <= 20
    for variant in bench.VARIANTS:
        assert len(bench.masks(variant, lengths, targets)) == batch
    assert [m.num_targets for m in bench.masks("quarter", lengths, targets)] == [n // 4 for n in lengths]


def on_cpu(bench, monkeypatch, **times):
    """Let the calls of the benchmark run by the CPU backend, in made-up times."""
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "BACKEND", "cpu")
    monkeypatch.setattr(bench, "tiles", lambda *_: (16, 16))
    monkeypatch.setattr(bench, "HEAD_DIMS", (64,))
    monkeypatch.setattr(bench, "SHAPES", ((2, 40), (2, 64)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Device")
    monkeypatch.setattr(bench.resumed.metadata, "version", lambda name: "1.0")
    called = []

    def medians(functions):
        for function in functions:
            function()
        called.append(len(functions))
        return [2.0] * len(functions)

    monkeypatch.setattr(
        bench, "Gpu", lambda budget: SimpleNamespace(medians=medians, matmul_tflops=lambda dtype: 700.0)
    )
    return called


def test_a_stopped_run_goes_on(bench, monkeypatch, tmp_path):
    called = on_cpu(bench, monkeypatch)
    target = tmp_path / "hstu_tflops.json"
    command = ["--head-dims", "64", "--json", str(target)]
    assert bench.main([*command, "--seconds", "-1"]) == 0 and not called
    assert bench.main(command) == 0
    whole = json.loads(target.read_text(encoding="utf-8"))
    assert called == [5] * 4 and len(whole["rows"]) == 20
    rows = {tuple(row[name] for name in bench.KEY): row for row in whole["rows"]}
    assert len(rows) == 20
    lengths, targets = bench.drawn(2, 40)
    row, mask = rows[64, 2, 40, "forward", "targets"], bench.masks("targets", lengths, targets)
    assert row["tflops"] == pytest.approx(4 * 4 * 64 * bench.visible_scores(lengths, mask) / 2e-3 / 1e12)
    assert row["tflops_of_tiles"] > row["tflops"]
    whole["rows"] = whole["rows"][:7]
    target.write_text(json.dumps(whole), encoding="utf-8")
    assert bench.main(command) == 0
    again = json.loads(target.read_text(encoding="utf-8"))
    assert called == [5] * 7 and len(again["rows"]) == 20
    assert {tuple(row[name] for name in bench.KEY) for row in again["rows"]} == set(rows)


def test_every_kernel_is_compiled_once(bench, monkeypatch):
    on_cpu(bench, monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    monkeypatch.setattr(bench, "_calls", lambda *given: [lambda: ran.append(given)])
    for part in range(3):
        bench._compile((64, 128), 3, part)
    assert sorted((given[0], given[2], *given[-1]) for given in ran) == sorted(
        (head_dim, seqlen, variant)
        for head_dim in (64, 128)
        for seqlen in (40, 64)  # the shortest and the longest, which have other tiles
        for variant in bench.VARIANTS
    )


def test_the_page_marks_what_others_published(bench):
    rows = [
        {
            "head_dim": 128, "batch": 512, "seqlen": 512, "direction": "forward", "variant": variant,
            "ms": 1.0, "tflops": 300.4, "tflops_of_tiles": 402.0,
        }
        for variant in bench.VARIANTS
    ]  # fmt: skip
    said = dict.fromkeys(("date", "command", "device", "torch"), "said")
    text = bench.markdown({**said, "packages": {"flash-attn-4": "4"}, "matmul_tflops": 700.0, "rows": rows})
    lines = text.splitlines()
    assert "| variant | N = 512 |" in lines and "| window | 300 (402) |" in lines
    assert "| published, FBGEMM | 163–287 |" in lines
    assert "not of this run" in text and "Backward" not in text


def test_it_needs_a_hopper_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2 and "needs a Hopper GPU" in capsys.readouterr().err
