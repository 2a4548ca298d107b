"""Call every family of kernels without softmax (FA2, linear time, FA4) on shapes so small that
compute-sanitizer can watch each access.

    compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py --head-dims 64 --dtypes bf16

Results are compared with the CPU backend in float64, so that a run under a sanitizer also shows that the
kernels ran. `make sanitize` runs this script under all four tools.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from flash_attn import explain, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, nosoftmax
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
TOLERANCE = 2e-2  # relative to the largest value; bf16 rounds weights and results
BACKWARD_ENV = "FLASH_ATTENTION_NOSOFTMAX_BACKWARD"
# Slightly more than one tile, with uneven ends; a key head serves two query heads.
SEQLEN_Q, SEQLEN_K, NHEADS, NHEADS_K = 136, 150, 2, 1
EVEN = 128
# Two segments of nosoftmax/backends/linear/kernels.py, the second one short.
SEGMENTS = (600, 700)


@dataclass(frozen=True)
class Place:
    """Where a case runs: inputs are rounded to ``rounded``; ``backend`` computes with them in ``dtype`` on
    ``device``.
    """

    device: str
    backend: str
    dtype: torch.dtype
    rounded: torch.dtype

    @property
    def options(self) -> dict[str, object]:
        """Options of a call: no softmax, and on a GPU the backend."""
        return {"use_softmax": False, "backend": self.backend if self.device == "cuda" else "auto"}

    def numbers(self, x: Tensor) -> Tensor:
        return x.to(self.rounded).to(self.device, self.dtype)

    def int32(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def randn(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [self.numbers(torch.randn(shape, generator=generator)) for shape in shapes]


Case = Callable[[Place, int], list[Tensor]]
ACTIVATIONS = ("relu", "relu2", "sigmoid", "silu", "gelu", "softplus")


def add_slopes(options: dict, place: Place) -> None:
    """Replace alibi=True and decay=True by slopes of the query heads."""
    for name in ("alibi", "decay"):
        if options.pop(name, False):
            options[f"{name}_slopes"] = torch.linspace(0.05, 0.1, NHEADS, device=place.device)


def with_gradients(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in tensors]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def dense(
    place: Place, head_dim: int, seqlens=(SEQLEN_Q, SEQLEN_K), uneven=False, factors=False, **options
) -> list[Tensor]:
    d = head_dim - 8 if uneven else head_dim
    tensors = place.randn((1, seqlens[0], NHEADS, d), *[(1, seqlens[1], NHEADS_K, d)] * 2)
    add_slopes(options, place)
    if factors:
        options["normalization"] = torch.linspace(0.0, 2.0, seqlens[0], device=place.device)[None]
    return with_gradients(partial(flash_attn_func, **{**place.options, **options}), tensors)


def part(place: Place, head_dim: int, seqlens=(SEQLEN_Q, SEQLEN_K), **options) -> list[Tensor]:
    """A part of a sequence: float32 results, and a diagonal where it is given."""
    q, k, v, dout = place.randn(
        (1, seqlens[0], NHEADS, head_dim), *[(1, seqlens[1], NHEADS_K, head_dim)] * 2,
        (1, seqlens[0], NHEADS, head_dim),
    )  # fmt: skip
    add_slopes(options, place)
    options |= {name: x for name, x in place.options.items() if name != "use_softmax"}
    options["out_dtype"] = torch.float64 if place.dtype == torch.float64 else torch.float32
    out, _ = nosoftmax.forward(q, k, v, **options)
    return [out, *nosoftmax.backward(dout, q, k, v, **options)]


def varlen(place: Place, head_dim: int, longest: tuple[int, int] = (70, 70), **options) -> list[Tensor]:
    """Call with packed sequences, one of them without queries and one without keys."""
    lengths_q, lengths_k = [longest[0], 0, 5, longest[0] - 5], [longest[1] - 5, 15, 0, longest[1]]
    starts_q, starts_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    cu_q, cu_k = place.int32(starts_q), place.int32(starts_k)
    tensors = place.randn((starts_q[-1], NHEADS, head_dim), *[(starts_k[-1], NHEADS_K, head_dim)] * 2)
    add_slopes(options, place)
    return with_gradients(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **{**place.options, **options}),
        tensors,
    )


def kvcache(place: Place, head_dim: int, new: bool, paged: bool, **options) -> list[Tensor]:
    """Decode with a cache of 512 slots, whose unused slots hold NaN; also returns the cache if the call
    appends to it.
    """
    slots, page = 512, 256
    q, k, v, *fresh = place.randn(
        (2, 3, NHEADS, head_dim), *[(2, slots, NHEADS_K, head_dim)] * 2, *[(2, 3, NHEADS_K, head_dim)] * 2
    )
    lengths = place.int32([300, 17])
    for cache in (k, v):
        for batch, length in enumerate(lengths.tolist()):
            cache[batch, length:] = float("nan")
    if paged:
        k, v = (x.reshape(2 * slots // page, page, NHEADS_K, head_dim) for x in (k, v))
        options["block_table"] = place.int32([[0, 1], [2, 3]])
    else:
        options["cache_leftpad"] = place.int32([5, 0])
    if new:
        angles = torch.arange(slots)[:, None] / 10000 ** (torch.arange(8) / 8)
        options["rotary_cos"], options["rotary_sin"] = (
            place.numbers(x) for x in (angles.cos(), angles.sin())
        )
        options["k"], options["v"] = fresh
    add_slopes(options, place)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **place.options, **options)
    return [out, k.nan_to_num(), v.nan_to_num()] if new else [out]


def pages(place: Place, head_dim: int, **options) -> list[Tensor]:
    """Call with packed queries, and keys in pages, whose unused slots hold NaN. There is no backward."""
    q, k, v = place.randn((8, NHEADS, head_dim), *[(4, 256, NHEADS_K, head_dim)] * 2)
    for cache in (k, v):
        for page, used in ((0, 44), (2, 0), (3, 17)):
            cache[page, used:] = float("nan")
    table, starts_q, starts_k = (
        place.int32([[1, 0], [3, 2]]),
        place.int32([0, 3, 8]),
        place.int32([0, 300, 317]),
    )
    with torch.no_grad():
        return [
            flash_attn_varlen_func(
                q, k, v, starts_q, starts_k, 5, 300, block_table=table, **{**place.options, **options}
            )
        ]


def part_cases(seqlens: tuple[int, int], *activations: str) -> Iterator[tuple[str, Case]]:
    """Of as many queries as keys, and of queries that lie elsewhere, with and without a decay."""
    for activation in activations:
        for decay in (False, True):
            name, score = f"{activation}{', decay' * decay}", {"activation": activation, "decay": decay}
            square = (seqlens[0], seqlens[0])
            yield f"part, square, causal, {name}", partial(part, seqlens=square, causal=True, **score)
            yield f"part, {name}", partial(part, seqlens=seqlens, **score)
            yield f"part, diagonal, {name}", partial(part, seqlens=seqlens, causal=True, diagonal=60, **score)


def fa2_cases() -> Iterator[tuple[str, Case]]:
    yield "even tiles", partial(dense, seqlens=(EVEN, 2 * EVEN))
    yield "even tiles, causal", partial(dense, seqlens=(EVEN, 2 * EVEN), causal=True)
    yield "even tiles, small batch that splits", partial(dense, seqlens=(EVEN, 1024))
    yield "dense", dense
    yield "causal", partial(dense, causal=True)
    yield "causal, square", partial(dense, seqlens=(SEQLEN_Q, SEQLEN_Q), causal=True)
    yield "window", partial(dense, window_size=(40, 7))
    yield "ALiBi", partial(dense, alibi=True)
    yield "ALiBi, causal", partial(dense, alibi=True, causal=True)
    yield "softcap", partial(dense, softcap=5.0)
    yield "softcap, causal", partial(dense, softcap=5.0, causal=True)
    yield "dropout", partial(dense, dropout_p=0.2)
    yield "dropout, causal", partial(dense, dropout_p=0.2, causal=True)
    yield "dropout, ALiBi, window", partial(dense, dropout_p=0.2, alibi=True, window_size=(40, 7))
    yield "general", partial(dense, uneven=True)
    yield "general, window", partial(dense, uneven=True, window_size=(40, 7))
    yield (
        "general, ALiBi and softcap, causal",
        partial(dense, uneven=True, alibi=True, softcap=5.0, causal=True),
    )
    yield "general, dropout", partial(dense, uneven=True, dropout_p=0.2)
    yield "varlen", varlen
    yield "varlen, causal", partial(varlen, causal=True)
    for activation in ACTIVATIONS:
        score = {"activation": activation}
        yield f"{activation}", partial(dense, **score)
        yield (
            f"{activation}, causal, 1/visible",
            partial(dense, causal=True, normalization="1/visible", **score),
        )
        yield f"{activation}, varlen, 1/n", partial(varlen, normalization="1/n", **score)
        yield (
            f"{activation}, kvcache, 3 splits",
            partial(kvcache, paged=True, new=True, num_splits=3, **score),
        )
    bias = {"activation": "sigmoid", "sigmoid_bias": "-log n"}
    yield "sigmoid, -log n, window", partial(dense, window_size=(40, 7), **bias)
    yield "silu, softcap", partial(dense, activation="silu", softcap=5.0)
    yield "silu, ALiBi", partial(dense, activation="silu", alibi=True)
    yield "silu, dropout, causal", partial(dense, activation="silu", dropout_p=0.2, causal=True)
    for activation in ("identity", "silu"):
        decayed = {"activation": activation, "decay": True}
        yield f"{activation}, decay", partial(dense, **decayed)
        yield f"{activation}, decay, ALiBi, causal", partial(dense, alibi=True, causal=True, **decayed)
        yield f"{activation}, decay, varlen, window", partial(varlen, window_size=(40, 7), **decayed)
        yield (
            f"{activation}, decay, kvcache, 3 splits",
            partial(kvcache, paged=True, new=True, num_splits=3, **decayed),
        )
    yield "silu, decay, softcap", partial(dense, activation="silu", decay=True, softcap=5.0)
    yield "silu, decay, dropout", partial(dense, activation="silu", decay=True, dropout_p=0.2)
    yield "factors of rows", partial(dense, factors=True, causal=True)
    yield "silu, factors of rows", partial(dense, factors=True, activation="silu")
    for paged in (False, True):
        for new in (False, True):
            for splits in (1, 3):
                name = f"kvcache{', paged' * paged}{', append and rotary' * new}, {splits} splits"
                yield name, partial(kvcache, paged=paged, new=new, num_splits=splits, causal=True)
    yield "kvcache, softcap, 3 splits", partial(kvcache, paged=False, new=False, num_splits=3, softcap=5.0)
    yield (
        "kvcache, window, 3 splits",
        partial(kvcache, paged=False, new=False, num_splits=3, window_size=(50, 0)),
    )
    yield from part_cases((SEQLEN_Q, SEQLEN_K), "identity", "silu")


def linear_cases() -> Iterator[tuple[str, Case]]:
    for causal in (False, True):
        for normalization in (None, "1/visible"):
            name = f"{', causal' * causal}{normalization and f', {normalization}' or ''}"
            yield f"dense{name}", partial(dense, seqlens=SEGMENTS, causal=causal, normalization=normalization)
            yield (
                f"varlen{name}",
                partial(varlen, longest=SEGMENTS, causal=causal, normalization=normalization),
            )

        yield (
            f"dense, decay{', causal' * causal}",
            partial(dense, seqlens=SEGMENTS, causal=causal, decay=True),
        )
        yield (
            f"varlen, decay{', causal' * causal}",
            partial(varlen, longest=SEGMENTS, causal=causal, decay=True),
        )
    yield from part_cases(SEGMENTS, "identity")


def fa4_cases() -> Iterator[tuple[str, Case]]:
    yield "dense", dense
    yield "causal, decay", partial(dense, causal=True, decay=True)
    yield "varlen, silu, decay", partial(varlen, activation="silu", decay=True)
    yield "causal, silu", partial(dense, causal=True, activation="silu")
    yield (
        "window, sigmoid, 1/visible",
        partial(dense, window_size=(40, 7), activation="sigmoid", normalization="1/visible"),
    )
    yield "softcap, relu2", partial(dense, softcap=5.0, activation="relu2")
    yield "causal, deterministic", partial(dense, causal=True, deterministic=True)
    yield "deterministic", partial(dense, deterministic=True)
    yield "varlen, 1/n", partial(varlen, normalization="1/n")
    yield "varlen, causal, silu", partial(varlen, causal=True, activation="silu")
    yield "pages, causal", partial(pages, causal=True)
    yield from part_cases((SEQLEN_Q, SEQLEN_K), "identity", "silu")


CASES = {"fa2": fa2_cases, "linear": linear_cases, "fa4": fa4_cases}


def difference(name: str, actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error of any result, relative to its largest value. Raises AssertionError for NaN or
    Inf.
    """
    worst = 0.0
    for x, y in zip(actual, expected):
        assert torch.isfinite(x).all(), (
            f"{name}: {(~torch.isfinite(x)).sum()} of {x.numel()} values NaN or Inf"
        )
        worst = max(worst, ((x.cpu().double() - y).abs().max() / y.abs().max().clamp(min=1e-30)).item())
    return worst


