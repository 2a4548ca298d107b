"""Test tensors without memory, torch.compile, torch.export, autocast and nested tensors, as torch's own
attention takes them.
"""

from __future__ import annotations

from contextlib import nullcontext

import flash_attn
import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from torch._subclasses.fake_tensor import FakeTensorMode

from calls import DIFFERENTIABLE, close, inputs
from measure import NAMES, assert_close, gradients, packed, qkv, randn
from package import Package, cumulative

SCORES = [dict(), dict(causal=True), dict(activation="silu", normalization="1/n"), dict(algorithm="linear")]
scores = pytest.mark.parametrize("options", SCORES, ids=str)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    torch._dynamo.reset()


# --- Tensors without memory


def without_memory(kind: str):
    """Return (a mode to enter, the device of its tensors)."""
    return (nullcontext(), "meta") if kind == "meta" else (FakeTensorMode(), kind)


def looks(x) -> tuple:
    return tuple(x.shape), x.dtype, x.device.type


kinds = pytest.mark.parametrize("kind", ["meta", "cpu", "cuda"])


def results(name: str, kind: str, gradients: bool, **options) -> list[tuple]:
    """Return the looks of a function's output and gradients, for arguments without memory."""
    mode, device = without_memory(kind)
    tensors, lengths = inputs(name, "cpu")
    with mode:
        tensors = [
            torch.empty(x.shape, dtype=torch.float16, device=device, requires_grad=gradients) for x in tensors
        ]
        lengths = [
            torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
            for x in lengths
        ]
        out = getattr(flash_attn, name)(*tensors, *lengths, **options)
        return [looks(out), *map(looks, torch.autograd.grad(out.sum(), tensors) if gradients else ())]


@kinds
@scores
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_look_as_with_softmax(name, options, kind):
    """The output and, where torch supports it, the gradients have the shape, dtype and device that softmax
    gives.
    """
    # A torch without CUDA neither slices a GPU tensor nor differentiates by it.
    absent = kind == "cuda" and not torch.cuda.is_available()
    expected = results(name, "meta" if absent else kind, not absent, causal=options.get("causal", False))
    if absent:
        expected = [(shape, dtype, "cuda") for shape, dtype, _ in expected]
    assert results(name, kind, not absent, use_softmax=False, **options) == expected


@kinds
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("options", SCORES[:3], ids=str)
def test_a_cache_looks_as_it_should(options, append, kind):
    mode, device = without_memory(kind)
    with mode:
        q, new = (torch.empty(2, 1, h, 8, dtype=torch.float16, device=device) for h in (4, 2))
        pair = [torch.empty(2, 16, 2, 8, dtype=torch.float16, device=device) for _ in range(2)]
        lengths = torch.empty(2, dtype=torch.int32, device=device)
        more = (new, new.clone()) if append else ()
        out = flash_attn_with_kvcache(q, *pair, *more, cache_seqlens=lengths, use_softmax=False, **options)
    assert looks(out) == looks(q)


# --- Compiled and exported


@pytest.mark.parametrize("options", [dict(), dict(algorithm="linear"), dict(algorithm="quadratic")], ids=str)
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_longest_sequence_from_a_tensor(device, options):
    """max_seqlen may be .item() of a tensor, which is unknown while the graph is made."""
    attention, lengths = Package(device), dict(lengths_q=[5, 9, 2], lengths_k=[5, 9, 2])
    cu = cumulative(lengths["lengths_q"], device)

    def attend(q, k, v, cu, cu_k):
        longest = (cu[1:] - cu[:-1]).max().item()
        return flash_attn_varlen_func(
            q, k, v, cu, cu_k, longest, longest, causal=True, use_softmax=False, **options
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors, cu_k = packed(attention, **lengths), cu.clone()
    actual, expected = (gradients(lambda *x: f(*x, cu, cu_k), *tensors) for f in (compiled, attend))
    for a, e in zip(actual, expected):
        close(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(activation="silu")], ids=str)
def test_export_with_a_dynamic_length(device, options):
    """One exported program is right for lengths on both sides of the crossover."""
    attention = Package(device)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, use_softmax=False, **options)

    shape = dict(nheads=1, head_dim=8)
    dynamic = {name: {1: torch.export.Dim("length", min=2, max=100_000)} for name in "qkv"}
    program = torch.export.export(Attention(), qkv(attention, 1, 300, 300, **shape), dynamic_shapes=dynamic)
    for seqlen in (64, 2500):
        tensors = qkv(attention, 1, seqlen, seqlen, **shape)
        expected = flash_attn_func(*tensors, use_softmax=False, algorithm="quadratic", **options)
        assert_close(
            f"{seqlen} tokens", program.module()(*tensors), expected.double(), baseline=expected * 1.001
        )


def decoding(device: str):
    """Return (q, k_cache, v_cache, k, v, lengths) of one decoding step."""
    attention = Package(device)
    q, k, v = (randn(2, 1, h, 16, seed=h, like=attention) for h in (4, 2, 2))
    pair = [randn(2, 24, 2, 16, seed=i, like=attention) for i in (5, 6)]
    return q, *pair, k, v + 1, torch.tensor([7, 12], dtype=torch.int32, device=device)


