"""Check the linear algorithm of an implementation: the installed package, or a wrong one of
linear_mutations.py.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from flash_attn.nosoftmax.backends.linear import chunked
from flash_attn.nosoftmax.backends.linear.form import Form, Given
from torch import Tensor

from measure import NAMES, assert_close, compare, gradients, poisoned, qkv, randn

# (seqlen_q, seqlen_k) around the edges of chunks of 64, 128 and 512, and far from square.
LENGTHS = [
    (127, 127),
    (128, 128),
    (129, 129),
    (300, 300),
    (70, 300),
    (300, 70),
    (1, 200),
    (200, 1),
    (260, 132),
    (513, 600),
]
PACKED = dict(lengths_q=[130, 0, 64, 5, 200], lengths_k=[130, 7, 0, 133, 100])
# The error against float64 may be this many times that of the quadratic algorithm.
FACTOR = 1.5
MANY_TOKENS = 2**16


def shorten_segments(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    """Shorten the segments of linear time's kernels, so that sequences short enough for the interpreter have
    several. Heads up to 64 have two segments on each of six multiprocessors.
    """
    for shortest in ("_ONE_SEGMENT", "_SHORTEST_OF_SEVERAL"):
        monkeypatch.setattr(kernels, shortest, 64)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 6)


def check_lengths(
    attention, causal: bool, lengths: tuple[int, int], dtype: torch.dtype | None = None, **options
) -> None:
    """Compare output and gradients with the oracle, for grouped heads."""
    compare(
        attention,
        *qkv(attention, 2, *lengths, nheads=4, nheads_k=2, head_dim=16, dtype=dtype),
        causal=causal,
        **options,
    )


def factors(attention, *shape: int) -> Tensor:
    """Float32 factors of very different sizes, in no order, one of them 0."""
    count = torch.Size(shape).numel()
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return (mixed / count).square().reshape(shape).to(attention.device)


def decays(attention, *shape: int) -> Tensor:
    """Float32 slopes from nearly none to one that leaves little but the neighbours."""
    count = torch.Size(shape).numel()
    return torch.logspace(-4, 0.3, count).reshape(shape).to(attention.device)


def check_decay(attention, **options) -> None:
    check_lengths(attention, decay_slopes=decays(attention, 4), **options)


def recurrence(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Go through one head token by token, (seqlen, d) each, with the state before: out, the state after."""
    outs, state = [], state.clone()
    for t in range(len(q)):
        state = state * torch.exp(-slopes) + k[t, :, None] * v[t]
        outs.append(q[t] @ state)
    return torch.stack(outs), state


def _by_recurrence(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, causal: bool) -> Tensor:
    """One head of any lengths: positions without a query or a key hold zeros. Full is causal from both ends
    without the diagonal twice."""
    total = max(len(q), len(k))
    q_all, k_all, v_all = (torch.cat([x.new_zeros(total - len(x), x.shape[1]), x]) for x in (q, k, v))
    zero = q.new_zeros(q.shape[1], v.shape[1])
    out, _ = recurrence(q_all, k_all, v_all, slope, zero)
    if not causal:
        back, _ = recurrence(q_all.flip(0), k_all.flip(0), v_all.flip(0), slope, zero)
        out = out + back.flip(0) - (q_all * k_all).sum(-1, keepdim=True) * v_all
    return out[total - len(q) :]


