"""Test that non-finite values show, that finite inputs give a finite output, and that a finite gradient is
right.

NaN or Inf in a visible entry of q, k, v or dO reaches every entry of a result that depends on it and no
other. The oracle shows which entries depend on it: those that change with it.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from caches import caches, step
from measure import NAMES, gradients, integers, poisoned, qkv, randn, reference

NAN, INF = float("nan"), float("inf")
ACTIVATIONS = ["identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus"]
# For other f, f(-Inf) is a limit, and the formula of f decides between 0 and NaN. NaN must show with every f.
NO_LIMIT = ("identity", "relu", "relu2", "sigmoid", "softplus")
INPUTS = ("q", "k", "v", "dout")
LENGTH = 12


def tensors(like=None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Make q, k, v and dout, with two heads of one key head."""
    shapes = ((LENGTH, 2), (LENGTH, 1), (LENGTH, 1), (LENGTH, 2))
    # In this range every dtype can represent bfloat16 numbers.
    return [
        randn(1, *s, 8, seed=i).bfloat16().to(like.device if like else "cpu", dtype)
        for i, s in enumerate(shapes)
    ]


def place(name: str, causal: bool) -> tuple[int, int, int, int]:
    """The index of an entry that every query sees, or that sees every key, so that no tile can be skipped."""
    row = {"q": LENGTH - 1, "dout": LENGTH - 1}.get(name, 0) if causal else 5
    return (0, row, 0, 3)


def results(
    run, name: str, value: float, causal: bool, *, like=None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    *x, dout = (
        poisoned(t, place(name, causal), value) if n == name else t
        for n, t in zip(INPUTS, tensors(like, dtype))
    )
    return run(*x, dout)


def oracle(activation: str, causal: bool, dtype: torch.dtype):
    return lambda q, k, v, dout: reference(q, k, v, dout, dtype, causal=causal, activation=activation)


@functools.cache
def depend(name: str, causal: bool, activation: str) -> tuple[Tensor, ...]:
    """Return for each result a mask of the entries that depend on the entry at ``place``."""
    run = oracle(activation, causal, torch.float64)
    return tuple(a != b for a, b in zip(*(results(run, name, value, causal) for value in (1.75, -0.375))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_visible_values_show(attention, activation, causal, dtype):
    def run(q, k, v, dout):
        return gradients(
            lambda *x: attention.dense(*x, causal=causal, activation=activation, deterministic=True),
            q,
            k,
            v,
            dout=dout,
        )

    smooth = "identity" if activation == "identity" else "silu"
    for name in INPUTS:
        # A NaN score makes f and f' NaN on both sides of a kink. Where the derivative is 0, NaN in v or dO
        # may show or not.
        sure = smooth if name in "qk" else activation
        finite = results(run, name, 0.5, causal, like=attention, dtype=dtype)
        for value in (NAN, INF) if activation in NO_LIMIT else (NAN,):
            actual = results(run, name, value, causal, like=attention, dtype=dtype)
            shows = results(oracle(activation, causal, torch.float64), name, value, causal)
            for result, a, f, s, may, must in zip(
                NAMES, actual, finite, shows, depend(name, causal, smooth), depend(name, causal, sure)
            ):
                where, s, may, must = (
                    f"{value} in {name}: {result}",
                    *(x.to(a.device) for x in (s.isfinite(), may, must)),
                )
                lost = must & a.isfinite() & ~(s & (value == INF))
                assert not lost.any(), (
                    f"{where} is finite at {lost.sum()} of {must.sum()} entries that depend on it"
                )
                tolerance = 8 * torch.finfo(dtype).eps * f.abs().max()
                assert ((a - f).abs() <= tolerance)[~may].all(), (
                    f"{where} changed where it does not depend on it"
                )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(softmax_scale=1e9), dict(softcap=1e-9), dict(softcap=1e9), dict(normalization="1/visible")],
    ids=str,
)
def test_float16_of_any_size_gives_a_finite_output(attention, activation, options):
    """Inputs from the smallest to the largest number, mixed in every row, give a finite output."""
    q, k, v = qkv(attention, 1, 40, 48, head_dim=32, dtype=torch.float16)
    sizes = [torch.logspace(-7, 4.6, 32, dtype=torch.float64).roll(shift) for shift in (0, 3, 11)]
    q, k, v = (
        (x.double().sign() * s.to(x.device)).clamp(-65504, 65504).half() for x, s in zip((q, k, v), sizes)
    )
    out = attention.dense(q, k, v, causal=True, activation=activation, **options)
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} values are NaN or Inf"


