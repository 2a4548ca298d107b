"""Checks of the arguments, before any work: what was wrong, with the values, and what to do."""

import math
from typing import Optional, Sequence

import torch

from ..score_function import resolve
from .options import Options
from .visibility import Window

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def options(
    q: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    dropout_p: float,
    has_alibi: bool,
    use_softmax: bool,
    activation: str,
    sigmoid_bias: Optional[float],
    normalization: Optional[str],
) -> Options:
    """The options of a call, checked alone and against each other."""
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale={softmax_scale}: give a finite number, or None for 1/sqrt(head_dim)")
    if not softcap >= 0.0 or not math.isfinite(softcap):
        raise ValueError(f"softcap={softcap}: give a positive number, or 0 for none")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: give a probability in [0, 1)")
    if softcap > 0.0 and dropout_p > 0.0:
        raise ValueError(f"softcap={softcap} with dropout_p={dropout_p} is not supported: leave one of them out")
    if softcap > 0.0 and softmax_scale <= 0.0:
        raise ValueError(f"softmax_scale={softmax_scale} with softcap={softcap}: softcap needs a positive scale")
    if has_alibi and softmax_scale == 0.0:
        raise ValueError("softmax_scale=0 with alibi_slopes: give another softmax_scale, or leave the slopes out")
    resolve(use_softmax, activation, "-log n" if sigmoid_bias is None else sigmoid_bias, normalization)
    window = Window.resolve(causal, window_size_left, window_size_right, max_seqlen_k)
    return Options(
        q.dtype, softmax_scale, window, softcap, dropout_p, use_softmax, activation, sigmoid_bias, normalization
    )


def same_kind(q: torch.Tensor, **others: Optional[torch.Tensor]) -> None:
    """q and the others are CPU tensors of one supported dtype."""
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}: the CPU backend takes float16, bfloat16, float32 and float64")
    on_cpu(q=q, **others)
    for name, x in others.items():
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert one of them")


def on_cpu(**tensors: Optional[torch.Tensor]) -> None:
    for name, x in tensors.items():
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"{name} is on {x.device}: the CPU backend needs all tensors on the CPU")


def shape(name: str, x: Optional[torch.Tensor], *expected: int, axes: str) -> None:
    """x, if it is given, has the expected shape; `axes` names its axes for the message."""
    if x is not None and tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected} = ({axes})")


def rank(name: str, x: torch.Tensor, axes: str) -> None:
    expected = axes.count(",") + 1
    if x.dim() != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected} axes: ({axes})")


def heads(nheads: int, nheads_k: int, head_dim: int) -> None:
    if nheads_k < 1 or nheads < 1 or nheads % nheads_k != 0:
        raise ValueError(f"{nheads} heads in q, {nheads_k} in k and v: the latter must divide the former")
    if head_dim < 1:
        raise ValueError("head_dim=0: q, k and v need at least one channel")


def alibi_slopes(slopes: Optional[torch.Tensor], batch: int, nheads: int) -> None:
    if slopes is None:
        return
    on_cpu(alibi_slopes=slopes)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes has dtype {slopes.dtype}, expected torch.float32")
    if tuple(slopes.shape) not in ((nheads,), (batch, nheads)):
        raise ValueError(f"alibi_slopes has shape {tuple(slopes.shape)}, expected ({nheads},) or ({batch}, {nheads})")


def int32(name: str, x: Optional[torch.Tensor], *expected: int, axes: str) -> None:
    """x, if it is given, is an int32 CPU tensor of the expected shape."""
    if x is None:
        return
    on_cpu(**{name: x})
    if x.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {x.dtype}, expected torch.int32")
    shape(name, x, *expected, axes=axes)


def like(x: torch.Tensor, axes: str, **others: Optional[torch.Tensor]) -> None:
    """The others, where given, have the shape of x."""
    for name, other in others.items():
        shape(name, other, *x.shape, axes=axes)


def cu_seqlens(name: str, offsets: Sequence[int], total: Optional[int], max_seqlen: Optional[int] = None) -> None:
    """Offsets start at 0 or later, do not descend, end within `total` rows, and no sequence exceeds max_seqlen."""
    if offsets[0] < 0:
        raise ValueError(f"{name}[0]={offsets[0]}: offsets start at 0")
    for i, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        if stop < start:
            raise ValueError(f"{name} descends from {start} to {stop} at entry {i + 1}: give cumulative lengths")
        if max_seqlen is not None and stop - start > max_seqlen:
            raise ValueError(f"{name}: sequence {i} has length {stop - start}, more than max_seqlen={max_seqlen}")
    if total is not None and offsets[-1] > total:
        raise ValueError(f"{name} ends at {offsets[-1]}, but the tensor has only {total} rows")


def seqused_k(seqused: Optional[torch.Tensor], lengths: list[int], paged: bool) -> list[int]:
    """The number of keys used of each sequence; pages may hold more than cu_seqlens_k says, packed keys may not."""
    if seqused is None:
        return lengths
    used = seqused.tolist()
    for i, (count, length) in enumerate(zip(used, lengths)):
        if count < 0 or (count > length and not paged):
            raise ValueError(f"seqused_k[{i}]={count}, but sequence {i} has {length} keys in cu_seqlens_k")
    return used


