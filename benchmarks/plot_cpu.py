"""Draw docs/cpu_vs_sdpa.png and write the section of docs/speed.md from docs/results/cpu_vs_sdpa.json, which
`make bench` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import results_page
from gpu_tables import table, tokens

ROOT = Path(__file__).resolve().parents[1]
BARS_WIDTH = 0.85  # of a group of bars; groups are 1 apart


def summary(record: dict) -> str:
    """Make the section of docs/speed.md."""
    shape = record["shape"]
    ratios = table(
        record["results"],
        "dtype, scores",
        lambda r: f"{r['dtype']}, {r['score_function']}",
        lambda r: f"{'causal' if r['causal'] else 'full'}, {r['direction']}",
        lambda r: f"{r['ratio']:.2f}",
    )
    return (
        f"Against torch's own `scaled_dot_product_attention` ({record['threads']} threads, torch "
        f"{record['torch']}, {record['date']}, `make bench`):\nbatch {shape['batch']}, "
        f"{tokens(shape['seqlen'])} tokens, {shape['heads']} heads, head_dim {shape['head_dim']}, ratio of "
        "median times, below 1 where flash_attn is faster.\nThe identity runs in linear time here.\n\n"
        f"{ratios}"
    )


def draw(record: dict, target: Path) -> None:
    """Draw a group of bars for each dtype, mask and pass: torch's SDPA, flash_attn with softmax, flash_attn
    without.
    """
    groups: dict[str, dict[str, float]] = {}
    for r in record["results"]:
        label = "\n".join((r["dtype"], "causal" if r["causal"] else "full", *r["direction"].split("+")))
        bars = groups.setdefault(label, {"SDPA (softmax)": r["sdpa_ms"]})
        bars[
            "flash_attn, softmax"
            if r["score_function"] == "softmax"
            else f"flash_attn, {r['score_function']}"
        ] = r["flash_attn_ms"]
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = BARS_WIDTH / len(names)
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    for i, name in enumerate(names):
        positions = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(positions, [bars.get(name, 0.0) for bars in groups.values()], width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    shape = record["shape"]
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel("ms, median")
    axes.set_title(
        f"batch {shape['batch']}, {shape['seqlen']} tokens, {shape['heads']} heads, head_dim "
        f"{shape['head_dim']}; torch {record['torch']}, {record['threads']} CPU threads, {record['date']}",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/cpu_vs_sdpa.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/cpu_vs_sdpa.png")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text(encoding="utf-8"))
    results_page.summarize(args.json, summary(record))
    draw(record, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
