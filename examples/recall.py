"""Train a small model for each form of attention on multi-query associative recall, and measure its accuracy.

A sequence holds pairs, a key and a value in one token, then all of the keys in another order; at each of
these the model must say its value. (In Arora et al., arXiv 2312.04927, a value follows its key as a token of
its own, which first takes a layer that looks one token back.) Attention that is linear in the scores keeps
all pairs in a state of fixed size, and should fail when they are many; attention that singles out a key need
not.

    python examples/recall.py --setting cpu      # minutes on two cores
    for i in 1 2 3 4 5 6 7 8; do python examples/recall.py --setting gpu --share $i/8 & done; wait

The models are so small that a GPU waits for the host, and has time for several processes.
Writes docs/results/recall_*.json, after each model: a run that was ended goes on there, and --share as in
train_lm.py. `python examples/figures.py` makes the plot of docs/recipes.md from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from language_model import LanguageModel
from train_lm import DTYPES, options, record_of

SETTINGS = {
    "cpu": dict(layers=2, width=32, heads=2, batch=32, steps=600, rate=5e-3, pairs=[4, 8, 16], seeds=1),
    "gpu": dict(
        layers=2, width=64, heads=2, batch=256, steps=2000, rate=3e-3, pairs=[8, 16, 32, 64, 128], seeds=3
    ),
}
COMPARED = ["softmax", "sigmoid, -log n, qk-norm", "relu2, 1/n", "identity, norm after", "retention"]


def draw(batch: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens int64 (batch, 2 * pairs, 2) and the values to say (batch, 2 * pairs), -100 where none is
    asked.

    A token is (key, value), or (key, ASK) where it asks. Keys are 0 to 2 * pairs - 1, then come the values,
    then ASK. Each key is asked once. Drawn where the generator is.
    """
    order = [
        torch.rand(batch, n, generator=generator, device=generator.device).argsort(1)
        for n in (2 * pairs, pairs, pairs)
    ]
    keys = order[0][:, :pairs]
    values = 2 * pairs + order[1]
    asked, answers = keys.gather(1, order[2]), values.gather(1, order[2])
    tokens = torch.stack(
        [torch.cat([keys, asked], 1), torch.cat([values, 0 * values + 3 * pairs], 1)], dim=-1
    )
    return tokens, torch.cat([0 * values - 100, answers], dim=1)


def accuracy(form: str, pairs: int, seed: int, s: dict, device: str, dtype: torch.dtype) -> float:
    torch.manual_seed(seed)
    model = LanguageModel(form, s["layers"], s["width"], s["heads"], vocabulary=3 * pairs + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["rate"], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s["rate"], s["steps"])
    generator = torch.Generator(device).manual_seed(seed)
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    for _ in range(s["steps"]):
        tokens, targets = draw(s["batch"], pairs, generator)
        with autocast:
            logits = model(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    tokens, targets = draw(512, pairs, torch.Generator(device).manual_seed(10**6))
    with torch.no_grad(), autocast:
        said = model(tokens).argmax(-1)
    asked = targets >= 0
    return (said[asked] == targets[asked]).float().mean().item()


def main() -> None:
    parser = options(__doc__, SETTINGS, COMPARED)
    parser.add_argument("--pairs", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, help="how many; default: as the setting")
    args = parser.parse_args()
    s, device = dict(SETTINGS[args.setting]), "cuda" if args.setting == "gpu" else "cpu"
    pairs, seeds = args.pairs or s["pairs"], args.seeds or s["seeds"]
    s = {name: x for name, x in s.items() if name not in ("pairs", "seeds")}
    s["steps"], dtype = args.steps or s["steps"], "bf16" if device == "cuda" else "fp32"
    wanted = [
        dict(form=form, pairs=count, seed=seed)
        for seed in range(seeds)
        for count in pairs
        for form in args.forms
    ]

    def measure(**case) -> dict:
        return {"accuracy": round(accuracy(**case, s=s, device=device, dtype=DTYPES[dtype]), 4)}

    for row in record_of("recall", args, s, dtype).fill(wanted, args, measure):
        print(
            f"{row['form']:<26} {row['pairs']:>4} pairs, seed {row['seed']}  {row['accuracy']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
