"""Make the calls that gpu_vs_softmax.py compares, through the public functions of flash_attn, with random
inputs.

A side is one call of a comparison. ``side()`` runs it once and returns its results and a function that runs
it again. It raises the package's errors, for instance for kernels that were not built.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from gpu_device import Gpu
from gpu_record import BACKWARD, NO_SOFTMAX, NO_SOFTMAX_KERNEL, SOFTMAX, Case, kv_bytes
from torch import Tensor

Call = Callable[[], object]
Side = Callable[[], tuple[Sequence[Tensor], Call]]

SIDES = (SOFTMAX, NO_SOFTMAX, NO_SOFTMAX_KERNEL)
BACKEND = "fa2"  # the extension has kernels for both sides
BACKWARD_SWITCH = "FLASH_ATTENTION_NOSOFTMAX_BACKWARD"


@dataclass(frozen=True)
class Feature:
    """A way to call attention: options of the function, and properties of the shapes."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    score: dict[str, object] = field(default_factory=dict)  # options of the side without softmax
    decay: bool = False  # of the side without softmax
    heads_per_key_head: int = 1
    alibi: bool = False
    varlen: bool = False
    masks: tuple[bool, ...] = (False, True)  # causal or not

    @property
    def has_two_backwards(self) -> bool:
        """Whether backward can be three forwards, which is then the default (backward_by_forwards in
        kernel_dispatch.h).
        """
        return not {"softcap", "dropout_p"} & set(self.options) and not self.score

    @property
    def backward_by(self) -> str:
        return "three forwards" if self.has_two_backwards else "the backward kernel"


PLAIN = Feature("plain")
ACTIVATIONS = (
    *(Feature(name, score={"activation": name}) for name in ("relu", "relu2", "silu", "gelu", "softplus")),
    Feature("sigmoid", score={"activation": "sigmoid"}),
    Feature("sigmoid -log n", score={"activation": "sigmoid", "sigmoid_bias": "-log n"}),
    Feature("identity 1/visible", score={"normalization": "1/visible"}),
)
FEATURES = (
    Feature("dropout 0.17", {"dropout_p": 0.17}),
    Feature("softcap 30", {"softcap": 30.0}),
    Feature("ALiBi", alibi=True),
    Feature("decay", decay=True),
    Feature("silu, decay", score={"activation": "silu"}, decay=True),
    Feature("window (1024, 0)", {"window_size": (1024, 0)}, masks=(True,)),
    Feature("GQA 8:1", heads_per_key_head=8),
    Feature("varlen", varlen=True),
)


