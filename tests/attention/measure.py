"""Make inputs, gradients and tolerances for the checks.

A kernel must be as exact as its dtype allows: its error against the float64 oracle may be at most ``FACTOR``
times the error of the oracle itself run in that dtype. This needs no hand-tuned tolerance per option, and
stays fair where signed scores cancel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oracle import Oracle

FACTOR = 3.0
# Extra tolerance for rounding the largest value, in units of the last place. Wide types are summed in blocks.
LAST_PLACES = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 256, torch.float64: 4096}
NAMES = ("out", "dq", "dk", "dv")


def randn(*shape: int, seed: int, like=None, dtype: torch.dtype | None = None, size: float = 1.0) -> Tensor:
    """Make normal numbers that are the same on every device and, up to rounding, in every dtype."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return numbers.to(
        device=like.device if like else "cpu", dtype=dtype or (like.dtype if like else torch.float64)
    )


def qkv(
    like, batch: int = 2, seqlen_q: int = 7, seqlen_k: int = 9, nheads: int = 2, nheads_k: int | None = None,
    head_dim: int = 8, dtype: torch.dtype | None = None, seed: int = 0, size: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Make random q, k, v in the device and dtype of ``like`` (an implementation)."""
    nheads_k = nheads if nheads_k is None else nheads_k
    shapes = ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k))
    return tuple(
        randn(batch, *s, head_dim, seed=3 * seed + i, like=like, dtype=dtype, size=size)
        for i, s in enumerate(shapes)
    )


def packed(
    attention, lengths_q, lengths_k, nheads: int = 2, nheads_k: int = 2, head_dim: int = 8, **keywords
):
    """Make random q, k, v of packed sequences of these lengths: (total, heads, head_dim)."""
    sizes = ((sum(lengths_q), nheads), (sum(lengths_k), nheads_k), (sum(lengths_k), nheads_k))
    return tuple(randn(*s, head_dim, seed=i, like=attention, **keywords) for i, s in enumerate(sizes))


def single(like) -> torch.dtype:
    """The widest dtype up to float32. With softmax the log-sum-exp is a float32, so no gradient can be more
    exact.
    """
    return torch.float32 if like.dtype == torch.float64 else like.dtype


def integers(like, *values: int) -> Tensor:
    """Lengths, indices and offsets for the kernels: int32 on the device."""
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def slopes(like, *shape: int, size: float = 0.5) -> Tensor:
    """Positive ALiBi slopes for the kernels: float32, different for every head."""
    return torch.linspace(0.2, 1.0, torch.Size(shape).numel()).reshape(shape).mul(size).to(like.device)


def gradients(
    function: Callable[..., Tensor], *tensors: Tensor, dout: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return (out, one gradient per tensor); dout is random unless given."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    if dout is None:
        dout = randn(*out.shape, seed=99).to(out)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def assert_same(name: str, actual: Tensor, expected: Tensor, roundings: int = 2) -> None:
    """Check that two results of one implementation are equal up to a few roundings of the largest value."""
    assert_close(
        name, actual, expected, baseline=expected.double() * (1 + roundings * torch.finfo(actual.dtype).eps)
    )


def on_cpu(value, dtype: torch.dtype | None = None):
    """Copy a tensor to the CPU for the oracle, in ``dtype`` if given. Other values pass unchanged."""
    return value.detach().to("cpu", dtype or value.dtype, copy=True) if isinstance(value, Tensor) else value


def assert_close(
    name: str, actual: Tensor, expected: Tensor, baseline: Tensor | None = None, largest: float = 0.0
) -> None:
    """Check that ``actual`` is as near to ``expected`` (float64) as ``baseline``, the oracle in the dtype of
    ``actual``.

    ``largest``: the size of the summands, where it exceeds the largest expected number.
    """
    assert actual.shape == expected.shape, (
        f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert torch.isfinite(actual).all(), (
        f"{name} has {(~torch.isfinite(actual)).sum()} values that are NaN or Inf"
    )
    if actual.numel() == 0:
        return
    expected = expected.double().cpu()
    error = (actual.double().cpu() - expected).abs().max().item()
    allowed = (
        LAST_PLACES[actual.dtype] * torch.finfo(actual.dtype).eps * max(largest, expected.abs().max().item())
    )
    if baseline is not None:
        allowed += FACTOR * (baseline.double().cpu() - expected).abs().max().item()
    assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g} ({actual.dtype})"


def compare(
    attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None, method: str = "dense", **arguments
) -> None:
    """Compare output and gradients of one method of ``attention`` with the oracle."""
    if dout is None:
        dout = randn(*q.shape, seed=99).to(q)
    actual = gradients(lambda *x: getattr(attention, method)(*x, **arguments), q, k, v, dout=dout)
    compare_results(actual, q, k, v, dout, method, **arguments)


def compare_results(
    actual: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    method: str = "dense",
    **arguments,
) -> None:
    """Compare (out, dq, dk, dv), however they were computed, with the oracle."""
    expected, baseline = (
        reference(q, k, v, dout, dtype, method, **arguments) for dtype in (torch.float64, q.dtype)
    )
    # With softmax dS = P (dP - D) may cancel. The rounding error is then not relative to the small
    # difference.
    largest = (
        max(x.abs().max().item() for x in expected if x.numel())
        if arguments.get("use_softmax") and q.numel()
        else 0.0
    )
    for name, *three in zip(NAMES, actual, expected, baseline):
        assert_close(name, *three, largest)


def reference(q, k, v, dout, dtype: torch.dtype, method: str = "dense", **arguments) -> tuple[Tensor, ...]:
    """Return (out, dq, dk, dv) of the oracle computing in ``dtype``."""
    arguments = {name: on_cpu(value) for name, value in arguments.items()}
    tensors, dout = [on_cpu(x, dtype) for x in (q, k, v)], on_cpu(dout, dtype)
    return gradients(lambda *x: getattr(Oracle(), method)(*x, **arguments), *tensors, dout=dout)


def compare_output(attention, *tensors: Tensor, method: str, **arguments) -> None:
    """Like ``compare``, for methods without a backward. Caches are copied, because both sides append to
    them.
    """

    def run(dtype: torch.dtype) -> Tensor:
        plain = {name: on_cpu(value) for name, value in arguments.items()}
        return getattr(Oracle(), method)(*(on_cpu(x, dtype) for x in tensors), **plain)

    expected, baseline = run(torch.float64), run(tensors[0].dtype)
    assert_close(method, getattr(attention, method)(*tensors, **arguments), expected, baseline)


def poisoned(x: Tensor, index, value: float = float("nan")) -> Tensor:
    """Copy x with ``value`` at ``index``, as in unwritten memory."""
    x = x.detach().clone()
    x[index] = value
    return x


def poison_allocator(device: str) -> None:
    """Free a block of NaN, which shows in the result of a kernel that reads memory it has not written."""
    torch.full((1 << 20,), float("nan"), device=device)
