"""Take a mask of flash_attn.masks into a call, and check it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch

from ..masks import HSTU, Intervals
from . import checks
from .call import Call, Options

_MOST_INTERVALS = 3
_COUNTS = ("num_targets", "num_contexts")
_NUMBERS = ("max_attn_len", "min_full_attn_seq_len", "target_group_size")


class Given(NamedTuple):
    """The tensors of a mask, as the fields of Call that hold them."""

    target_counts: Optional[torch.Tensor] = None
    context_counts: Optional[torch.Tensor] = None
    interval_starts: Optional[torch.Tensor] = None
    interval_ends: Optional[torch.Tensor] = None


ABSENT = Given()


def names_of(mask: Any) -> tuple:
    """The names of the parts of a mask, an argument that may be anything."""
    return mask._fields if isinstance(mask, (HSTU, Intervals)) else ()


def parts_of(mask: Any) -> tuple:
    """The parts of a mask; of anything else itself, or nothing if it is None."""
    if mask is None:
        return ()
    return tuple(mask) if isinstance(mask, (HSTU, Intervals)) else (mask,)


def taken(mask: Any, options: Options, arguments: dict, decay_slopes: Any) -> tuple[Given, Options]:
    """Return the tensors of a mask, and the options with its numbers. arguments: those of the call.

    A mask that hides no more than causal or window_size do becomes these.
    """
    if mask is None:
        return ABSENT, options
    if not isinstance(mask, (HSTU, Intervals)):
        raise TypeError(f"mask={mask!r}: give a flash_attn.masks.HSTU or flash_attn.masks.Intervals")
    if "k_cache" in arguments:
        raise ValueError(
            "mask with flash_attn_with_kvcache: it takes none; append to the pages yourself, and give mask "
            "and block_table to flash_attn_varlen_func"
        )
    _refuse_beside(mask, options, arguments["alibi_slopes"], decay_slopes)
    return _intervals(mask, options) if isinstance(mask, Intervals) else _hstu(mask, options)


def _refuse_beside(mask: Any, options: Options, alibi_slopes: Any, decay_slopes: Any) -> None:
    if (options.window_left, options.window_right) != (-1, -1):
        raise ValueError(
            f"mask={type(mask).__name__} with "
            + (
                "causal=True"
                if options.causal
                else f"window_size={options.window_left, options.window_right}"
            )
            + ": the mask says which keys a query sees, leave out causal and window_size"
        )
    if not isinstance(mask, HSTU):
        return
    for name, x in (("alibi_slopes", alibi_slopes), ("decay_slopes", decay_slopes)):
        if x is not None:
            raise ValueError(
                f"{name} with mask=HSTU: contextual keys and candidates have no distance in positions; give "
                f"Intervals if distances by index are meant, or leave {name} out"
            )


def _intervals(mask: Intervals, options: Options) -> tuple[Given, Options]:
    starts, ends = (_int32(name, x) for name, x in zip(mask._fields, mask))
    return Given(interval_starts=starts, interval_ends=ends), options._replace(mask="intervals")


def _hstu(mask: HSTU, options: Options) -> tuple[Given, Options]:
    numbers = {name: checks.integer(name, getattr(mask, name)) for name in _NUMBERS}
    counts: dict = {}
    for name in _COUNTS:
        x = getattr(mask, name)
        if isinstance(x, torch.Tensor):
            counts[name], numbers[name] = _int32(name, x), 0
        else:
            numbers[name] = checks.integer(name, x)
    for name, x in numbers.items():
        if x < (least := 1 if name == "target_group_size" else 0):
            raise ValueError(f"{name}={x}: give a number of keys, at least {least}")
    if not counts and numbers["num_targets"] == numbers["num_contexts"] == 0:
        window, whole = numbers["max_attn_len"], numbers["min_full_attn_seq_len"]
        if window == 0 or whole == 0:
            return ABSENT, options._replace(window_left=window or -1, window_right=0)
    given = Given(counts.get("num_targets"), counts.get("num_contexts"))
    return given, options._replace(mask="hstu", **numbers)


def _int32(name: str, x: Any) -> torch.Tensor:
    """Convert int64 to int32. Leave other dtypes for `check` to report."""
    checks.is_tensor(name, x)
    x = x.to(torch.int32) if x.dtype == torch.int64 else x
    return x if x.is_contiguous() else x.contiguous()


def check(call: Call) -> None:
    """Check shapes, dtypes and devices of the tensors of a mask, and numbers against the longest sequence."""
    o = call.options
    if o.mask is None:
        return
    given = _tensors(call)
    checks.one_device(q=call.q, **given)
    if o.mask == "intervals":
        _check_intervals(call, **given)
        return
    for name, x in given.items():
        checks.integers(name, x, call.batch, axes="batch")
    counted = o.num_targets + o.num_contexts
    # While compiling, the longest length may be unknown.
    if not torch.compiler.is_compiling() and counted > o.max_seqlen_k > 0:
        raise ValueError(
            f"num_targets={o.num_targets} and num_contexts={o.num_contexts}, but the longest sequence has "
            f"{o.max_seqlen_k} keys: give at most as many"
        )


def _tensors(call: Call) -> dict:
    """Return the tensors of the mask by the names of its parts."""
    if call.options.mask == "intervals":
        return {"starts": call.interval_starts, "ends": call.interval_ends}
    return {"num_targets": call.target_counts, "num_contexts": call.context_counts}


def _check_intervals(call: Call, starts: torch.Tensor, ends: torch.Tensor) -> None:
    rows, axes = call.q.shape[:-2], "total_q, k" if call.varlen else "batch, seqlen_q, k"
    checks.rank("starts", starts, axes)
    if not 1 <= starts.shape[-1] <= _MOST_INTERVALS:
        raise ValueError(
            f"starts has shape {tuple(starts.shape)}: a row has 1 to {_MOST_INTERVALS} intervals (k)"
        )
    for name, x in (("starts", starts), ("ends", ends)):
        checks.integers(name, x, *rows, starts.shape[-1], axes=axes)


# ---- Contents of tensors on the CPU ----


def values(call: Call) -> None:
    """Check counts and intervals on the CPU against the lengths, after checks.values has checked these."""
    o = call.options
    if o.mask is None:
        return
    lengths = _lengths(call)
    if o.mask == "intervals":
        _interval_values(call, lengths)
        return
    counts(call, lengths)
    if call.diagonal is not None:
        _positions(call, lengths)


def counts(call: Call, lengths: Sequence[int]) -> None:
    """Check the counts of an HSTU mask. lengths: the number of keys of each sequence."""
    o = call.options
    of_each = [
        [count if length else 0 for length in lengths] if given is None else given.tolist()
        for given, count in ((call.target_counts, o.num_targets), (call.context_counts, o.num_contexts))
    ]
    for i, (targets, contexts, length) in enumerate(zip(*of_each, lengths)):
        for name, count in (("num_targets", targets), ("num_contexts", contexts)):
            if count < 0:
                raise ValueError(f"{name}[{i}]={count}: give a number of keys, at least 0")
        if targets + contexts > length:
            raise ValueError(
                f"num_targets[{i}]={targets} and num_contexts[{i}]={contexts}, but sequence {i} has {length} "
                "keys: give at most as many"
            )


def _positions(call: Call, lengths: Sequence[int]) -> None:
    """Check that no query lies behind the keys of its sequence."""
    rows = call.cu_seqlens_q.diff().tolist() if call.varlen else [call.q.shape[1]] * call.batch
    for i, (first, count, length) in enumerate(zip(call.diagonal.tolist(), rows, lengths)):
        if count and first + count > length:
            raise ValueError(
                f"diagonal[{i}]={first}: query {count - 1} of sequence {i} would have position "
                f"{first + count - 1}, but HSTU is a mask of its {length} keys: give all keys of the sequence"
            )


def _lengths(call: Call) -> list[int]:
    """Return the number of keys of each sequence, without padding."""
    if not call.varlen:
        return [call.k.shape[1]] * call.batch
    used = call.cu_seqlens_k.diff() if call.seqused_k is None else call.seqused_k
    return (used if call.leftpad_k is None else used - call.leftpad_k).tolist()


def _interval_values(call: Call, lengths: list[int]) -> None:
    starts, ends = call.interval_starts, call.interval_ends
    keys = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    if not call.varlen:
        intervals(starts, ends, keys[:, None])
        return
    # Rows outside of all sequences may hold anything.
    first, last = call.cu_seqlens_q[0].item(), call.cu_seqlens_q[-1].item()
    intervals(starts[first:last], ends[first:last], keys.repeat_interleave(call.cu_seqlens_q.diff()), first)


def intervals(starts: torch.Tensor, ends: torch.Tensor, keys: torch.Tensor, first: int = 0) -> None:
    """Check intervals (..., k). keys: the number of keys of each row's sequence, broadcastable to (...,).
    first: the number of the first row, for the message.
    """
    used = starts < ends
    before = torch.where(used, ends, 0).cummax(-1).values
    before = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], dim=-1)
    for wrong, why in (
        (starts > ends, "the interval descends: give start <= end"),
        (used & (starts < 0), "columns count from 0"),
        (used & (ends > keys[..., None]), "its sequence has fewer keys: give at most their number"),
        (used & (starts < before), "it begins before an earlier interval of the row ends: give them apart"),
    ):
        if wrong.any():
            *row, slot = at = wrong.nonzero()[0].tolist()
            row = [row[0] + first, *row[1:]]
            raise ValueError(
                f"starts{[*row, slot]}={starts[tuple(at)].item()}, ends{[*row, slot]}="
                f"{ends[tuple(at)].item()}: {why}"
            )