class Step(torch.nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k_cache, v_cache, k, v, lengths):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, use_softmax=False, **self.options
        )


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("options", [dict(), dict(activation="silu", normalization="1/n")], ids=str)
def test_a_cache_is_traced_and_written(device, options, how):
    """A decoding step is traced in one graph, and the caches hold the appended keys and values."""
    eager, traced = decoding(device), decoding(device)
    if how == "compile":
        step = torch.compile(Step(options), fullgraph=True, backend="aot_eager")
    else:
        step = torch.export.export(Step(options), decoding(device)).module()
    expected, actual = Step(options)(*eager), step(*traced)
    close(actual, expected)
    untouched = decoding(device)
    for name, a, e, before in zip(("k_cache", "v_cache"), traced[1:3], eager[1:3], untouched[1:3]):
        assert torch.equal(a, e) and not torch.equal(a, before), name


# --- Lengths


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_integer(attention, dtype):
    lengths = dict(lengths_q=[5, 9, 2], lengths_k=[7, 3, 8])
    tensors = packed(attention, **lengths)
    cu_q, cu_k = (cumulative(x, attention.device).to(dtype) for x in lengths.values())
    expected = gradients(
        lambda *x: attention.varlen(*x, **lengths, causal=True, deterministic=True), *tensors
    )
    for longest in ((9, 8), [torch.tensor(n, device=attention.device) for n in (9, 8)]):
        actual = gradients(
            lambda *x: attention._call(
                flash_attn_varlen_func, *x, cu_q, cu_k, *longest, causal=True, deterministic=True
            ),
            *tensors,
        )
        for name, a, e in zip(NAMES, actual, expected):
            assert torch.equal(a, e), name


def test_cache_lengths_of_either_integer(attention):
    q, k_cache, v_cache, k, v, lengths = decoding(attention.device)
    results = []
    for dtype in (torch.int32, torch.int64):
        pair = k_cache.clone(), v_cache.clone()
        index = torch.tensor([1, 0], dtype=dtype, device=q.device)
        out = attention.kvcache(
            q, *pair, k, v, cache_seqlens=lengths.to(dtype), cache_batch_idx=index, causal=True
        )
        results.append((out, *pair))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- Autocast


@pytest.mark.parametrize("given", [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
], ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))  # fmt: skip
@pytest.mark.parametrize("options", [dict(), dict(algorithm="linear"), dict(activation="silu")], ids=str)
def test_autocast_casts_as_torchs_attention_does(device, options, given):
    """Forward runs in autocast's dtype, and gradients have the dtypes of the inputs."""
    tensors = [x.to(dtype) for x, dtype in zip(qkv(Package(device), 1, 40, 40, nheads=2, head_dim=64), given)]

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def ours(q, k, v):
        return flash_attn_func(q, k, v, use_softmax=False, **options)

    found = []
    for attend in (torchs, ours):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast(device, dtype=torch.bfloat16):
            out = attend(*leaves)
        found.append([x.dtype for x in (out, *torch.autograd.grad(out.float().sum(), leaves))])
    assert found[0] == found[1]
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = ours(*tensors)
    assert torch.equal(actual, ours(*(x.bfloat16() for x in tensors)))


def test_without_autocast_dtypes_are_not_mixed(device):
    q, k, v = qkv(Package(device), 1, 40, 40, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="k has dtype torch.float16"):
        flash_attn_func(q, k.half(), v, use_softmax=False)
    with (
        torch.autocast(device, dtype=torch.bfloat16, enabled=False),
        pytest.raises(TypeError, match="k has dtype"),
    ):
        flash_attn_func(q, k.half(), v, use_softmax=False)


# --- Nested tensors


def nested(x: torch.Tensor, offsets: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(
        x, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
    )


@pytest.mark.parametrize("options", [
    dict(), dict(causal=True), dict(activation="silu", normalization="1/n"), dict(window_size=(3, 1)),
        dict(normalization="1/visible"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [
    dict(lengths_q=[7, 1, 13], lengths_k=[7, 1, 13]), dict(lengths_q=[4, 6, 5], lengths_k=[6, 7, 3]),
], ids=["self", "cross"])  # fmt: skip
def test_jagged_tensors_equal_packed_ones(attention, lengths, options):
    """Jagged tensors give the output and gradients of packed ones, and out is nested like q."""
    tensors = packed(attention, **lengths, nheads=4)
    dout = randn(*tensors[0].shape, seed=99, like=attention)
    options = dict(options, deterministic=True)
    expected = gradients(lambda *x: attention.varlen(*x, **lengths, **options), *tensors, dout=dout)
    offsets = {x: cumulative(lengths[f"lengths_{x}"], attention.device).long() for x in "qk"}
    if lengths["lengths_q"] == lengths["lengths_k"]:
        offsets["k"] = offsets["q"]  # one object for both says that the lengths are equal
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, k, v = (nested(x, offsets[side], lengths[f"lengths_{side}"]) for x, side in zip(leaves, "qkk"))
    out = attention._call(flash_attn_func, q, k, v, **options)
    assert out.is_nested and out.layout == torch.jagged and torch.equal(out.offsets(), q.offsets())
    actual = (out.values().detach(), *torch.autograd.grad(out.values(), leaves, dout))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, e), name


def test_nested_and_dense_are_not_mixed(device):
    attention = Package(device)
    q, k, v = packed(attention, [3, 4], [3, 4])
    offsets = cumulative([3, 4], device).long()
    with pytest.raises((TypeError, ValueError), match="nested|jagged"):
        flash_attn_func(nested(q, offsets, [3, 4]), k[None], v[None], use_softmax=False)
