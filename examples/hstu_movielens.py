"""Predict the next item on MovieLens-100k: a small HSTU against the same network with softmax.

    pip download --no-deps recbole
    python examples/hstu_movielens.py recbole-*.whl

The ratings lie in the wheel of recbole and are read from it; GroupLens allows research use and no
redistribution. Each user is the sequence of the items they rated, by time. The last item is the test, the
one before it the validation, and the network learns to predict each item before from those in front of it
(leave-one-out). A prediction ranks all items that the user has not rated before; HR@10 is how often the right
one is among the first ten, NDCG@10 weighs its rank r by 1 / log2(r + 1).

The block is that of HSTU (Zhai et al., arXiv 2402.17152) without its relative bias:

    U, V, Q, K = SiLU(Linear(LayerNorm(x)));  x + Linear(LayerNorm(attention(Q, K, V)) * U)

Both networks have the same parameters. Only attention differs: silu of the scores divided by the longest
length, or softmax of them. Writes what it finds to --json after each network, and goes on there if it was
ended. benchmarks/movielens_page.py makes a page and a plot of it. On a GPU, which has time for several
processes:

    for i in 1 2 3 4 5; do python examples/hstu_movielens.py recbole-*.whl --device cuda --share $i/5 \\
        --json docs/results/hstu_movielens_gpu.json & done; wait
"""

from __future__ import annotations

import argparse
import math
import platform
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from flash_attn import flash_attn_func
from flash_attn.masks import HSTU
from language_model import causal_softmax
from record import Record, add_options
from torch import Tensor, nn

RATINGS = "ml-100k.inter"
PADDING = 0
TOP = 10
ATTENTION = ("silu", "softmax")
AUTOCAST = {"cuda": torch.bfloat16}  # device type -> dtype; float32 elsewhere


class Settings(NamedTuple):
    """longest: how many of the last items of a user the network sees. All else is as usual."""

    epochs: int = 30
    longest: int = 50
    width: int = 64
    heads: int = 2
    blocks: int = 2
    users_at_once: int = 64
    learning_rate: float = 1e-3
    dropout: float = 0.3


# ---- The data


def sequences(wheel: Path) -> list[list[int]]:
    """Return the items of each user in the order of time. Items are numbered from 1. Ratings of one second
    keep the order of the file.
    """
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"/{RATINGS}"))
        _, *lines = archive.read(name).decode().splitlines()
    users: dict[str, list[tuple[float, str]]] = {}
    for line in lines:
        user, item, _, at = line.split("\t")
        users.setdefault(user, []).append((float(at), item))
    numbers: dict[str, int] = {}
    return [
        [numbers.setdefault(item, len(numbers) + 1) for _, item in sorted(given, key=lambda pair: pair[0])]
        for given in users.values()
    ]


def padded(rows: list[list[int]], longest: int, device: torch.device) -> Tensor:
    """Return the last items of each row, (users, length), with PADDING behind them."""
    rows = [row[-longest:] for row in rows]
    length = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows], device=device)


# ---- The network


class Block(nn.Module):
    """One block of HSTU, with silu attention or softmax attention."""

    def __init__(self, settings: Settings, attention: str) -> None:
        super().__init__()
        width = settings.width
        self.attention, self.heads, self.longest = attention, settings.heads, settings.longest
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (users, length, width). Padding lies behind the items, where no item sees it."""
        u, v, q, k = nn.functional.silu(self.into(self.before(x))).chunk(4, dim=-1)
        v, q, k = (part.unflatten(-1, (self.heads, -1)) for part in (v, q, k))
        if self.attention == "softmax":
            seen = causal_softmax(q, k, v)
        else:
            seen = flash_attn_func(
                q, k, v, use_softmax=False, activation="silu", normalization=1.0 / self.longest, mask=HSTU()
            )
        return x + self.out(self.dropout(self.behind(seen.flatten(-2).to(x.dtype)) * u))


class Recommender(nn.Module):
    """Items and positions, blocks, and the scores of all items by the same embeddings."""

    def __init__(self, items: int, settings: Settings, attention: str) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, settings.width, padding_idx=PADDING)
        self.positions = nn.Embedding(settings.longest, settings.width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(settings, attention) for _ in range(settings.blocks)))
        self.last = nn.LayerNorm(settings.width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: item numbers (users, length). Returns a vector for each, (users, length, width)."""
        at = torch.arange(rows.shape[1], device=rows.device)
        x = self.items(rows) * math.sqrt(self.items.embedding_dim) + self.positions(at)
        return self.last(self.blocks(self.dropout(x)))

    def scores(self, vectors: Tensor) -> Tensor:
        return vectors @ self.items.weight.mT


