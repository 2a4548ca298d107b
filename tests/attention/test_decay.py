"""Test decay_slopes: every weight is multiplied by exp(-slope * |c - j|), whatever f, mask and function."""

from __future__ import annotations

import flash_attn
import pytest
import torch

from caches import CAPACITY, LENGTHS, caches, check, step
from calls import DIFFERENTIABLE, close, inputs, run
from dropping import compare_dropped
from measure import assert_same, compare, gradients, integers, packed, qkv, slopes
from oracle import FUNCTIONS as FORMULAS
from package import cumulative

RAGGED = dict(lengths_q=[5, 0, 9, 2], lengths_k=[8, 3, 4, 2])
OPTIONS = [
    dict(),
    dict(causal=True),
    dict(window_size=(4, 2)),
    dict(window_size=(4, -1), softcap=2.0),
    dict(causal=True, normalization="1/visible"),
    dict(normalization=0.1, softmax_scale=-0.3),
]
FORMS = [(4,), (2, 4)]


@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(20, 20), (12, 21), (21, 12)])
def test_dense(attention, options, shape, seqlen_q, seqlen_k):
    """Slopes are those of query heads, four of which share two key heads."""
    tensors = qkv(attention, 2, seqlen_q, seqlen_k, nheads=4, nheads_k=2)
    compare(attention, *tensors, decay_slopes=slopes(attention, *shape), **options)


@pytest.mark.scores
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("causal", [False, True])
def test_activations(attention, activation, causal):
    tensors = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2)
    compare(attention, *tensors, activation=activation, causal=causal, decay_slopes=slopes(attention, 4))


@pytest.mark.scores
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_beside_alibi(attention, activation):
    """ALiBi adds to the score, and the decay multiplies the weight."""
    both = dict(alibi_slopes=slopes(attention, 2), decay_slopes=slopes(attention, 2, size=0.2))
    compare(attention, *qkv(attention, 2, 20, 24), activation=activation, causal=True, **both)