def check_recurrence(attention, causal: bool, lengths: tuple[int, int]) -> None:
    """Compare output and gradients with a recurrence in float64, which autograd differentiates."""
    q, k, v = qkv(attention, 1, *lengths, nheads=4, nheads_k=2, head_dim=8)
    slopes, dout = decays(attention, 4), randn(*q.shape, seed=9, like=attention)
    actual = gradients(
        lambda *x: attention.dense(*x, causal=causal, softmax_scale=0.5, decay_slopes=slopes),
        q,
        k,
        v,
        dout=dout,
    )

    def by_recurrence(q, k, v):
        heads = [
            _by_recurrence(q[0, :, h], k[0, :, h // 2], v[0, :, h // 2], slopes[h].double().cpu(), causal)
            for h in range(4)
        ]
        return 0.5 * torch.stack(heads, 1)[None]

    wide = [x.double().cpu() for x in (q, k, v)]
    expected = gradients(by_recurrence, *wide, dout=dout.double().cpu())
    for name, a, e in zip(NAMES, actual, expected):
        assert_close(name, a, e)


def check_decay_of_many_tokens(attention, causal: bool, slope: float, dtype: torch.dtype) -> None:
    """Compare the last outputs of a long sequence, and the gradients of its first keys, with float64."""
    few, many, size = 64, 2**15, dict(head_dim=16, nheads=1, dtype=dtype)
    q, k, v = qkv(attention, 1, many, many, **size)
    dout = randn(*q.shape, seed=9, like=attention, dtype=dtype)
    given = torch.tensor([slope], device=attention.device)
    options = dict(causal=causal, softmax_scale=1 / 64, decay_slopes=given)
    out, _, dk, dv = gradients(lambda *x: attention.dense(*x, **options), q, k, v, dout=dout)
    q, k, v, dout = (x[0, :, 0].double().cpu() for x in (q, k, v, dout))
    at = torch.arange(many, dtype=torch.float64)
    weights = torch.exp(-given.double().cpu() * (at[-few:, None] - at).abs()) / 64
    weights = weights.tril(many - few) if causal else weights
    expected = (q[-few:] @ k.T * weights) @ v
    assert_close("out", out[0, -few:, 0], expected, baseline=expected.to(dtype))
    weights = torch.exp(-given.double().cpu() * (at[:few, None] - at).abs()) / 64
    weights = weights.triu() if causal else weights
    for name, actual, expected in (
        ("dk", dk, (v[:few] @ dout.T * weights) @ q),
        ("dv", dv, (k[:few] @ q.T * weights) @ dout),
    ):
        assert_close(name, actual[0, :few, 0], expected, baseline=expected.to(dtype))


def check_gentle_decay(attention) -> None:
    """Check that a state of ones is decayed right in float32 over a million positions, 128 at a time."""
    slopes = torch.tensor([3e-7, 1e-6, 2e-6, 5e-6])
    q = torch.zeros(1, 1, 4, 1)
    chunks = chunked._Chunks(q, q, q, Form(1.0, True, decay=(4,)), Given(None, slopes))
    state = torch.ones(4, 1, 1)
    for _ in range(2**13):
        chunks.pass_over(state, 2**7)
    expected = torch.exp(-slopes.double() * 2**20)[:, None, None]
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=0)


def check_factors(attention, **options) -> None:
    check_lengths(attention, normalization=factors(attention, 2, options["lengths"][0]), **options)


def packed(attention, nheads_k: int = 2, **keywords) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [(sum(PACKED["lengths_q"]), 4), *[(sum(PACKED["lengths_k"]), nheads_k)] * 2]
    return tuple(randn(*size, 16, seed=i, like=attention, **keywords) for i, size in enumerate(sizes))


def check_packed(attention, causal: bool, nheads_k: int = 2, **options) -> None:
    """Check packed sequences of unequal length, some of them without queries or without keys."""
    compare(attention, *packed(attention, nheads_k), method="varlen", **PACKED, causal=causal, **options)


def check_nothing_leaks(attention, causal: bool, **options) -> None:
    """Check that a packed sequence is bit for bit the same beside any neighbours, even if they are NaN."""
    tensors = packed(attention)
    dout = randn(*tensors[0].shape, seed=9, like=attention)
    first_q, first_k = PACKED["lengths_q"][0], PACKED["lengths_k"][0]
    results = []
    for value in (0.0, float("nan")):
        q, k, v = (poisoned(x, slice(0, n), value) for x, n in zip(tensors, (first_q, first_k, first_k)))
        results.append(
            gradients(lambda *x: attention.varlen(*x, **PACKED, causal=causal, **options), q, k, v, dout=dout)
        )
    for a, b, n in zip(*results, (first_q, first_q, first_k, first_k)):
        assert torch.isfinite(b[n:]).all() and torch.equal(a[n:], b[n:])


def check_rows_without_keys(attention) -> None:
    """Check that rows before the first key are exactly 0 and get no gradient, even if they hold NaN."""
    q, k, v = qkv(attention, 1, 300, 70, head_dim=16)
    dout = randn(*q.shape, seed=9, like=attention)
    q, dout = (poisoned(x, (slice(None), slice(0, 230)), float("nan")) for x in (q, dout))
    out, dq, dk, dv = gradients(lambda *x: attention.dense(*x, causal=True), q, k, v, dout=dout)
    assert not out[:, :230].any() and not dq[:, :230].any()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


def check_many_tokens(attention, quadratic, dtype: torch.dtype, mean: float) -> None:
    """Check the last outputs of a long causal sequence, and the gradients of the first keys of a full one.
    They must be as exact as those of the quadratic algorithm, which computes only these.
    """
    few, size = 64, dict(head_dim=16, nheads=1, dtype=dtype)
    q, k, v = (x + mean for x in qkv(attention, 1, MANY_TOKENS, MANY_TOKENS, **size))
    dout = randn(*q.shape, seed=9, like=attention, dtype=dtype) + mean
    wide = [x.double() for x in (q, k, v, dout)]
    last = slice(MANY_TOKENS - few, None)
    scores = torch.einsum("bihd,bjhd->bhij", wide[0][:, last], wide[1]).tril(MANY_TOKENS - few) / 4
    expected = torch.einsum("bhij,bjhd->bihd", scores, wide[2])
    actual = attention.dense(q, k, v, causal=True)[:, last]
    _as_exact("out", actual, quadratic.dense(q[:, last], k, v, causal=True), expected)
    _, _, *actual = gradients(attention.dense, q, k, v, dout=dout)
    _, _, *others = gradients(quadratic.dense, q, k[:, :few], v[:, :few], dout=dout)
    expected_dk = torch.einsum("bihd,bihe->bhde", wide[3], wide[0]) / 4
    expected_dk, expected_dv = (
        wide[2][:, :few, 0] @ expected_dk[:, 0],
        wide[1][:, :few, 0] @ expected_dk[:, 0].mT,
    )
    for name, a, other, e in zip(("dk", "dv"), actual, others, (expected_dk, expected_dv)):
        _as_exact(name, a[:, :few, 0], other[:, :, 0], e)


def _as_exact(name: str, actual: Tensor, other: Tensor, expected: Tensor) -> None:
    error, allowed = ((x.double() - expected).abs().max().item() for x in (actual, other))
    # If the other is exact by luck, one rounding of the result is still allowed.
    allowed = max(FACTOR * allowed, torch.finfo(actual.dtype).eps / 2 * expected.abs().max().item())
    assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g} ({actual.dtype})"


