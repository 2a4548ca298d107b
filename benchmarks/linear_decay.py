"""Time a decay in linear time, on a GPU: beside no decay, beside fla's kernels of the same function, and a
step of decoding beside the speed of a copy.

Sequences are one of a batch ("one"), as many as make TOKENS tokens ("many"), or as many of uneven lengths,
packed ("packed"). Slopes are those of retention (arXiv 2307.08621). fla.ops.retention and
fla.ops.lightning_attn call chunk_simple_gla with a constant decay of each head, as this script does. A short
call waits for its host, so calls are timed again as the replay of a CUDA graph.

    python benchmarks/linear_decay.py --json docs/results/linear_decay_h200.json

Rows go to --json as they come, and a second run measures what is missing there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import resumed
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.linear import linear_attention_step
from linear_vs_quadratic import copy_rate, graph_ms, median_ms
from torch import Tensor

NHEADS, TOKENS = 16, 16384
STEP = {"sequences": 256, "nheads": 32, "nheads_k": 8, "head_dim": 128}
CONTENDERS = ("linear", "linear+decay", "fla", "fla+decay")
LAYOUTS = ("one", "many", "packed")
KEYS = ("layout", "head_dim", "seqlen", "direction", "contender")


def retention(nheads: int) -> Tensor:
    """The slopes -log(1 - 2^(-5 - head)) of retention, float32 (nheads,)."""
    return -torch.log1p(-(2.0 ** (-5 - torch.arange(nheads, device="cuda").double()))).float()


def uneven(tokens: int, seqlen: int) -> Tensor:
    """Offsets, int32, of tokens // seqlen sequences with lengths between 0.5 and 1.5 times the mean."""
    count = max(tokens // seqlen, 1)
    shares = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    ends = (shares.cumsum(0) / shares.sum() * tokens).round()
    return torch.cat([torch.zeros(1), ends]).to("cuda", torch.int32)


def attention(contender: str, layout: str, cu_seqlens: Tensor | None) -> Callable[..., Tensor]:
    """Return causal attention of q, k and v, (batch, seqlen, nheads, head_dim) or packed."""
    slopes = retention(NHEADS) if contender.endswith("+decay") else None
    if contender.startswith("linear"):
        options = {"causal": True, "use_softmax": False, "backend": "linear", "decay_slopes": slopes}
        if layout == "packed":
            longest = int(cu_seqlens.diff().max())
            lengths = (cu_seqlens, cu_seqlens, longest, longest)
            return lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, **options)
        return lambda q, k, v: flash_attn_func(q, k, v, **options)
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    more = {} if layout != "packed" else {"cu_seqlens": cu_seqlens.long()}

    def attend(q, k, v):
        if layout == "packed":
            q, k, v = q[None], k[None], v[None]
        scale = q.shape[-1] ** -0.5
        if slopes is None:
            out = chunk_linear_attn(q, k, v, scale=scale, normalize=False, **more)[0]
        else:
            out = chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=scale, **more)[0]
        return out[0] if layout == "packed" else out

    return attend


def measure_one(layout: str, head_dim: int, seqlen: int, direction: str, contender: str) -> dict:
    cu_seqlens = uneven(TOKENS, seqlen) if layout == "packed" else None
    batch = 1 if layout == "one" else TOKENS // seqlen
    shape = (TOKENS, NHEADS, head_dim) if layout == "packed" else (batch, seqlen, NHEADS, head_dim)
    backward = direction != "forward"
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    attend = attention(contender, layout, cu_seqlens)

    def run():
        out = attend(*inputs)
        if backward:
            torch.autograd.grad(out, inputs, dout)

    with torch.autograd.set_multithreading_enabled(False):
        ms = median_ms(run, "cuda", 0)
        return {"ms": ms, "graph_ms": graph_ms(run) if ms <= 3.0 else None}


def measure_step(contender: str) -> dict:
    """Time a step of decoding. share: of the time in which a copy moves the states once each way, without the
    host's part where a CUDA graph shows that.
    """
    sequences, nheads, nheads_k, d = STEP.values()
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = (randn(sequences, heads, d).bfloat16() for heads in (nheads, nheads_k, nheads_k))
    state, slopes = randn(sequences, nheads_k, d, d), retention(nheads_k)
    given = slopes if contender.endswith("+decay") else None
    if contender.startswith("linear"):

        def run():
            linear_attention_step(q, k, v, state, decay_slopes=given)

    else:
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        # fla has no grouped heads here: each key head has one query head, and a quarter of the work.
        one = q[:, :nheads_k].contiguous()
        three = [x[:, None] for x in (one, k, v)]
        gamma = None if given is None else -given

        def run():
            fused_recurrent_simple_gla(
                *three, g_gamma=gamma, scale=d**-0.5, initial_state=state, output_final_state=True
            )

    with torch.no_grad():
        ms, graph = median_ms(run, "cuda", 0), graph_ms(run)
    return {"ms": ms, "graph_ms": graph, "share": 2e3 * state.nbytes / copy_rate("cuda") / (graph or ms)}


