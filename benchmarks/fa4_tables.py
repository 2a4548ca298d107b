"""Write docs/results/fa4_tflops.md, its section of docs/speed.md and docs/fa4_tflops.png from the JSON of
fa4_tflops.py.
"""

from __future__ import annotations

from pathlib import Path

import results_page
from fa4_tflops import ACTIVATIONS, CONTENDERS, DENSE
from gpu_record import BACKWARD, FORWARD
from gpu_tables import table, tokens
from legend import legend_below
from matplotlib.figure import Figure

STYLES = {
    "softmax": {"color": "black", "linestyle": "--"},
    "identity": {"color": "C0"},
    "relu": {"color": "C1"},
    "relu2": {"color": "C2"},
    "sigmoid": {"color": "C3"},
    "silu": {"color": "C4"},
    "fa2": {"color": "C7", "linestyle": ":"},
    "retention": {"color": "C5"},
}
LABELS = {"fa2": "FA2 identity", "retention": "fla parallel_retention"}


def _kind(row: dict) -> str:
    return f"{row['head_dim']} {'causal' if row['causal'] else 'full'}"


def _length(row: dict) -> str:
    return f"{_kind(row)}, N = {tokens(row['seqlen'])}" + ("" if row["name"] == DENSE else f", {row['name']}")


def markdown(record: dict) -> str:
    text = f"""# FA4's kernels without softmax on {record["device"]}

{record["date"]}, torch {record["torch"]}, flash-attn-4 {record["flash_attn_4"]}, nvidia-cutlass-dsl {record["dsl"]}:

    {record["command"]}

TFLOP/s, bfloat16, 16k tokens in all (N = 32k: 32k), hidden 2048, medians with a cold L2 cache; backward alone. In the same run cuBLAS
reached {record["matmul_tflops"]:.0f} TFLOP/s on 8192³. FA2 identity: FA2's kernels without softmax. gqa: 8 query heads a key head.
varlen: six sequences of uneven length. Written by `benchmarks/fa4_tables.py` from the JSON file beside this one.
"""  # noqa: E501
    shown = [c for c in CONTENDERS if any(c in row["tflops"] for row in record["rows"])]
    for direction in (FORWARD, BACKWARD):
        rows = sorted(
            (r for r in record["rows"] if r["direction"] == direction),
            key=lambda r: (r["head_dim"], r["causal"], r["name"] != DENSE, r["name"], r["seqlen"]),
        )
        cells = [{**row, "contender": name} for row in rows for name in shown if name in row["tflops"]]
        # Columns appear in the order of their first cells, so sort the cells of each line.
        cells.sort(key=lambda r: shown.index(r["contender"]))
        order = {_length(row): i for i, row in enumerate(rows)}
        text += f"\n## {direction.capitalize()}\n\n"
        lines = table(
            cells,
            "head_dim, mask",
            _length,
            lambda r: LABELS.get(r["contender"], r["contender"]),
            lambda r: f"{r['tflops'][r['contender']]:.0f}",
        ).splitlines()
        body = sorted(lines[2:], key=lambda line: order[line.split(" | ")[0].removeprefix("| ")])
        text += "\n".join([*lines[:2], *body]) + "\n"
    return text


def summary(record: dict) -> str:
    """Make the section of docs/speed.md: the dense rows of 16k tokens."""
    rows = sorted(
        (r for r in record["rows"] if r["name"] == DENSE and r["seqlen"] == 16384),
        key=lambda r: (r["head_dim"], r["causal"], r["direction"] == BACKWARD),
    )
    speeds = table(
        [{**row, "contender": name} for row in rows for name in ("softmax", *ACTIVATIONS)],
        "head_dim, mask, pass",
        lambda r: f"{_kind(r)}, {r['direction']}",
        lambda r: r["contender"],
        lambda r: f"{r['tflops'][r['contender']]:.0f}",
    )
    return (
        f"{record['device']}, torch {record['torch']}, flash-attn-4 {record['flash_attn_4']}, "
        f"{record['date']}, `make bench-fa4`:\nTFLOP/s at N = 16k, 16k tokens in all, hidden 2048, bfloat16. "
        f"In the same run cuBLAS reached {record['matmul_tflops']:.0f} on 8192³.\n\n{speeds}\n"
        "GQA, varlen, other lengths, FA2's kernels and a peer in Triton: "
        "[all figures](results/fa4_tflops.md)."
    )


def draw(record: dict, target: Path) -> None:
    """Plot TFLOP/s against N: a column for each head size and mask, forward above backward."""
    rows = [r for r in record["rows"] if r["name"] == DENSE]
    kinds = list(dict.fromkeys(map(_kind, sorted(rows, key=lambda r: (r["head_dim"], r["causal"])))))
    kinds = [
        kind for kind in kinds if len({r["seqlen"] for r in rows if _kind(r) == kind}) > 1
    ]  # a run that was stopped has points
    figure = Figure(figsize=(3.6 * len(kinds), 6.4), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False, sharey=True)
    for i, direction in enumerate((FORWARD, BACKWARD)):
        for ax, kind in zip(axes[i], kinds):
            chosen = sorted(
                (r for r in rows if r["direction"] == direction and _kind(r) == kind),
                key=lambda r: r["seqlen"],
            )
            for name in CONTENDERS:
                points = [(r["seqlen"], r["tflops"][name]) for r in chosen if name in r["tflops"]]
                if points:
                    ax.plot(*zip(*points), marker=".", label=LABELS.get(name, name), **STYLES[name])
            ax.axhline(record["matmul_tflops"], color="black", linewidth=0.6)
            ax.set_xscale("log", base=2)
            ax.set_title(f"head_dim {kind}, {direction}", fontsize=10)
            ax.set_xlabel("N")
            ax.grid(alpha=0.3)
        axes[i][0].set_ylabel("TFLOP/s (thin line: cuBLAS)")
    legend_below(figure)
    figure.suptitle(f"{record['device']}, bfloat16, hidden 2048, {record['date']}", fontsize=11)
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> int:
    return results_page.write(__doc__, "fa4_tflops", markdown, summary, draw, argv)


if __name__ == "__main__":
    raise SystemExit(main())
