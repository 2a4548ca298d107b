"""Time a sequence over several GPUs against one GPU, and count the bytes that a rank receives.

    make bench-context-parallel RANKS=2

One causal sequence, 16 heads, head_dim 128, bfloat16, forward and forward + backward:

    linear, decay      1M tokens in linear time, method "state"
    silu, identity     64k and 128k tokens, quadratic: zigzag allgather, zigzag ring, Ulysses
    softmax            64k and 128k tokens, the package ring-flash-attn as a peer, over this package's FA2
                       kernels; left out where one of the two is missing

"alone" is the whole sequence on one GPU, without context_parallel. Bytes come from torch's profiler, beside
those of the formulas in docs/distributed.md, which `explain` gives. Without a GPU the script runs on gloo,
for a try at small sizes. Results go to --json as they come, and a second run measures what is missing there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_tables import size
from flash_attn import explain, flash_attn_func
from flash_attn.distributed import ContextParallel
from torch.profiler import ProfilerActivity, profile

ALONE = "alone"
LINEAR, QUADRATIC, PEER = ("linear", "decay"), ("silu", "identity"), ("softmax",)
METHODS = {
    LINEAR: [("state", "contiguous"), ("state", "zigzag")],
    QUADRATIC: [("allgather", "zigzag"), ("ring", "zigzag"), ("ulysses", "contiguous")],
    PEER: [("ring-flash-attn", "zigzag")],
}
DIRECTIONS = ("forward", "forward+backward")
ROUNDS, MOST_MS = 7, 10000.0  # turns of a race
ROW_MS = 50.0  # so long a row of calls takes at least, as the layers of a model follow one another
# As the profiler names them: with NCCL and with gloo.
SIZES = {"Float": 4, "BFloat16": 2, "Half": 2, "float": 4, "c10::BFloat16": 2, "c10::Half": 2}


@dataclass(frozen=True)
class Case:
    score: str
    tokens: int
    method: str
    layout: str

    def options(self, heads: int, device: torch.device) -> dict:
        if self.score in PEER:
            return dict(causal=True)
        algorithm = "linear" if self.score in LINEAR else "quadratic"
        options = dict(causal=True, use_softmax=False, algorithm=algorithm, normalization=1 / self.tokens)
        if self.score == "decay":
            # Half-lives from 2^5 to 2^(5 + heads) tokens.
            lives = 2.0 ** torch.arange(5, 5 + heads, dtype=torch.float32, device=device)
            options["decay_slopes"] = 0.6931 / lives
        if self.score == "silu":
            options["activation"] = "silu"
        return options

    def plan(self) -> ContextParallel | None:
        if self.method == ALONE or self.score in PEER:
            return None
        return ContextParallel(None, self.layout, seqlen=self.tokens, method=self.method, check=False)


def races(args: argparse.Namespace) -> list[list[Case]]:
    """The cases of one score and length, which take turns, for each: the shortest sequences first."""
    found = []
    groups = [(LINEAR, args.linear_tokens), (QUADRATIC, args.quadratic_tokens)]
    if importlib.util.find_spec("ring_flash_attn") is not None:
        groups.append((PEER, args.quadratic_tokens))
    for scores, lengths in groups:
        for tokens in lengths:
            for score in scores:
                found.append([Case(score, tokens, *how) for how in ((ALONE, ""), *METHODS[scores])])
    return found


def _peer() -> Callable:
    """Return the peer's function, without its package's adapters, which need an old transformers."""
    package = types.ModuleType("ring_flash_attn")
    package.__path__ = importlib.util.find_spec("ring_flash_attn").submodule_search_locations
    sys.modules.setdefault("ring_flash_attn", package)
    return importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func


def calls(case: Case, args: argparse.Namespace, device: torch.device) -> tuple[list[Callable], dict]:
    """Return the forward pass and the forward and backward pass, and the bytes of the formulas."""
    cp, options, attend = case.plan(), case.options(args.heads, device), flash_attn_func
    tokens = case.tokens if cp is None else cp.tokens
    if case.score in PEER and case.method != ALONE:
        attend = _peer()
        tokens = case.tokens // dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(dist.get_rank())
    shape = (1, tokens, args.heads, args.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    computed = {}
    if cp is not None:
        options["context_parallel"] = cp
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if cp is not None:
        chosen = explain(flash_attn_func, *inputs, **options)
        computed = {
            "forward": chosen.forward_bytes,
            "forward+backward": chosen.forward_bytes + chosen.backward_bytes,
        }

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, **options)

    def both() -> None:
        torch.autograd.grad(attend(*inputs, **options), inputs, dout)

    return [forward, both], computed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def medians_ms(functions: list[Callable], device: torch.device) -> list[float]:
    """The median time of a call of each function in a row of calls, on the slowest rank. The functions take
    turns, because a GPU's clock drifts by more than they differ.
    """
    calls = []
    for function in functions:
        row_ms(function, 1, device)  # loads kernels
        calls.append(max(2, math.ceil(ROW_MS / row_ms(function, 1, device))))
    turns: list[list[float]] = []
    while len(turns) < ROUNDS and sum(map(sum, turns)) < MOST_MS:
        turns.append([row_ms(function, count, device) for function, count in zip(functions, calls)])
    return [statistics.median(times) / count for times, count in zip(zip(*turns), calls)]


def row_ms(function: Callable, calls: int, device: torch.device) -> float:
    """The wall time of a row of calls on the slowest rank."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(1e3 * (time.perf_counter() - start), device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def received(function: Callable, device: torch.device) -> int | None:
    """The bytes that this rank receives in a call, by the profiler; None if it says nothing of them."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    synchronize(device)
    with profile(activities=kinds, record_shapes=True) as profiled:
        function()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    world = dist.get_world_size()
    messages = [*_of_nccl(events, world)] if device.type == "cuda" else [*_of_gloo(events, world)]
    return round(sum(messages)) if messages else None


def _of_nccl(events: list, world: int):
    for event in events:
        more = event.get("args", {})
        if event.get("name") != "record_param_comms" or more.get("dtype") not in SIZES:
            continue
        kind, numbers = more.get("Collective name", ""), more.get("Out msg nelems", 0)
        if "allgather" in kind or "all_to_all" in kind:
            yield numbers * SIZES[more["dtype"]] * (world - 1) / world
        elif "recv" in kind:
            yield numbers * SIZES[more["dtype"]]


def _of_gloo(events: list, world: int):
    shares = {"gloo:all_gather": world - 1, "gloo:all_to_all": (world - 1) / world, "gloo:recv": 1}
    for event in events:
        share = shares.get(event.get("name"))
        if share is None:
            continue
        for kind, shape in zip(event["args"]["Input type"], event["args"]["Input Dims"]):
            if kind in SIZES:
                yield share * SIZES[kind] * torch.Size(shape).numel()


def measure(race: list[Case], args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Return a row for each case."""
    made = [calls(case, args, device) for case in race]
    rows = [
        {**asdict(case), "ms": {}, "received": {}, "computed": computed}
        for case, (_, computed) in zip(race, made)
    ]
    for at, name in enumerate(DIRECTIONS):
        functions = [both[at] for both, _ in made]
        for row, function, ms in zip(rows, functions, medians_ms(functions, device)):
            row["ms"][name] = ms
            if row["method"] != ALONE:
                row["received"][name] = received(function, device)
    return rows


