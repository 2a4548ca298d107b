"""Test ``diagonal`` and ``out_dtype`` of nosoftmax.forward and backward: parts of a sequence, cut anywhere,
add up to the whole, which the oracle computes.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from flash_attn import flash_attn_func, nosoftmax
from torch import Tensor

from oracle import Oracle

F64 = torch.float64
OPTIONS = {
    "full": dict(),
    "causal": dict(causal=True),
    "left": dict(window_size=(20, -1)),
    "right": dict(window_size=(-1, 15)),
    "both": dict(window_size=(30, 4)),
}
MORE = {
    "identity": dict(),
    "silu": dict(activation="silu"),
    "alibi": dict(alibi_slopes=torch.tensor([0.1, 0.5, 0.0, 0.02]), activation="sigmoid", sigmoid_bias=-1.0),
    "decay": dict(decay_slopes=torch.tensor([0.01, 0.2, 0.0, 3.0])),
    "softcap": dict(softcap=2.0),
}
ALGORITHMS = ["quadratic", "linear"]


def sample(seqlen_q: int, seqlen_k: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(seqlen_q)
    shapes = (seqlen_q, 4, 8), (seqlen_k, 2, 8), (seqlen_k, 2, 6), (seqlen_q, 4, 6)
    return [torch.randn(batch, *shape, dtype=F64) for shape in shapes]


def whole(q, k, v, dout, **options) -> tuple[Tensor, ...]:
    """The output and the gradients of the oracle."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = Oracle().dense(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def both(q, k, v, dout, **options) -> tuple[Tensor, ...]:
    return nosoftmax.forward(q, k, v, **options)[0], *nosoftmax.backward(dout, q, k, v, **options)


def exact(options: dict) -> bool:
    """Whether linear time is exact."""
    return not options.keys() & {"activation", "alibi_slopes", "softcap", "window_size"}


