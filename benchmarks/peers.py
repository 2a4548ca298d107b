"""Time relu and sigmoid beside other kernels of the same function, on a GPU.

relu: FlexAttention, whose score_mod log(relu(s)) makes exp the identity, and whose output times exp(lse) has
the row sum taken out again. sigmoid: the package triton-sigmoid, with a bias of -log n. All compute the same
numbers; the largest difference to this package's is printed and kept.

    python benchmarks/peers.py --json docs/results/peers_h200.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import resumed
import torch
from flash_attn import flash_attn_func
from gpu_device import Gpu
from torch import Tensor

TOKENS, HIDDEN = 16384, 2048
OURS = ("fa2", "fa4")
PEERS = {"relu": "FlexAttention", "sigmoid": "triton-sigmoid"}
KEYS = ("activation", "causal", "head_dim", "seqlen")


def ours(activation: str, causal: bool, seqlen: int, backend: str) -> Callable[..., Tensor]:
    bias = -math.log(seqlen) if activation == "sigmoid" else 0.0
    return lambda q, k, v: flash_attn_func(
        q, k, v, causal=causal, use_softmax=False, activation=activation, sigmoid_bias=bias, backend=backend
    )


def peer(activation: str, causal: bool, seqlen: int) -> Callable[..., Tensor]:
    """Return the other kernel, on q, k and v of this package's layout (batch, seqlen, nheads, head_dim)."""
    if activation == "sigmoid":
        from triton_sigmoid.sigmoid_triton_dense import sigmoid_attention

        return lambda q, k, v: sigmoid_attention(
            q, k, v, is_causal=causal, scale=q.shape[-1] ** -0.5, sigmoid_bias=-math.log(seqlen)
        )
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # after 8 shapes it would not compile any more
    attend = torch.compile(flex_attention, dynamic=False)
    mask = (
        create_block_mask(lambda b, h, q, k: q >= k, None, None, seqlen, seqlen, device="cuda")
        if causal
        else None
    )

    def log_relu(score, b, h, q, k):
        return torch.log(torch.relu(score))

    def relu(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attend(q, k, v, score_mod=log_relu, block_mask=mask, return_lse=True)
        return (out * torch.exp(lse)[..., None].to(out.dtype)).transpose(1, 2)

    return relu


def measure(gpu: Gpu, activation: str, causal: bool, head_dim: int, seqlen: int) -> dict:
    shape = TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(4))
    functions = {name: ours(activation, causal, seqlen, name) for name in OURS}
    functions[PEERS[activation]] = peer(activation, causal, seqlen)
    found: dict = {"ms": {}, "why_not": {}, "difference": {}}
    first = None
    for direction in ("forward", "forward+backward"):
        backward, calls = direction != "forward", {}
        inputs = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        for name, function in functions.items():

            def call(function=function):
                out = function(*inputs)
                return torch.autograd.grad(out, inputs, dout) if backward else out

            try:
                out = call()
                calls[name] = call
            except (ImportError, RuntimeError, ValueError, TypeError) as error:
                reason = (str(error).splitlines() or [""])[0][:160]
                found["why_not"].setdefault(name, f"{direction}: {type(error).__name__}: {reason}")
                continue
            if not backward:
                first = out if first is None else first
                found["difference"][name] = ((out - first).abs().max() / first.abs().max()).item()
        found["ms"][direction] = dict(zip(calls, gpu.medians(list(calls.values()))))
    return found


def wanted(args: argparse.Namespace) -> Iterator[dict]:
    for seqlen in args.seqlens:
        for activation in PEERS:
            for head_dim in args.head_dims:
                for causal in (True, False):
                    yield dict(zip(KEYS, (activation, causal, head_dim, seqlen)))


def markdown(record: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    text = f"""# relu and sigmoid beside other kernels, on {record["device"]}

{record["date"]}, torch {record["torch"]}, {versions}:

    {record["command"]}

Median ms with a cold L2 cache, calls in turn, bfloat16, {TOKENS} tokens in all, hidden {HIDDEN}: forward /
forward and backward. FlexAttention computes relu as exp(log(relu(s))), and its row sum is taken out again.
Written by `benchmarks/peers.py` from the JSON file beside this one.
"""
    for activation, name in PEERS.items():
        rows = [row for row in record["rows"] if row["activation"] == activation]
        if not rows:
            continue
        names = [*OURS, name]
        text += f"\n## {activation}\n\n| head_dim, mask, N | " + " | ".join(names)
        text += f" | {name} / the faster of ours | largest difference |\n|" + "---|" * (len(names) + 3) + "\n"
        for row in sorted(rows, key=lambda r: (r["head_dim"], r["causal"], r["seqlen"])):
            ms = row["ms"] or {}
            cells, ratios = [], []
            for contender in names:
                times = [ms.get(way, {}).get(contender) for way in ("forward", "forward+backward")]
                cells.append(" / ".join("–" if x is None else f"{x:.2f}" for x in times))
            for way in ("forward", "forward+backward"):
                fast = [ms.get(way, {}).get(x) for x in OURS if ms.get(way, {}).get(x)]
                slow = ms.get(way, {}).get(name)
                ratios.append(f"{slow / min(fast):.2f}" if fast and slow else "–")
            worst = row.get("difference", {}).get(name)
            label = f"{row['head_dim']}, {'causal' if row['causal'] else 'full'}, {row['seqlen']}"
            cells += [" / ".join(ratios), "–" if worst is None else f"{worst:.1e}"]
            text += f"| {label} | " + " | ".join(cells) + " |\n"
    return text


def main() -> int:
    parser = resumed.options(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384, 8192, 2048])
    parser.add_argument("--budget-ms", type=float, default=200.0, help="time for one comparison")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device, and the kernels run on one")
    gpu = Gpu(args.budget_ms)
    record = resumed.started(args.json, ("triton-sigmoid", "triton", "flash-attn-4"))
    resumed.collect(record, args, wanted(args), lambda **case: measure(gpu, **case), markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
