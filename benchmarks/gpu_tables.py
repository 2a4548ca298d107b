"""Write docs/results/gpu_vs_softmax.md, its section of docs/speed.md and docs/gpu_vs_softmax.png from the
JSON of gpu_vs_softmax.py (`make bench-gpu`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import results_page
from gpu_record import BACKWARD, DECODE, FORWARD, NO_SOFTMAX, NO_SOFTMAX_KERNEL, SOFTMAX
from legend import legend_below
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
ABSENT = "–"
SIDES = {
    SOFTMAX: "softmax",
    NO_SOFTMAX: "`use_softmax=False`",
    NO_SOFTMAX_KERNEL: "`use_softmax=False`, backward kernel",
}
MASK_COLORS = {False: "tab:blue", True: "tab:orange"}


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def tokens(n: int) -> str:
    """Format a number of tokens, such as 512, 16k or 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def _bar(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def table(
    rows: list[dict], corner: str, row_key: Callable, column_key: Callable, cell: Callable[[dict], str]
) -> str:
    """Make a markdown table with a line for each row_key(row) and a column for each column_key(row), in order
    of appearance.
    """
    cells = {(row_key(r), column_key(r)): cell(r) for r in rows}
    lines, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in range(2))
    text = _bar([corner, *columns]) + _bar(["---"] * (len(columns) + 1))
    return text + "".join(
        _bar([line, *(cells.get((line, column), ABSENT) for column in columns)]) for line in lines
    )


def _with_ratio(text: str, row: dict) -> str:
    return text if row["ratio"] is None else f"{text} ({row['ratio']:.2f}×)"


def _speed(row: dict) -> str:
    return _with_ratio(f"{row['tflops'][NO_SOFTMAX]:.0f}", row) if NO_SOFTMAX in row["tflops"] else ABSENT


def _both_backwards(row: dict) -> str:
    return " / ".join(
        f"{row['tflops'][name]:.0f}" if name in row["tflops"] else ABSENT
        for name in (NO_SOFTMAX, NO_SOFTMAX_KERNEL)
    )


def _ratio(row: dict) -> str:
    return ABSENT if row["ratio"] is None else f"{row['ratio']:.2f}×"


def _step(row: dict) -> str:
    if NO_SOFTMAX not in row["ms"]:
        return ABSENT
    return _with_ratio(f"{row['ms'][NO_SOFTMAX] * 1e3:.0f} µs, {row['bandwidth'][NO_SOFTMAX]:.0%}", row)


def _mib(row: dict, name: str) -> str:
    return ABSENT if row["skipped"] else f"{row[name] / 2**20:.1f}"


def _dense(rows: list[dict]) -> str:
    size_and_mask, seqlen = (
        lambda r: f"{r['head_dim']} {_mask(r['causal'])}",
        lambda r: f"N = {tokens(r['seqlen'])}",
    )
    text = ""
    for direction in (FORWARD, BACKWARD):
        chosen = [r for r in rows if r["direction"] == direction]
        text += f"\n## {direction.capitalize()}: TFLOP/s without softmax, and the ratio\n\n"
        text += table(chosen, "head_dim, mask", size_and_mask, seqlen, _speed)
    text += (
        "\n## The two ways to run backward without softmax: TFLOP/s as three forwards / by the backward "
        "kernel\n\n"
    )
    text += (
        "Without FLASH_ATTENTION_NOSOFTMAX_BACKWARD in the environment it is: "
        f"{chosen[0]['backward_by']}.\n\n"
    )
    return text + table(chosen, "head_dim, mask", size_and_mask, seqlen, _both_backwards)


def _features(rows: list[dict]) -> str:
    text = f"\n## With other options: ratio at N = {tokens(rows[0]['seqlen'])}\n\n"
    ways = {r["name"]: r["backward_by"] for r in rows if r["direction"] == BACKWARD}
    listed = (
        f"{way}: {', '.join(name for name in ways if ways[name] == way)}"
        for way in dict.fromkeys(ways.values())
    )
    text += f"How backward runs without softmax: {'; '.join(listed)}.\n\n"
    return text + table(
        rows,
        "option, mask",
        lambda r: f"{r['name']}, {_mask(r['causal'])}",
        lambda r: f"head_dim {r['head_dim']} {r['direction']}",
        _ratio,
    )


