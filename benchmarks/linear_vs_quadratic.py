"""Time attention without softmax in linear time against the quadratic kernels and against others, over
sequence lengths.

Contenders, each left out where it does not run, with the reason in the record:
    linear     flash_attn_func(use_softmax=False, algorithm="linear")
    quadratic  the same with algorithm="quadratic", by FA2's kernels on a GPU
    fa4        the same by the kernels of flash-attn-4 on a Hopper GPU, where that is installed
    fla        fla.ops.linear_attn.chunk_linear_attn(normalize=False), causal only (package fla-core)
    torch      Q @ (K^T V), full only
Every length runs at batch 1 and, up to --tokens, at that many tokens in all. Results go to --json as they
come, so that a stopped run keeps its results. The run ends with the length from which linear is faster, for
each head size, mask and pass.

On a GPU a short call waits for its host. Calls up to 3 ms are therefore timed again as the replay of a CUDA
graph, which needs no host. Backward runs in the calling thread, because waking autograd's own thread takes a
time that differs from run to run.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from flash_attn import flash_attn_func

ROOT = Path(__file__).resolve().parents[1]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PASSES = ("forward", "forward+backward")
# A contender is not asked for longer sequences if it would take longer than this, extrapolated linearly from
# its last length.
_TOO_LONG_MS = {"cpu": 8000.0, "cuda": 100.0}
# Up to this time the host may dominate, so the call is also timed in a CUDA graph.
_SHORT_MS = 3.0
# Time of one measurement on a GPU. A longer call is measured once, after the warm-up.
_GPU_MS = 40


@dataclass(frozen=True)
class Setting:
    batch: int
    seqlen: int
    nheads: int
    head_dim: int
    causal: bool
    direction: str


@dataclass(frozen=True)
class Result(Setting):
    """One contender's median time in ms, and the share of it that reading the inputs and writing the results
    once would take.

    graph_ms: the median time in a CUDA graph; None on a CPU, for longer calls, and if the call cannot be
    captured. peak_mib: on a GPU, the peak of allocated memory, inputs included.
    """

    contender: str
    ms: float | None
    memory_floor_share: float | None
    graph_ms: float | None = None
    peak_mib: float | None = None
    why_not: str | None = None


def _fla(q, k, v, causal):
    from fla.ops.linear_attn import chunk_linear_attn

    out = chunk_linear_attn(q, k, v, scale=q.shape[-1] ** -0.5, normalize=False)
    return out[0] if isinstance(out, tuple) else out


def _torch(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ (k.transpose(-1, -2) @ v) * q.shape[-1] ** -0.5).transpose(1, 2)


def _ours(backend: str) -> Callable:
    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal, use_softmax=False, backend=backend)


CONTENDERS = {
    "linear": _ours("linear"),
    "quadratic": _ours("fa2" if torch.cuda.is_available() else "cpu"),
    "fa4": _ours("fa4"),
    "fla": _fla,
    "torch": _torch,
}
_ONLY = {"fla": True, "torch": False}


def median_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median time after a warm-up. On a GPU the L2 cache is cold and the queue full, so that the host's
    time shows only if it exceeds the GPU's.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=5, rep=_GPU_MS, return_mode="median")
    times = []
    started = time.perf_counter()
    for repeat in range(repeats + 2):
        begin = time.perf_counter()
        run()
        milliseconds = (time.perf_counter() - begin) * 1e3
        if repeat >= 2 or milliseconds > _TOO_LONG_MS[device]:
            times.append(milliseconds)
        if times and time.perf_counter() - started > 10:
            break
    return statistics.median(times)


def graph_ms(run: Callable[[], object]) -> float | None:
    """The median time of replaying ``run`` as a CUDA graph; None if it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the graph must not capture what a first call on another stream does
        run()
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return median_ms(graph.replay, "cuda", 0)