# ---- The page ----


def said(number: float | None) -> str:
    return "–" if number is None else size(number)


def page(record: dict) -> str:
    rows = record["results"]
    alone = {(row["score"], row["tokens"]): row["ms"] for row in rows if row["method"] == ALONE}
    lines = [
        "# A sequence over several GPUs",
        "",
        f"{record['ranks']} × {record['device']}, torch {record['torch']}, {record['date']}: one causal "
        f"sequence, {record['heads']} heads, head_dim {record['head_dim']}, {record['dtype']}. Written by",
        f"`{record['command']}`. Times are those of a call in a row of calls, medians on the slowest rank;",
        "all of a score and length take turns. × is the time on one GPU over it.",
        "Bytes are those that rank 0 receives, by torch's profiler, and in parentheses by the formulas of",
        "[distributed.md](../distributed.md).",
        "",
        "| score | tokens | method | forward | forward + backward | received forward | and backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = []
        for name in DIRECTIONS:
            ms, base = row["ms"][name], alone.get((row["score"], row["tokens"]), {}).get(name)
            faster = f" ({base / ms:.2f} ×)" if base and row["method"] != ALONE else ""
            times.append(f"{ms:.3g} ms{faster}")
        moved = [
            f"{said(row['received'].get(name))} ({size(row['computed'][name])})" if row["computed"] else "–"
            for name in DIRECTIONS
        ]
        method = f"{row['method']}, {row['layout']}" if row["layout"] else "one GPU"
        lines.append(
            f"| {row['score']} | {row['tokens']:,} | {method} | {' | '.join(times)} | {' | '.join(moved)} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--linear-tokens", type=int, nargs="*", default=[2**20])
    parser.add_argument("--quadratic-tokens", type=int, nargs="*", default=[2**16, 2**17])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=4.0, help="start no further score after these")
    parser.add_argument(
        "--json", type=Path, help="write the results here, and a page with the ending .md beside it"
    )
    args = parser.parse_args()
    began, cuda = time.monotonic(), torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda" if cuda else "cpu")
    first = dist.get_rank() == 0
    record = {
        "device": torch.cuda.get_device_name() if cuda else "a process on a CPU, gloo",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "dtype": "bfloat16" if cuda else "float32",
        "heads": args.heads,
        "head_dim": args.head_dim,
        "command": " ".join(["torchrun", f"--nproc-per-node {dist.get_world_size()}", *sys.argv]),
        "results": [],
    }
    if first and args.json is not None and args.json.is_file():
        record["results"] = json.loads(args.json.read_text(encoding="utf-8"))["results"]
    for race in races(args):
        keys = [asdict(case) for case in race]
        found = [row for row in record["results"] if {name: row[name] for name in keys[0]} in keys]
        decision = [len(found) == len(race), time.monotonic() - began > 60 * args.minutes]
        dist.broadcast_object_list(decision, 0, device=device)
        if decision[0]:
            continue
        if decision[1]:
            break
        try:
            rows = measure(race, args, device)
        except RuntimeError as error:  # kernels with softmax may be missing
            if race[0].score not in PEER:
                raise
            if first:
                print(f"left out, {race[0]}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        if cuda:
            torch.cuda.empty_cache()
        if first:
            record["results"] = [row for row in record["results"] if row not in found] + rows
            print(*map(json.dumps, rows), sep="\n", file=sys.stderr, flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                args.json.with_suffix(".md").write_text(page(record), encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
