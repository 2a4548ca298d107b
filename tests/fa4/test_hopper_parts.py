"""Test `diagonal` and float32 results on the Hopper kernels with several tiles a sequence.

tests/attention/test_parts.py runs on them too, with small parts; test_ranges.py and test_tile_loops.py have
the blocks without a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from flash_attn import nosoftmax
from flash_attn.masks import HSTU, Intervals
from flash_attn.nosoftmax import interface
from torch import Tensor

from measure import NAMES, poison_allocator, randn
from package import cumulative, missing

LENGTHS_Q, LENGTHS_K = [700, 0, 130, 257, 64], [281, 50, 0, 600, 700]
# Rows before, among and behind the keys, and far from them.
DIAGONALS = {"among": (-100, 0, 3, 200, 650), "outside": (-650, 7, 2**30, 590, -(2**30))}
WINDOWS = {
    "causal": dict(causal=True),
    "left": dict(window_size=(130, -1)),
    "right": dict(window_size=(-1, 50)),
    "both": dict(window_size=(100, 20)),
    "narrow": dict(causal=True, window_size=(2, 0)),
}
MORE: dict[str, dict[str, Any]] = {
    "identity": dict(),
    "silu, 1/visible": dict(activation="silu", normalization="1/visible"),
    "sigmoid, decay": dict(activation="sigmoid", decay_slopes=torch.tensor([0.01, 0.2, 0.0, 3.0])),
    "relu, deterministic": dict(activation="relu", deterministic=True),
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
more = pytest.mark.parametrize("more", MORE.values(), ids=MORE)


@pytest.fixture(autouse=True)
def memory() -> None:
    """New memory holds NaN, so that what no kernel writes shows."""
    if why := missing("cuda", "fa4"):
        pytest.skip(why)
    poison_allocator("cuda")


def results(tensors: tuple[Tensor, ...], backend: str, dtype: torch.dtype, **options) -> list[Tensor]:
    """Return the output and the gradients of q, k, v and dout, computed in `dtype`."""
    device = "cpu" if backend == "cpu" else "cuda"
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    q, k, v, dout = (x.to(device, dtype) for x in tensors)
    out, _ = nosoftmax.forward(q, k, v, backend=backend, **options)
    return [out, *nosoftmax.backward(dout, q, k, v, backend=backend, **options)]


def check(tensors: tuple[Tensor, ...], dtype: torch.dtype, slack: float = 4.0, **options) -> list[Tensor]:
    """Compare with the CPU in float64. slack: in units of rounding of the largest value."""
    tensors = tuple(x.to(dtype) for x in tensors)
    wide = {"out_dtype": torch.float64} if options.get("out_dtype") else {}
    found = results(tensors, "fa4", dtype, **options)
    expected = results(tensors, "cpu", torch.float64, **{**options, **wide})
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert x.dtype == options.get("out_dtype", dtype), name
        atol = slack * torch.finfo(dtype).eps * max(y.abs().max().item(), 1.0)
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")
    return found


def sample(
    seqlen_q: int, seqlen_k: int, head_dim: int, nheads_k: int = 2, batch: int = 2, head_dim_v: int = 0
) -> tuple:
    """q, k, v and dout."""
    shapes = (seqlen_q, 4), (seqlen_k, nheads_k), (seqlen_k, nheads_k), (seqlen_q, 4)
    sizes = head_dim, head_dim, head_dim_v or head_dim, head_dim_v or head_dim
    return tuple(randn(batch, *x, d, seed=i) for i, (x, d) in enumerate(zip(shapes, sizes)))


def packed_sample(head_dim: int, nheads_k: int = 2) -> tuple[tuple, dict]:
    """q, k, v and dout, with rows of no sequence at both ends, and the lengths."""
    total_q, total_k = sum(LENGTHS_Q) + 7, sum(LENGTHS_K) + 7
    tensors = tuple(x[0] for x in sample(total_q, total_k, head_dim, nheads_k, batch=1))
    lengths = dict(
        cu_seqlens_q=cumulative(LENGTHS_Q, "cpu") + 3, cu_seqlens_k=cumulative(LENGTHS_K, "cpu") + 5,
        max_seqlen_q=max(LENGTHS_Q), max_seqlen_k=max(LENGTHS_K),
    )  # fmt: skip
    return tensors, lengths


@more
@windows
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dense(head_dim, window, more):
    for diagonal in (-300, 0, 190, 450, torch.tensor([40, 3000], dtype=torch.int32)):
        check(sample(500, 440, head_dim), torch.bfloat16, diagonal=diagonal, **window, **more)


@pytest.mark.parametrize("diagonals", DIAGONALS.values(), ids=DIAGONALS)
@more
@windows
def test_packed(window, more, diagonals):
    diagonal = torch.tensor(diagonals, dtype=torch.int32)
    tensors, lengths = packed_sample(64)
    found = check(tensors, torch.float16, diagonal=diagonal, **lengths, **window, **more)
    for x, before in zip(found, (3, 3, 5, 5)):
        assert not x[:before].any() and not x[before - 7 :].any()


@pytest.mark.parametrize("head_dim", [40, 96, 192, 256])
@windows
def test_head_sizes(head_dim, window):
    options: dict[str, Any] = dict(activation="silu", **window)
    check(sample(300, 400, head_dim, nheads_k=4), torch.bfloat16, diagonal=-20, **options)
    check(sample(300, 200, head_dim), torch.bfloat16, diagonal=20, normalization="1/visible", **options)


def test_decay_without_a_mask():
    slopes = torch.tensor([0.01, 0.2, 0.0, 0.002])
    for diagonal in (-300, 0, 700, torch.tensor([40, 3000], dtype=torch.int32)):
        check(sample(300, 400, 64), torch.bfloat16, diagonal=diagonal, decay_slopes=slopes)


@pytest.mark.parametrize("kind", ["HSTU", "intervals"])
def test_rows_of_a_mask(kind):
    """With the position of its first row, a part of the rows is what it is in the whole. Intervals are listed
    by row, and the diagonal is that of their decay."""
    from flash_attn.cute.nosoftmax import hopper

    n, rows = 400, slice(130, 290)
    row = torch.arange(n, device="cuda", dtype=torch.int32)
    starts = torch.stack([torch.zeros_like(row), (row - 60).clamp(min=5)], 1).expand(2, -1, -1)
    ends = torch.stack([torch.full_like(row, 5), (row + 20).clamp(5, n)], 1).expand(2, -1, -1)

    def call(rows: slice):
        options: dict[str, Any] = dict(mask=HSTU(50, 5, max_attn_len=60), activation="silu")
        if kind == "intervals":
            mask = Intervals(starts[:, rows].contiguous(), ends[:, rows].contiguous())
            options = dict(mask=mask, decay_slopes=torch.tensor([0.01, 0.2, 0.0, 0.002], device="cuda"))
        part = q[:, rows].contiguous(), k, v
        call, _ = interface._prepared(*part, {"backend": "fa4", **options})
        diagonal = torch.full((2,), rows.start, dtype=torch.int32, device="cuda")
        return call._replace(diagonal=diagonal)

    q, k, v, dout = (x.to("cuda", torch.bfloat16) for x in sample(n, n, 64))
    whole, part = (call(x) for x in (slice(0, n), rows))
    of_whole = hopper.forward(whole)[:, rows], hopper.backward(whole, dout)[0][:, rows]
    of_part = hopper.forward(part), hopper.backward(part, dout[:, rows].contiguous())[0]
    for x, y in zip(of_part, of_whole):
        assert x.any()
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)


def test_a_diagonal_where_no_position_counts_changes_nothing():
    tensors = tuple(x.to(torch.bfloat16) for x in sample(300, 300, 64))
    given, plain = (results(tensors, "fa4", torch.bfloat16, **x) for x in (dict(diagonal=77), {}))
    assert torch.equal(given[0], plain[0]) and all(torch.equal(x, y) for x, y in zip(given[2:], plain[2:]))


@pytest.mark.parametrize("more", [dict(), dict(decay_slopes=torch.tensor([0.01, 0.2, 0.0, 3.0]))], ids=str)
def test_the_default_named_is_the_default(more):
    """Other kernels give nearly the same."""
    tensors = tuple(x.to(torch.bfloat16) for x in sample(300, 420, 128))
    given, plain = (
        results(tensors, "fa4", torch.bfloat16, causal=True, **more, **x) for x in (dict(diagonal=120), {})
    )
    for x, y in zip(given, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("window", ["causal", "both"])
def test_another_diagonal_needs_no_other_kernel(window):
    """Neither the diagonal nor the size of the window is part of a compile key."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    caches = _flash_attn_fwd.compile_cache, _flash_attn_bwd.compile_cache
    tensors, counts = sample(300, 300, 64), []
    for diagonal, left in pairwise((0, 20, 70, -5)):
        options = WINDOWS[window] if window == "causal" else dict(window_size=(left + 50, 4))
        results(tensors, "fa4", torch.bfloat16, diagonal=diagonal, **options)
        counts.append([len(cache.cache) for cache in caches])
    assert counts[1:] == counts[:-1]