def _decode(rows: list[dict]) -> str:
    text = f"\n## Decode: {rows[0]['nheads']} query heads, {rows[0]['nheads_k']} key heads, one new token\n\n"
    text += (
        "Time without softmax, the share of the copy bandwidth that reading K and V reaches, and the "
        "ratio.\n\n"
    )
    return text + table(
        rows,
        "head_dim, batch",
        lambda r: f"{r['head_dim']}, {r['batch']}",
        lambda r: f"context {tokens(r['seqlen'])}",
        _step,
    )


def _memory(rows: list[dict]) -> str:
    text = f"\n## Memory of a training step: batch 1, N = {tokens(rows[0]['seqlen'])}, causal, MiB\n\n"
    text += (
        "What a forward and backward takes beside q, k, v and dout: kept by the graph between the two, "
        "if nothing else keeps\n"
    )
    text += "the output; and at the peak of the step, beside dq, dk and dv.\n\n"
    text += _bar(["head_dim", "side", "kept", "peak", "dq, dk, dv"]) + _bar(["---"] * 5)
    amounts = ("kept_bytes", "peak_bytes", "gradient_bytes")
    return text + "".join(
        _bar([r["head_dim"], SIDES[r["side"]], *(_mib(r, name) for name in amounts)]) for r in rows
    )


def _activations(rows: list[dict]) -> str:
    text = ""
    for direction in (FORWARD, BACKWARD):
        chosen = [r for r in rows if r["direction"] == direction]
        text += f"\n## Activations, {direction}: TFLOP/s, and the ratio to softmax\n\n"
        text += table(
            chosen,
            "activation, head_dim, mask",
            lambda r: f"{r['name']}, {r['head_dim']} {_mask(r['causal'])}",
            lambda r: f"N = {tokens(r['seqlen'])}",
            _speed,
        )
    steps = [r for r in rows if r["direction"] == DECODE]
    if not steps:
        return text
    first = steps[0]
    text += (
        f"\n## Activations, decode: {first['nheads']} query heads, {first['nheads_k']} key heads, batch "
        f"{first['batch']}, context {tokens(first['seqlen'])} in pages of 256\n\n"
    )
    return text + table(
        steps, "activation", lambda r: r["name"], lambda r: f"head_dim {r['head_dim']}", _step
    )


PARTS = {
    "dense": _dense,
    "activations": _activations,
    "features": _features,
    "decode": _decode,
    "memory": _memory,
}


def skipped(record: dict) -> list[str]:
    """List every reason why something was not measured, once."""
    reasons = (r["skipped"] for part in PARTS for r in record.get(part, []))
    return list(
        dict.fromkeys(
            why
            for found in reasons
            for why in (found.values() if isinstance(found, dict) else [found])
            if why
        )
    )


def markdown(record: dict) -> str:
    """Make short tables of all parts in the record, below the run's device, date and settings."""
    yardsticks = record["yardsticks"]
    text = f"""# use_softmax=False against softmax on {record["device"]}

{record["date"]}, driver {record["driver"]}, CUDA {record["cuda"]}, torch {record["torch"]}, flash_attn {record["flash_attn"]}:

    {record["command"]}

{record["dtype"]}, {record["tokens"]} tokens in all, hidden {record["hidden"]}, medians. Ratio: time with softmax / time without, of the
same wheel and run, above 1 where `use_softmax=False` is faster. In the same run: cuBLAS 8192³ {yardsticks["matmul_tflops"]:.0f} TFLOP/s,
copy within device memory {yardsticks["copy_tb_per_s"]:.2f} TB/s. Written by `benchmarks/gpu_tables.py` from the JSON file beside this one.
"""  # noqa: E501
    text += "".join(write(record[part]) for part, write in PARTS.items() if record.get(part))
    if reasons := skipped(record):
        text += "\n## Not measured\n\n" + "".join(f"- {why}\n" for why in reasons)
    return text