def copy_rate(device: str) -> float:
    """Bytes per second of a copy, read and written, for the memory floor."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), device, 10) * 1e-3)


def _floor_ms(setting: Setting, dtype: torch.dtype, rate: float) -> float:
    """Time of the memory traffic: forward reads q, k, v and writes out; backward reads q, k, v, dout and
    writes dq, dk, dv.
    """
    tensor = setting.batch * setting.seqlen * setting.nheads * setting.head_dim * dtype.itemsize
    return (4 if setting.direction == "forward" else 11) * tensor / rate * 1e3


def _run(
    setting: Setting, contender: str, dtype: torch.dtype, device: str, repeats: int
) -> tuple[float, float | None]:
    """Return (ms, graph_ms) of Result."""
    shape = (setting.batch, setting.seqlen, setting.nheads, setting.head_dim)
    backward = setting.direction != "forward"
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]

    def step():
        out = CONTENDERS[contender](*inputs, setting.causal)
        if backward:
            torch.autograd.grad(out, inputs, dout)

    with torch.autograd.set_multithreading_enabled(False):
        ms = median_ms(step, device, repeats)
        return ms, graph_ms(step) if device == "cuda" and ms <= _SHORT_MS else None


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    for head_dim in args.head_dims:
        for causal in (True, False):
            for direction in _PASSES:
                batched = [(args.tokens // n, n) for n in args.seqlens if args.tokens // n > 1]
                for batch, seqlen in [(1, n) for n in args.seqlens] + batched:
                    yield Setting(batch, seqlen, args.heads, head_dim, causal, direction)


def measure(args: argparse.Namespace) -> Iterator[Result]:
    dtype, rate = _DTYPES[args.dtype], copy_rate(args.device)
    last: dict[
        tuple, tuple[int, float]
    ] = {}  # kind of setting -> the length that was measured last, and its time
    deadline = time.monotonic() + args.seconds
    for setting in _settings(args):
        for contender in args.contenders:
            kind = (contender, setting.head_dim, setting.causal, setting.direction, setting.batch == 1)
            if _ONLY.get(contender, setting.causal) != setting.causal or time.monotonic() > deadline:
                continue
            seqlen, before = last.get(kind, (setting.seqlen, 0.0))
            if before * setting.seqlen / seqlen > _TOO_LONG_MS[args.device]:
                continue
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                (ms, graph_ms), why = _run(setting, contender, dtype, args.device, args.repeats), None
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                ms, graph_ms, why = None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
            last[kind] = setting.seqlen, float("inf") if ms is None else ms
            share = None if ms is None else _floor_ms(setting, dtype, rate) / ms
            peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
            yield Result(
                **asdict(setting),
                contender=contender,
                ms=ms,
                memory_floor_share=share,
                graph_ms=graph_ms,
                peak_mib=peak,
                why_not=why,
            )


def crossovers(results: list[Result]) -> dict[str, float | None]:
    """The length at batch 1 from which linear is faster than quadratic, by log-log interpolation; None if
    nowhere.
    """
    times: dict[str, dict[int, dict[str, float]]] = {}
    for r in results:
        if r.batch == 1 and r.ms is not None:
            name = f"head_dim {r.head_dim}, {'causal' if r.causal else 'full'}, {r.direction}"
            times.setdefault(name, {}).setdefault(r.seqlen, {})[r.contender] = r.ms
    found = {}
    for name, by_length in times.items():
        ratios = [
            (n, ms["linear"] / ms["quadratic"])
            for n, ms in sorted(by_length.items())
            if {"linear", "quadratic"} <= ms.keys()
        ]
        found[name] = None
        for (n0, r0), (n1, r1) in zip(ratios, ratios[1:]):
            if r0 > 1 >= r1:
                found[name] = round(n0 * (n1 / n0) ** ((r0 - 1) / (r0 - r1)))
        if ratios and ratios[0][1] <= 1 and found[name] is None:
            found[name] = ratios[0][0]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--seqlens", type=int, nargs="+", default=[2**n for n in (range(10, 21) if on_gpu else range(7, 15))]
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384 if on_gpu else 0,
        help="tokens in all for the batched runs; 0 leaves these out",
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls on the CPU")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    record = {
        "date": date.today().isoformat(),
        "command": shlex.join(
            ["python", "benchmarks/linear_vs_quadratic.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU, threads: {torch.get_num_threads()}",
        "device_type": args.device,
        "dtype": args.dtype,
        "results": [],
    }
    results: list[Result] = []
    print(
        f"{record['date']}  {record['device']}  torch {record['torch']}  {args.dtype}, {args.heads} heads, "
        "medians"
    )
    print(
        f"{'mask':<8}{'pass':<18}{'d':>4}{'batch':>7}{'N':>9}  "
        f"{'contender':<11}{'ms':>10}{'of floor':>10}{'graph, ms':>11}"
    )
    for r in measure(args):
        results.append(r)
        record["results"].append(asdict(r))
        in_graph = "" if r.graph_ms is None else f"{r.graph_ms:>11.3f}"
        outcome = (
            f"{r.ms:>10.3f}{r.memory_floor_share:>10.0%}{in_graph}" if r.ms is not None else f"  {r.why_not}"
        )
        mask = "causal" if r.causal else "full"
        print(
            f"{mask:<8}{r.direction:<18}{r.head_dim:>4}{r.batch:>7}{r.seqlen:>9}  {r.contender:<11}{outcome}",
            flush=True,
        )
        record["crossovers"] = crossovers(results)
        if args.json is not None:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, length in crossovers(results).items():
        print(f"crossover, {name}: {'not within these lengths' if length is None else length}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