def missing(backend: str) -> str | None:
    """Say why a backend does not run on this machine's GPU; None if it does."""
    x = torch.zeros(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    return explain(flash_attn_func, x, x, x, use_softmax=False, backend=backend).passed_over.get(backend)


def check(name: str, case: Case, head_dim: int, dtype: torch.dtype, device: str, backend: str) -> None:
    actual = case(Place(device, backend, dtype, dtype), head_dim)
    if "dropout" in name:  # each backend drops other entries
        expected = [x.double().cpu() for x in actual]
    else:
        expected = case(Place("cpu", backend, torch.float64, dtype), head_dim)
    error = difference(name, actual, expected)
    assert error <= TOLERANCE, f"{name}: off by {error:.3g} of the largest value"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--backends", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU; --device cpu runs the same calls on the CPU backend", file=sys.stderr
        )
        return 2
    for backend in list(args.backends):
        if args.device == "cuda" and (why := missing(backend)):
            print(f"{backend} is left out: {why}", flush=True)
            args.backends.remove(backend)
    failed = total = 0
    for head_dim, dtype, backend in itertools.product(args.head_dims, args.dtypes, args.backends):
        for name, case in CASES[backend]():
            # "forwards" makes backward three forward passes; with softcap or dropout it is still the backward
            # kernel.
            for backward in ("kernel", "forwards"):
                if backward == "forwards" and (
                    backend != "fa2" or any(one_way in name for one_way in ("softcap", "dropout", "kvcache"))
                ):
                    continue
                os.environ[BACKWARD_ENV] = backward
                total += 1
                try:
                    check(name, case, head_dim, DTYPES[dtype], args.device, backend)
                except AssertionError as error:
                    failed += 1
                    print(
                        f"{backend}, head_dim {head_dim}, {dtype}, backward by {backward}: {error}",
                        flush=True,
                    )
    print(f"{total} calls, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
