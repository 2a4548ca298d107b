"""Measure TFLOP/s of flash-attn-4's Hopper kernels without softmax: every activation, beside the same kernels
with softmax, FA2's kernels and cuBLAS.

    python benchmarks/fa4_tflops.py --json docs/results/fa4_tflops.json

Contenders, each left out where it does not run, with the reason in the record:
    softmax                            flash_attn.cute.flash_attn_func as upstream has it
    identity relu relu2 sigmoid silu   the same with use_softmax=False
    fa2                                flash_attn.flash_attn_func(use_softmax=False, backend="fa2"), where the
                                       wheel with it is installed
    retention                          fla.ops.retention.parallel_retention (package fla-core), a peer in
                                       Triton; causal, as many key heads
Shapes: dense; grouped-query heads (8 query heads a key head), with all tokens in one sequence; packed
sequences of uneven length. Results go to --json as they come. The first call of a kernel compiles it;
--compile does only that, in several processes at once.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from importlib import metadata
from itertools import accumulate
from pathlib import Path

import torch
from gpu_device import Gpu
from gpu_record import BACKWARD, FORWARD, Case, attention_flops, tera_per_second

ACTIVATIONS = ("identity", "relu", "relu2", "sigmoid", "silu")
CONTENDERS = ("softmax", *ACTIVATIONS, "fa2", "retention")
DENSE, GROUPED, PACKED = "dense", "gqa", "varlen"
GROUP = 8
# Lengths of packed sequences, as shares of the tokens.
SHARES = (0.35, 0.25, 0.2, 0.1, 0.06, 0.04)
# A contender that takes longer than this is not asked for longer sequences of the same kind.
TOO_SLOW_MS = 300.0


def lengths(case: Case) -> list[int]:
    """The lengths of the packed sequences: case.seqlen positions in all."""
    firsts = [int(case.seqlen * share) for share in SHARES[:-1]]
    return [*firsts, case.seqlen - sum(firsts)]


def flops(case: Case) -> float:
    if case.name != PACKED:
        return attention_flops(case)
    return attention_flops(case) * sum(n**2 for n in lengths(case)) / case.seqlen**2


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases in the order of --seqlens, so that a stopped run has the first lengths of every
    kind.
    """
    kinds = list(itertools.product(args.head_dims, (False, True), (FORWARD, BACKWARD)))
    for seqlen in args.seqlens:
        for head_dim, causal, direction in kinds:
            nheads = args.hidden // head_dim
            yield Case(
                DENSE, direction, max(args.tokens // seqlen, 1), seqlen, nheads, nheads, head_dim, causal
            )
    for name in args.shapes:
        for head_dim, causal, direction in kinds:
            nheads = args.hidden // head_dim
            yield Case(
                name,
                direction,
                1,
                args.tokens,
                nheads,
                max(nheads // GROUP, 1) if name == GROUPED else nheads,
                head_dim,
                causal,
            )


def _function(
    contender: str, case: Case
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the call of one contender. Raises ImportError or ValueError if the contender does not take the
    case.
    """
    if contender == "retention":
        if case.name != DENSE or not case.causal:
            raise ValueError("it is causal, dense, and has as many key heads")
        attend = importlib.import_module("fla.ops.retention").parallel_retention
        return lambda q, k, v: attend(q, k, v)[0]
    options = {"causal": case.causal}
    if contender == "fa2":
        package, more = "flash_attn", {"use_softmax": False, "backend": "fa2"}
    else:
        package, more = (
            "flash_attn.cute",
            {} if contender == "softmax" else {"use_softmax": False, "activation": contender},
        )
    module = importlib.import_module(package)
    if case.name == PACKED:
        starts = torch.tensor([0, *accumulate(lengths(case))], dtype=torch.int32, device="cuda")
        options |= {
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts,
            "max_seqlen_q": max(lengths(case)),
            "max_seqlen_k": max(lengths(case)),
        }
        function = module.flash_attn_varlen_func
    else:
        function = module.flash_attn_func

    def attend(q, k, v):
        out = function(q, k, v, **options, **more)
        return out[0] if isinstance(out, tuple) else out

    return attend


def prepared(contender: str, case: Case) -> Callable[[], object]:
    """Return the function to time: a forward call, or the backward pass alone of an earlier forward call."""
    rows = (case.seqlen,) if case.name == PACKED else (case.batch, case.seqlen)
    shapes = [(*rows, case.nheads, case.head_dim), *[(*rows, case.nheads_k, case.head_dim)] * 2]
    backward = case.direction == BACKWARD
    q, k, v = (torch.randn(s, dtype=torch.bfloat16, device="cuda").requires_grad_(backward) for s in shapes)
    attend = _function(contender, case)
    if not backward:
        return lambda: attend(q, k, v)
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def measure(args: argparse.Namespace, gpu: Gpu) -> Iterator[dict]:
    stopped: set[tuple] = set()
    deadline = time.monotonic() + args.seconds
    for case in cases(args):
        calls, skipped = {}, {}
        for contender in args.contenders:
            kind = (contender, case.name, case.head_dim, case.causal, case.direction)
            if kind in stopped or time.monotonic() > deadline:
                continue
            try:
                calls[contender] = prepared(contender, case)
                calls[contender]()
            except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
                calls.pop(contender, None)
                skipped[contender] = _reason(error)
                stopped.add(kind)
        if not calls:
            continue
        ms = dict(zip(calls, gpu.medians(list(calls.values()))))
        stopped |= {
            (name, case.name, case.head_dim, case.causal, case.direction)
            for name, t in ms.items()
            if t > TOO_SLOW_MS
        }
        del calls
        torch.cuda.empty_cache()
        yield {
            **asdict(case),
            "ms": ms,
            "tflops": {name: tera_per_second(flops(case), t) for name, t in ms.items()},
            "skipped": skipped,
        }


def _compile(args: argparse.Namespace, part: int) -> None:
    """Run every kernel of one part of the cases once, on few tokens: short and long sequences have other
    tiles.
    """
    args.tokens = 8192
    args.seqlens = [512, 8192]
    pairs = [(contender, case) for case in cases(args) for contender in args.contenders]
    for contender, case in pairs[part :: args.compile]:
        try:
            prepared(contender, case)()
            torch.cuda.synchronize()
        except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
            print(f"{contender}, {case}: {_reason(error)}", flush=True)


def compile_all(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile, args=(args, part)) for part in range(args.compile)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384, 512, 2048, 8192, 32768, 1024, 4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        help="batch * seqlen, unless seqlen is longer (default: %(default)s)",
    )
    parser.add_argument("--hidden", type=int, default=2048, help="nheads * head_dim (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--shapes", nargs="*", choices=(GROUPED, PACKED), default=[GROUPED, PACKED], help="beside dense"
    )
    parser.add_argument(
        "--budget-ms",
        type=float,
        default=150.0,
        help="time for the contenders of one case (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this time")
    parser.add_argument(
        "--compile",
        type=int,
        default=0,
        metavar="PROCESSES",
        help="only compile the kernels, in this many processes",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("error: this needs a Hopper GPU and a torch with CUDA", file=sys.stderr)
        return 2
    if args.compile:
        compile_all(args)
        return 0
    gpu = Gpu(args.budget_ms)
    torch.manual_seed(0)
    record = {
        "date": date.today().isoformat(),
        "command": shlex.join(
            ["python", "benchmarks/fa4_tflops.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flash_attn_4": metadata.version("flash-attn-4"),
        "dsl": metadata.version("nvidia-cutlass-dsl"),
        "matmul_tflops": gpu.matmul_tflops(torch.bfloat16),
        "rows": [],
    }
    print(
        f"{record['date']}  {record['device']}  bfloat16, {args.hidden} hidden; cuBLAS 8192^3: "
        f"{record['matmul_tflops']:.0f} TFLOP/s"
    )
    for row in measure(args, gpu):
        record["rows"].append(row)
        said = "  ".join(f"{name} {value:.0f}" for name, value in row["tflops"].items())
        print(f"{Case.of(row)}: {said}", flush=True)
        for name, why in row["skipped"].items():
            print(f"  {name}: {why}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
