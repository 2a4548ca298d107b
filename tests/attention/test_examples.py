"""Test the models of examples/: every form trains, none sees the future, and the tasks are what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("language_model", "recall", "stability", "train_lm")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: __import__(name) for name in names}


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
    setting = dict(layers=1, width=16, heads=2, tokens=32, batch=2, steps=4, seeds=1, rate=1e-3)
    curve = examples["train_lm"].train("relu, 1/n", 0, setting, "cpu", torch.bfloat16)
    assert curve["steps"] == [1, 2, 3, 4] and all(3 < bits < 8 for bits in curve["bits"])
    seen = examples["stability"].watched("softmax", setting, "cpu")
    assert len(seen["norms"]) == 4 and min(seen["norms"]) > 0


def test_recall_asks_for_pairs_that_it_told(examples):
    pairs = 5
    tokens, targets = examples["recall"].draw(64, pairs, torch.Generator().manual_seed(0))
    assert tokens.shape == (64, 2 * pairs, 2) and targets.shape == (64, 2 * pairs)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        told, asked = dict(row[:pairs]), [key for key, _ in row[pairs:]]
        assert len(told) == pairs and sorted(asked) == sorted(told) and max(told) < 2 * pairs
        assert wanted == [-100] * pairs + [told[key] for key in asked]
        assert {value for _, value in row[pairs:]} == {3 * pairs} and max(told.values()) < 3 * pairs
    assert examples["recall"].accuracy(
        "softmax", 2, 0, dict(layers=1, width=16, heads=1, batch=4, steps=2, rate=1e-3), "cpu"
    ) in {x / 1024 for x in range(1025)}
