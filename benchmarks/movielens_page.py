"""Write docs/results/hstu_movielens.md and docs/hstu_movielens.png from the record beside the page, which
examples/hstu_movielens.py writes; --json docs/results/hstu_movielens_gpu.json those of a GPU.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import results_page

NAME = "hstu_movielens"
MEASURES = {"hr": "HR@10", "ndcg": "NDCG@10"}


def attentions(record: dict) -> list[str]:
    return list(dict.fromkeys(run["attention"] for run in record["rows"]))


def of(record: dict, attention: str, measure: str) -> list[float]:
    """The test's measure of each seed."""
    return [run[measure] for run in record["rows"] if run["attention"] == attention]


def spread(numbers: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"


def markdown(record: dict) -> str:
    seeds = len({run["seed"] for run in record["rows"]})
    # Older records have the time of the whole run alone.
    seconds = record.get("seconds") or sum(run["seconds"] for run in record["rows"])
    name = f"{NAME}_gpu" if record["device"].startswith("cuda") else NAME
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    head = f"| attention | {' | '.join(MEASURES.values())} |\n|---|{'---|' * len(MEASURES)}\n"
    table = head + "".join(
        f"| {name} | {' | '.join(spread(of(record, name, measure)) for measure in MEASURES)} |\n"
        for name in attentions(record)
    )
    each = f"| seed | {' | '.join(f'{m}, {a}' for a in attentions(record) for m in MEASURES.values())} |\n"
    each += f"|---|{'---|' * len(MEASURES) * len(attentions(record))}\n"
    for seed in sorted({run["seed"] for run in record["rows"]}):
        cells = [
            f"{run[measure]:.4f}"
            for name in attentions(record)
            for run in record["rows"]
            if (run["seed"], run["attention"]) == (seed, name)
            for measure in MEASURES
        ]
        each += f"| {seed} | {' | '.join(cells)} |\n"
    return (
        "# A small HSTU on MovieLens-100k\n\n"
        "Written by `benchmarks/movielens_page.py` from the record of `examples/hstu_movielens.py`, whose "
        "docstring says what is computed.\n"
        f"{record['users']} users, {record['items']} items, {record['ratings']} ratings of {record['data']}; "
        "leave-one-out, all items ranked that the user has not\nrated before. "
        f"Settings: {settings}.\n"
        f"{record['device']}, threads {record['threads']}, torch {record['torch']}, {record['date']}, "
        f"{seconds:.0f} s in all.\n\n"
        f"Mean and standard deviation of {seeds} seeds, of the epoch with the best NDCG@10 of the "
        f"validation:\n\n{table}\n{each}\n"
        f"![NDCG@10 of the validation by epoch](../{name}.png)\n"
    )


def summary(record: dict) -> str:
    """docs/speed.md has no section of it."""
    return ""


def draw(record: dict, target: Path) -> None:
    """Draw the NDCG@10 of the validation by epoch: the mean of the seeds, and their range."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in attentions(record):
        curves = [
            [epoch["ndcg"] for epoch in run["curve"]] for run in record["rows"] if run["attention"] == name
        ]
        by_epoch = list(zip(*curves))
        epochs = range(1, len(by_epoch) + 1)
        (line,) = axes.plot(epochs, [statistics.mean(x) for x in by_epoch], label=name)
        axes.fill_between(
            epochs, [min(x) for x in by_epoch], [max(x) for x in by_epoch], alpha=0.2, color=line.get_color()
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("NDCG@10, validation")
    axes.set_title(f"MovieLens-100k, {len(curves)} seeds: mean and range", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(target, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(results_page.write(__doc__, NAME, markdown, summary, draw, None))
