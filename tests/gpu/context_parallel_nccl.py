"""Compare a sequence over several GPUs with one GPU: every method and layout, with every kind of score.

    torchrun --standalone --nproc-per-node 2 tests/gpu/context_parallel_nccl.py

Most of its time goes to compilers: a run for each of --scores, side by side, takes a fifth of it.

Output, dq, dk and dv of this rank's tokens against those of the whole sequence on its own GPU, in bfloat16
and in float16, dense and packed, causal and full. Without a GPU the script runs on gloo, in float32 and
bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from itertools import accumulate

import torch
import torch.distributed as dist
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.distributed import ContextParallel
from flash_attn.masks import HSTU, Intervals
from torch import Tensor

METHODS, LAYOUTS = ("state", "ulysses", "allgather", "ring"), ("contiguous", "zigzag")
SCORES = ("identity", "decay", "silu", "sigmoid", "1/visible", "alibi", "window", "rows", "hstu", "intervals")
NOT_CAUSAL = "window", "hstu", "intervals"  # they say themselves what is visible
# Lengths that no tile divides; packed sequences begin and end anywhere, and some lie on several ranks.
TOKENS, LENGTHS = 1001, (130, 0, 1, 500, 370)
HEADS, HEADS_K = 8, 4
# In units of the rounding of the largest value: both sides round P and the results to 16 bit, at other
# places. In float32 the order of sums counts.
SLACK = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 16.0}


def options_of(score: str, tokens: int, device: torch.device) -> dict:
    slopes = torch.linspace(0.0, 0.3, HEADS, device=device) ** 2
    return {
        "identity": dict(normalization=1 / tokens),
        "decay": dict(decay_slopes=slopes, normalization=1 / 64),
        "silu": dict(activation="silu", normalization="1/n"),
        "sigmoid": dict(activation="sigmoid", sigmoid_bias="-log n"),
        "1/visible": dict(normalization="1/visible"),
        "alibi": dict(alibi_slopes=slopes, activation="softplus", normalization=1 / 64),
        "window": dict(window_size=(90, 30), activation="relu", normalization=1 / 64),
        "rows": dict(normalization="rows"),
        "hstu": dict(activation="silu", normalization="1/visible"),
        "intervals": dict(activation="silu", normalization=1 / 64),
    }[score]


def hstu(packed: bool, tokens: int, device: torch.device) -> HSTU:
    targets, contexts = ((30, 0, 1, 100, 40), (8, 0, 0, 3, 0)) if packed else ((tokens // 10, 0), (8, 3))
    return HSTU(*(torch.tensor(x, device=device) for x in (targets, contexts)), max_attn_len=60)


def intervals(lengths: tuple, device: torch.device) -> Intervals:
    """The first 16 and the last 90 keys before each row."""
    row = torch.cat([torch.arange(n, device=device) for n in lengths])
    starts = torch.stack([torch.zeros_like(row), (row - 89).clamp(min=16)], -1)
    ends = torch.stack([(row + 1).clamp(max=16), row + 1], -1)
    return Intervals(starts, torch.maximum(starts, ends))


def call(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, options: dict) -> Tensor:
    if offsets is None:
        return flash_attn_func(q, k, v, use_softmax=False, **options)
    longest = max(LENGTHS)
    return flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, use_softmax=False, **options)


def results(qkv: list, dout: Tensor, offsets: Tensor | None, options: dict) -> list:
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = call(*qkv, offsets, options)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def worst(method: str, layout: str, score: str, packed: bool, causal: bool, dtype, args, device):
    """Return the largest error of all ranks, in units of the bound; None where the method does not apply."""
    offsets = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device) if packed else None
    tokens = (sum(LENGTHS),) if packed else (2, args.tokens)
    generator = torch.Generator().manual_seed(0)
    heads = HEADS, HEADS_K, HEADS_K, HEADS
    q, k, v, dout = (
        torch.randn(*tokens, n, args.head_dim, generator=generator).to(device, dtype) for n in heads
    )
    options = {"causal": causal and score not in NOT_CAUSAL, **options_of(score, tokens[-1], device)}
    dim = 0 if packed else 1
    cp = ContextParallel(
        None, layout, method=method, **(dict(cu_seqlens=offsets) if packed else dict(seqlen=args.tokens))
    )
    own = dict(options)
    if score == "rows":
        options["normalization"] = torch.rand(tokens, generator=generator).to(device) / 64
        own["normalization"] = cp.shard(options["normalization"], dim)
    elif score == "hstu":
        options["mask"] = own["mask"] = hstu(packed, args.tokens, device)
    elif score == "intervals":
        mask = intervals(LENGTHS if packed else (args.tokens,), device)
        mask = mask if packed else Intervals(*(x.expand(2, *x.shape) for x in mask))
        options["mask"], own["mask"] = mask, Intervals(*(cp.shard(x, dim) for x in mask))
    given = [cp.shard(x, dim) for x in (q, k, v)]
    try:
        found = results(given, cp.shard(dout, dim), offsets, {**own, "context_parallel": cp})
    except (ValueError, NotImplementedError) as error:
        if not str(error).startswith((f'method="{method}" is not possible', "no backend can run")):
            raise
        return None
    expected = results([q, k, v], dout, offsets, options)
    ratio = 0.0
    for x, y in zip(found, expected, strict=True):
        here = cp.shard(y, dim)
        assert x.shape == here.shape and x.dtype == here.dtype == dtype
        bound = SLACK[dtype] * torch.finfo(dtype).eps * y.abs().max().item()
        error = (x.float() - here.float()).abs().max().item() if x.numel() else 0.0
        ratio = max(ratio, error / bound if error == error else float("inf"))
    largest = torch.tensor(ratio, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--scores", nargs="*", default=SCORES, choices=SCORES)
    parser.add_argument("--dtypes", nargs="*", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda" if cuda else "cpu")
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.bfloat16)
    if args.dtypes:
        dtypes = tuple(getattr(torch, name) for name in args.dtypes)
    wrong = compared = 0
    for method, layout, score in itertools.product(args.methods, LAYOUTS, args.scores):
        cells = []
        for packed, causal, dtype in itertools.product((False, True), (True, False), dtypes):
            ratio = worst(method, layout, score, packed, causal, dtype, args, device)
            if ratio is not None:
                compared += 1
                wrong += not ratio <= 1.0
                cells.append(f"{ratio:.2f}")
        if dist.get_rank() == 0:
            print(f"{method:9} {layout:10} {score:9} {' '.join(cells) or 'does not apply'}", flush=True)
    if dist.get_rank() == 0:
        print(f"{compared} cases, {wrong} beyond the bound; errors are in units of it")
    dist.destroy_process_group()
    return 1 if wrong or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
