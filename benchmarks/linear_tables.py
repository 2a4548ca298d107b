"""Write a page beside the JSON of linear_vs_quadratic.py and its section of docs/speed.md, and plot time
against length, log-log, in docs/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import results_page
from gpu_tables import table, tokens
from legend import legend_below

STYLES = {
    "linear": {"label": "flash_attn, linear", "color": "C0", "marker": "."},
    "quadratic": {"label": "flash_attn, quadratic", "color": "C1", "marker": "."},
    "fa4": {"label": "flash_attn.cute (FA4), quadratic", "color": "C4", "marker": "v"},
    "fla": {"label": "fla chunk_linear_attn", "color": "C3", "marker": "."},
    "torch": {"label": "torch Q(KᵀV)", "color": "C2", "marker": "."},
    "floor": {"label": "memory floor", "color": "black", "linestyle": ":"},
}

# causal -> the other implementation of linear time to compare with.
PEERS = {True: "fla", False: "torch"}


def _milliseconds(ms: float | None) -> str:
    return "–" if ms is None else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}"


def _ratio(slow: float | None, fast: float | None) -> str:
    return f"{slow / fast:.2f}×" if slow is not None and fast is not None else "–"


def markdown(record: dict) -> str:
    """Make a table for each head size, mask and pass, with a line for each batch and length."""
    legend = f"Median times in ms, {record['dtype']}. "
    if record["device_type"] == "cuda":
        legend = (
            f"Median times in ms with a cold L2 cache, {record['dtype']}. In brackets: in a CUDA "
            "graph, where the host has no part.\n"
        )
    text = f"""# Linear time on {record["device"]}

{record["date"]}, torch {record["torch"]}:

    {record["command"]}

{legend}“Of the floor” is the share of reading all inputs and writing all results once.
Written by `benchmarks/linear_tables.py` from the JSON file beside this one.
"""
    panels: dict[tuple, dict[tuple, dict[str, dict]]] = {}
    for r in record["results"]:
        lines = panels.setdefault((r["head_dim"], r["causal"], r["direction"]), {})
        lines.setdefault((r["batch"], r["seqlen"]), {})[r["contender"]] = r

    def cell(result: dict | None) -> str:
        if result is None or result["ms"] is None:
            return "–"
        graph = result.get("graph_ms")
        return _milliseconds(result["ms"]) + ("" if graph is None else f" ({_milliseconds(graph)})")

    for (head_dim, causal, direction), lines in sorted(
        panels.items(), key=lambda panel: (panel[0][0], not panel[0][1], panel[0][2])
    ):
        peer = PEERS[causal]
        shown = [
            name
            for name in ("linear", peer, "quadratic", "fa4")
            if any(name in line for line in lines.values())
        ]
        titles = {
            "linear": "linear",
            "fla": "fla",
            "torch": "torch",
            "quadratic": "quadratic",
            "fa4": "quadratic, FA4",
        }
        text += f"\n## head_dim {head_dim}, {'causal' if causal else 'full'}, {direction}\n\n"
        head = ["batch × N", *(titles[name] for name in shown), "of the floor", f"{peer} / linear"]
        text += "| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n"
        for (batch, seqlen), line in sorted(lines.items()):
            linear, other = line.get("linear", {}), line.get(peer, {})
            share = linear.get("memory_floor_share")
            ratio = _ratio(other.get("ms"), linear.get("ms"))
            if linear.get("graph_ms") is not None and other.get("graph_ms") is not None:
                ratio += f" ({_ratio(other['graph_ms'], linear['graph_ms'])})"
            cells = [
                f"{batch} × {seqlen}",
                *(cell(line.get(name)) for name in shown),
                "–" if share is None else f"{share:.0%}",
                ratio,
            ]
            text += "| " + " | ".join(cells) + " |\n"
    return text


def summary(record: dict) -> str:
    """Make the section of docs/speed.md: causal, batch 1, four lengths."""
    longest = 1 << 20
    chosen: dict[tuple, dict[str, dict]] = {}
    for r in record["results"]:
        if r["causal"] and r["batch"] == 1 and r["seqlen"] in (4096, 16384, 65536, longest):
            chosen.setdefault((r["head_dim"], r["direction"], r["seqlen"]), {})[r["contender"]] = r

    def cell(row: tuple) -> str:
        of = row[1]
        times = " / ".join(_milliseconds(of.get(name, {}).get("ms")) for name in ("linear", "fla", "fa4"))
        graph = [of.get(name, {}).get("graph_ms") for name in ("linear", "fla")]
        return times if None in graph else f"{times} ({' / '.join(map(_milliseconds, graph))})"

    def share(causal: bool) -> str:
        wanted = ("linear", causal, "forward", longest)
        kinds = ("contender", "causal", "direction", "seqlen")
        shares = [r["memory_floor_share"] for r in record["results"] if tuple(r[k] for k in kinds) == wanted]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    times = table(
        sorted(chosen.items(), key=lambda row: row[0]),
        "head_dim, pass",
        lambda row: f"{row[0][0]}, {row[0][1]}",
        lambda row: f"N = {tokens(row[0][2])}",
        cell,
    )
    return (
        f"{record['device']}, torch {record['torch']}, {record['date']}, `make bench-linear`: causal, batch "
        f"1, 16 heads, {record['dtype']}, ms:\nflash_attn in linear time / fla-core's `chunk_linear_attn` / "
        "FA4's quadratic kernels, and in brackets\nthe first two in a CUDA graph, without the host's share."
        f"\n\n{times}\nAt {tokens(longest)} tokens forward runs at {share(True)} of the speed of reading q, "
        f"k, v and writing the output once,\nwith full masks at {share(False)}. "
        "[All figures](results/linear_vs_quadratic_h100.md)."
    )


def draw(record: dict, target: Path) -> None:
    """Draw a panel for each head size, mask and pass, at batch 1, with a line for each contender and for the
    memory floor.
    """
    panels: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    for r in record["results"]:
        if r["batch"] == 1 and r["ms"] is not None:
            panel = panels.setdefault((r["head_dim"], r["causal"], r["direction"]), {})
            panel.setdefault(r["contender"], []).append((r["seqlen"], r["ms"]))
            if r["contender"] == "linear":
                panel.setdefault("floor", []).append((r["seqlen"], r["ms"] * r["memory_floor_share"]))
    panels = {
        kind: lines for kind, lines in panels.items() if len(lines.get("linear", ())) > 1
    }  # a run that was stopped has points
    columns = max(1, min(4, len(panels)))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
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
    figure.suptitle(
        f"{record['device']}, {record['dtype']}, batch 1, torch {record['torch']}, {record['date']}",
        fontsize=11,
    )
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> int:
    return results_page.write(__doc__, "linear_vs_quadratic_cpu", markdown, summary, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
