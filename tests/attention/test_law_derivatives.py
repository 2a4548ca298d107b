"""Test that derivatives of any order are right or raise, and are never silently zero, on every backend.

With the identity, and without softcap and dropout, the backward consists of forwards, so that second
derivatives are right. In every other case a second derivative raises, at every length.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn import flash_attn_func
from flash_attn.nosoftmax.backends import cpu, linear
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from measure import NAMES, assert_close, gradients, on_cpu, packed, qkv, randn, slopes
from oracle import Oracle

IDENTITY = {
    "full": dict(),
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "scale": dict(softmax_scale=-0.6, causal=True),
    "alibi": dict(alibi_slopes=(2,)),
    "decay": dict(decay_slopes=(2,)),
    "decay, causal, 1/visible": dict(decay_slopes=(2,), causal=True, normalization="1/visible"),
    "1/n": dict(normalization="1/n"),
    "1/visible": dict(normalization="1/visible", causal=True),
    "1/sqrt(n)": dict(normalization="1/sqrt(n)", window_size=(3, 0)),
    "alibi, window, 1/visible": dict(alibi_slopes=(2,), window_size=(2, 1), normalization="1/visible"),
}
NOT_TWICE = {
    "relu": dict(activation="relu"),
    "relu2": dict(activation="relu2"),
    "sigmoid": dict(activation="sigmoid"),
    "silu": dict(activation="silu"),
    "gelu": dict(activation="gelu"),
    "softplus": dict(activation="softplus"),
    "softcap": dict(softcap=2.0),
    "dropout": dict(dropout_p=0.2),
}
ONCE = {**IDENTITY, **{name: options for name, options in NOT_TWICE.items() if name != "dropout"}}
LENGTHS = dict(lengths_q=[3, 0, 5], lengths_k=[4, 2, 3])

identity = pytest.mark.parametrize("options", IDENTITY.values(), ids=IDENTITY)
once = pytest.mark.parametrize("options", ONCE.values(), ids=ONCE)


def given(attention, options: dict) -> dict:
    """Make the slopes in ``options`` on the device of the backend."""
    named = {name: options[name] for name in ("alibi_slopes", "decay_slopes") if name in options}
    return {**options, **{name: slopes(attention, *shape, size=0.3) for name, shape in named.items()}}


def tensors(attention, method: str = "dense", nheads_k: int = 1) -> tuple[Tensor, ...]:
    sizes = dict(nheads=2, nheads_k=nheads_k, head_dim=8)
    return packed(attention, **LENGTHS, **sizes) if method == "varlen" else qkv(attention, 2, 5, 6, **sizes)


def penalty(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, order: int) -> tuple[Tensor, ...]:
    """Gradients of order 2 or 3, of a function of the gradients, with respect to q, k, v and dout."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, dout)]
    *inputs, gradient = leaves
    found = torch.autograd.grad(attend(*inputs), inputs, gradient, create_graph=True)
    for _ in range(order - 2):
        total = sum(x.square().sum() for x in found)
        found = torch.autograd.grad(total, inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in found), leaves)


def compare_penalties(attention, method: str, order: int, nheads_k: int = 1, **options) -> None:
    """Compare with the oracle in float64, within the error of the oracle in the dtype of the backend."""
    q, k, v = tensors(attention, method, nheads_k)
    size = 0.1 if order > 2 else 1.0  # squares of squares
    inputs = [size * x for x in (q, k, v, randn(*q.shape, seed=9, like=attention))]
    extra = LENGTHS if method == "varlen" else {}
    actual = penalty(lambda *x: getattr(attention, method)(*x, **extra, **options), *inputs, order)
    plain = {name: on_cpu(value) for name, value in {**extra, **options}.items()}
    expected, baseline = (
        penalty(lambda *x: getattr(Oracle(), method)(*x, **plain), *(on_cpu(x, dtype) for x in inputs), order)
        for dtype in (torch.float64, attention.dtype)
    )
    for name, *three in zip(("q", "k", "v", "dout"), actual, expected, baseline):
        assert_close(f"the gradient of the penalty with respect to {name}", *three)


@identity
@pytest.mark.parametrize("method", ["dense", "varlen"])
def test_second_derivatives(attention, method, options):
    """Second derivatives are right in a gradient penalty, with grouped heads."""
    compare_penalties(attention, method, 2, **given(attention, options))


@pytest.mark.parametrize("nheads_k", [1, 2])
def test_third_derivatives(attention, nheads_k):
    compare_penalties(attention, "dense", 3, nheads_k, causal=True)


