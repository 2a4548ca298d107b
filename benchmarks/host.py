"""Measure what a small call costs the host: wall time of each backend, of softmax and of torch's own
attention.

At batch 1, 128 tokens, 8 heads and head_dim 64 a GPU waits for the host, so the wall time of many calls in a
row is the host's time. "entry" is the backend's own function, called without flash_attn.nosoftmax: the
primitive of linear time, flash_attn.cute's function, the extension's fwd and bwd. Writes JSON, and a page
beside it.

    python benchmarks/host.py --json docs/results/host.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func, flash_attn_varlen_func

BATCH, SEQLEN, NHEADS, HEAD_DIM = 1, 128, 8, 64
CALLS = {"cuda": 300, "cpu": 30}
TURNS = 9
PACKED = ", packed"
Contender = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contenders(device: str) -> dict[str, Contender]:
    """Name -> attention of q, k and v, (batch, seqlen, nheads, head_dim), or (batch * seqlen, nheads,
    head_dim) if the name ends with PACKED. Some may not run on this machine.
    """
    forced = {
        name: lambda q, k, v, name=name: flash_attn_func(
            q, k, v, causal=True, use_softmax=False, backend=name
        )
        for name in (("linear", "fa4", "fa2") if device == "cuda" else ("linear", "cpu"))
    }
    cu_seqlens = torch.tensor([0, SEQLEN], dtype=torch.int32, device=device)

    def packed(q, k, v, **options):
        lengths = (cu_seqlens, cu_seqlens, SEQLEN, SEQLEN)
        return flash_attn_varlen_func(q, k, v, *lengths, causal=True, use_softmax=False, **options)

    return {
        "torch SDPA": lambda q, k, v: F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ),
        "softmax": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        "auto": lambda q, k, v: flash_attn_func(q, k, v, causal=True, use_softmax=False),
        "auto, silu": lambda q, k, v: flash_attn_func(
            q, k, v, causal=True, use_softmax=False, activation="silu"
        ),
        **{f'backend="{name}"': call for name, call in forced.items()},
        f"auto{PACKED}": packed,
        **({f"fa4{PACKED}": lambda q, k, v: packed(q, k, v, backend="fa4")} if device == "cuda" else {}),
        **_entries(device),
    }


def _entries(device: str) -> dict[str, Contender]:
    """The backends' own functions; forward alone if a function has no derivative."""
    from flash_attn.nosoftmax.backends.linear import primitive
    from flash_attn.nosoftmax.backends.linear.form import Form

    form = Form(HEAD_DIM**-0.5, True)
    entries = {"linear's entry": torch.no_grad()(lambda q, k, v: primitive.attend(q, k, v, form))}
    if device == "cuda":

        def cute(q, k, v):
            from flash_attn import cute

            return cute.flash_attn_func(q, k, v, causal=True, use_softmax=False)[0]

        def extension(q, k, v):
            from flash_attn import extension

            return extension.load().fwd(
                q, k, v, None, None, 0.0, HEAD_DIM**-0.5, True, -1, -1, 0.0, False, None, False
            )[0]  # fmt: skip

        entries.update({"fa4's entry": cute, "fa2's entry": extension})
    return entries


def microseconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call, from many calls in a row and one wait for the GPU at the end."""
    start = time.perf_counter()
    for _ in range(CALLS[device]):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS[device] * 1e6


def measure(device: str) -> list[dict]:
    """Measure medians. The contenders take turns, so that a slow moment of the host affects all of them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, SEQLEN, NHEADS, HEAD_DIM)
    dense = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    rows: list[dict] = []
    timed: list[tuple[dict, str, Callable[[], object]]] = []
    for name, attend in contenders(device).items():
        row: dict = {"contender": name, "forward": None, "both": None}
        rows.append(row)
        try:
            q, k, v, dout = [x.flatten(0, 1) for x in dense] if name.endswith(PACKED) else dense
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            forward = partial(attend, q, k, v)
            microseconds(forward, device)  # compiles
            timed.append((row, "forward", forward))
            out = attend(*leaves)
            if out.requires_grad:
                both = partial(_both, attend, leaves, dout.reshape(out.shape))
                microseconds(both, device)
                timed.append((row, "both", both))
        except (ValueError, ImportError, NotImplementedError, RuntimeError, AttributeError) as error:
            row["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0]
    turns = [[microseconds(call, device) for _, _, call in timed] for _ in range(TURNS)]
    for (row, key, _), times in zip(timed, zip(*turns)):
        row[key] = statistics.median(times)
    for row in rows:
        print(
            f"{row['contender']:22} {_cell(row['forward']):>8} {_cell(row['both']):>8}  "
            f"{row.get('skipped', '')[:90]}"
        )
    return rows


def _both(attend: Contender, leaves: list[torch.Tensor], dout: torch.Tensor) -> None:
    torch.autograd.grad(attend(*leaves), leaves, dout)


def _cell(x: float | None) -> str:
    return "–" if x is None else f"{x:.0f}"


def page(record: dict) -> str:
    text = f"""# What a small call costs the host, on {record["device"]}

{record["date"]}, torch {record["torch"]}:

    {record["command"]}

Microseconds of wall time a call, causal, batch {BATCH}, {SEQLEN} tokens, {NHEADS} heads, head_dim {HEAD_DIM}, {record["dtype"]}.
Medians; the contenders take turns. An “entry” is the backend's own function, without the door. Written by
`benchmarks/host.py` with the JSON file beside this one.

| | forward | forward + backward |
|---|---|---|
"""  # noqa: E501
    for row in record["results"]:
        text += f"| {row['contender']} | {_cell(row['forward'])} | {_cell(row['both'])} |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=sorted(CALLS)
    )
    parser.add_argument(
        "--json", type=Path, help="write the results here, and a page with the ending .md beside it"
    )
    args = parser.parse_args()
    cuda = args.device == "cuda"
    record = {
        "device": torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "dtype": "bfloat16" if cuda else "float32",
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "results": measure(args.device),
    }
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.json.with_suffix(".md").write_text(page(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