@pytest.mark.parametrize("shape", [(4,), (4, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed(attention, options, shape):
    tensors = packed(attention, **RAGGED, nheads=4)
    given = slopes(attention, *shape)
    compare(attention, *tensors, method="varlen", **RAGGED, decay_slopes=given, **options)


@pytest.mark.scores
def test_dropout(attention):
    compare_dropped(attention, *qkv(attention, 2, 33, 41), decay_slopes=slopes(attention, 2))


@pytest.mark.scores
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_cache(attention, activation, shape):
    """Distances count from the last key of each sequence, which the query just appended."""
    new = step(attention, seqlen=2)
    check(
        attention, new[0], *caches(attention), *new[1:], cache_seqlens=integers(attention, *LENGTHS),
        causal=True, activation=activation, decay_slopes=slopes(attention, *shape),
    )  # fmt: skip


@pytest.mark.scores
def test_decoding_equals_prefill(attention):
    q, k, v = qkv(attention, 2, 12, 12)
    options = dict(causal=True, activation="silu", decay_slopes=slopes(attention, 2))
    cache = [torch.zeros(2, CAPACITY, *x.shape[2:]).to(x) for x in (k, v)]
    steps = [
        attention.kvcache(
            *(x[:, i : i + 1] for x in (q,)), *cache, k[:, i : i + 1], v[:, i : i + 1],
            cache_seqlens=integers(attention, i, i), **options,
        )
        for i in range(12)
    ]  # fmt: skip
    assert_same("out", torch.cat(steps, 1), attention.dense(q, k, v, **options))


# ---- Laws


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_of_zero_change_nothing(attention, causal):
    """Up to rounding; without slopes the call is the plain one."""
    tensors = qkv(attention, 2, 150, 170)
    zero = torch.zeros(2, device=attention.device)
    plain, none, with_zero = (
        gradients(lambda *x: attention.dense(*x, causal=causal, decay_slopes=given), *tensors)
        for given in (None, None, zero)
    )
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), plain, none, with_zero):
        assert torch.equal(a, b)
        assert_same(name, c, a)


@pytest.mark.parametrize("causal", [False, True])
def test_a_steep_slope_leaves_the_diagonal(attention, causal):
    q, k, v = qkv(attention, 2, 150, 150)
    given = torch.full((2,), 200.0, device=attention.device)
    out = attention.dense(q, k, v, causal=causal, softmax_scale=1.0, decay_slopes=given)
    assert_same("out", out, ((q.double() * k.double()).sum(-1, keepdim=True) * v.double()).to(q.dtype), 8)


@pytest.mark.scores
def test_positions_may_shift(attention):
    """Keys in front, which no query sees, move all positions and change nothing."""
    q, k, v = qkv(attention, 1, 6, 9)
    options = dict(window_size=(3, 0), activation="silu", decay_slopes=slopes(attention, 2))
    more = [torch.cat([torch.full_like(x, float("nan")), x], 1) for x in (k, v)]
    assert torch.equal(attention.dense(q, *more, **options), attention.dense(q, k, v, **options))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_alone(attention, causal):
    lengths = [130, 0, 64, 5]
    q, k, v = packed(attention, lengths, lengths)
    given = slopes(attention, len(lengths), 2)
    options = dict(causal=causal, decay_slopes=given)
    together = gradients(
        lambda *x: attention.varlen(*x, lengths, lengths, **options), q, k, v, dout=v.detach()
    )
    start = 0
    for b, length in enumerate(lengths):
        own, start = slice(start, start + length), start + length
        parts = [x[None, own] for x in (q, k, v)]
        alone = gradients(
            lambda *x: attention.dense(*x, causal=causal, decay_slopes=given[b : b + 1]), *parts,
            dout=v[None, own].detach(),
        )  # fmt: skip
        for name, a, e in zip(("out", "dq", "dk", "dv"), together, alone):
            assert_same(name, a[own], e[0], 8)


# ---- Every function, derivatives, compilers

ALGORITHMS = pytest.mark.parametrize("algorithm", ["quadratic", "linear"])


@ALGORITHMS
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_public_functions(name, device, compiled, algorithm):
    if device != "cpu":
        pytest.skip("the CPU shows it: arguments take the same way")
    torch._dynamo.reset()
    options = dict(use_softmax=False, causal=True, decay_slopes=torch.tensor([0.3, 0.1]), algorithm=algorithm)
    expected = run("flash_attn_varlen_func" if "varlen" in name else "flash_attn_func", device, **options)
    if not compiled:
        for a, e in zip(run(name, device, **options), expected, strict=True):
            close(a, e)
        return
    tensors, lengths = inputs(name, device)

    def attend(*x):
        return getattr(flash_attn, name)(*x, *lengths, **options)

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(out, attend(*tensors))
    for a, e in zip(*(torch.autograd.grad(o, tensors, out.detach()) for o in (out, attend(*tensors)))):
        close(a, e)


@ALGORITHMS
def test_forward_and_backward(device, algorithm):
    if device != "cpu":
        pytest.skip("the CPU shows it: arguments take the same way")
    q, k, v = qkv(None)
    options = dict(causal=True, decay_slopes=torch.tensor([0.3, 0.1]), algorithm=algorithm)
    out, dq, dk, dv = gradients(
        lambda *x: flash_attn.flash_attn_func(*x, use_softmax=False, **options), q, k, v, dout=q
    )
    assert torch.equal(out, flash_attn.nosoftmax.forward(q, k, v, **options)[0])
    for a, e in zip(flash_attn.nosoftmax.backward(q, q, k, v, **options), (dq, dk, dv)):
        assert torch.equal(a, e)


@ALGORITHMS
@pytest.mark.parametrize("causal", [False, True])
def test_derivatives(device, causal, algorithm):
    if device != "cpu":
        pytest.skip("finite differences need float64, which the CUDA kernels do not take")
    tensors = [x.requires_grad_() for x in qkv(None, 1, 3, 4, nheads=2, nheads_k=1, head_dim=2)]
    options = dict(causal=causal, decay_slopes=torch.tensor([0.3, 0.1]), algorithm=algorithm)

    def attend(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, use_softmax=False, **options)

    torch.autograd.gradcheck(attend, tensors, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@ALGORITHMS
def test_vmap(device, algorithm):
    """Each entry has its own slopes, or all share them."""
    if device != "cpu":
        pytest.skip("the CPU shows it: what is folded is the same")
    tensors = [torch.stack([x, x + 1]) for x in qkv(None, 3, 4, 5)]

    def loss(q, k, v, given):
        out = flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, causal=True, decay_slopes=given, algorithm=algorithm
        )
        return out.square().sum()

    for given in (torch.rand(2, 2), torch.rand(2, 3, 2)):
        for dims, own in ((0, given), (None, given[:1].expand_as(given))):
            shared = given if dims == 0 else given[0]
            both = torch.func.vmap(torch.func.grad(loss), (0, 0, 0, dims))(*tensors, shared)
            alone = torch.stack([torch.func.grad(loss)(*x) for x in zip(*tensors, own)])
            torch.testing.assert_close(both, alone, rtol=0, atol=1e-10)


# ---- Refused


WRONG = {
    "of no head": (dict(decay_slopes=torch.ones(3)), ValueError, r"decay_slopes has shape \(3,\)"),
    "of another dtype": (dict(decay_slopes=torch.ones(2).double()), TypeError, "decay_slopes has dtype"),
    "that asks for a gradient": (
        dict(decay_slopes=torch.ones(2, requires_grad=True)), ValueError, r"decay_slopes\.detach",
    ),
    "below 0": (dict(decay_slopes=torch.tensor([1.0, -1.0])), ValueError, r"decay_slopes\[1\]=-1\.0"),
    "not a number": (dict(decay_slopes=torch.tensor([torch.nan, 1.0])), ValueError, r"decay_slopes\[0\]=nan"),
    "infinite": (dict(decay_slopes=torch.tensor([torch.inf, 1.0])), ValueError, r"decay_slopes\[0\]=inf"),
    "elsewhere": (dict(decay_slopes=torch.ones(2, device="meta")), ValueError, "decay_slopes on meta"),
    "a list": (dict(decay_slopes=[1.0, 1.0]), TypeError, "decay_slopes is a builtins.list"),
    "with softmax": (dict(decay_slopes=torch.ones(2), use_softmax=True), ValueError, "use_softmax=False"),
    "a list with softmax": (dict(decay_slopes=[1.0], use_softmax=True), ValueError, "decay_slopes replaces"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("ask", ["call", "explain", "packed", "cache"])
def test_refused(options, error, words, ask):
    q, k, v = qkv(None)
    options = {"use_softmax": False, **options}
    with pytest.raises(error, match=words):
        if ask == "call":
            flash_attn.flash_attn_func(q, k, v, **options)
        elif ask == "explain":
            flash_attn.explain(flash_attn.flash_attn_func, q, k, v, **options)
        elif ask == "cache":
            flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=integers(q, 9, 9), **options)
        else:
            starts_q, starts_k = cumulative([7, 7], "cpu"), cumulative([9, 9], "cpu")
            flash_attn.flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), starts_q, starts_k, 7, 9, **options
            )


def test_slopes_that_change_are_read_again():
    """A call that looks like an earlier one is not checked again, but reads its own slopes."""
    q, k, v = qkv(None)
    given = torch.tensor([0.3, 0.1])
    first = flash_attn.flash_attn_func(q, k, v, use_softmax=False, decay_slopes=given)
    same = flash_attn.flash_attn_func(q, k, v, use_softmax=False, decay_slopes=given.clone())
    other = flash_attn.flash_attn_func(q, k, v, use_softmax=False, decay_slopes=2 * given)
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(ValueError, match=r"decay_slopes\[0\]=-0"):
        flash_attn.flash_attn_func(q, k, v, use_softmax=False, decay_slopes=-given)