@identity
def test_finite_differences_agree(attention, options):
    if attention.device != "cpu":
        pytest.skip("finite differences need float64, which the CUDA kernels do not take")
    inputs = [x.requires_grad_() for x in qkv(attention, 1, 3, 4, nheads=2, nheads_k=1, head_dim=2)]
    options = given(attention, options)
    assert torch.autograd.gradgradcheck(lambda *x: attention.dense(*x, **options), inputs, fast_mode=True)


def test_one_number(attention):
    """q, k, v = 1, 2, 3: out = q k v, l = out², g = dl/dq = 2 out k v = 72; d(l + g²)/dq = 72 + 2 g (2 k² v²)
    = 10440.
    """
    q, k, v = (
        torch.full((1, 1, 1, 1), x, dtype=torch.float32, device=attention.device) for x in (1.0, 2.0, 3.0)
    )
    q, k, v = (x.to(attention.dtype).requires_grad_() for x in (q, k, v))
    loss = attention.dense(q, k, v, softmax_scale=1.0).square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    (loss + gradient.square().sum()).backward()
    assert q.grad.item() == pytest.approx(10440, rel=1e-3)


def second_derivative(attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
    sum(x.square().sum() for x in found).backward()


NAMED = {name: next(iter(options)) for name, options in NOT_TWICE.items()}


@pytest.mark.parametrize("name", NOT_TWICE)
def test_second_derivatives_are_refused(attention, name):
    """An unsupported second derivative raises, and the error names the option that prevents it."""
    with pytest.raises(RuntimeError, match=NAMED[name]):
        second_derivative(lambda *x: attention.dense(*x, **NOT_TWICE[name]), *qkv(attention, 1, 8, 8))


@pytest.mark.parametrize("seqlen", [64, 4096])
@pytest.mark.parametrize("name", ["relu", "silu", "softcap", "dropout"])
def test_second_derivatives_are_refused_at_every_length(device, monkeypatch, name, seqlen):
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = [randn(1, seqlen, 1, 8, seed=i, dtype=dtype).to(device) for i in range(3)]
    with pytest.raises(RuntimeError, match=NAMED[name]):
        second_derivative(lambda *x: flash_attn_func(*x, use_softmax=False, **NOT_TWICE[name]), *inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [64, 128, 256, 600])
def test_whichever_algorithm_is_chosen(device, monkeypatch, seqlen, causal):
    """A second derivative is right on both sides of the crossover."""
    if device != "cpu":
        pytest.skip("compares in float64, which the CUDA kernels do not take")
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    inputs = [randn(1, seqlen, 1, 4, seed=i, size=0.1) for i in range(4)]
    auto, quadratic = (
        penalty(lambda *x: run(*x, causal=causal), *inputs, 2)
        for run in (lambda *x, **o: flash_attn_func(*x, use_softmax=False, **o), Oracle().dense)
    )
    for name, a, e in zip(("q", "k", "v", "dout"), auto, quadratic):
        assert_close(name, a, e)


# --- torch.func


@once
def test_func_grad_and_vjp(attention, options):
    """torch.func gives the results of torch.autograd."""
    options, (q, k, v) = given(attention, options), tensors(attention)
    dout = randn(*q.shape, seed=99, like=attention)

    def attend(*x):
        return attention.dense(*x, deterministic=True, **options)

    expected = gradients(attend, q, k, v, dout=dout)
    out, pull = torch.func.vjp(attend, q, k, v)
    by_grad = torch.func.grad(lambda *x: (attend(*x) * dout).sum(), argnums=(0, 1, 2))(q, k, v)
    for name, a, e in zip(NAMES, (out, *pull(dout)), expected):
        assert torch.equal(a, e), name
    for name, a, e in zip(NAMES[1:], by_grad, expected[1:]):
        assert_close(name, a, e)


@pytest.mark.parametrize("algorithm", ["quadratic", "linear"])
def test_backends_meet_plain_tensors(algorithm, monkeypatch):
    """The function that torch.func.vjp returns is called after its transform, when a kernel cannot read the
    dead wrappers.
    """
    backend = {"quadratic": cpu, "linear": linear}[algorithm]
    met = []

    def watch(name: str) -> None:
        function = getattr(backend, name)

        def watched(call, *more):
            met.extend(is_functorch_wrapped_tensor(x) for x in (*call.tensors, *more) if x is not None)
            return function(call, *more)

        monkeypatch.setattr(backend, name, watched)

    watch("forward")
    watch("backward")
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    out, pull = torch.func.vjp(
        lambda *x: flash_attn_func(*x, use_softmax=False, algorithm=algorithm), q, k, v
    )
    pull(torch.ones_like(out))
    assert len(met) > 6 and not any(met)


def test_func_grad_of_grad(attention):
    """The same number as in test_one_number."""
    k, v = (torch.full((1, 1, 1, 1), x, dtype=attention.dtype, device=attention.device) for x in (2.0, 3.0))

    def loss(q):
        return attention.dense(q, k, v, softmax_scale=1.0).square().sum()

    def penalized(q):
        return loss(q) + torch.func.grad(loss)(q).square().sum()

    assert torch.func.grad(penalized)(torch.ones_like(k)).item() == pytest.approx(10440, rel=1e-3)


# The position of the extra axis in q, k and v, or None.
AXES = [(0, 0, 0), (1, 1, 1), (0, None, None), (None, 0, 0), (None, 2, None), (3, 0, None)]


def batched(x: Tensor, axis: int | None, size: int = 3) -> Tensor:
    """Add an axis of copies of the tensor, each a bit larger."""
    factors = 1 + torch.arange(size, dtype=x.dtype, device=x.device) / 4
    return x if axis is None else torch.stack([x * f for f in factors], axis)


@once
def test_vmap(attention, options):
    """vmap joins the axis with the batch."""
    options, inputs = given(attention, options), tensors(attention)
    for axes in AXES:
        wide = [batched(x, axis) for x, axis in zip(inputs, axes)]
        out = torch.func.vmap(lambda *x: attention.dense(*x, **options), in_dims=axes)(*wide)
        for i in range(3):
            one = [x if axis is None else x.select(axis, i) for x, axis in zip(wide, axes)]
            assert_close(f"out with in_dims={axes}", out[i], attention.dense(*one, **options))


def test_vmap_of_a_gradient(attention):
    """vmap of a gradient gives per-sample gradients."""
    wide = [batched(x, 0) for x in tensors(attention)]

    def loss(q, k, v):
        return attention.dense(q, k, v, causal=True, activation="identity").sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*wide)
    for i in range(3):
        expected = torch.autograd.grad(
            loss(*(leaves := [x[i].clone().requires_grad_() for x in wide])), leaves
        )
        for name, a, e in zip(NAMES[1:], found, expected):
            assert_close(name, a[i], e)