def uneven_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths of sequences with ``tokens`` tokens in all: the longest first, then ever shorter ones, none of
    which fills a kernel's blocks.
    """
    lengths = []
    while tokens > 0:
        lengths.append(min(longest, tokens * 9 // 16 + 1))
        tokens -= lengths[-1]
    return lengths


def _attend(feature: Feature, case: Case, lengths: list[int], device: str) -> Callable[..., Tensor]:
    """Return f(q, k, v, use_softmax=...) -> out; with varlen, on sequences of the given lengths."""
    options = {"causal": case.causal, "backend": BACKEND, **feature.options}
    if feature.alibi:
        options["alibi_slopes"] = _slopes(case.nheads, device)
    if not feature.varlen:
        return partial(flash_attn_func, **options)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    options |= {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    return partial(flash_attn_varlen_func, **options)


def _slopes(nheads: int, device: str) -> Tensor:
    """The slopes of the ALiBi paper."""
    return torch.exp2(-8 * torch.arange(1, nheads + 1, dtype=torch.float32, device=device) / nheads)


def attention(feature: Feature, case: Case, dtype: torch.dtype, device: str) -> dict[str, Side]:
    """The sides of one dense or varlen case, all on the same q, k, v and dout of N(0, 1)."""
    lengths = uneven_lengths(case.batch * case.seqlen, case.seqlen) if feature.varlen else []
    tokens = (sum(lengths),) if feature.varlen else (case.batch, case.seqlen)
    heads = (case.nheads, case.nheads_k, case.nheads_k)
    inputs = [
        torch.randn(*tokens, n, case.head_dim, dtype=dtype, device=device, requires_grad=True) for n in heads
    ]
    attend = _attend(feature, case, lengths, device)
    score = {"use_softmax": False, **feature.score}
    if feature.decay:
        score["decay_slopes"] = _slopes(case.nheads, device)
    scores = {name: {"use_softmax": True} if name == SOFTMAX else score for name in SIDES}
    if case.direction != BACKWARD:
        return {name: partial(_forward, attend, inputs, scores[name]) for name in (SOFTMAX, NO_SOFTMAX)}
    dout = torch.randn_like(inputs[0])
    names = SIDES if feature.has_two_backwards else (SOFTMAX, NO_SOFTMAX)
    return {name: partial(_backward, attend, inputs, dout, name, scores[name]) for name in names}


def _forward(
    attend: Callable[..., Tensor], inputs: list[Tensor], score: dict[str, object]
) -> tuple[list[Tensor], Call]:
    @torch.no_grad()
    def call() -> Tensor:
        return attend(*inputs, **score)

    return [call()], call


def _backward(
    attend: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, name: str, score: dict[str, object]
) -> tuple[Sequence[Tensor], Call]:
    """Make a call of backward alone, on a graph that is kept."""
    out = attend(*inputs, **score)

    def call() -> Sequence[Tensor]:
        with backward_choice(name):
            return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return [out.detach(), *call()], call


@contextmanager
def backward_choice(name: str) -> Iterator[None]:
    """Choose the backward kernel for NO_SOFTMAX_KERNEL, the package's own choice for others, and ignore the
    environment.
    """
    before = os.environ.pop(BACKWARD_SWITCH, None)
    if name == NO_SOFTMAX_KERNEL:
        os.environ[BACKWARD_SWITCH] = "kernel"
    try:
        yield
    finally:
        os.environ.pop(BACKWARD_SWITCH, None)
        if before is not None:
            os.environ[BACKWARD_SWITCH] = before


def decode(
    case: Case, dtype: torch.dtype, gpu: Gpu, score: dict[str, object] | None = None, page: int = 0
) -> tuple[dict[str, Side], int]:
    """The sides of one decode step (one new query token, nothing appended), and the number of steps in each
    call. score: options of the side without softmax. page: keys of a page, in shuffled order, or 0 for none.

    A small cache would stay in L2, unlike in a model with many layers. Each call therefore walks over enough
    caches to overflow L2.
    """
    steps = max(1, math.ceil(gpu.cache_bytes / kv_bytes(case, dtype.itemsize)))
    lengths = torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=gpu.device)
    shapes = [
        (case.batch, 1, case.nheads, case.head_dim),
        *[(case.batch, case.seqlen, case.nheads_k, case.head_dim)] * 2,
    ]
    caches = [[torch.randn(s, dtype=dtype, device=gpu.device) for s in shapes] for _ in range(steps)]
    options = {"cache_seqlens": lengths, "causal": True, "backend": BACKEND}
    if page:
        pages = torch.randperm(case.batch * case.seqlen // page, dtype=torch.int32, device=gpu.device)
        options["block_table"] = pages.reshape(case.batch, -1)
        caches = [[q, *(x.view(-1, page, *x.shape[2:]) for x in kv)] for q, *kv in caches]

    def side(use_softmax: bool) -> tuple[list[Tensor], Call]:
        options["use_softmax"] = use_softmax
        chosen = {**options, **({} if use_softmax else score or {})}
        calls = [partial(flash_attn_with_kvcache, *cache, **chosen) for cache in caches]
        return [calls[0]()], gpu.captured(calls)

    return {name: partial(side, name == SOFTMAX) for name in (SOFTMAX, NO_SOFTMAX)}, steps


def training_step_memory(case: Case, name: str, dtype: torch.dtype, gpu: Gpu) -> dict[str, int]:
    """Bytes that one forward and backward takes beside q, k, v and dout, which are allocated before.

    kept_bytes: held between forward and backward by the graph alone, after its user has dropped the output;
    gradient_bytes: dq, dk, dv; peak_bytes: the most held at any time of the step, without the gradients.
    """
    shape = (case.batch, case.seqlen, case.nheads, case.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=gpu.device) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    before = gpu.allocated()
    # The edge keeps the graph alive, but not the output.
    out = flash_attn_func(*inputs, causal=case.causal, backend=BACKEND, use_softmax=name == SOFTMAX)
    edge = torch.autograd.graph.get_gradient_edge(out)
    del out
    forward_peak = gpu.peak()
    kept = gpu.allocated() - before
    with backward_choice(name):
        gradients = torch.autograd.grad(edge, inputs, dout)
    gradient_bytes = sum(g.nbytes for g in gradients)
    peak = max(forward_peak, gpu.peak()) - before
    return {"kept_bytes": kept, "gradient_bytes": gradient_bytes, "peak_bytes": peak - gradient_bytes}
