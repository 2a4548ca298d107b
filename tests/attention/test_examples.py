"""Test the models of examples/: every form trains, none sees the future, and the tasks are what they say."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("language_model", "record", "train_lm", "recall", "stability", "figures")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: __import__(name) for name in names}


TINY = dict(layers=1, width=16, heads=2, tokens=32, batch=2, steps=4, rate=1e-3)


@pytest.mark.slow
def test_every_form_trains_and_sees_no_future(examples):
    model_of = examples["language_model"]
    for form in model_of.FORMS:
        torch.manual_seed(0)
        model = model_of.LanguageModel(form, layers=2, width=32, heads=2)
        tokens = torch.randint(128, (2, 24))
        logits = model(tokens)
        logits.square().mean().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters()), form
        changed = tokens.clone()
        changed[:, 12:] = 127 - changed[:, 12:]
        again = model(changed)
        torch.testing.assert_close(again[:, :12], logits[:, :12], rtol=1e-4, atol=1e-5, msg=form)
        assert (again[:, 12:] - logits[:, 12:]).abs().max() > 1e-3, form


def test_the_text_is_split(examples):
    training, validation = examples["language_model"].text(0.1)
    assert len(training) > 8 * len(validation) > 0 and training.max() < 128
    assert "def " in bytes(training.tolist()).decode()


@pytest.mark.slow
def test_a_step_of_training(examples):
    seen = examples["stability"].watched("softmax", TINY, "cpu")
    assert len(seen["norms"]) == 4 and min(seen["norms"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_form_trains_in_16_bits(examples, dtype):
    """fp16 through GradScaler, which skips a step where a gradient is too large."""
    for form in examples["language_model"].FORMS:
        curve = examples["train_lm"].train(form, 0, TINY, "cpu", dtype)
        assert curve["steps"] == [1, 2, 3, 4] and all(3 < bits < 8 for bits in curve["bits"]), form
        assert curve["skipped"] <= 1, form


def test_steps_that_the_scaler_skips_are_counted(examples, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    curve = examples["train_lm"].train("identity, norm after", 0, {**TINY, "steps": 3}, "cpu", torch.float16)
    assert curve["skipped"] == 3


def test_batches_are_pieces_of_the_text(examples):
    """Targets are one character ahead; a seed gives the same batches, and goes on after many."""
    batches, text = examples["language_model"].batches, torch.arange(500)
    given = batches(text, 3, 20, 7, "cpu")
    seen = [next(given) for _ in range(1002)]
    for inputs, targets in (seen[0], seen[-1]):
        assert inputs.shape == targets.shape == (3, 20)
        assert torch.equal(inputs + 1, targets) and torch.equal(inputs.diff(), torch.ones(3, 19).long())
    assert len({inputs[0, 0].item() for inputs, _ in seen}) > 300
    assert torch.equal(next(batches(text, 3, 20, 7, "cpu"))[0], seen[0][0])


def test_softmax_runs_by_torch_where_this_package_lacks_its_kernels(examples, monkeypatch):
    model_of = examples["language_model"]
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    expected = model_of.causal_softmax(q, k, v)
    monkeypatch.setattr(model_of, "has_softmax", lambda q: False)
    monkeypatch.setattr(model_of, "flash_attn_func", None)
    torch.testing.assert_close(model_of.causal_softmax(q, k, v), expected)


def test_recall_asks_for_pairs_that_it_told(examples):
    pairs = 5
    tokens, targets = examples["recall"].draw(64, pairs, torch.Generator().manual_seed(0))
    assert tokens.shape == (64, 2 * pairs, 2) and targets.shape == (64, 2 * pairs)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        told, asked = dict(row[:pairs]), [key for key, _ in row[pairs:]]
        assert len(told) == pairs and sorted(asked) == sorted(told) and max(told) < 2 * pairs
        assert wanted == [-100] * pairs + [told[key] for key in asked]
        assert {value for _, value in row[pairs:]} == {3 * pairs} and max(told.values()) < 3 * pairs
    setting = dict(layers=1, width=16, heads=1, batch=4, steps=2, rate=1e-3)
    found = examples["recall"].accuracy("softmax", 2, 0, setting, "cpu", torch.bfloat16)
    assert found in {x / 1024 for x in range(1025)}


# ---- Records ----


@pytest.fixture
def started(examples, monkeypatch):
    """Start an example in a tiny setting, as its command line does."""
    tiny = {
        "train_lm": {**TINY, "seeds": 2},
        "recall": {**TINY, "seeds": 1, "pairs": [2, 3]},
        "stability": TINY,
    }
    monkeypatch.setattr(examples["language_model"], "text", lambda: (torch.arange(900) % 128,) * 2)
    for name in tiny:
        monkeypatch.setattr(examples[name], "SETTINGS", {"cpu": tiny[name]})
        if hasattr(examples[name], "text"):
            monkeypatch.setattr(examples[name], "text", examples["language_model"].text)

    def start(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, "--setting", "cpu", *map(str, arguments)])
        examples[name].main()

    return start


TWO = ("--forms", "retention", "softmax")


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("train_lm", 4), ("recall", 4), ("stability", 2)])
def test_an_ended_run_goes_on(started, tmp_path, capsys, name, rows):
    target = tmp_path / "record.json"
    started(name, *TWO, "--json", target, "--seconds", -1)
    assert not target.exists() and f"{rows} are left" in capsys.readouterr().out
    started(name, *TWO, "--json", target, "--share", "2/2")
    first = rows_of(target)
    started(name, *TWO, "--json", target)
    assert len(first) == rows // 2 and rows_of(target)[: rows // 2] == first and len(rows_of(target)) == rows
    capsys.readouterr()
    started(name, *TWO, "--json", target)
    assert capsys.readouterr().out == "" and len(rows_of(target)) == rows
    with pytest.raises(SystemExit, match="is of another run: setting .*--fresh"):
        started(name, *TWO, "--json", target, "--steps", 2)
    started(name, *TWO, "--json", target, "--steps", 2, "--fresh")
    assert json.loads(target.read_text())["setting"]["steps"] == 2


def test_a_loss_that_is_not_finite_is_kept_and_reported(started, examples, monkeypatch, tmp_path):
    curve = {"steps": [1], "seconds": [0.0], "bits": [math.nan], "skipped": 0}
    monkeypatch.setattr(examples["train_lm"], "train", lambda *given: curve)
    with pytest.raises(RuntimeError, match="not finite: softmax"):
        started("train_lm", "--forms", "softmax", "--json", tmp_path / "r.json", "--seeds", 1)
    assert math.isnan(rows_of(tmp_path / "r.json")[0]["bits"][0])


FILL = """
import sys
from argparse import Namespace
from pathlib import Path
from record import Record
record = Record(Path(sys.argv[1]), {"of": "all"})
args = Namespace(share=(int(sys.argv[2]), 4), seconds=60)
list(record.fill([{"n": n} for n in range(100)], args, lambda n: {"square": n * n}))
"""


def test_processes_fill_one_record(tmp_path):
    """Four at once lose no row of each other."""
    target = tmp_path / "record.json"
    programs = [
        subprocess.Popen([sys.executable, "-c", FILL, str(target), str(i)], cwd=EXAMPLES) for i in range(1, 5)
    ]
    assert [program.wait() for program in programs] == [0] * 4
    rows = rows_of(target)
    assert sorted(row["n"] for row in rows) == list(range(100))
    assert all(row["square"] == row["n"] ** 2 for row in rows)


def test_records_of_several_machines_are_merged(examples, tmp_path):
    record = examples["record"]
    parts = [tmp_path / name for name in ("a.json", "b.json")]
    for part, numbers in zip(parts, ((1, 2), (2, 3))):
        record.Record(part, {"of": "all", "date": str(part)}).add(*({"n": n} for n in numbers))
    record.merge(tmp_path / "merged.json", parts)
    assert [row["n"] for row in rows_of(tmp_path / "merged.json")] == [1, 2, 3]
    record.Record(tmp_path / "c.json", {"of": "others"}).add({"n": 4})
    with pytest.raises(SystemExit, match="of 'all' there, 'others' here"):
        record.merge(tmp_path / "merged.json", [tmp_path / "c.json"])


# ---- The page ----


def test_the_page_holds_the_figures_of_the_records(examples):
    pytest.importorskip("matplotlib")
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text()
    assert examples["figures"].written() in page


@pytest.mark.slow
def test_records_of_a_gpu_are_drawn_beside_those_of_a_cpu(started, examples, monkeypatch, tmp_path):
    """However far they have come: one form of one example, with fp16 beside it."""
    pytest.importorskip("matplotlib")
    figures = examples["figures"]
    (tmp_path / "results").mkdir()
    (tmp_path / "recipes.md").write_text(f"before\n{figures.BEGIN}old\n{figures.END}after\n")
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    results = tmp_path / "results"
    for name in ("train_lm", "recall", "stability"):
        started(name, *TWO, "--json", results / f"{name}_cpu.json")
    started("train_lm", "--forms", "retention", "--json", results / "train_lm_gpu.json")
    half = ("--dtype", "fp16", "--seeds", 1, "--json", results / "train_lm_fp16_gpu.json")
    started("train_lm", "--forms", "retention", *half)
    figures.main()
    page = (tmp_path / "recipes.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    on_gpu, on_cpu = page.index("### On a GPU"), page.index("### On a CPU")
    assert on_gpu < page.index("(train_lm_gpu.png)") < on_cpu < page.index("(train_lm_cpu.png)")
    assert "(recall_gpu.png)" not in page
    lines = page[on_gpu:on_cpu].splitlines()
    (line,) = (x for x in lines if x.startswith("| retention | "))
    bits, halves = (rows_of(results / f"{name}_gpu.json") for name in ("train_lm", "train_lm_fp16"))
    assert f" {sum(row['bits'][-1] for row in bits) / 2:.3f} ± " in line and "| 2 |" in line
    assert line.endswith(f"| {halves[0]['bits'][-1]:.3f} | 0 |")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"train_lm_gpu.png", "train_lm_cpu.png", "recall_cpu.png", "stability_cpu.png"}


def test_every_form_has_its_call_in_the_page(examples):
    """The table of calls, and the names of the curves."""
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text()
    for name, form in examples["language_model"].FORMS.items():
        if name == "softmax":
            continue
        options = form.options(1024)
        (row,) = re.findall(rf"^\| [^|]*\({re.escape(name)}\) \|(.*)$", page, re.MULTILINE)
        for option, value in options.items():
            said = "1 / longest" if isinstance(value, float) else f'"{value}"'
            assert f"{option}={said}" in row, (name, option)
        assert ("decay_slopes=" in row) == form.decay and ("RMSNorm on q and k" in row) == form.qk_norm
        assert ("norm of each head's output" in row.replace("RMSNorm", "norm")) == form.out_norm, name