def close(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("mask", OPTIONS)
def test_parts_add_up(mask, more, algorithm):
    options = {**OPTIONS[mask], **MORE[more]}
    if algorithm == "linear" and not exact(options):
        pytest.skip("linear time is not exact with these options")
    for seqlen_q, seqlen_k in ((150, 180), (180, 150)):
        given = sample(seqlen_q, seqlen_k)
        q, k, v, dout = given
        out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
        for start_q, stop_q in pairwise((0, 3, 100, seqlen_q)):
            for start_k, stop_k in pairwise((0, 60, 61, 140, seqlen_k)):
                rows, keys = slice(start_q, stop_q), slice(start_k, stop_k)
                part = both(
                    q[:, rows], k[:, keys], v[:, keys], dout[:, rows], algorithm=algorithm, **options,
                    diagonal=start_q + seqlen_k - seqlen_q - start_k,
                )  # fmt: skip
                for total, at, x in zip((out, dq, dk, dv), (rows, rows, keys, keys), part):
                    total[:, at] += x
        close((out, dq, dk, dv), whole(*given, **options))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("normalization", ["1/visible", "1/n"])
def test_rows_count_the_keys_that_they_see(normalization, algorithm):
    given = sample(90, 70)
    q, k, v, dout = given
    for mask in OPTIONS if algorithm == "quadratic" else ("full", "causal"):
        options = dict(normalization=normalization, **OPTIONS[mask])
        out, dq, _, _ = whole(*given, **options)
        for rows in (slice(0, 15), slice(15, 89), slice(89, 90)):
            part = both(
                q[:, rows], k, v, dout[:, rows], algorithm=algorithm, diagonal=rows.start - 20, **options
            )
            close(part[:2], (out[:, rows], dq[:, rows]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_behind_the_keys_count_all_of_them(algorithm):
    q, k, v, dout = sample(40, 16)
    options = dict(causal=True, diagonal=3, algorithm=algorithm)
    found = both(q, k, v, dout, normalization="1/visible", **options)
    seen = torch.arange(4, 44).clamp(max=16)[:, None, None]
    out, _, dk, dv = both(q, k, v, dout / seen, **options)
    close((found[0], *found[2:]), (out / seen, dk, dv))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_sequence_has_its_own(algorithm):
    """Dense and packed, as a tensor; far beyond both ends of the keys too."""
    diagonals = [40, -7, 0, 3000, -3000]
    options = dict(causal=True, decay_slopes=torch.tensor([0.01, 0.2, 0.0, 0.001]), algorithm=algorithm)
    given = sample(20, 30, batch=len(diagonals))
    alone = [both(*(x[b : b + 1] for x in given), diagonal=key, **options) for b, key in enumerate(diagonals)]
    expected = [torch.cat(parts) for parts in zip(*alone)]
    diagonal = torch.tensor(diagonals, dtype=torch.int32)
    close(both(*given, diagonal=diagonal, **options), expected)
    offsets = torch.arange(len(diagonals) + 1, dtype=torch.int32)
    packed = dict(cu_seqlens_q=20 * offsets, cu_seqlens_k=30 * offsets, max_seqlen_q=20, max_seqlen_k=30)
    found = both(*(x.flatten(0, 1) for x in given), diagonal=diagonal.long(), **packed, **options)
    close(found, [x.flatten(0, 1) for x in expected])
    assert expected[0][3].abs().max() > 0 and not expected[0][4].any()  # sees all keys, and none


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_out_of_sight_is_not_read(algorithm):
    """NaN in queries before and behind all keys that they may see, and in keys that no query sees."""
    window = dict(causal=True, **({"window_size": (5, 0)} if algorithm == "quadratic" else {}))
    for diagonal, rows, keys in ((10, slice(25, 30), slice(0, 5)), (-10, slice(0, 10), slice(20, 30))):
        given = sample(30, 30)
        hidden = [(1, keys), (2, keys)]
        if diagonal < 0 or algorithm == "quadratic":
            hidden += [(0, rows), (3, rows)]
        if diagonal > 0 and algorithm == "linear":
            hidden = []  # each query sees keys, and each key is seen
        for i, at in hidden:
            given[i][:, at] = torch.nan
        found = both(*given, diagonal=diagonal, algorithm=algorithm, **window)
        assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("causal", [False, True])
def test_wide_results_are_neither_rounded_nor_saturated(causal, algorithm):
    given = [200 * x.half() for x in sample(150, 150)]
    options = dict(causal=causal, softmax_scale=2.0**-4, algorithm=algorithm)
    found = both(*given, out_dtype=torch.float32, **options)
    narrow = both(*given, **options)
    expected = whole(*(x.double() for x in given), causal=causal, softmax_scale=2.0**-4)
    for x, y, z in zip(found, narrow, expected, strict=True):
        assert (x.dtype, y.dtype) == (torch.float32, torch.float16)
        assert z.abs().max() > 65504
        torch.testing.assert_close(x.double(), z, rtol=1e-4, atol=1e-4 * z.abs().max().item())
    assert torch.equal(found[0].clamp(-65504, 65504).half(), narrow[0])


@pytest.mark.parametrize(
    "dtype, out_dtype",
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)],
)
def test_the_own_dtype_may_be_named(dtype, out_dtype):
    given = [x.to(dtype) for x in sample(5, 5)]
    for x, y in zip(both(*given, out_dtype=out_dtype), both(*given)):
        assert torch.equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(diagonal=2**31), ValueError, "diagonal=2147483648: give the key"),
        (dict(diagonal=1.5), TypeError, "diagonal=1.5: give an integer"),
        (dict(diagonal=torch.zeros(2)), TypeError, "diagonal has dtype torch.float32"),
        (dict(diagonal=torch.zeros(2, dtype=torch.int32)), ValueError, r"diagonal has shape \(2,\)"),
        (
            dict(diagonal=torch.tensor([-(2**31)], dtype=torch.int32)),
            ValueError,
            r"diagonal\[0\]=-2147483648",
        ),
        (dict(out_dtype=torch.float16), ValueError, "out_dtype=torch.float16: with q in torch.float64 give"),
        (dict(out_dtype=torch.float32), ValueError, "out_dtype=torch.float32: with q in torch.float64 give"),
    ],
)
def test_wrong_use(options, error, words):
    q, k, v, dout = sample(5, 5)
    with pytest.raises(error, match=words):
        nosoftmax.forward(q, k, v, **options)
    with pytest.raises(error, match=words):
        nosoftmax.backward(dout, q, k, v, **options)


def test_the_public_functions_do_not_have_them():
    q, k, v, _ = sample(5, 5)
    for name, value in (("diagonal", 0), ("out_dtype", F64)):
        with pytest.raises(TypeError, match=name):
            flash_attn_func(q, k, v, use_softmax=False, **{name: value})
