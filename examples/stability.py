"""Train on long sequences without gradient clipping, at a learning rate four times too high: softmax beside
sigmoid.

    python examples/stability.py --setting cpu      # minutes on two cores: 512 tokens
    python examples/stability.py --setting gpu      # 8,192 tokens

Writes the gradient norm and the loss of each step into docs/results/stability_*.json, whatever comes out, and
stops a form at a loss that is not finite. `python examples/figures.py` makes the plot of docs/recipes.md from
it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from language_model import LanguageModel, batches, source_of, text
from train_lm import options, record_of

SETTINGS = {
    "cpu": dict(layers=2, width=64, heads=4, tokens=512, batch=4, steps=60, rate=3e-3),
    "gpu": dict(layers=6, width=384, heads=6, tokens=8192, batch=2, steps=500, rate=1e-3),
}
TOO_HIGH = 4
COMPARED = ["softmax", "sigmoid, -log n, qk-norm"]


def watched(form: str, s: dict, device: str) -> dict:
    """Return the gradient norm and the loss of each step."""
    torch.manual_seed(0)
    model = LanguageModel(form, s["layers"], s["width"], s["heads"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TOO_HIGH * s["rate"], betas=(0.9, 0.95))
    given = batches(text()[0], s["batch"], s["tokens"], 0, device)
    seen: dict = {"norms": [], "losses": []}
    for _ in range(s["steps"]):
        inputs, targets = next(given)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()])).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            seen["stopped"] = len(seen["norms"])
            break
        seen["norms"].append(round(norm, 5))
        seen["losses"].append(round(loss.item(), 4))
        optimizer.step()
    return seen


def main() -> None:
    args = options(__doc__, SETTINGS, COMPARED).parse_args()
    s, device = dict(SETTINGS[args.setting]), "cuda" if args.setting == "gpu" else "cpu"
    s["steps"] = args.steps or s["steps"]
    record = record_of("stability", args, s, "bf16" if device == "cuda" else "fp32", text=source_of(*text()))
    wanted = [dict(form=form) for form in args.forms]
    for row in record.fill(wanted, args, lambda form: watched(form, s, device)):
        half = sorted(row["norms"][len(row["norms"]) // 2 :]) or [math.nan]
        spread = f"median {half[len(half) // 2]:.3f}, largest {half[-1]:.3f}"
        last = row["losses"][-1] if row["losses"] else math.nan
        print(f"{row['form']:<26} gradient norm of the second half: {spread}; last loss {last}", flush=True)


if __name__ == "__main__":
    main()