# ---- Float32 results


def exact(tensors: tuple[Tensor, ...], dtype: torch.dtype, **options) -> None:
    """Compare float32 results with the CPU, and rounded with those that the kernels round."""
    options = dict(deterministic=True, **options)
    wide = check(tensors, dtype, out_dtype=torch.float32, **options)
    narrow = results(tuple(x.to(dtype) for x in tensors), "fa4", dtype, **options)
    for name, x, y in zip(NAMES, wide, narrow, strict=True):
        assert torch.equal(x.to(dtype), y), name
        assert (x != y.float()).any(), f"{name} is rounded"


@pytest.mark.parametrize("nheads_k", [4, 2])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 192, 224, 256])
def test_float32_results(head_dim, nheads_k):
    """Of each tile, and with grouped heads, whose sums are float32 in any case."""
    tensors = sample(300, 420, head_dim, nheads_k)
    exact(tensors, torch.bfloat16, activation="silu")
    exact(tensors, torch.bfloat16, causal=True, diagonal=-20, normalization="1/visible")
    exact(tensors, torch.float16, causal=True)


@pytest.mark.parametrize("head_dim, head_dim_v", [(128, 64), (192, 128), (64, 128), (40, 72)])
def test_float32_results_of_two_head_sizes(head_dim, head_dim_v):
    exact(sample(300, 420, head_dim, 4, head_dim_v=head_dim_v), torch.bfloat16, causal=True)