# ---- Training and evaluation


def batches(rows: list[list[int]], settings: Settings, order: Tensor) -> Iterator[list[list[int]]]:
    chosen = order.tolist()
    for first in range(0, len(chosen), settings.users_at_once):
        yield [rows[i] for i in chosen[first : first + settings.users_at_once]]


def autocast(device: torch.device) -> torch.autocast:
    """Return autocast for one pass. It keeps the cast weights while it lasts, so no step may lie in it."""
    return torch.autocast(device.type, AUTOCAST.get(device.type), enabled=device.type in AUTOCAST)


def train(
    network: Recommender, rows: list[list[int]], settings: Settings, optimizer: torch.optim.Optimizer
) -> float:
    """Learn once from every user; return the mean loss."""
    network.train()
    device, losses = network.items.weight.device, []
    for users in batches(rows, settings, torch.randperm(len(rows))):
        given = padded(users, settings.longest + 1, device)
        known, following = given[:, :-1], given[:, 1:]
        real = following != PADDING
        with autocast(device):
            scores = network.scores(network(known)[real])
        loss = nn.functional.cross_entropy(scores.float(), following[real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def ranks(scores: Tensor, seen: list[list[int]], right: Tensor) -> Tensor:
    """Return the rank of the right item of each user, from 1, among all that the user has not rated before.

    scores: (users, items + 1). An item with the same score counts as before it.
    """
    scores = scores.clone()
    scores[:, PADDING] = -math.inf
    users = [i for i, items in enumerate(seen) for _ in items]
    rated = torch.tensor([users, sum(seen, [])], device=scores.device)
    scores[rated[0], rated[1]] = -math.inf
    own = scores.gather(1, right[:, None])
    return (scores >= own).sum(1)


@torch.no_grad()
def evaluate(network: Recommender, rows: list[list[int]], settings: Settings) -> tuple[float, float]:
    """Return (HR@10, NDCG@10) of predicting the last item of each row from those before it."""
    network.eval()
    device, found = network.items.weight.device, []
    for users in batches(rows, settings, torch.arange(len(rows))):
        known = [row[:-1] for row in users]
        with autocast(device):
            vectors = network(padded(known, settings.longest, device))
        last = torch.tensor([min(len(row), settings.longest) - 1 for row in known], device=device)
        right = torch.tensor([row[-1] for row in users], device=device)
        with autocast(device):
            scores = network.scores(vectors[torch.arange(len(users), device=device), last])
        found.append(ranks(scores.float(), known, right).cpu())
    rank = torch.cat(found).double()
    hit = rank <= TOP
    return hit.double().mean().item(), (hit / torch.log2(rank + 1)).mean().item()


def run(rows: list[list[int]], attention: str, seed: int, settings: Settings, device: torch.device) -> dict:
    """Train one network, and test it as it was in the epoch with the best NDCG@10 of the validation."""
    started = time.monotonic()
    torch.manual_seed(seed)
    network = Recommender(max(map(max, rows)), settings, attention).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    curve, best, test = [], -1.0, (0.0, 0.0)
    for _ in range(settings.epochs):
        loss = train(network, [row[:-2] for row in rows], settings, optimizer)
        _, ndcg = evaluate(network, [row[:-1] for row in rows], settings)
        curve.append({"loss": loss, "ndcg": ndcg})
        if ndcg > best:
            best, test = ndcg, evaluate(network, rows, settings)
    seconds = round(time.monotonic() - started, 1)
    return {"hr": test[0], "ndcg": test[1], "seconds": seconds, "curve": curve}


def about(args: argparse.Namespace, settings: Settings, rows: list[list[int]]) -> dict:
    """Return what a reader of the record must know beside the runs."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine()
    return {
        "data": args.wheel.name,
        "users": len(rows),
        "items": max(map(max, rows)),
        "ratings": sum(map(len, rows)),
        "settings": settings._asdict(),
        "torch": torch.__version__,
        "device": f"{args.device.type}, {device}",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path, help="of recbole: pip download --no-deps recbole")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    add_options(parser)
    for name, value in Settings()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    rows = sequences(args.wheel)
    path = args.json or Path("hstu_movielens.json")
    record = Record(path, about(args, settings, rows), args.fresh)
    wanted = [dict(attention=attention, seed=seed) for seed in args.seeds for attention in ATTENTION]
    for row in record.fill(wanted, args, partial(run, rows, settings=settings, device=args.device)):
        print(
            f"seed {row['seed']}  {row['attention']:8} "
            f"HR@{TOP} {row['hr']:.4f}  NDCG@{TOP} {row['ndcg']:.4f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
