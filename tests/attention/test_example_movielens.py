"""Test examples/hstu_movielens.py on made-up users: what it reads, how it ranks, and that it learns."""

from __future__ import annotations

import copy
import importlib
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

SMALL = dict(
    epochs=30, longest=8, width=16, heads=2, blocks=1, users_at_once=8, learning_rate=1e-2, dropout=0.0
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    return importlib.import_module("hstu_movielens")


def test_sequences_are_in_the_order_of_time(example, tmp_path):
    """Ratings of one second keep the order of the file; numbers start at 1."""
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["7\tc\t3\t20", "9\tb\t5\t1", "7\ta\t3\t10", "7\tb\t1\t20"]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "\n".join(lines))
    assert example.sequences(tmp_path / "x.whl") == [[1, 2, 3], [3]]


def test_ranks(example):
    """What the user has rated before does not count, and an equal score counts as better."""
    scores = torch.tensor([[9.0, 5.0, 4.0, 3.0, 3.0], [9.0, 5.0, 4.0, 3.0, 2.0]])
    assert example.ranks(scores, [[1], [3]], torch.tensor([3, 1])).tolist() == [3, 1]


class CountsUp(torch.nn.Module):
    """Predicts the number after the last item."""

    def __init__(self):
        super().__init__()
        self.items = torch.nn.Embedding(200, 1)

    def forward(self, rows):
        return torch.nn.functional.one_hot(rows + 1, 200).float()

    def scores(self, vectors):
        return vectors


def test_evaluation(example):
    """The last item of each user is predicted from the one before it, however long the others are."""
    settings = example.Settings(**SMALL)
    rows = [list(range(start, start + length)) for start, length in ((1, 5), (3, 30), (7, 9), (2, 2))]
    assert example.evaluate(CountsUp(), rows, settings) == (1.0, 1.0)
    rows[0][-1] = 100  # a miss: all others have the same score
    assert example.evaluate(CountsUp(), rows, settings) == (0.75, 0.75)


@pytest.mark.parametrize("attention", ["silu", "softmax"])
def test_no_item_sees_a_later_one(example, attention):
    torch.manual_seed(0)
    network = example.Recommender(9, example.Settings(**SMALL), attention).eval()
    rows = torch.tensor([[1, 2, 3, 4, 5]])
    changed = torch.tensor([[1, 2, 3, 9, 8]])
    out, other = network(rows), network(changed)
    assert torch.equal(out[:, :3], other[:, :3]) and not torch.allclose(out[:, 3:], other[:, 3:])


@pytest.mark.parametrize("attention", ["silu", "softmax"])
def test_it_learns(example, attention):
    """Users who count up are predicted at once."""
    settings = example.Settings(**SMALL)
    rows = [[(start + i) % 12 + 1 for i in range(9)] for start in range(12)]
    result = example.run(rows, attention, 0, settings, torch.device("cpu"))
    assert len(result["curve"]) == settings.epochs
    assert result["curve"][-1]["loss"] < 0.2 * math.log(12)
    assert result["hr"] == 1.0 and result["ndcg"] > 0.9


def test_autocast_keeps_no_weights_from_before_a_step(example, monkeypatch):
    """As on a GPU: the network computes as a copy of it does, whose weights were never cast."""
    monkeypatch.setattr(example, "AUTOCAST", {"cpu": torch.bfloat16})
    given, seen = torch.tensor([[1, 2, 3, 4]]), []

    def evaluate(network, rows, settings):
        network.eval()
        with torch.no_grad(), example.autocast(torch.device("cpu")):
            seen.append(torch.equal(network(given), copy.deepcopy(network)(given)))
        return 0.0, 0.0

    monkeypatch.setattr(example, "evaluate", evaluate)
    settings = example.Settings(**{**SMALL, "epochs": 3})
    example.run([[1, 2, 3, 4, 5, 6]] * 4, "silu", 0, settings, torch.device("cpu"))
    assert seen == [True] * 4  # three validations and a test


def test_an_ended_run_goes_on(example, tmp_path, monkeypatch, capsys):
    """Two processes may share the work, and a record of other settings is refused."""
    wheel, target = tmp_path / "x.whl", tmp_path / "record.json"
    lines = ["head", *(f"{user}\t{(user + i) % 5}\t1\t{i}" for user in range(4) for i in range(5))]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "\n".join(lines))
    command = [str(wheel), "--epochs", "1", "--width", "8", "--longest", "4", "--json", str(target)]
    assert example.main([*command, "--seeds", "0", "1", "--share", "2/2"]) == 0
    assert [row["attention"] for row in json.loads(target.read_text())["rows"]] == ["softmax"] * 2
    assert example.main([*command, "--seeds", "0", "1"]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert sorted((row["attention"], row["seed"]) for row in rows) == [
        ("silu", 0), ("silu", 1), ("softmax", 0), ("softmax", 1),
    ]  # fmt: skip
    assert "1/2  seed 0  silu" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="record.json is of another run: settings .*'epochs': 1"):
        example.main([*command, "--epochs", "2"])
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    page = pytest.importorskip("movielens_page").markdown(json.loads(target.read_text()))
    assert "mean and standard deviation of 2 seeds" in page.lower()