@pytest.mark.parametrize("nheads_k", [4, 2])
@pytest.mark.parametrize("head_dim", [64, 192])
def test_float32_results_of_packed_sequences(head_dim, nheads_k):
    """Rows of no sequence are 0, and a sequence does not write into the next one."""
    tensors, lengths = packed_sample(head_dim, nheads_k)
    diagonal = torch.tensor(DIAGONALS["among"], dtype=torch.int32)
    for options in (dict(activation="relu"), dict(causal=True, diagonal=diagonal)):
        exact(tensors, torch.bfloat16, **lengths, **options)


def test_float32_results_of_pages_and_used_lengths():
    """Forward alone, with grouped heads, which are not packed into a tile then."""
    q, k, v, _ = (x.to("cuda", torch.bfloat16) for x in sample(70, 4 * 64, 64, batch=3))
    used = torch.tensor([200, 0, 130], dtype=torch.int32, device="cuda")
    offsets = 70 * torch.arange(4, dtype=torch.int32, device="cuda")
    of_k = 256 * torch.arange(4, dtype=torch.int32, device="cuda")
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().reshape(3, 4).cuda()
    pages = [torch.full((12, 64, 2, 64), torch.nan, dtype=x.dtype, device="cuda") for x in (k, v)]
    for pool, x in zip(pages, (k, v)):
        pool[table.flatten().long()] = x.reshape(12, 64, 2, 64)
    lengths = dict(cu_seqlens_q=offsets, cu_seqlens_k=of_k, seqused_k=used, max_seqlen_q=70, max_seqlen_k=256)
    diagonal = torch.tensor([150, 3, 90], dtype=torch.int32, device="cuda")
    for more in (dict(), dict(causal=True, diagonal=diagonal, normalization="1/visible")):
        for (keys, values), pages_of in ((pages, table), ((k.flatten(0, 1), v.flatten(0, 1)), None)):
            given = q.flatten(0, 1), keys, values
            options = dict(
                activation="silu", out_dtype=torch.float32, block_table=pages_of, **lengths, **more
            )
            out, _ = nosoftmax.forward(*given, backend="fa4", **options)
            on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
            on_cpu["out_dtype"] = torch.float64
            expected, _ = nosoftmax.forward(*(x.cpu().double() for x in given), backend="cpu", **on_cpu)
            assert out.dtype == torch.float32
            atol = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()  # the weights are rounded
            torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=atol)


def test_nothing_to_do_gives_float32_zeros():
    tensors = tuple(x.to("cuda", torch.float16) for x in sample(5, 0, 64))
    for x in results(tensors, "fa4", torch.float16, out_dtype=torch.float32):
        assert x.dtype == torch.float32 and not x.any()
