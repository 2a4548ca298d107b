"""Measure errors of linear-time attention without softmax against float64, beside those of the quadratic
kernels, at many tokens.

    python benchmarks/linear_errors.py --json docs/results/linear_errors_h100.json

Inputs are normal numbers with mean 0 and with mean 1, whose sums grow with the length. softmax_scale is
1/256, so that results fit into float16. For each head size, dtype, mean and mask, and for out, dq, dk and dv,
it reports the largest error and the root mean square in linear time, as multiples of the quadratic kernel's.
Float64 results come from the linear-time primitive in PyTorch on the same device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from datetime import date
from pathlib import Path

import torch
from flash_attn import flash_attn_func
from flash_attn.nosoftmax.backends.linear import primitive
from flash_attn.nosoftmax.backends.linear.form import Form, Given
from torch import Tensor

SCALE = 1 / 256
NAMES = ("out", "dq", "dk", "dv")
LIMIT = 1.5


def exact(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, slopes: Tensor | None
) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) in float64."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    form = Form(SCALE, causal, decay=None if slopes is None else tuple(slopes.shape))
    given = Given(decay_slopes=slopes)
    return primitive.attend(q, k, v, form, given=given), *primitive.gradients(
        dout, q, k, v, form, given=given
    )


def computed(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, slopes: Tensor | None, algorithm: str
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(
        *leaves, causal=causal, softmax_scale=SCALE, use_softmax=False, algorithm=algorithm,
        decay_slopes=slopes,
    )  # fmt: skip
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest, root mean square)"""
    difference = actual.double() - expected
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seqlen", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--decay",
        action="store_true",
        help="with decay_slopes from 2^-14, whose decay is a factor e over 16k tokens, to 2^-6",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    record = {
        "date": date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "seqlen": args.seqlen,
        "decay": args.decay,
        "rows": [],
    }
    slopes = torch.logspace(-14, -6, args.heads, base=2, device=args.device) if args.decay else None
    worst = 0.0
    for head_dim, dtype, mean, causal in itertools.product(
        args.head_dims, (torch.bfloat16, torch.float16), (0.0, 1.0), (False, True)
    ):
        torch.manual_seed(0)
        shape = (1, args.seqlen, args.heads, head_dim)
        inputs = [(torch.randn(shape, device=args.device) + mean).to(dtype) for _ in range(4)]
        expected = exact(*inputs, causal, slopes)
        linear, quadratic = (
            computed(*inputs, causal, slopes, algorithm) for algorithm in ("linear", "quadratic")
        )
        row = {
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "mean": mean,
            "causal": causal,
        }
        for name, a, b, e in zip(NAMES, linear, quadratic, expected):
            (largest, root), (largest_quadratic, root_quadratic) = errors(a, e), errors(b, e)
            row[name] = {"largest": largest / largest_quadratic, "root_mean_square": root / root_quadratic}
            worst = max(worst, row[name]["largest"])
        record["rows"].append(row)
        said = "  ".join(
            f"{name} {row[name]['largest']:.2f} {row[name]['root_mean_square']:.2f}" for name in NAMES
        )
        print(
            f"head_dim {head_dim:3}  {row['dtype']:<8}  mean {mean:.0f}  {'causal' if causal else 'full  '}  "
            f"{said}",
            flush=True,
        )
        if args.json is not None:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{device}, {args.seqlen} tokens: the largest error is at most {worst:.2f} times the quadratic "
        f"kernel's, {LIMIT} is the limit"
    )
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
