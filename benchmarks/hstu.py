"""Measure TFLOP/s of HSTU's masks on flash-attn-4's Hopper kernels: silu, a jagged batch, candidates.

    python benchmarks/hstu.py --json docs/results/hstu_tflops.json

The shapes are those of published HSTU kernels: bfloat16, 4 heads, lengths drawn from [0.9 N, N), 1 to 20
candidates a sequence. Variants, timed in turn on the same tensors:

    causal      causal=True, without a mask
    targets     HSTU(num_targets)
    contexts    and 8 contextual keys
    window      and max_attn_len=256
    quarter     a quarter of each sequence is candidates

A row has the operations of the visible scores a second, and those of the tiles that hold one, which is what
the kernels compute: above head size 128 less, where half of a forward tile sees nothing. Rows go to --json as
they come, and a run that finds its own rows there goes on after them. --quick takes one head size and three
shapes. The table is written beside the JSON file. The first call of a kernel compiles it; --compile
does only that, in several processes at once.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator

import resumed
import torch
from flash_attn import flash_attn_varlen_func
from flash_attn.masks import HSTU
from flash_attn.nosoftmax.intervals import HSTUSequence
from gpu_device import Gpu
from gpu_record import BACKWARD, BACKWARD_FLOPS, FORWARD, tera_per_second
from gpu_tables import table, tokens

DEVICE, BACKEND = "cuda", "fa4"
NHEADS = 4
MOST_TARGETS = 20
WINDOW = 256
HEAD_DIMS = (128, 64, 256)
SHAPES = ((512, 256), (512, 512), (512, 1024), (128, 2048), (32, 4096), (32, 8192), (32, 16384))
QUICK = ((128,), ((512, 512), (128, 2048), (32, 8192)))
VARIANTS = ("causal", "targets", "contexts", "window", "quarter")
# TFLOP/s on an H100 that recsys-examples publishes for FBGEMM's CUTLASS kernels: (head_dim, direction) -> N.
# Batches of 16 to 512, another run on another machine.
PUBLISHED_N = (512, 1024, 2048, 4096, 8192, 16384)
PUBLISHED = {
    (64, FORWARD): ("97–191", "181–264", "301–374", "394–426", "456–470", "468–483"),
    (64, BACKWARD): ("113–179", "201–266", "293–333", "374–383", "400–410", "415–426"),
    (128, FORWARD): ("163–287", "281–397", "415–483", "505–535", "525–556", "553–571"),
    (128, BACKWARD): ("145–204", "246–313", "358–390", "425–440", "461–468", "479–490"),
    (256, FORWARD): ("193–351", "353–486", "511–580", "579–642", "617–632", "637–651"),
    (256, BACKWARD): ("149–185", "238–271", "321–326", "356–363", "375–382", "385–391"),
}
PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl")
KEY = ("head_dim", "batch", "seqlen", "direction", "variant")


def drawn(batch: int, seqlen: int) -> tuple[list[int], list[int]]:
    """The lengths and the numbers of candidates of a batch, the same in every run."""
    generator = torch.Generator().manual_seed(seqlen)
    lengths = torch.randint(int(0.9 * seqlen), seqlen, (batch,), generator=generator)
    return lengths.tolist(), torch.randint(1, MOST_TARGETS + 1, (batch,), generator=generator).tolist()


def masks(variant: str, lengths: list[int], targets: list[int]) -> list[HSTU]:
    """The mask of each sequence."""
    if variant == "causal":
        return [HSTU()] * len(lengths)
    if variant == "quarter":
        return [HSTU(n // 4) for n in lengths]
    contexts, window = {"targets": (0, 0), "contexts": (8, 0), "window": (8, WINDOW)}[variant]
    return [HSTU(count, contexts, window) for count in targets]


def visible_scores(lengths: list[int], masks: list[HSTU]) -> int:
    """The scores that count in a forward pass of one head, from the intervals of the rows."""
    total = 0
    for n, mask in zip(lengths, masks):
        starts, ends = HSTUSequence(n, n, *mask).intervals()
        total += int((ends - starts).clamp(min=0).sum())
    return total


def scores_of_tiles(lengths: list[int], masks: list[HSTU], tile_m: int, tile_n: int) -> int:
    """The scores in tiles of (tile_m, tile_n) that hold one which counts."""
    total = 0
    for n, mask in zip(lengths, masks):
        sequence = HSTUSequence(n, n, *mask)
        for first in range(0, n, tile_m):
            ranges = sequence.seen_by_any(range(first, min(first + tile_m, n)))
            blocks = {x for keys in ranges for x in range(keys.start // tile_n, -(-keys.stop // tile_n))}
            total += len(blocks) * tile_m * tile_n
    return total


def tiles(head_dim: int, direction: str, variant: str, seqlen: int) -> tuple[int, int]:
    """(queries, keys) of the kernels' tiles."""
    from flash_attn.cute import interface
    from flash_attn.cute.nosoftmax.kernel import bwd_tile_with
    from flash_attn.cute.nosoftmax.marker import NoSoftmax
    from flash_attn.cute.nosoftmax.schedule import small

    if direction == FORWARD:
        found = small(head_dim, head_dim, WINDOW if variant == "window" else -(-seqlen // 2))
        if found is not None:
            return found.tile
        tile = interface._tile_size_fwd_sm90(head_dim, head_dim, True, False)
    else:
        choose = bwd_tile_with(NoSoftmax(), interface._tile_size_bwd_sm90)
        tile = choose(head_dim, head_dim, True, False)
    return tile.m_block_size, tile.n_block_size


def flops(scores: int, head_dim: int, direction: str) -> float:
    return 4.0 * scores * NHEADS * head_dim * (BACKWARD_FLOPS if direction == BACKWARD else 1.0)


def _call(variant: str, lengths: list[int], masks: list[HSTU], seqlen: int) -> Callable:
    """Return the public call of a variant, whose counts are tensors on the GPU."""
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    if variant == "causal":
        options = {"causal": True}
    else:
        counts = torch.tensor([mask.num_targets for mask in masks], dtype=torch.int32, device=DEVICE)
        options = {"mask": masks[0]._replace(num_targets=counts)}
    return lambda q, k, v: flash_attn_varlen_func(
        q, k, v, offsets, offsets, seqlen, seqlen, use_softmax=False, activation="silu",
        normalization=1 / seqlen, backend=BACKEND, **options,
    )  # fmt: skip


def measure(gpu: Gpu, args: argparse.Namespace, done: set[tuple]) -> Iterator[dict]:
    deadline = time.monotonic() + args.seconds
    head_dims, shapes = QUICK if args.quick else (args.head_dims, SHAPES)
    for head_dim in head_dims:
        for batch, seqlen in shapes:
            for direction in (FORWARD, BACKWARD):
                case = (head_dim, batch, seqlen, direction)
                if all((*case, variant) in done for variant in VARIANTS):
                    continue
                if time.monotonic() > deadline:
                    print("the time is up: the same command goes on from here", flush=True)
                    return
                # A run that was stopped within a case has some of its rows.
                yield from (row for row in _rows(gpu, *case) if tuple(row[name] for name in KEY) not in done)


def _calls(
    head_dim: int, batch: int, seqlen: int, direction: str, variants: tuple[str, ...]
) -> list[Callable]:
    """Return the functions to time: forward calls, or the backward passes alone of earlier forward calls."""
    lengths, targets = drawn(batch, seqlen)
    shape = sum(lengths), NHEADS, head_dim
    q, k, v, dout = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(4))
    calls = []
    for variant in variants:
        call = _call(variant, lengths, masks(variant, lengths, targets), seqlen)
        if direction == FORWARD:
            calls.append(lambda call=call: call(q, k, v))
            continue
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        calls.append(lambda out=out, leaves=leaves: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    return calls


def _rows(gpu: Gpu, head_dim: int, batch: int, seqlen: int, direction: str) -> Iterator[dict]:
    lengths, targets = drawn(batch, seqlen)
    for variant, ms in zip(VARIANTS, gpu.medians(_calls(head_dim, batch, seqlen, direction, VARIANTS))):
        given = lengths, masks(variant, lengths, targets)
        work = [
            flops(scores, head_dim, direction)
            for scores in (
                visible_scores(*given),
                scores_of_tiles(*given, *tiles(head_dim, direction, variant, seqlen)),
            )
        ]
        yield {
            **dict(zip(KEY, (head_dim, batch, seqlen, direction, variant))),
            "ms": ms,
            "tflops": tera_per_second(work[0], ms),
            "tflops_of_tiles": tera_per_second(work[1], ms),
        }


def _compile(head_dims: tuple[int, ...], processes: int, part: int) -> None:
    """Run every kernel of one part of the variants once, on a small batch of short and of long sequences,
    which have other tiles.
    """
    ends = SHAPES[0][1], SHAPES[-1][1]
    for head_dim, variant, seqlen in list(itertools.product(head_dims, VARIANTS, ends))[part::processes]:
        _calls(head_dim, 2, seqlen, BACKWARD, (variant,))[0]()
    torch.cuda.synchronize()


def compile_all(head_dims: tuple[int, ...], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_compile, args=(head_dims, processes, part)) for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def markdown(record: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    text = f"""# HSTU's masks on {record["device"]}

{record["date"]}, torch {record["torch"]}, {versions}:

    {record["command"]}

TFLOP/s, bfloat16, silu, {NHEADS} heads, lengths in [0.9 N, N), 1 to {MOST_TARGETS} candidates, medians with a cold L2 cache; backward
alone. The first number counts the visible scores, the one in brackets those of the tiles that hold one. In the same run cuBLAS reached
{record["matmul_tflops"]:.0f} TFLOP/s on 8192³. Variants: `benchmarks/hstu.py`. The last line is not of this run: it is published by
recsys-examples for FBGEMM's CUTLASS kernels on an H100, at batches of 16 to 512.
"""  # noqa: E501
    for direction in (FORWARD, BACKWARD):
        for head_dim in sorted({row["head_dim"] for row in record["rows"]}):
            rows = [r for r in record["rows"] if (r["head_dim"], r["direction"]) == (head_dim, direction)]
            rows.sort(key=lambda r: (r["seqlen"], VARIANTS.index(r["variant"])))
            if not rows:
                continue
            cells = [
                {**r, "said": f"{r['tflops']:.0f} ({r['tflops_of_tiles']:.0f})", "line": r["variant"]}
                for r in rows
            ]
            cells += [
                {"seqlen": n, "batch": None, "said": said, "line": "published, FBGEMM"}
                for n, said in zip(PUBLISHED_N, PUBLISHED[head_dim, direction])
                if any(r["seqlen"] == n for r in rows)
            ]
            text += f"\n## {direction.capitalize()}, head_dim {head_dim}\n\n"
            text += table(
                cells, "variant", lambda r: r["line"], lambda r: f"N = {tokens(r['seqlen'])}",
                lambda r: r["said"],
            )  # fmt: skip
    return text


def main(argv: list[str] | None = None) -> int:
    parser = resumed.options(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS), choices=HEAD_DIMS)
    parser.add_argument("--quick", action="store_true", help="head size 128 and three shapes")
    parser.add_argument("--budget-ms", type=float, default=200.0, help="time for the variants of one case")
    parser.add_argument(
        "--compile", type=int, default=0, metavar="PROCESSES", help="only compile, in this many processes"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("error: this needs a Hopper GPU and a torch with CUDA", file=sys.stderr)
        return 2
    if args.compile:
        compile_all(QUICK[0] if args.quick else args.head_dims, args.compile)
        return 0
    torch.manual_seed(0)
    gpu = Gpu(args.budget_ms)
    record = resumed.started(args.json, PACKAGES)
    record.setdefault("matmul_tflops", gpu.matmul_tflops(torch.bfloat16))
    done = {tuple(row[name] for name in KEY) for row in record["rows"]}
    for row in measure(gpu, args, done):
        record["rows"].append(row)
        print(
            f"{' '.join(str(row[name]) for name in KEY)}: {row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s "
            f"visible, {row['tflops_of_tiles']:.0f} in tiles",
            flush=True,
        )
        resumed.write(record, args.json, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
