"""Print the table of docs/distributed.md: bytes and times of each method for many ranks, computed from the
formulas there, not measured.
"""

from __future__ import annotations

import argparse

HEADS, HEAD_DIM, BYTES, WIDE = 16, 128, 2, 4  # bfloat16, sums in float32
RANKS = (8, 64, 1024)
TOKENS = (2**20, 2**22, 2**24)


def received(method: str, ranks: int, tokens: int) -> tuple[float, float]:
    """The bytes that a rank receives forward and backward, with as many heads of k as of q, zigzag."""
    here, others = tokens / ranks, ranks - 1
    keys = 2 * here * HEADS * HEAD_DIM
    if method == "state":
        states = 2 * others * HEADS * HEAD_DIM**2 * WIDE
        return states, states
    if method == "ulysses":
        moved = 4 * here * HEADS * HEAD_DIM * BYTES * others / ranks
        return moved, moved
    return others * keys * BYTES, others * keys * (BYTES + WIDE)


def size(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=400.0, help="per second and rank, to 8 ranks")
    parser.add_argument("--gigabytes-beyond", type=float, default=50.0, help="per second and rank, beyond")
    args = parser.parse_args()
    print("| tokens | ranks | `state` | `ulysses` | `allgather`, `ring` |")
    print("|---|---|---|---|---|")
    for tokens in TOKENS:
        for ranks in RANKS:
            speed = (args.gigabytes if ranks <= 8 else args.gigabytes_beyond) * 1e9
            cells = []
            for method in ("state", "ulysses", "allgather"):
                if method == "ulysses" and HEADS % ranks:
                    cells.append("–")
                    continue
                total = sum(received(method, ranks, tokens))
                cells.append(f"{size(total)}, {time(total / speed)}")
            print(f"| {tokens // 2**20}M | {ranks:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
