"""Test that a wrong call raises the same error on every backend and at every length: class, message, public
argument and its value.

Wrong values in a tensor, such as slopes, offsets and pages, raise on the CPU only: the host reads no GPU
tensor.
"""

from __future__ import annotations

import re

import flash_attn
import numpy
import pytest
import torch
from flash_attn import explain
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def dense(device: str, n: int, **changes) -> dict:
    q, k, v = (torch.zeros(2, n, 2, 8, dtype=torch.float16, device=device) for _ in range(3))
    return {"q": q, "k": k, "v": v, **changes}


def lengths(device: str, *offsets: int) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def varlen(device: str, n: int, **changes) -> dict:
    q, k, v = (torch.zeros(2 * n, 2, 8, dtype=torch.float16, device=device) for _ in range(3))
    given = {"q": q, "k": k, "v": v, "max_seqlen_q": n, "max_seqlen_k": n}
    return {**given, **{f"cu_seqlens_{x}": lengths(device, 0, n, 2 * n) for x in "qk"}, **changes}


def cache(device: str, n: int, **changes) -> dict:
    q, k, v = (torch.zeros(2, 1, 2, 8, dtype=torch.float16, device=device) for _ in range(3))
    pair = {
        name: torch.zeros(2, n, 2, 8, dtype=torch.float16, device=device) for name in ("k_cache", "v_cache")
    }
    return {"q": q, **pair, "k": k, "v": v, "cache_seqlens": lengths(device, 3, 5), **changes}


def paged(device: str, n: int, table: list[list[int]], cached: tuple[int, int], **changes) -> dict:
    pair = {
        name: torch.zeros(4, 256, 2, 8, dtype=torch.float16, device=device) for name in ("k_cache", "v_cache")
    }
    table = torch.tensor(table, dtype=torch.int32, device=device)
    return {
        **cache(device, n),
        **pair,
        "block_table": table,
        "cache_seqlens": lengths(device, *cached),
        **changes,
    }


def with_value(option: str, value) -> tuple:
    return lambda device, n: dense(device, n, **{option: value})


