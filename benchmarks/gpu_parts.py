"""Measure the parts of gpu_vs_softmax.py. Each function yields the rows of a part, as gpu_record.py describes
them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import gpu_cases
from gpu_cases import FEATURES, PLAIN, Feature, Side
from gpu_device import Gpu
from gpu_record import (
    BACKWARD,
    DECODE,
    FORWARD,
    NO_SOFTMAX,
    NO_SOFTMAX_KERNEL,
    SOFTMAX,
    Case,
    attention_flops,
    kv_bytes,
    ratio,
    tera_per_second,
)

HEAD_DIMS = (64, 128)  # of all parts but dense
DECODE_HEADS = (32, 4)  # of queries, of keys
SHORTEST = 2048  # N of the activations part
PAGED_CONTEXT, PAGED_HEADS = (
    8192,
    (32, 8),
)  # of its decode steps: the longest context; heads of queries and keys
NOT_BUILT = ("has no kernels ", "This flash attention build ")

Row = dict[str, object]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """Return the first line of an error that says that the wheel lacks these kernels; raise any other error
    again.
    """
    words = str(error).partition("\n")[0]
    if not any(phrase in words for phrase in NOT_BUILT):
        raise error
    return words


def _row(case: Case, ms: dict[str, float], skipped: dict[str, str], finite: bool = True) -> Row:
    row = {**asdict(case), "ms": ms, "skipped": skipped, "finite": finite, "ratio": ratio(ms)}
    said = [f"{name} {value:.3f} ms" for name, value in ms.items()]
    said += [f"ratio {row['ratio']:.2f}"] if row["ratio"] else []
    said += [f"{name} skipped: {why}" for name, why in skipped.items()] + ([] if finite else ["NaN or Inf"])
    _progress(f"{case}: {', '.join(said)}")
    return row


def _compare(case: Case, sides: dict[str, Side], gpu: Gpu, calls: int = 1) -> Row:
    """Time the sides of one case in turn. ``calls``: how many calls of the package one run of a side
    makes.
    """
    prepared, skipped, finite = {}, {}, True
    for name, side in sides.items():
        try:
            results, prepared[name] = side()
        except (NotImplementedError, RuntimeError) as error:
            skipped[name] = _reason(error)
        else:
            finite &= all(bool(x.isfinite().all()) for x in results)
    times = gpu.medians(list(prepared.values())) if prepared else []
    return _row(case, {name: ms / calls for name, ms in zip(prepared, times)}, skipped, finite)


def _attention(
    args: argparse.Namespace,
    gpu: Gpu,
    features: Sequence[Feature],
    head_dims: Sequence[int],
    seqlens: Sequence[int],
) -> Iterator[tuple[Case, Row]]:
    shapes = [
        (head_dim, feature, seqlen) for head_dim in head_dims for feature in features for seqlen in seqlens
    ]
    for head_dim, feature, seqlen in shapes:
        nheads = args.hidden // head_dim
        shape = (
            args.tokens // seqlen,
            seqlen,
            nheads,
            max(1, nheads // feature.heads_per_key_head),
            head_dim,
        )
        for causal in feature.masks:
            for direction in (FORWARD, BACKWARD):
                case = Case(feature.name, direction, *shape, causal)
                row = _compare(case, gpu_cases.attention(feature, case, args.dtype, gpu.device), gpu)
                yield case, row if direction == FORWARD else {**row, "backward_by": feature.backward_by}


def _narrow(args: argparse.Namespace) -> list[int]:
    return [head_dim for head_dim in args.head_dims if head_dim in HEAD_DIMS]


def dense(args: argparse.Namespace, gpu: Gpu, yardsticks: dict[str, float]) -> Iterator[Row]:
    """Measure plain attention: every head size, length and mask, forward and backward, with TFLOP/s."""
    for case, row in _attention(args, gpu, [PLAIN], args.head_dims, args.seqlens):
        flops = attention_flops(case)
        yield {**row, "tflops": {name: tera_per_second(flops, ms) for name, ms in row["ms"].items()}}


def activations(args: argparse.Namespace, gpu: Gpu, yardsticks: dict[str, float]) -> Iterator[Row]:
    """Measure each activation as `dense` does, from N = 2k on, and decode steps with it over a cache in
    pages, for the largest batch.
    """
    seqlens = [seqlen for seqlen in args.seqlens if seqlen >= SHORTEST]
    for case, row in _attention(args, gpu, gpu_cases.ACTIVATIONS, args.head_dims, seqlens):
        flops = attention_flops(case)
        yield {**row, "tflops": {name: tera_per_second(flops, ms) for name, ms in row["ms"].items()}}
    context = max((c for c in args.contexts if c <= PAGED_CONTEXT and c % 256 == 0), default=None)
    if context is None:
        return
    for head_dim, feature in itertools.product(_narrow(args), gpu_cases.ACTIVATIONS):
        case = Case(feature.name, DECODE, max(args.batches), context, *PAGED_HEADS, head_dim)
        sides, calls = gpu_cases.decode(case, args.dtype, gpu, feature.score, page=256)
        yield _with_bandwidth(_compare(case, sides, gpu, calls), case, args, yardsticks)


def _with_bandwidth(row: Row, case: Case, args: argparse.Namespace, yardsticks: dict[str, float]) -> Row:
    """Add the share of the copy bandwidth that reading K and V reaches."""
    size = kv_bytes(case, args.dtype.itemsize)
    shares = {name: tera_per_second(size, ms) / yardsticks["copy_tb_per_s"] for name, ms in row["ms"].items()}
    return {**row, "bandwidth": shares}


def features(args: argparse.Namespace, gpu: Gpu, yardsticks: dict[str, float]) -> Iterator[Row]:
    """Measure the options beside the plain form, with half of the tokens in the longest sequence."""
    for _, row in _attention(args, gpu, FEATURES, _narrow(args), [args.tokens // 2]):
        yield row


def decode(args: argparse.Namespace, gpu: Gpu, yardsticks: dict[str, float]) -> Iterator[Row]:
    """Measure one new token for each sequence against its KV cache, and the share of the memory bandwidth
    that reading K and V reaches.
    """
    shapes = [
        (head_dim, batch, context)
        for head_dim in _narrow(args)
        for batch in args.batches
        for context in args.contexts
    ]
    for head_dim, batch, context in shapes:
        case = Case("kvcache", DECODE, batch, context, *DECODE_HEADS, head_dim)
        size = kv_bytes(case, args.dtype.itemsize)
        if size > args.memory_limit * 1e9:
            why = f"K and V take {size / 1e9:.1f} GB, more than --memory-limit {args.memory_limit:g}"
            row = _row(case, {}, {SOFTMAX: why, NO_SOFTMAX: why})
        else:
            sides, calls = gpu_cases.decode(case, args.dtype, gpu)
            row = _compare(case, sides, gpu, calls)
        yield _with_bandwidth(row, case, args, yardsticks)


def memory(args: argparse.Namespace, gpu: Gpu, yardsticks: dict[str, float]) -> Iterator[Row]:
    """Measure the memory of a causal forward and backward of all tokens as one sequence
    (gpu_cases.training_step_memory).
    """
    for head_dim in _narrow(args):
        nheads = args.hidden // head_dim
        case = Case(
            "training step", "forward+backward", 1, args.tokens, nheads, nheads, head_dim, causal=True
        )
        for name in (SOFTMAX, NO_SOFTMAX, NO_SOFTMAX_KERNEL):
            row = {**asdict(case), "side": name, "skipped": ""}
            try:
                row |= gpu_cases.training_step_memory(case, name, args.dtype, gpu)
                found = (
                    f"{row['kept_bytes']} bytes kept, {row['peak_bytes']} at the peak beside "
                    f"{row['gradient_bytes']} of gradients"
                )
            except (NotImplementedError, RuntimeError) as error:
                row["skipped"] = _reason(error)
                found = f"skipped: {row['skipped']}"
            _progress(f"{case}: {name} {found}")
            yield row