def measure(layout: str, **case) -> dict:
    if layout == "step":
        return measure_step(case["contender"])
    return measure_one(layout, **case)


def wanted(args: argparse.Namespace) -> Iterator[dict]:
    for contender in args.contenders:
        yield dict(zip(KEYS, ("step", STEP["head_dim"], 1, "forward", contender)))
    for head_dim in args.head_dims:
        for seqlen in args.seqlens:
            for layout in LAYOUTS:
                if layout != "one" and seqlen * 2 > TOKENS:
                    continue
                for direction in ("forward", "forward+backward"):
                    for contender in args.contenders:
                        yield dict(zip(KEYS, (layout, head_dim, seqlen, direction, contender)))


def markdown(record: dict) -> str:
    text = f"""# A decay in linear time, on {record["device"]}

{record["date"]}, torch {record["torch"]}, fla-core {record["packages"]["fla-core"]}:

    {record["command"]}

Median times in ms with a cold L2 cache, bfloat16, {NHEADS} heads, causal. In brackets: in a CUDA graph, where
the host has no part. “fla+decay” is chunk_simple_gla with a constant decay of each head, which
chunk_retention and chunk_lightning_attn call. Written by `benchmarks/linear_decay.py`.
"""
    results = {tuple(r[key] for key in KEYS): r for r in record["rows"]}

    def cell(kind: tuple, contender: str) -> str:
        r = results.get((*kind, contender), {})
        if r.get("ms") is None:
            return "–"
        return f"{r['ms']:.3f}" + ("" if r.get("graph_ms") is None else f" ({r['graph_ms']:.3f})")

    def ratio(kind: tuple, slow: str, fast: str) -> str:
        a, b = (results.get((*kind, name), {}) for name in (slow, fast))
        texts = [f"{a[k] / b[k]:.2f}" for k in ("ms", "graph_ms") if a.get(k) and b.get(k)]
        return f"{texts[0]} ({texts[1]})" if len(texts) == 2 else (texts or ["–"])[0]

    kinds = list(dict.fromkeys(key[:-1] for key in results))
    for layout in LAYOUTS:
        for head_dim in sorted({kind[1] for kind in kinds if kind[0] == layout}):
            for direction in ("forward", "forward+backward"):
                lengths = sorted(kind[2] for kind in kinds if kind[:2] == (layout, head_dim))
                lines = [(layout, head_dim, n, direction) for n in dict.fromkeys(lengths)]
                if not any((*kind, "linear+decay") in results for kind in lines):
                    continue
                text += f"\n## {layout}, head_dim {head_dim}, {direction}\n\n"
                head = ["N", *CONTENDERS, "decay / none", "fla+decay / linear+decay", "fla / linear"]
                text += "| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n"
                for kind in lines:
                    cells = [str(kind[2]), *(cell(kind, name) for name in CONTENDERS)]
                    cells += [ratio(kind, "linear+decay", "linear")]
                    cells += [ratio(kind, "fla+decay", "linear+decay"), ratio(kind, "fla", "linear")]
                    text += "| " + " | ".join(cells) + " |\n"
    kind = ("step", STEP["head_dim"], 1, "forward")
    steps = {name: results[(*kind, name)] for name in CONTENDERS if (*kind, name) in results}
    if steps:
        text += f"""
## A step of decoding

{STEP["sequences"]} sequences, {STEP["nheads"]} heads, {STEP["nheads_k"]} key heads, d {STEP["head_dim"]}.
fla's kernel has a query head for each key head. The share is that of the time in which a copy reads and
writes the states once, of the time in a CUDA graph.

| contender | ms | share of a copy's speed |
|---|---|---|
"""
        for name, r in steps.items():
            share = f"{r['share']:.0%}" if r["ms"] is not None else "–"
            text += f"| {name} | {cell(kind, name)} | {share} |\n"
    return text


def main() -> int:
    parser = resumed.options(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2**n for n in range(10, 21)])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device, and the kernels run on one")
    record = resumed.started(args.json, ("fla-core", "triton"))
    resumed.collect(record, args, wanted(args), measure, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
