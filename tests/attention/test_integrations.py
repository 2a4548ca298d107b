"""Test flash_attn.integrations where its clients are missing or too old: one error that names the version.

tests/integrations tests them with their clients.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from flash_attn.integrations.transformers import register
from flash_attn.integrations.transformers.score import ScoreFunction, checked


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match='needs transformers 4.57 or newer.*pip install "transformers>=4.57"'
    ):
        register()


@pytest.mark.parametrize("version, why", [("4.56.2", "this is 4.56.2"), ("3.0.0", "this is 3.0.0")])
def test_too_old(monkeypatch, version, why):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=f"needs transformers 4.57 or newer, and {why}"):
        register()


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(activation="tanh"), "activation='tanh'"),
        (dict(normalisation="1/n"), "normalisation is no argument here"),
        (dict(sigmoid_bias=1.0), "sigmoid_bias=1.0"),
        (dict(sigmoid_bias=[1.0]), "sigmoid_bias=.*needs activation"),
        (dict(normalization=0.0), "normalization=0.0"),
        (dict(decay_slopes=0.5), "decay_slopes=0.5"),
        (dict(decay_slopes=[0.5, -1.0]), "decay_slopes=.*not negative"),
        (dict(decay_slopes=[float("nan")]), "decay_slopes=.*finite"),
        (dict(n=1024), "n=1024 without"),
        (dict(normalization="1/n", n=0), "n=0"),
        (dict(normalization="1/n", n=float("inf")), "n=inf"),
    ],
)
def test_a_wrong_score_function(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        checked(options)


def test_a_given_n_is_a_factor_and_a_bias():
    device = torch.device("cpu")
    given = checked(dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/n", n=64))
    options = given.options(device)
    assert options["normalization"] == 1 / 64 and abs(options["sigmoid_bias"] + 4.1588830833596715) < 1e-12
    assert not given.counts_keys and checked(dict(normalization="1/sqrt(n)")).counts_keys
    assert checked(dict(normalization="1/sqrt(n)", n=64)).options(device)["normalization"] == 1 / 8
    assert checked(dict(normalization="1/visible")).counts_keys == ""


def test_numbers_by_head_become_tensors_once():
    score = checked(
        dict(activation="sigmoid", sigmoid_bias=torch.tensor([1.0, 2.0]), decay_slopes=[0.5, 0.25])
    )
    assert score == ScoreFunction("sigmoid", (1.0, 2.0), None, (0.5, 0.25))
    with torch.inference_mode():
        options = score.options(torch.device("cpu"))
    assert options["decay_slopes"].dtype == torch.float32 and not options["decay_slopes"].is_inference()
    assert score.options(torch.device("cpu"))["decay_slopes"] is options["decay_slopes"]
    assert score.saved["decay_slopes"] == [0.5, 0.25]