def leftpad_k(leftpad: Optional[torch.Tensor], used: list[int], paged: bool) -> list[int]:
    """The number of leading keys that each sequence leaves out, at most as many as it has."""
    if leftpad is None:
        return [0] * len(used)
    if paged:
        raise ValueError("leftpad_k with block_table: paged keys cannot be left-padded, pass one of them")
    skipped = leftpad.tolist()
    for i, (count, length) in enumerate(zip(skipped, used)):
        if not 0 <= count <= length:
            raise ValueError(f"leftpad_k[{i}]={count}, but sequence {i} has {length} keys")
    return skipped


def max_seqlen_k(max_seqlen: int, seqlens: list[int]) -> None:
    for i, length in enumerate(seqlens):
        if length > max_seqlen:
            raise ValueError(f"max_seqlen_k={max_seqlen}, but sequence {i} has {length} keys")


def cache_lengths(filled: list[int], seqlen_new: int, capacity: int) -> None:
    """What is filled and what is appended fits into the cache."""
    for i, length in enumerate(filled):
        if length < 0 or length + seqlen_new > capacity:
            appended = f" and {seqlen_new} to append" if seqlen_new else ""
            raise ValueError(f"cache_seqlens[{i}]={length}{appended}, but the cache holds {capacity} keys")


def cache_entries(
    cache_batch_idx: Optional[torch.Tensor], batch: int, batch_cache: int, paged: bool, appending: bool
) -> list[int]:
    """The cache row of each sequence."""
    if cache_batch_idx is None:
        if not paged and batch > batch_cache:
            raise ValueError(f"{batch} sequences in q, but only {batch_cache} in the cache")
        return list(range(batch))
    if paged:
        raise ValueError("cache_batch_idx with block_table: the table already says where each sequence is, pass one")
    entries = cache_batch_idx.tolist()
    for i, entry in enumerate(entries):
        if not 0 <= entry < batch_cache:
            raise ValueError(f"cache_batch_idx[{i}]={entry}, but the cache has {batch_cache} rows")
    if appending and len(set(entries)) < len(entries):
        raise ValueError(f"cache_batch_idx={entries}: two sequences cannot append to the same cache row")
    return entries


def pages_written_once(block_table: torch.Tensor, filled: list[int], seqlen_new: int, page_size: int) -> None:
    """No page is appended to by two sequences (they may share pages that are only read)."""
    if seqlen_new == 0:
        return
    writer: dict[int, int] = {}
    for i, length in enumerate(filled):
        for page in block_table[i, length // page_size : (length + seqlen_new - 1) // page_size + 1].tolist():
            if writer.setdefault(page, i) != i:
                raise ValueError(f"block_table: sequences {writer[page]} and {i} both append to page {page}")


def rotary(
    cos: Optional[torch.Tensor],
    sin: Optional[torch.Tensor],
    head_dim: int,
    appending: bool,
    capacity: int,
    filled: list[int],
    seqlen_q: int,
) -> None:
    """The tables fit each other and head_dim, and reach as far as the cache and as the last query."""
    if (cos is None) != (sin is None):
        raise ValueError("only one of rotary_cos and rotary_sin is given: pass both or neither")
    if cos is None:
        return
    if not appending:
        raise ValueError("rotary_cos and rotary_sin without new k and v: pass the keys and values to append as well")
    rank("rotary_cos", cos, "seqlen_ro, rotary_dim / 2")
    like(cos, "seqlen_ro, rotary_dim / 2", rotary_sin=sin)
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"rotary_dim={2 * cos.shape[1]} (twice the columns of rotary_cos) exceeds head_dim={head_dim}")
    needed = max([capacity, *(length + seqlen_q for length in filled)])
    if cos.shape[0] < needed:
        raise ValueError(f"rotary_cos has {cos.shape[0]} rows, but positions up to {needed - 1} may be used")


def seed(rng_state: Optional[torch.Tensor], dropout_p: float) -> int:
    """The dropout seed in the rng_state that the forward pass returned; without dropout there may be none."""
    if dropout_p == 0.0:
        return 0
    if rng_state is None:
        raise ValueError(f"dropout_p={dropout_p} without rng_state: pass the rng_state that the forward pass returned")
    on_cpu(rng_state=rng_state)
    if rng_state.dtype != torch.int64:
        raise TypeError(f"rng_state has dtype {rng_state.dtype}, expected torch.int64")
    shape("rng_state", rng_state, 2, axes="seed, offset")
    return int(rng_state[0])


def pages(block_table: torch.Tensor, used: Sequence[int], page_size: int, num_pages: int) -> None:
    """The pages that the used lengths need are in the table and in the cache; entries beyond them are not looked at."""
    for i, length in enumerate(used):
        needed = -(-length // page_size)
        if needed > block_table.shape[1]:
            raise ValueError(
                f"sequence {i} has {length} keys, but its {block_table.shape[1]} pages hold only "
                f"{block_table.shape[1] * page_size}: widen block_table"
            )
        entries = block_table[i, :needed].tolist()
        bad = [page for page in entries if not 0 <= page < num_pages]
        if bad:
            raise ValueError(f"block_table[{i}] names page {bad[0]}, but there are only {num_pages} pages")
