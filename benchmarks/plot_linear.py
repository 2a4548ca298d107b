"""Draw a plot in docs/ from the JSON in docs/results/ that benchmarks/linear_vs_quadratic.py writes: time against length, log-log."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from legend import legend_below

ROOT = Path(__file__).resolve().parents[1]
STYLES = {
    "linear": {"label": "flash_attn, linear", "color": "C0", "marker": "."},
    "quadratic": {"label": "flash_attn, quadratic", "color": "C1", "marker": "."},
    "fa4": {"label": "flash_attn.cute (FA4), quadratic", "color": "C4", "marker": "v"},
    "fla": {"label": "fla chunk_linear_attn", "color": "C3", "marker": "."},
    "torch": {"label": "torch Q(KᵀV)", "color": "C2", "marker": "."},
    "floor": {"label": "memory floor", "color": "black", "linestyle": ":"},
}


def draw(record: dict, target: Path) -> None:
    """One panel for each head size, mask and pass, at batch 1; a line for each contender, and the memory floor."""
    panels: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    for r in record["results"]:
        if r["batch"] == 1 and r["ms"] is not None:
            panel = panels.setdefault((r["head_dim"], r["causal"], r["direction"]), {})
            panel.setdefault(r["contender"], []).append((r["seqlen"], r["ms"]))
            if r["contender"] == "linear":
                panel.setdefault("floor", []).append((r["seqlen"], r["ms"] * r["memory_floor_share"]))
    columns = max(1, min(4, len(panels)))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for ax, ((head_dim, causal, direction), lines) in zip(axes.flat, panels.items()):
        for name, points in lines.items():
            ax.loglog(*zip(*sorted(points)), base=2, **STYLES[name])
        ax.set_yscale("log", base=10)
        ax.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}, {direction}", fontsize=10)
        ax.set_xlabel("tokens")
        ax.set_ylabel("ms")
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    legend_below(figure)
    figure.suptitle(f"{record['device']}, {record['dtype']}, batch 1, torch {record['torch']}, {record['date']}", fontsize=11)
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/linear_vs_quadratic_cpu.json")
    parser.add_argument("--out", type=Path, help="docs/ and the name of the JSON by default")
    args = parser.parse_args(argv)
    target = args.out or ROOT / "docs" / args.json.with_suffix(".png").name
    draw(json.loads(args.json.read_text(encoding="utf-8")), target)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