# Fault -> (function, its arguments on a device at a length, error class, regular expression for the message).
OPTIONS = {
    f"{name}={value}": ("flash_attn_func", with_value(name, value), error, words)
    for name, value, error, words in [
        ("dropout_p", -0.5, ValueError, r"dropout_p=-0\.5"),
        ("dropout_p", NAN, ValueError, "dropout_p=nan"),
        ("dropout_p", 1.0, ValueError, r"dropout_p=1\.0"),
        ("dropout_p", 2.0, ValueError, r"dropout_p=2\.0"),
        ("dropout_p", "much", TypeError, "dropout_p='much'"),
        ("softcap", -1.0, ValueError, r"softcap=-1\.0"),
        ("softcap", NAN, ValueError, "softcap=nan"),
        ("softcap", INF, ValueError, "softcap=inf"),
        ("softcap", 1e-31, ValueError, "softcap=1e-31"),
        ("softcap", 5e38, ValueError, r"softcap=5e\+38"),
        ("softmax_scale", NAN, ValueError, "softmax_scale=nan"),
        ("softmax_scale", INF, ValueError, "softmax_scale=inf"),
        ("softmax_scale", 1e31, ValueError, r"softmax_scale=1e\+31"),
        ("softmax_scale", -1e31, ValueError, r"softmax_scale=-1e\+31"),
        ("softmax_scale", "0.3", TypeError, "softmax_scale='0.3'"),
        ("causal", "no", TypeError, "causal='no'"),
        ("causal", 2.5, TypeError, r"causal=2\.5"),
        ("deterministic", "yes", TypeError, "deterministic='yes'"),
        ("window_size", 5, TypeError, "window_size=5"),
        ("window_size", (5,), TypeError, r"window_size=\(5,\)"),
        ("window_size", (5, 1.5), TypeError, r"window_size=.*1\.5"),
        ("window_size", "ab", TypeError, "window_size='ab'"),
        ("activation", "softmax", ValueError, "activation='softmax'"),
        ("normalization", "1/m", ValueError, "normalization='1/m'"),
        ("backend", "fa5", ValueError, "backend='fa5'"),
        ("algorithm", "fast", ValueError, "algorithm='fast'"),
    ]
}
TENSORS = {
    "softmax_scale is a tensor that requires a gradient": (
        "flash_attn_func",
        lambda device, n: dense(device, n, softmax_scale=torch.tensor(0.3, device=device,
        requires_grad=True)), ValueError, "softmax_scale.*gradient",
    ),
    "alibi_slopes requires a gradient": (
        "flash_attn_func",
        lambda device, n: dense(device, n, alibi_slopes=torch.ones(2, device=device, requires_grad=True)),
        ValueError, "alibi_slopes.*gradient",
    ),
    "alibi_slopes of another dtype": (
        "flash_attn_func", lambda device, n: dense(device, n, alibi_slopes=torch.ones(2,
        device=device).half()), TypeError, "alibi_slopes has dtype torch.float16",
    ),
    "alibi_slopes of another shape": (
        "flash_attn_func", lambda device, n: dense(device, n, alibi_slopes=torch.ones(3, device=device)),
        ValueError, r"alibi_slopes has shape \(3,\)",
    ),
    "q is numpy": (
        "flash_attn_func", lambda device, n: dense(device, n, q=numpy.zeros((2, n, 2, 8), "float16")),
        TypeError, r"q is .*numpy\.ndarray",
    ),
    "k is a list": ("flash_attn_func", lambda device, n: dense(device, n, k=[1.0]), TypeError, "k is .*list"),
    "head_dim 0": (
        "flash_attn_func",
        lambda device, n: {name: x[..., :0] for name, x in dense(device, n).items()}, ValueError,
        "head_dim=0",
    ),
    "rank 3": ("flash_attn_func", lambda device, n: {name: x[0] for name, x in dense(device, n).items()},
    ValueError, "q has shape"),
    "rank 5": ("flash_attn_func", lambda device, n: {name: x[None] for name, x in dense(device, n).items()},
    ValueError, "q has shape"),
    "k of another length than v": (
        "flash_attn_func", lambda device, n: dense(device, n, v=torch.zeros(2, n + 1, 2, 8,
        dtype=torch.float16, device=device)), ValueError, "v has shape",
    ),
    "k of another head size, as it was given": (
        "flash_attn_func", lambda device, n: dense(device, n, k=torch.zeros(2, n, 2, 5, dtype=torch.float16,
        device=device)), ValueError, r"k has shape \(2, N, 2, 5\).* 8\)",
    ),
    "heads that do not divide": (
        "flash_attn_func",
        lambda device, n: dense(device, n, **{x: torch.zeros(2, n, 3, 8, dtype=torch.float16,
        device=device) for x in "kv"}), ValueError, "2 heads in q, 3 in k and v",
    ),
    "k on meta": (
        "flash_attn_func", lambda device, n: dense(device, n, k=torch.zeros(2, n, 2, 8, dtype=torch.float16,
        device="meta")), ValueError, "one device.*k on meta",
    ),
    "alibi_slopes on meta": (
        "flash_attn_func", lambda device, n: dense(device, n, alibi_slopes=torch.ones(2, device="meta")),
        ValueError, "one device.*alibi_slopes on meta",
    ),
    "k of another dtype": (
        "flash_attn_func", lambda device, n: dense(device, n, k=torch.zeros(2, n, 2, 8, dtype=torch.bfloat16,
        device=device)), TypeError, "k has dtype torch.bfloat16",
    ),
    "q of integers": (
        "flash_attn_func", lambda device, n: {name: x.long() for name, x in dense(device, n).items()},
        TypeError, "q has dtype torch.int64",
    ),
    "max_seqlen 7.5": ("flash_attn_varlen_func", lambda device, n: varlen(device, n, max_seqlen_q=7.5),
    TypeError, r"max_seqlen_q=7\.5"),
    "max_seqlen negative": ("flash_attn_varlen_func", lambda device, n: varlen(device, n, max_seqlen_k=-1),
    ValueError, "max_seqlen_k=-1"),
    "cu_seqlens on meta": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_k=lengths("meta", 0, n,
        2 * n)), ValueError, "one device.*cu_seqlens_k on meta",
    ),
    "cu_seqlens of floats": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_q=lengths(device, 0, n,
        2 * n).float()), TypeError, "cu_seqlens_q has dtype torch.float32",
    ),
    "cu_seqlens of two batches": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_k=lengths(device, 0, n)),
        ValueError, r"cu_seqlens_k has shape \(2,\)",
    ),
    "cu_seqlens empty": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_q=lengths(device)),
        ValueError, "cu_seqlens_q is empty",
    ),
}  # fmt: skip
# On the CPU only, where the values of tensors are read.
VALUES = {
    "alibi_slopes NaN": (
        "flash_attn_func", lambda device, n: dense(device, n, alibi_slopes=torch.tensor([0.5, NAN])),
        ValueError, r"alibi_slopes=\[0\.5, nan\]",
    ),
    "alibi_slopes Inf": (
        "flash_attn_func", lambda device, n: dense(device, n, alibi_slopes=torch.tensor([INF, 0.5])),
        ValueError, r"alibi_slopes=\[inf, 0\.5\]",
    ),
    "cu_seqlens descend": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_q=lengths(device, 0, n, 5)),
        ValueError, r"cu_seqlens_q descends from N to 5",
    ),
    "cu_seqlens begin before 0": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, cu_seqlens_k=lengths(device, -1, n, n)),
        ValueError, r"cu_seqlens_k\[0\]=-1",
    ),
    "cu_seqlens end behind the tensor": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, q=torch.zeros(9, 2, 8,
        dtype=torch.float16)), ValueError, r"cu_seqlens_q ends at N.*9 rows",
    ),
    "a sequence longer than max_seqlen": (
        "flash_attn_varlen_func", lambda device, n: varlen(device, n, max_seqlen_k=7), ValueError,
        "cu_seqlens_k.*max_seqlen_k=7",
    ),
}  # fmt: skip
# A cache has no linear algorithm, and its length is the capacity.
CACHES = {
    "cache_seqlens of floats": (
        lambda device, n: cache(device, n, cache_seqlens=lengths(device, 3, 5).float()), TypeError,
        "cache_seqlens has dtype",
    ),
    "cache_seqlens of another batch": (
        lambda device, n: cache(device, n, cache_seqlens=lengths(device, 3, 5, 7)), ValueError,
        r"cache_seqlens has shape \(3,\)",
    ),
    "k without v": (lambda device, n: cache(device, n, v=None), ValueError, "only one of k and v"),
    "appending at no length": (lambda device, n: cache(device, n, cache_seqlens=None), ValueError,
    "cache_seqlens"),
    "an expanded cache": (
        lambda device, n: cache(device, n, k_cache=torch.zeros(1, n, 2, 8, dtype=torch.float16,
        device=device).expand(2, -1, -1, -1)), ValueError, "k_cache.*expanded",
    ),
    "pages of no key": (
        lambda device, n: paged(
            device, n, [[0], [1]], (0, 0), k=None, v=None,
            **{name: torch.zeros(4, 0, 2, 8, dtype=torch.float16, device=device) for name in ("k_cache",
            "v_cache")},
        ),
        ValueError, r"k_cache has shape \(4, 0, 2, 8\)",
    ),
    "return_softmax_lse": (lambda device, n: cache(device, n, return_softmax_lse=True), ValueError,
    "return_softmax_lse=True"),
    "rotary_cos alone": (
        lambda device, n: cache(device, n, rotary_cos=torch.zeros(n, 4, dtype=torch.float16, device=device)),
        ValueError, "rotary_sin",
    ),
    "v_cache on meta": (
        lambda device, n: cache(device, n, v_cache=torch.zeros(2, n, 2, 8, dtype=torch.float16,
        device="meta")), ValueError, "one device.*v_cache on meta",
    ),
}  # fmt: skip
CACHE_VALUES = {
    "appending behind the end": (
        lambda device, n: cache(device, n, cache_seqlens=lengths(device, 3, n)), ValueError,
        r"cache_seqlens\[1\]=",
    ),
    "cache_batch_idx that is not there": (
        lambda device, n: cache(device, n, cache_batch_idx=lengths(device, 0, 2)), ValueError,
        r"cache_batch_idx\[1\]=2",
    ),
    "two sequences in one row": (
        lambda device, n: cache(device, n, cache_batch_idx=lengths(device, 1, 1)), ValueError,
        r"cache_batch_idx=\[1, 1\]",
    ),
    "a page that is not there": (lambda device, n: paged(device, n, [[0], [4]], (3, 5)), ValueError,
    r"block_table\[1\] names page 4"),
    "a page of two sequences to append to": (lambda device, n: paged(device, n, [[2], [2]], (3, 5)),
    ValueError, "block_table.*page 2"),
    "a page that one sequence names twice": (
        lambda device, n: paged(device, n, [[3, 3], [1, 2]], (300, 5)), ValueError, "block_table.*page 3",
    ),
    "left padding beyond the length": (
        lambda device, n: cache(device, n, cache_leftpad=lengths(device, 0, 6)), ValueError,
        r"cache_leftpad\[1\]=6",
    ),
}  # fmt: skip
NS = (60, 4100)