def summary(record: dict) -> str:
    """Make the section of docs/speed.md: three lengths, and the ranges of the other parts."""

    def range_of(part: str) -> str:
        ratios = [r["ratio"] for r in record[part] if r["ratio"] is not None]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    dense = table(
        [r for r in record["dense"] if r["seqlen"] in (2048, 8192, 16384)],
        "head_dim, mask",
        lambda r: f"{r['head_dim']} {_mask(r['causal'])}",
        lambda r: f"{r['direction']} {tokens(r['seqlen'])}",
        _speed,
    )
    measured = (r for r in record["memory"] if r["side"] == SOFTMAX and not r["skipped"])
    step = max(measured, key=lambda r: r["peak_bytes"])
    kept, peak = (f"{step[name] / 2**20:.0f} MiB" for name in ("kept_bytes", "peak_bytes"))
    return (
        f"{record['device']}, CUDA {record['cuda']}, torch {record['torch']}, {record['date']}, "
        "`make bench-gpu`: `use_softmax=False` against softmax,\nsame wheel, same run; "
        f"{record['dtype']}, {tokens(record['tokens'])} tokens in all, hidden {record['hidden']}; "
        f"TFLOP/s without softmax, and the ratio to softmax.\n\n{dense}\n"
        f"With other options (dropout, softcap, ALiBi, windows, GQA, varlen) it is {range_of('features')} "
        f"times as fast,\ndecoding {range_of('decode')} times. Beside q, k, v and the gradients a training "
        f"step at {tokens(step['seqlen'])} tokens\nkeeps {kept} with softmax and takes {peak} at its peak, "
        "without softmax none. [All figures](results/gpu_vs_softmax.md)."
    )


def draw(record: dict, target: Path) -> None:
    """Plot TFLOP/s against N: a column for each head size, forward above backward; softmax dashed,
    use_softmax=False solid.
    """
    rows = record["dense"]
    head_dims = list(dict.fromkeys(r["head_dim"] for r in rows))
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.subplots(2, len(head_dims), sharex=True, sharey=True, squeeze=False)
    for line, direction in zip(grid, (FORWARD, BACKWARD)):
        line[0].set_ylabel(f"{direction}, TFLOP/s")
        for axes, head_dim in zip(line, head_dims):
            _panel(axes, [r for r in rows if (r["direction"], r["head_dim"]) == (direction, head_dim)])
            axes.axhline(
                record["yardsticks"]["matmul_tflops"], color="gray", linestyle=":", label="cuBLAS 8192³"
            )
    for axes, head_dim in zip(grid[0], head_dims):
        axes.set_title(f"head_dim {head_dim}", fontsize=11)
    seqlens = sorted({r["seqlen"] for r in rows})
    for axes in grid[-1]:
        axes.set_xlabel("N, tokens of a sequence")
        axes.set_xticks(seqlens, [tokens(n) for n in seqlens])
        axes.minorticks_off()
    grid[0][0].set_ylim(bottom=0)
    legend_below(figure, ncols=5, frameon=False)
    figure.suptitle(
        f"{record['device']}, {record['dtype']}, {tokens(record['tokens'])} tokens in all, hidden "
        f"{record['hidden']}, {record['date']}",
        fontsize=11,
    )
    figure.savefig(target, dpi=100)


def _panel(axes: Axes, rows: list[dict]) -> None:
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    for causal, color in MASK_COLORS.items():
        for side, style, label in ((SOFTMAX, "o--", "softmax"), (NO_SOFTMAX, "o-", "use_softmax=False")):
            points = sorted(
                (r["seqlen"], r["tflops"][side])
                for r in rows
                if r["causal"] == causal and side in r["tflops"]
            )
            if points:
                axes.plot(*zip(*points), style, color=color, markersize=4, label=f"{label}, {_mask(causal)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/gpu_vs_softmax.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs/results/gpu_vs_softmax.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/gpu_vs_softmax.png")
    args = parser.parse_args(argv)
    if not args.json.exists():
        print(
            f"error: {args.json} is not there: `make bench-gpu` writes it, on a machine with a GPU",
            file=sys.stderr,
        )
        return 2
    record = json.loads(args.json.read_text(encoding="utf-8"))
    args.markdown.write_text(markdown(record), encoding="utf-8")
    print(f"wrote {args.markdown}")
    if all(record.get(part) for part in PARTS):
        results_page.summarize(args.json, summary(record))
    if record.get("dense"):
        draw(record, args.plot)
        print(f"wrote {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
