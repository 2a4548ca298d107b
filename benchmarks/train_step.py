"""Time a whole training step of a language model on one Hopper GPU: softmax beside attention without it.

    python benchmarks/train_step.py --json docs/results/train_step.json

The model is that of examples/language_model.py: 4 blocks, width 2048, 16 heads of 128, and what a form needs
beside attention (a norm after it, a gate). A step is forward, backward and AdamW, in bfloat16 by autocast
over float32 weights, and has 64k tokens whatever N is. "compiled" runs torch.compile over each block.
Softmax is run by torch's flash kernel, by FA2 and by FA4; what a machine lacks is left out with its reason.

Rows go to --json as they come, and a run that finds its own rows there goes on after them. A GPU takes about
four minutes, a third of it for compilers. --quick takes N = 16k alone. --tables only writes the page beside
the JSON file, and the section of docs/speed.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import results_page
import resumed
import torch
import torch.nn.functional as F
from flash_attn import explain, flash_attn_func
from gpu_tables import table, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from language_model import VOCABULARY, LanguageModel, causal_sdpa

DEVICE, COMPILER = "cuda", "inductor"
LAYERS, WIDTH, HEADS = 4, 2048, 16
TOKENS = 65536
SEQLENS, QUICK = (4096, 16384, 65536), (16384,)
MODES = ("eager", "compiled")
WARM_UP, ROUNDS = 2, 5
SOFTMAX = ("softmax, torch", "softmax, FA2", "softmax, FA4")
FORMS = {"identity": "identity, norm after", "silu": "silu, given n", "retention": "retention"}
VARIANTS = (*SOFTMAX, *FORMS)
PACKAGES = ("flash_attn", "flash-attn-4", "triton")


def softmax(variant: str) -> Callable:
    """Return causal softmax attention of q, k and v. Raises ImportError if the machine lacks it."""
    if variant == "softmax, torch":
        return causal_sdpa
    if variant == "softmax, FA2":
        return partial(flash_attn_func, causal=True)
    from flash_attn.cute import flash_attn_func as attend

    # It is no operator: the compiler leaves it out, and a block becomes several graphs.
    return torch.compiler.disable(lambda q, k, v: attend(q, k, v, causal=True)[0])


def measure(mode: str, seqlen: int, variant: str) -> dict:
    """Return ms of a step, tokens a second, the peak of memory, and what it took until the first step was
    done.
    """
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    began, attend = time.perf_counter(), softmax(variant) if variant in SOFTMAX else None
    with torch.device(DEVICE):
        model = LanguageModel(FORMS.get(variant, "softmax"), LAYERS, WIDTH, HEADS, VOCABULARY, attend)
        inputs, targets = torch.randint(VOCABULARY, (2, TOKENS // seqlen, seqlen))
    if mode == "compiled":
        for block in model.blocks:
            block.compile(dynamic=False, backend=COMPILER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    only_flash = variant == "softmax, torch"

    def step() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if only_flash else nullcontext():
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                logits = model(inputs)
            F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = seconds(step, began)
    for _ in range(WARM_UP - 1):
        seconds(step)
    median = statistics.median(seconds(step) for _ in range(ROUNDS))
    return {
        "ms": 1e3 * median,
        "tokens_per_second": TOKENS / median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_seconds": round(first, 1),
        "kernels": variant.rpartition(", ")[2] if variant in SOFTMAX else backend(model, seqlen),
    }


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def seconds(step: Callable[[], None], began: float | None = None) -> float:
    """Return the wall time of a step, or since `began`."""
    began = time.perf_counter() if began is None else began
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def backend(model: LanguageModel, seqlen: int) -> str:
    """Return the backend that runs the attention of a step."""
    attention = model.blocks[0].attention
    shape = TOKENS // seqlen, seqlen, HEADS, WIDTH // HEADS
    q = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    return explain(flash_attn_func, q, q, q, **attention.options(seqlen)).backend


def wanted(args: argparse.Namespace) -> Iterator[dict]:
    for mode in args.modes:
        for seqlen in QUICK if args.quick else args.seqlens:
            for variant in args.variants:
                yield {"mode": mode, "seqlen": seqlen, "variant": variant}


# ---- The page


def fastest_softmax(rows: list[dict], row: dict) -> float | None:
    """Return the tokens a second of the fastest softmax beside a row."""
    place = row["mode"], row["seqlen"]
    beside = [r for r in rows if (r["mode"], r["seqlen"]) == place and r["variant"] in SOFTMAX and r["ms"]]
    return max((r["tokens_per_second"] for r in beside), default=None)


def cell(rows: list[dict], row: dict) -> str:
    if row["ms"] is None:
        return "–"
    best = fastest_softmax(rows, row)
    ratio = "" if best is None else f" ({row['tokens_per_second'] / best:.2f}×)"
    return f"{row['tokens_per_second'] / 1e3:.0f}k{ratio}, {row['peak_bytes'] / 2**30:.0f} GiB"


def tables(record: dict) -> str:
    """Return a table for each mode."""
    text = ""
    for mode in MODES:
        rows = [row for row in record["rows"] if row["mode"] == mode]
        rows.sort(key=lambda row: (VARIANTS.index(row["variant"]), row["seqlen"]))
        if rows:
            said = table(
                rows,
                mode,
                lambda r: r["variant"],
                lambda r: f"N = {tokens(r['seqlen'])}",
                partial(cell, rows),
            )
            text += f"\n{said}"
    return text


def setting() -> str:
    return (
        f"{LAYERS} blocks, width {WIDTH}, {HEADS} heads of {WIDTH // HEADS}, "
        f"{tokens(TOKENS)} tokens a step: tokens a second, the ratio to the\n"
        "fastest softmax in the same column, and the peak of memory"
    )


def markdown(record: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    text = f"""# A training step on {record["device"]}