def backends(device: str) -> list[dict]:
    """List every way to ask for a backend of the device."""
    quadratic = ["cpu"] if device == "cpu" else ["fa2", "fa4"]
    return [
        dict(),
        dict(algorithm="linear"),
        dict(algorithm="quadratic"),
        *(dict(backend=name) for name in ("linear", *quadratic)),
    ]


def errors(function, device: str, arguments, forced: list[dict], asks) -> list[tuple[type, str]]:
    """List (class, message) of the call by each backend at each length, with numbers of the length replaced
    by N.
    """
    found = []
    for n in NS:
        for options in forced:
            with pytest.raises(Exception) as error:
                asks(function, **{"use_softmax": False, **options, **arguments(device, n)})
            message = str(error.value)
            for number in (2 * n, n + 1, n):
                message = re.sub(rf"\b{number}\b", "N", message)
            found.append((type(error.value), message))
    return found


def call(function, **arguments):
    return function(**arguments)


def check(
    function_name: str, device: str, arguments, error: type, words: str, forced: list[dict], explained: bool
) -> None:
    function = getattr(flash_attn, function_name)
    for asks in (call, explain) if explained else (call,):
        first, *others = found = errors(function, device, arguments, forced, asks)
        assert all(kind is error and re.search(words, message) for kind, message in found), found
        assert all(other == first for other in others), found
        assert "'str' object" not in first[1] and "seqlens_k has shape" not in first[1].replace(
            "cu_seqlens_k", ""
        )


