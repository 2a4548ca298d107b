"""Make the plots and tables of docs/recipes.md from docs/results: python examples/figures.py.

A section for a GPU and one for a CPU, each of the records that are there, however far they have come.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from language_model import FORMS

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- written by examples/figures.py -->\n", "<!-- end -->\n"
PLACES = {"gpu": "On a GPU", "cpu": "On a CPU"}


def record(name: str, place: str) -> dict | None:
    path = DOCS / "results" / f"{name}_{place}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def by_form(found: dict) -> dict[str, list[dict]]:
    """Return the rows of each form that has some, in the order of FORMS and of the seeds."""
    rows = {form: [row for row in found["rows"] if row["form"] == form] for form in FORMS}
    return {form: sorted(own, key=lambda row: row.get("seed", 0)) for form, own in rows.items() if own}


def mean(numbers: list) -> float:
    return sum(numbers) / len(numbers)


def lines_of(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def where(found: dict) -> str:
    s = found["setting"]
    softmax = "" if found["softmax"] == "flash_attn" else ", softmax by torch's own attention"
    return (
        f"{found['machine']}, {found['dtype']}{softmax}: {s['layers']} layers, width {s['width']}, "
        f"{s['heads']} heads, batch {s['batch']}, {s['steps']} steps"
    )


# ---- Bits per character


def of_training(found: dict, halves: dict | None) -> str:
    """halves: the record in fp16, if there is one."""
    rows, scaled = [], by_form(halves) if halves else {}
    for form, curves in by_form(found).items():
        last = [curve["bits"][-1] for curve in curves]
        spread = f" ± {(max(last) - min(last)) / 2:.3f}" if len(last) > 1 else ""
        row = [form, f"{mean(last):.3f}{spread}", str(len(last)), f"{curves[0]['seconds'][-1]:.0f}"]
        if halves:
            own = scaled.get(form)
            row.append(f"{mean([x['bits'][-1] for x in own]):.3f}" if own else "–")
            row.append(str(sum(x["skipped"] for x in own)) if own else "–")
        rows.append(row)
    head = ["form", "bits per character", "seeds", "seconds of the first"]
    head += ["in fp16 with GradScaler", "steps it skipped"] if halves else []
    place = f"{where(found)}, {found['setting']['tokens']} tokens.\nText: {found['text']}."
    return f"Language model. {place}\n\n{lines_of(head, rows)}"


def draw_training(found: dict, axes: list) -> None:
    """Draw bits against steps, the mean of the seeds, and against seconds, of the first seed."""
    for form, curves in by_form(found).items():
        first = curves[0]
        axes[0].plot(first["steps"], [mean(at) for at in zip(*(c["bits"] for c in curves))], label=form)
        axes[1].plot(first["seconds"], first["bits"], label=form)
    for axis, label in zip(axes, ("steps", "seconds of training, first seed")):
        axis.set_xlabel(label)
        axis.set_ylabel("bits per character")


# ---- Recall


def accuracies(rows: list[dict]) -> dict[int, float]:
    """Return the mean accuracy by the number of pairs."""
    counts = sorted({row["pairs"] for row in rows})
    return {n: mean([row["accuracy"] for row in rows if row["pairs"] == n]) for n in counts}


def of_recall(found: dict) -> str:
    forms = {form: accuracies(rows) for form, rows in by_form(found).items()}
    counts = sorted({n for of_form in forms.values() for n in of_form})
    rows = [
        [form, *(f"{100 * of_form[n]:.0f} %" if n in of_form else "–" for n in counts)]
        for form, of_form in forms.items()
    ]
    seeds, head = len({row["seed"] for row in found["rows"]}), ["form", *(f"{n} pairs" for n in counts)]
    return f"Recall. {where(found)}, {seeds} seed(s).\n\n{lines_of(head, rows)}"


def draw_recall(found: dict, axes: list) -> None:
    for form, rows in by_form(found).items():
        of_form = accuracies(rows)
        axes[0].plot(list(of_form), [100 * x for x in of_form.values()], marker="o", label=form)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("pairs to recall")
    axes[0].set_ylabel("accuracy, %")
    axes[0].set_ylim(0, 103)


# ---- Gradient norms


def of_stability(found: dict) -> str:
    rows = []
    for form, (seen,) in by_form(found).items():
        half = sorted(seen["norms"][len(seen["norms"]) // 2 :])
        numbers = half and (half[len(half) // 2], half[-1], seen["losses"][-1])
        cells = [f"{x:.2f}" for x in numbers] or ["–"] * 3
        rows.append([form, *cells, str(seen.get("stopped", "–"))])
    head = ["form", "median of the second half", "largest of it", "last loss", "stopped at step"]
    place = f"{where(found)}, {found['setting']['tokens']} tokens.\nText: {found['text']}."
    return f"Gradient norms. {place}\n\n{lines_of(head, rows)}"


def draw_stability(found: dict, axes: list) -> None:
    for form, (seen,) in by_form(found).items():
        axes[0].plot(range(1, len(seen["norms"]) + 1), seen["norms"], label=form, linewidth=1)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("steps")
    axes[0].set_ylabel("gradient norm")


# ---- The page

DRAWN = {"train_lm": (draw_training, 2), "recall": (draw_recall, 1), "stability": (draw_stability, 1)}
TITLES = {"train_lm": "bits per character", "recall": "recall", "stability": "gradient norms"}


def draw(name: str, place: str) -> None:
    drawn, count = DRAWN[name]
    figure, axes = plt.subplots(1, count, figsize=(5.5 * count, 4.2), sharey=True, squeeze=False)
    drawn(record(name, place), list(axes[0]))
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}_{place}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def section(place: str) -> str:
    """Return what is said of the records of a place, each with its plot; nothing without records."""
    texts = {
        "train_lm": lambda found: of_training(found, record("train_lm_fp16", place)),
        "recall": of_recall,
        "stability": of_stability,
    }
    parts = [
        f"{text(found)}\n![{TITLES[name]}]({name}_{place}.png)\n"
        for name, text in texts.items()
        if (found := record(name, place)) is not None
    ]
    return "\n".join([f"### {PLACES[place]}\n", *parts]) if parts else ""


def written() -> str:
    return BEGIN + "\n".join(filter(None, map(section, PLACES))) + END


def main() -> None:
    for name in DRAWN:
        for place in PLACES:
            if record(name, place) is not None:
                draw(name, place)
    page = DOCS / "recipes.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: written(), text, count=1, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