{record["date"]}, torch {record["torch"]}, {versions}:

    {record["command"]}

Forward, backward and AdamW of the model in `examples/language_model.py`, bfloat16 by autocast over float32
weights, {setting()}.
Medians of {ROUNDS} steps. "compiled" is torch.compile over each block; FA4's softmax is no operator, so
that a block becomes several graphs. The identity has a norm after attention, retention a gate too. Written by
`benchmarks/train_step.py` with the JSON file beside this one.
{tables(record)}"""
    ran = [row for row in record["rows"] if row["ms"] is not None]
    if ran:
        head = ("variant", "million parameters", "kernels", "seconds to the first step, at most")
        text += f"\n## What ran\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}\n"
        for variant in VARIANTS:
            rows = [row for row in ran if row["variant"] == variant]
            if rows:
                kernels = ", ".join(dict.fromkeys(row["kernels"] for row in rows))
                first = max(row["first_seconds"] for row in rows)
                text += f"| {variant} | {rows[0]['parameters'] / 1e6:.0f} | {kernels} | {first:.0f} |\n"
    left_out: dict = {}
    for row in record["rows"]:
        if row["ms"] is None:
            left_out.setdefault((row["variant"], row["why_not"]), row)
    if left_out:
        text += "\n## Left out\n\n"
        for (variant, why), row in left_out.items():
            text += f"- {variant}, first at N = {tokens(row['seqlen'])}, {row['mode']}: {why}\n"
    return text


def summary(record: dict) -> str:
    """Return the section of docs/speed.md."""
    head = (
        f"{record['device']}, torch {record['torch']}, {record['date']}, `make bench-train-step`: "
        f"forward, backward and AdamW,\n{setting()}."
    )
    return f"{head}\n{tables(record)}\n[What ran, and what was left out](results/train_step.md).\n"


def write_pages(record: dict, path: Path) -> None:
    resumed.write(record, path, markdown)
    results_page.summarize(path, summary(record))


def main(argv: list[str] | None = None) -> int:
    parser = resumed.options(__doc__)
    parser.set_defaults(seconds=200.0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS, help=f"they divide {TOKENS}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--quick", action="store_true", help="N = 16k alone")
    parser.add_argument("--tables", action="store_true", help="only write the pages of --json")
    args = parser.parse_args(argv)
    if args.tables:
        write_pages(json.loads(args.json.read_text(encoding="utf-8")), args.json)
        return 0
    if not on_hopper():
        print("error: this needs a Hopper GPU and a torch with CUDA", file=sys.stderr)
        return 2
    record = resumed.started(args.json, PACKAGES)
    resumed.collect(record, args, wanted(args), measure, markdown)
    if args.json is not None:
        write_pages(record, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
