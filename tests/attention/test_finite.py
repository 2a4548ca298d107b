"""Test that finite inputs give finite results. Each test fails for a kernel that masks or converts to 16 bit
as softmax kernels do.

Softmax hides such faults: -inf becomes a weight of 0, weights never exceed 1 and outputs are averages.
"""

from __future__ import annotations

import pytest
import torch

from caches import CAPACITY, LENGTHS, caches, step
from measure import NAMES, gradients, integers, poisoned, qkv, randn, slopes
from oracle import Options, visibility

FUNCTIONS = ["identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus"]


def assert_finite(*tensors: torch.Tensor) -> None:
    for name, x in zip(NAMES, tensors):
        assert torch.isfinite(x).all(), (
            f"{name} has {(~torch.isfinite(x)).sum()} of {x.numel()} values NaN or Inf"
        )


def gradients_fit(dtype: torch.dtype, activation: str) -> bool:
    """Whether gradients of the largest inputs are within the dtype's range; relu2's derivative grows with the
    score.
    """
    return dtype != torch.float16 and activation != "relu2"


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_masked_entries(attention, activation):
    """A mask of -inf makes P -inf (identity), Inf (relu2) or NaN (silu)."""
    q, k, v = qkv(attention, seqlen_q=9, seqlen_k=9)
    assert_finite(*gradients(lambda *x: attention.dense(*x, causal=True, activation=activation), q, k, v))


@pytest.mark.parametrize("normalization", [None, "1/n", "1/visible", "1/sqrt(n)"])
def test_rows_without_keys(attention, normalization):
    """A row without keys is 0, not 0/0."""
    q, k, v = qkv(attention, seqlen_q=9, seqlen_k=3)
    out, *rest = gradients(lambda *x: attention.dense(*x, causal=True, normalization=normalization), q, k, v)
    assert_finite(out, *rest)
    assert not out[:, :6].any()


def test_zero_queries(attention):
    """Visible scores of exactly 0 next to masked scores give finite results, and the gradient does not
    vanish.
    """
    q, k, v = qkv(attention, seqlen_q=9, seqlen_k=9)
    q[:, 4] = 0
    out, dq, dk, dv = gradients(lambda *x: attention.dense(*x, causal=True), q, k, v)
    assert_finite(out, dq, dk, dv)
    assert dq[:, 4].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("seqlen_k", [1, 2, 5, 17])
def test_poisoned_padding(attention, seqlen_k, value):
    """NaN or Inf past seqused_k and before leftpad_k has no effect. A mask that multiplies by 0 would let it
    through.
    """
    q, k, v = (randn(40, 2, 8, seed=i, like=attention) for i in range(3))
    hidden = torch.ones(40, dtype=torch.bool)
    hidden[2 : 2 + seqlen_k] = hidden[20 + 3 : 20 + 3 + seqlen_k] = False
    used = dict(
        seqused_k=integers(attention, 2 + seqlen_k, 3 + seqlen_k), leftpad_k=integers(attention, 2, 3)
    )
    results = [
        attention.varlen(
            q, *(poisoned(x, hidden, filling) for x in (k, v)), lengths_q=[20, 20], lengths_k=[20, 20], **used
        )
        for filling in (0.0, value)
    ]
    assert_finite(*results)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_outside_every_window(attention, value):
    """NaN or Inf in keys that no window reaches has no effect, in forward and backward."""
    q, k, v = qkv(attention, seqlen_q=5, seqlen_k=90, nheads=1)
    hidden = ~visibility(5, 90, Options(window_size=(6, 3))).any(0)
    results = []
    for filling in (0.0, value):
        keys = (poisoned(x, (slice(None), hidden), filling) for x in (k, v))
        results.append(
            gradients(lambda *x: attention.dense(*x, window_size=(6, 3), deterministic=True), q, *keys)
        )
    assert_finite(*results[1])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [dict(causal=True), dict(window_size=(-1, 4))], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_queries_that_see_no_key(attention, value, options):
    """NaN or Inf in such queries, or in their rows of dout, reaches no key."""
    if attention.device == "cuda" and attention.variant == "quadratic":
        pytest.skip("the extension's tiles hold such queries beside those that see keys: README, limits")
    q, k, v = qkv(attention, seqlen_q=90, seqlen_k=35, nheads=2)
    blind = ~visibility(90, 35, Options(**options)).any(1)
    dout = randn(*q.shape, seed=99, like=attention)
    results = []
    for filling in (0.0, value):
        queries, gradient = (poisoned(x, (slice(None), blind), filling) for x in (q, dout))
        results.append(
            gradients(
                lambda *x: attention.dense(*x, deterministic=True, **options), queries, k, v, dout=gradient
            )
        )
    assert blind.sum() >= 50 and not results[1][0][:, blind].any()
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned_cache(attention, value):
    """Entries past the end, in the left padding and in unused slots count bit for bit as zeros."""
    q, *new = step(attention, 2)
    arguments = dict(
        cache_seqlens=integers(attention, *LENGTHS), cache_leftpad=integers(attention, 3, 0, 20), causal=True
    )
    results = []
    for filling in (0.0, value):
        pair = caches(attention, slots=4)
        for slot, (start, stop) in enumerate(zip((3, 0, 20, CAPACITY), LENGTHS + (0,))):
            pair = [
                poisoned(poisoned(x, (slot, slice(0, start)), filling), (slot, slice(stop, None)), filling)
                for x in pair
            ]
        results.append(attention.kvcache(q, *pair, *new, **arguments))
    assert_finite(*results)
    assert torch.equal(*results)