def test_vmap_with_dropout_is_refused(attention):
    wide = [batched(x, 0) for x in tensors(attention)]
    with pytest.raises(RuntimeError, match="dropout_p"):
        torch.func.vmap(lambda *x: attention.dense(*x, dropout_p=0.2))(*wide)


# --- Forward mode


@identity
def test_jvp(attention, options):
    """Forward derivatives are right by torch.func and by dual numbers, also with tangents of some inputs
    only.
    """
    options, inputs = given(attention, options), tensors(attention)
    moves = [randn(*x.shape, seed=30 + i, like=attention) for i, x in enumerate(inputs)]

    def expected(dtype: torch.dtype, moved) -> tuple[Tensor, Tensor]:
        plain = {name: on_cpu(value) for name, value in options.items()}
        x, t = ([on_cpu(y, dtype) for y in ys] for ys in (inputs, moved))
        # The sum of three forwards, each linear in the input that it differentiates.
        return torch.func.jvp(lambda *y: Oracle().dense(*y, **plain), tuple(x), tuple(t))

    for subset in ((0, 1, 2), (0,), (1, 2)):
        moved = [t if i in subset else torch.zeros_like(t) for i, t in enumerate(moves)]
        out, tangent = torch.func.jvp(
            lambda *x: attention.dense(*(x[subset.index(i)] if i in subset else y for i,
            y in enumerate(inputs)), **options), tuple(inputs[i] for i in subset),
            tuple(moves[i] for i in subset),
        )  # fmt: skip
        references = expected(torch.float64, moved), expected(attention.dtype, moved)
        for name, a, e, b in zip(("out", "tangent"), (out, tangent), *references):
            assert_close(name, a, e, b)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, moves)]
        dual = forward_ad.unpack_dual(attention.dense(*duals, **options)).tangent
    assert_close("tangent", dual, *(expected(dtype, moves)[1] for dtype in (torch.float64, attention.dtype)))


@pytest.mark.parametrize("name", NOT_TWICE)
def test_jvp_is_refused(attention, name):
    inputs = tensors(attention)
    with pytest.raises(RuntimeError, match=NAMED[name]):
        torch.func.jvp(lambda *x: attention.dense(*x, **NOT_TWICE[name]), inputs, inputs)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NAMED[name]):
        attention.dense(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:], **NOT_TWICE[name])