def check_largest(attention, dtype: torch.dtype, largest: float, causal: bool, agree: bool) -> None:
    """Check inputs of the largest size that the contract allows, over many chunks. There is no NaN, and no
    Inf where the dtype has the range or in float16's output, which saturates. A gradient that float16 cannot
    hold is not finite.
    """
    tensors = [randn(1, 1000, 2, 64, seed=i, like=attention, dtype=dtype).sign() * largest for i in range(4)]
    if agree:
        tensors = [x.abs() for x in tensors]
    *inputs, dout = tensors
    for name, result in zip(
        NAMES, gradients(lambda *x: attention.dense(*x, causal=causal), *inputs, dout=dout)
    ):
        if name == "out" or dtype != torch.float16:
            assert torch.isfinite(result).all(), (
                f"{name} has {(~torch.isfinite(result)).sum()} of {result.numel()} values NaN or Inf"
            )
        elif agree:
            assert not torch.isfinite(result).any(), f"{name} has finite values, which can't be right"


def check_not_finite(attention) -> None:
    """Check that Inf in v shows in its own channel of the queries that see it, across chunks, and nowhere
    else.
    """
    q, k, v = (x.abs() for x in qkv(attention, 1, 300, 300, nheads=1, head_dim=16, dtype=torch.float16))
    at = 128  # the first row of a chunk: within a chunk, a masked product is 0 * Inf
    v[0, at, 0, 3] = float("inf")
    out = attention.dense(q, k, v, causal=True)[0, :, 0]
    assert not torch.isfinite(out[at:, 3]).any(), "an Inf came out finite"
    others = torch.arange(16, device=out.device) != 3
    assert torch.isfinite(out[:at]).all() and torch.isfinite(out[:, others]).all()


def check_weights_saturate(attention) -> None:
    """Check float16 weights of a million, of keys beside their query: they count as 65504 in the output and
    in dv.
    """
    q = torch.full((1, 2, 1, 16), 250.0, dtype=torch.float16, device=attention.device)
    v = torch.full_like(q, 0.25)
    out, _, _, dv = gradients(
        lambda *x: attention.dense(*x, causal=True, softmax_scale=1.0), q, q.clone(), v, dout=v.clone()
    )
    assert out[0, :, 0, 0].tolist() == [16376.0, 32752.0] and dv[0, :, 0, 0].tolist() == [32752.0, 16376.0]


def check_pieces(prefill, attention, nheads_k: int, dtype: torch.dtype) -> None:
    """Check that a sequence in pieces, and token by token at the end, equals the whole sequence."""
    from flash_attn.linear import linear_attention_step

    q, k, v = qkv(attention, 2, 333, 333, nheads=4, nheads_k=nheads_k, head_dim=16, dtype=dtype)
    whole, whole_state = prefill(q, k, v)
    parts, state = [], None
    for start, stop in ((0, 1), (1, 130), (130, 130), (130, 258), (258, 331)):
        out, state = prefill(*(x[:, start:stop] for x in (q, k, v)), state)
        parts.append(out)
    for t in (331, 332):
        out, state = linear_attention_step(*(x[:, t] for x in (q, k, v)), state)
        parts.append(out[:, None])
    exact = (
        attention.dense(*(x.double().cpu() for x in (q, k, v)), causal=True)
        if attention.device == "cpu"
        else whole.double()
    )
    expected_state = torch.einsum("bthd,bthe->bhde", k.double(), v.double())
    for name, a, e in (("whole", whole, exact), ("pieces", torch.cat(parts, 1), exact)):
        assert_close(name, a, e, baseline=whole)
    for name, a in (("whole state", whole_state), ("state in pieces", state)):
        assert_close(name, a, expected_state)
