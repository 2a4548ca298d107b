"""Train a character-level language model once for each form of attention, with the same budget, and compare.

    python examples/train_lm.py --setting cpu      # minutes on two cores
    python examples/train_lm.py --setting gpu      # one GPU: 6 layers, width 384, 1,024 tokens, three seeds
    python examples/train_lm.py --setting gpu --dtype fp16 --seeds 1    # with GradScaler

Writes bits per character of the validation text, after steps and after seconds, into
docs/results/train_lm_*.json, after each model: a run that was ended goes on there. With two GPUs:

    for i in 1 2; do CUDA_VISIBLE_DEVICES=$((i - 1)) python examples/train_lm.py --share $i/2 & done; wait

`python examples/figures.py` makes the plot and the table of docs/recipes.md from it.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from language_model import FORMS, LanguageModel, batches, has_softmax, source_of, text
from record import Record, add_options

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SETTINGS = {
    "cpu": dict(layers=2, width=64, heads=4, tokens=128, batch=16, steps=250, seeds=1, rate=3e-3),
    "gpu": dict(layers=6, width=384, heads=6, tokens=1024, batch=16, steps=1000, seeds=3, rate=1e-3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATIONS = 12


def train(form: str, seed: int, s: dict, device: str, dtype: torch.dtype) -> dict:
    """Train one model; returns its curve: steps, seconds of training (of a CPU, its own) and bits per
    character, and how many steps the scaler of fp16 skipped.
    """
    torch.manual_seed(seed)
    model = LanguageModel(form, s["layers"], s["width"], s["heads"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["rate"], betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    training, validation = text()
    given = batches(training, s["batch"], s["tokens"], seed, device)
    curve: dict = {"steps": [], "seconds": [], "bits": []}
    clock = time.perf_counter if device == "cuda" else time.process_time  # other programs don't count
    seconds, began = 0.0, clock()
    for step in range(1, s["steps"] + 1):
        warm, progress = min(1.0, step / (s["steps"] / 20)), step / s["steps"]
        for group in optimizer.param_groups:
            group["lr"] = s["rate"] * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        inputs, targets = next(given)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step % max(1, s["steps"] // EVALUATIONS) == 0 or step == s["steps"]:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds += clock() - began
            curve["steps"].append(step)
            curve["seconds"].append(round(seconds, 2))
            curve["bits"].append(round(bits(model, validation, s, device, dtype), 4))
            began = clock()
    done = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    return {**curve, "skipped": s["steps"] - done}


@torch.no_grad()
def bits(model: torch.nn.Module, validation: torch.Tensor, s: dict, device: str, dtype: torch.dtype) -> float:
    """Return bits per character on eight batches of the validation text, the same for every model."""
    given, total = batches(validation, s["batch"], s["tokens"], 0, device), 0.0
    for _ in range(8):
        inputs, targets = next(given)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(inputs)
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()
    return total / 8 / math.log(2)


def options(doc: str, settings: dict, forms: list) -> argparse.ArgumentParser:
    """Return the command line that the examples share; forms: the default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=settings, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=forms)
    parser.add_argument("--steps", type=int)
    add_options(parser)
    return parser


def record_of(name: str, args: argparse.Namespace, setting: dict, dtype: str, **more: object) -> Record:
    """Return the record of an example: docs/results/<name>_<setting>.json, or --json."""
    cuda = args.setting == "gpu"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    head = torch.empty(
        0, setting["width"] // setting["heads"], dtype=DTYPES[dtype], device="cuda" if cuda else "cpu"
    )
    about = {
        "setting": setting,
        "dtype": dtype,
        "machine": f"{device}, torch {torch.__version__}",
        "softmax": "flash_attn" if has_softmax(head) else "torch",
        **more,
    }
    return Record(args.json or RESULTS / f"{name}_{args.setting}.json", about, args.fresh)


def main() -> None:
    parser = options(__doc__, SETTINGS, list(FORMS))
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seeds", type=int, help="how many; default: as the setting")
    args = parser.parse_args()
    s, device = dict(SETTINGS[args.setting]), "cuda" if args.setting == "gpu" else "cpu"
    seeds, dtype = args.seeds or s.pop("seeds"), args.dtype or ("fp32" if device == "cpu" else "bf16")
    s.pop("seeds", None)
    s["steps"] = args.steps or s["steps"]
    name = f"train_lm{'_fp16' if dtype == 'fp16' else ''}"
    record = record_of(name, args, s, dtype, text=source_of(*text()))
    wanted = [dict(form=form, seed=seed) for seed in range(seeds) for form in args.forms]
    for row in record.fill(wanted, args, lambda form, seed: train(form, seed, s, device, DTYPES[dtype])):
        print(
            f"{row['form']:<26} seed {row['seed']}  {row['bits'][-1]:.3f} bits per character, "
            f"{row['seconds'][-1]:.0f} s, {row['skipped']} skipped",
            flush=True,
        )
    bad = [row["form"] for row in record.rows() if not all(map(math.isfinite, row["bits"]))]
    if bad:
        raise RuntimeError(f"bits per character are not finite: {', '.join(bad)}")


if __name__ == "__main__":
    main()
