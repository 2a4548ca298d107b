"""Time flash_attn_func on the CPU against torch.nn.functional.scaled_dot_product_attention.

The softmax row of each setting compares like with like. The rows of the activations show the cost of
use_softmax=False beside it. Both sides are called in turn, so that a busy machine slows both. The ratio is
that of the medians, below 1 where flash_attn_func is faster.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from flash_attn import flash_attn_func
from flash_attn.nosoftmax.score import ACTIVATIONS
from torch.nn.functional import scaled_dot_product_attention

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """Median times of one setting, in milliseconds."""

    dtype: str
    causal: bool
    direction: str
    score_function: str
    flash_attn_ms: float
    sdpa_ms: float

    @property
    def ratio(self) -> float:
        return self.flash_attn_ms / self.sdpa_ms


def _medians(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Call the functions in turn, after one warm-up call; returns the median time of each in milliseconds."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, record in zip(functions, times):
            start = time.perf_counter()
            function()
            if repeat > 0:
                record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(record) for record in times]


def _direction(
    attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], backward: bool
) -> Callable[[], object]:
    def forward_only() -> None:
        with torch.no_grad():
            attend(*inputs)

    def forward_and_backward() -> None:
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return forward_and_backward if backward else forward_only


def measure(args: argparse.Namespace) -> list[Result]:
    results = []
    score_functions = ("softmax", *args.activations)
    torch.manual_seed(0)
    for dtype in args.dtypes:
        shape = (args.batch, args.seqlen, args.heads, args.head_dim)
        ours = [torch.randn(shape, dtype=_DTYPES[dtype], requires_grad=True) for _ in range(3)]
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
        for causal in (False, True):
            for backward in (False, True):
                sides = [
                    _direction(partial(scaled_dot_product_attention, is_causal=causal), theirs, backward)
                ]
                for name in score_functions:
                    options = {} if name == "softmax" else {"use_softmax": False, "activation": name}
                    sides.append(
                        _direction(partial(flash_attn_func, causal=causal, **options), ours, backward)
                    )
                sdpa_ms, *flash_ms = _medians(args.repeats, *sides)
                direction = "forward+backward" if backward else "forward"
                for name, milliseconds in zip(score_functions, flash_ms):
                    results.append(Result(dtype, causal, direction, name, milliseconds, sdpa_ms))
    return results


def _print_table(args: argparse.Namespace, results: list[Result]) -> None:
    print(
        f"{date.today()}  torch {torch.__version__}  {torch.get_num_threads()} CPU threads  batch "
        f"{args.batch}, seqlen {args.seqlen}, heads {args.heads}, head_dim {args.head_dim}, median of "
        f"{args.repeats}"
    )
    print(
        f"{'dtype':<10}{'mask':<8}{'pass':<18}{'scores':<10}{'flash_attn ms':>14}{'SDPA ms':>10}{'ratio':>8}"
    )
    for r in results:
        mask = "causal" if r.causal else "full"
        print(
            f"{r.dtype:<10}{mask:<8}{r.direction:<18}{r.score_function:<10}{r.flash_attn_ms:>14.1f}{r.sdpa_ms:>10.1f}"
            f"{r.ratio:>8.2f}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--activations", nargs="*", choices=ACTIVATIONS, default=["identity"])
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed calls of each side, after one to warm up"
    )
    parser.add_argument("--max-ratio", type=float, help="exit with 1 if a softmax row exceeds this ratio")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)

    results = measure(args)
    _print_table(args, results)
    if args.json is not None:
        record = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "shape": {
                "batch": args.batch,
                "seqlen": args.seqlen,
                "heads": args.heads,
                "head_dim": args.head_dim,
            },
            "results": [{**asdict(r), "ratio": r.ratio} for r in results],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.max_ratio is None:
        return 0
    return int(any(r.ratio > args.max_ratio for r in results if r.score_function == "softmax"))


if __name__ == "__main__":
    sys.exit(main())