@pytest.fixture
def place(device, monkeypatch) -> str:
    """Return a device, with no backend forced by the environment."""
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    return device


@pytest.mark.parametrize("name", [*OPTIONS, *TENSORS])
def test_what_is_seen_without_reading(place, name):
    function, arguments, error, words = {**OPTIONS, **TENSORS}[name]
    forced = [
        options
        for options in backends(place)
        if not (name.split("=")[0] in ("backend", "algorithm") and options)
    ]
    check(function, place, arguments, error, words, forced, explained=True)


@pytest.mark.parametrize("name", VALUES)
def test_what_is_read_on_the_cpu(name):
    function, arguments, error, words = VALUES[name]
    forced = (
        backends("cpu") if "alibi" not in name else [dict(), dict(algorithm="quadratic"), dict(backend="cpu")]
    )
    check(function, "cpu", arguments, error, words, forced, explained=True)


@pytest.mark.parametrize("name", CACHES)
def test_caches(place, name):
    arguments, error, words = CACHES[name]
    check("flash_attn_with_kvcache", place, arguments, error, words, [dict()], explained=True)


@pytest.mark.parametrize("name", CACHE_VALUES)
def test_what_is_read_of_a_cache_on_the_cpu(name):
    arguments, error, words = CACHE_VALUES[name]
    check(
        "flash_attn_with_kvcache",
        "cpu",
        arguments,
        error,
        words,
        [dict(), dict(backend="cpu")],
        explained=True,
    )


@pytest.mark.parametrize("causal", [True, 1, numpy.bool_(True)], ids=repr)
def test_what_means_a_number_is_taken(causal):
    """NumPy scalars, 0-dim tensors, and integers in place of floats are accepted."""
    given = dense("cpu", 64)
    given = {
        name: torch.randn(2, 64, 2, 8, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(given)
    }
    expected = flash_attn.flash_attn_func(
        **given, use_softmax=False, causal=True, softmax_scale=2.0, window_size=(5, 0)
    )
    for scale in (2, 2.0, numpy.float32(2), torch.tensor(2.0)):
        for window_size in ((5, 0), [numpy.int64(5), 0], (torch.tensor(5), 0)):
            actual = flash_attn.flash_attn_func(
                **given,
                use_softmax=False,
                causal=causal,
                softmax_scale=scale,
                window_size=window_size,
                softcap=0,
                dropout_p=0,
            )
            assert torch.equal(actual, expected)


def test_an_empty_variable_is_none(device, monkeypatch):
    """FLASH_ATTENTION_NOSOFTMAX_BACKEND= in a shell forces no backend."""
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "")
    given = {name: x.float() for name, x in dense("cpu", 64).items()}
    assert explain(flash_attn.flash_attn_func, **given, use_softmax=False).backend == "cpu"
    assert flash_attn.flash_attn_func(**given, use_softmax=False).shape == (2, 64, 2, 8)


def test_lengths_as_a_number_are_taken_everywhere():
    """An int for cache_seqlens is accepted beside pages, an index of rows, and a cache with more rows than
    the batch.
    """
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 2, 8, generator=gen)
    pair = [torch.randn(4, 256, 2, 8, generator=gen) for _ in range(2)]
    for more in (
        dict(),
        dict(cache_batch_idx=torch.tensor([3, 1], dtype=torch.int32)),
        dict(block_table=torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)),
    ):
        actual, expected = (
            flash_attn.flash_attn_with_kvcache(q, *pair, cache_seqlens=n, use_softmax=False, **more)
            for n in (17, torch.tensor([17, 17], dtype=torch.int32))
        )
        assert torch.equal(actual, expected)