def finite_and_wrong(actual: Tensor, expected: Tensor) -> Tensor:
    actual, largest = actual.double().cpu(), expected.abs().max()
    return actual.isfinite() & ((actual - expected).abs() > 5e-3 * largest)


@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize("size", [2.0**6, 2.0**9, 2.0**13])
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu2"])
def test_finite_gradients_are_right(attention, activation, size, nheads_k):
    """For an incoming gradient of any size, a result that does not fit is NaN or Inf, never the nearest
    number that fits.
    """
    q, k, v = qkv(attention, 1, 40, 48, nheads=4, nheads_k=nheads_k, head_dim=16, dtype=torch.float16)
    v, dout = 16 * v, randn(*q.shape, seed=99, like=attention, dtype=torch.float16, size=size).abs()
    results = gradients(lambda *x: attention.dense(*x, activation=activation), q, k, v, dout=dout)
    for name, a, e in zip(NAMES, results, reference(q, k, v, dout, torch.float64, activation=activation)):
        wrong = finite_and_wrong(a, e)
        assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} values of {name} are finite and wrong"


def test_sums_over_a_group_of_heads_do_not_saturate(attention):
    """Each head's dV fits, but their sum does not and shows."""
    q, k, v, dout = (
        torch.ones(1, 16, h, 8, dtype=torch.float16, device=attention.device) for h in (2, 1, 1, 2)
    )
    *_, dk, dv = gradients(lambda *x: attention.dense(*x, softmax_scale=0.125), q, k, v, dout=dout * 2500)
    assert not dv.isfinite().any() and not finite_and_wrong(dk, torch.full(dk.shape, 80000.0)).any()


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_grad_scaler_backs_off(attention, activation):
    """With a loss scale at which dO fits but dQ does not, GradScaler skips the step, and takes it once the
    scale is smaller.
    """
    weight = torch.nn.Parameter(torch.eye(16, device=attention.device) * 8)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    x = torch.ones(1, 32, 2, 16, device=attention.device)

    def train(scale: float) -> tuple[bool, float]:
        """Return whether the weight changed, and the scale of the next step."""
        scaler, before = (
            torch.amp.GradScaler(attention.device, init_scale=scale, growth_interval=1000),
            weight.detach().clone(),
        )
        optimizer.zero_grad()
        h = (x @ weight).half()
        out = attention.dense(h, h.detach(), h.detach(), activation=activation, softmax_scale=2.0**-6)
        loss = out.float().sum() * 2.0**-10
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return not torch.equal(weight, before), scaler.get_scale()

    assert train(2.0**20) == (False, 2.0**19)
    assert train(2.0**4) == (True, 2.0**4)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_rotary_saturates(attention, activation):
    """Rotated by 45 degrees, (65504, -65504) exceeds float16's range and saturates, in the cache and in q."""
    q, k, v = step(attention, 1)
    q, k = (torch.full_like(x, 65504).half() for x in (q, k))
    for x in (q, k):
        x[..., 1::2] *= -1
    pair = [x.half() for x in caches(attention)]
    angle = torch.full((64, 16), torch.pi / 4)
    turn = dict(rotary_cos=angle.cos().half().to(q.device), rotary_sin=angle.sin().half().to(q.device))
    lengths = integers(attention, 11, 0, 50)
    out = attention.kvcache(
        q, *pair, k, v.half(), cache_seqlens=lengths, causal=True, activation=activation, **turn
    )
    assert pair[0].isfinite().all() and pair[0].abs().max() == 65504 and out.isfinite().all()
    k[0, 0, 0, 0] = NAN
    out = attention.kvcache(
        q, *pair, k, v.half(), cache_seqlens=lengths, causal=True, activation=activation, **turn
    )
    assert pair[0][0, 11, 0, :2].isnan().all() and out[0, 0, :2].isnan().all()
    assert pair[0].isnan().sum() == 2 and out[1:].isfinite().all() and out[0, 0, 2:].isfinite().all()
