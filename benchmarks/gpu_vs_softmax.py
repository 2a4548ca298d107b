"""Time use_softmax=False against use_softmax=True on a GPU: the same wheel, inputs, device and run.

Parts: dense (forward; backward alone), features (dropout, softcap, ALiBi, window, GQA, varlen), decode (one
token against a KV cache, as a CUDA graph), memory (a training step). The sides of a row are called in turn,
so that a drift of the clock affects all of them. Times are medians by CUDA events. ratio = time with softmax
/ time without, above 1 where use_softmax=False is faster. gpu_record.py describes the rows. A case that the
wheel was not built for gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from gpu_device import Gpu
from gpu_record import PARTS, Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOORED = ("dense", "decode")  # parts that --min-ratio checks


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [kind(item) for item in text.split(",")]

    parse.__name__ = f"comma-separated {kind.__name__}"  # argparse prints this name in its error message
    return parse


def _part(name: str) -> str:
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"there is no part {name!r}: choose from {', '.join(PARTS)}")
    return name


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    integers = _list_of(int)
    parser.add_argument(
        "--parts", type=_list_of(_part), default=list(PARTS), help="comma-separated, of " + ",".join(PARTS)
    )
    parser.add_argument(
        "--head-dims",
        type=integers,
        default=[64, 128, 256],
        help="head dimensions; all parts but dense leave out 256",
    )
    parser.add_argument(
        "--seqlens",
        type=integers,
        default=[512, 2048, 8192, 16384],
        help="sequence lengths of the dense part",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all; batch = tokens / seqlen")
    parser.add_argument("--hidden", type=int, default=2048, help="nheads = hidden / head_dim")
    parser.add_argument("--batches", type=integers, default=[1, 4, 16, 64], help="batch sizes of decode")
    parser.add_argument(
        "--contexts", type=integers, default=[1024, 8192, 32768, 131072], help="tokens in the cache of decode"
    )
    parser.add_argument(
        "--memory-limit", type=float, default=20, help="GB that K and V of a decode row may take"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--budget-ms", type=float, default=100, help="time on the device for one row, but at least 7 rounds"
    )
    parser.add_argument(
        "--min-ratio",
        type=float,
        help="exit with 1 if a dense or decode row has a lower ratio, or none has a ratio",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file, after each part")
    args = parser.parse_args(argv)
    for seqlen in args.seqlens:
        if not 0 < seqlen <= args.tokens:
            parser.error(f"--seqlens {seqlen} is not between 1 and --tokens {args.tokens}")
    for head_dim in args.head_dims:
        if not 0 < head_dim <= args.hidden:
            parser.error(f"--head-dims {head_dim} is not between 1 and --hidden {args.hidden}")
    args.dtype = DTYPES[args.dtype]
    return args


def failures(record: dict, min_ratio: float | None) -> list[str]:
    """List faults of the results: rows that are not finite, and rows whose ratio is below ``min_ratio``, if
    given.
    """
    rows = [(part, row) for part in PARTS for row in record.get(part, [])]
    problems = [(row, "NaN or Inf") for _, row in rows if not row.get("finite", True)]
    if min_ratio is not None:
        compared = [row for part, row in rows if part in FLOORED and row["ratio"] is not None]
        problems += [
            (row, f"ratio {row['ratio']:.3f} is below {min_ratio}")
            for row in compared
            if row["ratio"] < min_ratio
        ]
        if not compared:
            return [f"--min-ratio {min_ratio}: no row of {' or '.join(FLOORED)} has both sides"]
    return [f"{Case.of(row)}: {what}" for row, what in problems]


def main(argv: list[str] | None = None, machine: type[Gpu] = Gpu) -> int:
    args = parse_args(argv)
    if (missing := machine.missing()) is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    import gpu_parts  # imports flash_attn, so only after the checks above

    start = time.monotonic()
    gpu = machine(args.budget_ms)
    torch.manual_seed(0)
    yardsticks = {"matmul_tflops": gpu.matmul_tflops(args.dtype), "copy_tb_per_s": gpu.copy_bandwidth()}
    record = {
        "date": date.today().isoformat(),
        "command": shlex.join(
            ["python", "benchmarks/gpu_vs_softmax.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        **gpu.describe(),
        "flash_attn": metadata.version("flash_attn"),
        "dtype": str(args.dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "hidden": args.hidden,
        "yardsticks": yardsticks,
    }
    for part in args.parts:
        record[part] = list(getattr(gpu_parts, part)(args, gpu, yardsticks))
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    rows = sum(len(record[part]) for part in args.parts)
    print(
        f"{record['device']}, flash_attn {record['flash_attn']}: {rows} rows in "
        f"{time.monotonic() - start:.0f} s"
    )
    problems = failures(record, args.min_ratio)
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
