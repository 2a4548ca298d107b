"""Make the plots and the table of docs/recipes.md from docs/results: python examples/figures.py.

Takes the results of a GPU where there are some, else those of a CPU, and says which.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- written by examples/figures.py -->\n", "<!-- end -->\n"


def results(name: str) -> dict:
    """Return the results of an example, with `place`, the setting that they come from."""
    for place in ("gpu", "cpu"):
        path = DOCS / "results" / f"{name}_{place}.json"
        if path.exists():
            return {**json.loads(path.read_text()), "place": place}
    raise SystemExit(f"docs/results has no {name}_*.json: python examples/{name}.py")


def mean(numbers: list) -> float:
    return sum(numbers) / len(numbers)


def save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def of_training(found: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for form, curves in found["curves"].items():
        heights = [mean(at) for at in zip(*(c["bits"] for c in curves))]
        for axis, places in zip(axes, ("steps", "seconds")):
            axis.plot([mean(at) for at in zip(*(c[places] for c in curves))], heights, label=form)
    for axis, label in zip(axes, ("steps", "seconds of training")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per character")
    axes[0].legend(fontsize=8)
    save(figure, "train_lm")


def of_recall(found: dict) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for form, by_pairs in found["accuracy"].items():
        axis.plot(
            list(map(int, by_pairs)), [100 * mean(x) for x in by_pairs.values()], marker="o", label=form
        )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("pairs to recall")
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 103)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "recall")


def of_stability(found: dict) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    for form, seen in found["forms"].items():
        axis.plot(range(1, len(seen["norms"]) + 1), seen["norms"], label=form, linewidth=1)
    axis.set_yscale("log")
    axis.set_xlabel("steps")
    axis.set_ylabel("gradient norm")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "stability")


def table(training: dict, recall: dict, stability: dict) -> str:
    s = training["setting"]
    pairs = list(next(iter(recall["accuracy"].values())))
    last = next(iter(training["curves"].values()))[0]["steps"][-1]
    lines = [
        f"Language model: {s['layers']} layers, width {s['width']}, {s['tokens']} tokens, "
        f"batch {s['batch']}, measured after {last} of {s['steps']} steps, {s['seeds']} seed(s), "
        f"{training['dtype']}, "
        f"{training['machine']}. Recall: {recall['setting']['steps']} steps, "
        f"width {recall['setting']['width']}, {recall['machine']}.",
        "",
        "| form | bits per character | seconds | recall of " + " | ".join(f"{n} pairs" for n in pairs) + " |",
        "|---|---|---|" + "---|" * len(pairs),
    ]
    for form, curves in training["curves"].items():
        last = [curve["bits"][-1] for curve in curves]
        spread = f" ± {(max(last) - min(last)) / 2:.3f}" if len(last) > 1 else ""
        recalled = recall["accuracy"].get(form, {})
        cells = [f"{100 * mean(recalled[n]):.0f} %" if n in recalled else "–" for n in pairs]
        seconds = mean([curve["seconds"][-1] for curve in curves])
        lines.append(f"| {form} | {mean(last):.3f}{spread} | {seconds:.0f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Gradient norms, {stability['setting']['steps']} steps of {stability['setting']['tokens']} tokens:",
        "",
    ]
    lines += [
        "| form | median of the second half | largest of the second half | last loss |",
        "|---|---|---|---|",
    ]
    for form, seen in stability["forms"].items():
        half = sorted(seen["norms"][len(seen["norms"]) // 2 :])
        lines.append(f"| {form} | {half[len(half) // 2]:.2f} | {half[-1]:.2f} | {seen['losses'][-1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    training, recall, stability = results("train_lm"), results("recall"), results("stability")
    of_training(training)
    of_recall(recall)
    of_stability(stability)
    page = DOCS / "recipes.md"
    written = f"{BEGIN}{table(training, recall, stability)}{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: written, page.read_text(), count=1, flags=re.DOTALL))


if __name__ == "__main__":
    main()