def test_poisoned_pages(attention):
    """NaN in free pages and in the rest of the last page has no effect."""
    q = randn(2, 3, 2, 8, seed=0, like=attention)
    k, v = (randn(6, 256, 2, 8, seed=i, like=attention) for i in (1, 2))
    arguments = dict(
        cache_seqlens=integers(attention, 300, 9),
        block_table=integers(attention, 4, 1, 3, 0).view(2, 2),
        causal=True,
    )
    results = []
    for filling in (0.0, float("nan")):
        pages = [poisoned(x, slice(5, None), filling) for x in (k, v)]
        for page, start in ((1, 300 - 256), (3, 9), (0, 0), (2, 0)):
            pages = [poisoned(x, (page, slice(start, None)), filling) for x in pages]
        results.append(attention.kvcache(q, *pages, **arguments))
    assert_finite(*results)
    assert torch.equal(*results)


@pytest.mark.scores
def test_weights_saturate_in_float16(attention):
    """A third of the scores are beyond 65504. They count as ±65504, so that no sum is Inf - Inf."""
    q, k, v = qkv(attention, 1, 64, 64, head_dim=64, dtype=torch.float16, size=60)
    v = v * 1e-5
    out = attention.dense(q, k, v, causal=True, softmax_scale=1.0)
    assert_finite(out)
    p = torch.einsum("bihd,bjhd->bhij", q.double().cpu(), k.double().cpu()).clamp(-65504, 65504).tril()
    expected = torch.einsum("bhij,bjhd->bihd", p, v.double().cpu())
    assert ((p.abs() == 65504).sum() > 100) and (
        out.cpu() - expected
    ).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("size", [60, 400])
def test_finite_gradients_are_right_in_float16(attention, size):
    """Some dS = dO·v are beyond 65504. Gradients that depend on them are Inf, NaN or right, so that
    torch.amp.GradScaler notices.
    """
    q, k, v = qkv(attention, 1, 64, 64, head_dim=64, dtype=torch.float16, size=60)
    k = k * 1e-5
    dout = randn(*q.shape, seed=99, like=attention, dtype=torch.float16, size=size)
    out, dq, *_ = gradients(lambda *x: attention.dense(*x, causal=True), q, k, v, dout=dout)
    assert_finite(out)
    ds = torch.einsum("bihd,bjhd->bhij", dout.double().cpu(), v.double().cpu()).tril()
    assert (ds.abs() > 65504).sum() > 20  # before scaling and, with the larger size, also after it
    expected = torch.einsum("bhij,bjhd->bihd", ds / 8, k.double().cpu())
    wrong = dq.isfinite().cpu() & ((dq.double().cpu() - expected).abs() > 2e-3 * expected.abs().max())
    assert not wrong.any(), f"{wrong.sum()} values of dq are finite and wrong"


def test_weights_do_not_saturate_in_bfloat16(attention):
    """bfloat16 has the range, so weights do not saturate."""
    q, k, v = qkv(attention, 1, 64, 64, head_dim=64, dtype=torch.bfloat16, size=60)
    v = v * 1e-5
    out = attention.dense(q, k, v, causal=True, softmax_scale=1.0)
    p = torch.einsum("bihd,bjhd->bhij", q.double().cpu(), k.double().cpu()).tril()
    expected = torch.einsum("bhij,bjhd->bihd", p, v.double().cpu())
    assert_finite(out)
    assert (out.cpu() - expected).abs().max() <= 1.6e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [dict(), dict(softcap=50.0), dict(normalization="1/n"), dict(normalization="1/visible")],
    ids=str,
)
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)
def test_largest_inputs(attention, dtype, largest, activation, options):
    """Inputs of the largest size that the contract allows, of both signs, give no NaN and no Inf in
    forward.
    """
    q, k, v = (x.sign() * largest for x in qkv(attention, 1, 40, 48, nheads=2, head_dim=64, dtype=dtype))
    dout = torch.full_like(q, largest)
    dout[:, ::2] *= -1
    options = dict(options, causal=True, activation=activation)
    out, *rest = gradients(lambda *x: attention.dense(*x, **options), q, k, v, dout=dout)
    assert_finite(out, *(rest if gradients_fit(dtype, activation) else ()))


@pytest.mark.parametrize("activation", ["identity", "relu2"])
@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)
def test_largest_inputs_in_several_blocks(attention, dtype, largest, activation):
    """A block with the sum Inf and a next block with -Inf would give NaN."""
    q, k, v, dout = (
        randn(1, 600, 1, 64, seed=i, like=attention, dtype=dtype).sign() * largest for i in range(4)
    )
    out, *rest = gradients(lambda *x: attention.dense(*x, activation=activation), q, k, v, dout=dout)
    assert_finite(out, *(rest if gradients_fit(dtype, activation) else ()))


@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)
def test_largest_inputs_that_all_agree(attention, dtype, largest):
    """With inputs of one sign, outputs saturate at the largest number, and gradients beyond it are not
    finite.
    """
    q, k, v = (
        torch.full_like(x, largest) for x in qkv(attention, 1, 40, 48, nheads=2, head_dim=64, dtype=dtype)
    )
    out, *rest = gradients(
        lambda *x: attention.dense(*x, alibi_slopes=slopes(attention, 2)),
        q,
        k,
        v,
        dout=torch.full_like(q, largest),
    )
    assert_finite(out)
    if dtype == torch.float16:
        assert (out == 65504).all() and not any(x.isfinite().any() for x in rest)
    else:
        assert_finite(out, *rest)
