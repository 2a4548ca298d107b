"""Test the public functions over the Triton kernels, interpreted on the CPU, against float64, which takes the
form in PyTorch. On a GPU the other files do it.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.linear import linear_attention_prefill, linear_attention_step
from torch import Tensor

from measure import NAMES
from package import cumulative

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("short_segments"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run in the other tests"),
]
NHEADS, NHEADS_K, LENGTHS = 4, 2, [150, 0, 1, 90]
SLOPES = torch.tensor([0.0, 0.01, 0.3, 2.0])
OPTIONS = {
    "causal": dict(causal=True, normalization="1/n"),
    "full": dict(normalization=0.1),
    "1/visible": dict(causal=True, normalization="1/visible"),
    "decay": dict(causal=True, decay_slopes=SLOPES),
    "full, decay": dict(decay_slopes=SLOPES),
    "decay, 1/visible": dict(causal=True, decay_slopes=SLOPES, normalization="1/visible"),
}
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """Let 16-bit tensors on the CPU take the kernels. Returns the names of the kernels that ran."""
    from flash_attn.nosoftmax.backends.linear import kernels, primitive

    ran: list[str] = []
    monkeypatch.setattr(primitive, "has_kernels", lambda x: x.dtype in (torch.float16, torch.bfloat16))
    for name in ("_walk", "_token"):
        run = getattr(kernels, name).run

        def noticed(*args, name=name, run=run, **kwargs):
            ran.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(getattr(kernels, name), "run", noticed)
    return ran


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(function, tensors: list, dtype: torch.dtype) -> list:
    """The output and the gradients of (q, k, v, …, dout), whose float32 tensors stay as they are."""
    *inputs, dout = (x.to(dtype) if x.dtype != torch.float32 else x for x in tensors)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def compare(function, tensors: list, dtype: torch.dtype) -> None:
    actual, expected = results(function, tensors, dtype), results(function, tensors, torch.float64)
    for name, a, e in zip([*NAMES, "dstate"], actual, expected):
        error, size = (a.double() - e.double()).abs().max().item(), e.abs().max().item()
        assert error <= torch.finfo(dtype).eps * size, f"{name} is off by {error:.3g} of {size:.3g}"


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_attention(launches, packed, options, dtype):
    shape = (sum(LENGTHS),) if packed else (2, 140)
    tensors = [
        draw(*shape, heads, 16, seed=i, dtype=dtype)
        for i, heads in enumerate((NHEADS, NHEADS_K, NHEADS_K, NHEADS))
    ]
    starts = cumulative(LENGTHS, "cpu")

    def attend(q, k, v):
        more = dict(use_softmax=False, backend="linear", **options)
        if packed:
            return flash_attn_varlen_func(q, k, v, starts, starts, max(LENGTHS), max(LENGTHS), **more)
        return flash_attn_func(q, k, v, **more)

    compare(attend, tensors, dtype)
    assert "_walk" in launches


@dtypes
@pytest.mark.parametrize("decay", [None, SLOPES[:NHEADS_K]], ids=["no decay", "decay"])
def test_pieces_and_steps(launches, decay, dtype):
    """A prefill in two pieces and steps after it, from a state that has a gradient, too."""
    tensors = [
        draw(2, 103, heads, 16, seed=i, dtype=dtype) for i, heads in enumerate((NHEADS, NHEADS_K, NHEADS_K))
    ]
    state, dout = torch.randn(2, NHEADS_K, 16, 16), draw(2, 103, NHEADS, 16, seed=9, dtype=dtype)

    def attend(q, k, v, state):
        outs = []
        for piece in (slice(0, 70), slice(70, 100)):
            out, state = linear_attention_prefill(
                q[:, piece], k[:, piece], v[:, piece], state, 0.1, decay_slopes=decay
            )
            outs.append(out)
        for t in range(100, 103):
            out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, 0.1, decay_slopes=decay)
            outs.append(out[:, None])
        return torch.cat(outs, 1)

    compare(attend, [*tensors, state, dout], dtype)
    assert "_walk" in launches
    with torch.no_grad():  # where a step writes into its state
        out = attend(*(x.clone() for x in (*tensors, state)))
        expected = attend(*(x.double() for x in tensors), state.clone())
    assert (out.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert "_token" in launches
