"""Test PyTorch's own tools on attention without softmax: FlopCounterMode, the profiler, opcheck,
torch.compile, CUDA graphs and AOTInductor. docs/pytorch.md lists them, with the test that keeps each line.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.linear import linear_attention_prefill, linear_attention_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from calls import DIFFERENTIABLE, LENGTHS, close, inputs, run, sample
from package import cumulative

ROOT = Path(__file__).resolve().parents[2]
SCORES = [
    dict(),
    dict(activation="silu", normalization="1/n", causal=True),
    dict(algorithm="linear", causal=True),
]
scores = pytest.mark.parametrize("options", SCORES, ids=["identity", "silu", "linear"])
functions = pytest.mark.parametrize("name", DIFFERENTIABLE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    torch._dynamo.reset()


def cached(device: str, seqlen: int = 1) -> tuple:
    """Return (q, k_cache, v_cache, k, v, lengths) of a step with 4 heads for 2 and 8 channels."""
    q, k, v = (sample(device, 2, seqlen, heads, 8) for heads in (4, 2, 2))
    pair = [sample(device, 2, 16, 2, 8) for _ in range(2)]
    return q, *pair, k, v, torch.tensor([3, 7], dtype=torch.int32, device=device)


def step(q, k_cache, v_cache, k, v, lengths, **options):
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, use_softmax=False, **options
    )


# ---- FlopCounterMode ----


@functions
@scores
def test_flops_are_those_of_torchs_attention(name, options, device):
    """Packed sequences count alone, and a mask or linear time takes nothing off."""
    with FlopCounterMode(display=False) as counter:
        run(name, device, use_softmax=False, **options)
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    shapes = [(1, 2, n, 8) for n in LENGTHS] if "varlen" in name else [(2, 2, sum(LENGTHS), 8)]
    forward = sum(sdpa_flop_count(s, s, s) for s in shapes)
    backward = sum(sdpa_backward_flop_count(s, s, s, s) for s in shapes)
    assert found == {"flash_attn_nosoftmax.forward": forward, "flash_attn_nosoftmax.backward": backward}


@pytest.mark.parametrize("head_dim_v", [8, 24])
def test_flops_of_other_shapes(device, head_dim_v):
    """Fewer heads in k and v, fewer queries than keys, another size of v."""
    if device == "cuda" and head_dim_v != 8:
        pytest.skip("the extension takes one size for both")
    q, k, v = (
        sample(device, 2, n, h, d).requires_grad_() for n, h, d in [(5, 4, 8), (9, 2, 8), (9, 2, head_dim_v)]
    )
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(q, k, v, use_softmax=False).sum().backward()
    pairs = 2 * 4 * 5 * 9
    assert counter.get_total_flops() == 2 * pairs * ((8 + head_dim_v) + (3 * 8 + 2 * head_dim_v))


@pytest.mark.parametrize("append", [False, True])
def test_flops_of_a_cache(device, append):
    """The keys that count, not the capacity."""
    q, k_cache, v_cache, k, v, lengths = cached(device)
    with FlopCounterMode(display=False) as counter:
        step(q, k_cache, v_cache, *((k, v) if append else (None, None)), lengths)
    keys = 3 + 7 + 2 * append
    assert counter.get_total_flops() == 2 * 4 * keys * (8 + 8)


@functions
def test_flops_without_memory(name):
    """A fake tensor has no lengths to read: all sequences count as the longest."""
    tensors, lengths = inputs(name, "cpu")
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        tensors, lengths = (
            [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
            for given in (tensors, lengths)
        )
        getattr(flash_attn, name)(*tensors, *lengths, use_softmax=False)
    shape = (2, 2, max(LENGTHS) if "varlen" in name else sum(LENGTHS), 8)
    assert counter.get_total_flops() == sdpa_flop_count(shape, shape, shape)


def piece(device: str, packed: bool) -> tuple:
    """Return q, k, v, state and options of pieces with 4 heads for 2, 8 channels and 24 of v."""
    lengths = LENGTHS if packed else [9, 9]
    shape = (sum(LENGTHS),) if packed else (2, 9)
    q, k, v = (sample(device, *shape, h, d) for h, d in ((4, 8), (2, 8), (2, 24)))
    state = torch.randn(len(lengths), 2, 8, 24, device=device)
    return (q, k, v), state, {"cu_seqlens": cumulative(LENGTHS, device)} if packed else {}, lengths


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_flops_of_a_piece(device, packed, graph, before):
    """A call of the piece by itself, and the products with states, with gradients and without."""
    tensors, state, options, lengths = piece(device, packed)
    tensors = [x.requires_grad_(graph) for x in tensors]
    with FlopCounterMode(display=False) as counter:
        linear_attention_prefill(*tensors, state if before else None, **options)
    pairs, tokens = sum(n * n for n in lengths), sum(lengths)
    products = 2 * tokens * 8 * 24 * (2 + 4 * before)
    assert counter.get_total_flops() == 2 * pairs * 4 * (8 + 24) + products


def test_flops_of_a_step(device):
    q, k, v = (sample(device, 3, h, d) for h, d in ((4, 8), (2, 8), (2, 24)))
    state = torch.zeros(3, 2, 8, 24, device=device)
    with FlopCounterMode(display=False) as counter:
        linear_attention_step(q, k, v, state)
    assert counter.get_total_flops() == 2 * 3 * (4 + 2) * 8 * 24


def test_a_state_looks_as_it_should(device):
    """Under fake tensors as without them, and a dispatch mode changes no result."""
    tensors, state, options, _ = piece(device, packed=True)
    slots, indices = (
        torch.randn(5, 2, 8, 24, device=device),
        torch.tensor([3, 0, 2], device=device)[: len(state)],
    )
    expected = linear_attention_prefill(*tensors, state, **options)
    with Caught():
        found = linear_attention_prefill(*tensors, state, **options)
        inplace = slots.clone()
        linear_attention_prefill(*tensors, inplace, state_indices=indices, **options)
        token = [x[: len(state)] for x in tensors]
        stepped = linear_attention_step(*token, inplace, state_indices=indices)
    other = slots.clone()
    linear_attention_prefill(*tensors, other, state_indices=indices, **options)
    step_out = linear_attention_step(*token, other, state_indices=indices)
    for a, e in zip((*found, inplace, *stepped), (*expected, other, *step_out)):
        assert torch.equal(a, e)
    assert stepped[1] is inplace
    tensors, state, _, _ = piece(device, packed=False)
    expected = linear_attention_prefill(*tensors, state)
    with FakeTensorMode() as mode:
        results = linear_attention_prefill(*(mode.from_tensor(x) for x in (*tensors, state)))
    assert [(x.shape, x.dtype, x.stride()) for x in results] == [
        (x.shape, x.dtype, x.stride()) for x in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["flash_attn", "torch.utils.flop_counter"])
def test_flops_in_either_order_of_imports(first):
    """flash_attn does not import the counter, which imports Triton, and tells it once it is imported."""
    other = {"flash_attn": "torch.utils.flop_counter", "torch.utils.flop_counter": "flash_attn"}[first]
    program = f"""
import sys, torch, {first}
assert {first!r} != "flash_attn" or "torch.utils.flop_counter" not in sys.modules
import {other}
x = torch.zeros(1, 4, 1, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    flash_attn.flash_attn_func(x, x, x, use_softmax=False)
assert counter.get_total_flops() == 2 * 16 * 16
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- The profiler ----


def names_of(seen: profile) -> set[str]:
    """The names that we give to passes, without those of kernels."""
    keys = (event.key for event in seen.key_averages())
    return {key for key in keys if key.startswith("flash_attn_nosoftmax::")}


@functions
@scores
def test_a_profile_names_passes_and_backends(name, options, device):
    backend = flash_attn.explain(
        getattr(flash_attn, name), *sum(inputs(name, device), []), use_softmax=False, **options
    ).backend
    with profile() as seen:
        run(name, device, use_softmax=False, **options)
    assert names_of(seen) == {f"flash_attn_nosoftmax::{way}[{backend}]" for way in ("forward", "backward")}


def test_a_profile_names_a_cache(device):
    with profile() as seen, torch.no_grad():
        step(*cached(device))
    assert names_of(seen) == {f"flash_attn_nosoftmax::forward[{'cpu' if device == 'cpu' else 'fa2'}]"}


# ---- Operators ----


class Caught(TorchDispatchMode):
    """Keeps the arguments of each of our operators that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "flash_attn_nosoftmax":
            copies = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.append((function, copies))
        return function(*args, **(kwargs or {}))


def check_operators(calls: list, expected: set) -> None:
    assert {str(function) for function, _ in calls} == {f"flash_attn_nosoftmax.{x}.default" for x in expected}
    for function, args in calls:
        # dout, q, k and v, or q, k and v. The gradients of a backward pass exist for the identity alone.
        count = (
            0
            if "kvcache" in str(function) or "linear_" in str(function)
            else 4
            if "backward" in str(function)
            else 3
        )
        if "backward" in str(function) and not {"silu", 0.25}.isdisjoint(
            x for x in args if isinstance(x, (str, float))
        ):
            count = 0
        args = [x.requires_grad_() if i < count else x for i, x in enumerate(args)]
        torch.library.opcheck(function, tuple(args))


@pytest.mark.slow
@functions
@pytest.mark.parametrize(
    "options",
    [*SCORES[:2], dict(dropout_p=0.25), dict(window_size=(2, 0))],
    ids=["identity", "silu", "dropout", "window"],
)
def test_opcheck(name, options, device):
    """torch.library.opcheck: schema, autograd registration, fake tensors, AOT dispatch with dynamic
    shapes.
    """
    with Caught() as caught:
        run(name, device, use_softmax=False, **options)
    check_operators(caught.calls, {"forward", "backward"})


@pytest.mark.slow
def test_opcheck_of_a_cache(device):
    with Caught() as caught, torch.no_grad():
        step(*cached(device), causal=True)
    check_operators(caught.calls, {"kvcache"})


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_a_state(device, packed):
    tensors, state, options, _ = piece(device, packed)
    with Caught() as caught, torch.no_grad():
        linear_attention_prefill(*tensors, state, decay_slopes=torch.rand(2, device=device), **options)
        linear_attention_step(*(x.flatten(0, -3)[: len(state)] for x in tensors), state)
    check_operators(caught.calls, {"linear_prefill", "linear_step"})


# ---- Compiled ----


@functions
@scores
def test_every_function_compiles(name, options, device):
    tensors, lengths = inputs(name, device)
    function = getattr(flash_attn, name)

    def attend(*tensors):
        return function(*tensors, *lengths, use_softmax=False, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*tensors), attend(*tensors)
    close(out, expected)
    dout = sample(device, *out.shape)
    for a, e in zip(torch.autograd.grad(out, tensors, dout), torch.autograd.grad(expected, tensors, dout)):
        close(a, e)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_aot_inductor(device, tmp_path):
    """An exported program becomes a library, which calls the operator."""
    if device == "cuda":
        pytest.skip("compiled once, for the CPU")
    # In a process of its own: Inductor imports setuptools, which fails in one that has imported pip.
    program = """
import sys, torch
from flash_attn import flash_attn_func

class Attention(torch.nn.Module):
    def forward(self, *qkv):
        return flash_attn_func(*qkv, causal=True, use_softmax=False, activation="silu", normalization="1/n")

tensors = tuple(torch.randn(2, 16, 4, 8) for _ in range(3))
exported = torch.export.export(Attention(), tensors)
path = torch._inductor.aoti_compile_and_package(exported, package_path=sys.argv[1])
library = torch._inductor.aoti_load_package(path)
assert torch.equal(library(*tensors), Attention()(*tensors))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "attention.pt2")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["dense", "packed", "cache"])
def test_cuda_graphs(device, way):
    """A captured call gives the results of new inputs, which are copied into the captured ones."""
    if device != "cuda":
        pytest.skip("needs a GPU: a CUDA graph records kernels")
    cu = cumulative(LENGTHS, device)

    def attend(q, k, v, *more):
        if way == "cache":
            return step(q, k, v, *more, causal=True)
        if way == "packed":
            longest = max(LENGTHS)
            return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, use_softmax=False)
        return flash_attn_func(q, k, v, causal=True, use_softmax=False, activation="silu")

    if way == "cache":
        tensors = list(cached(device))
    else:
        shape = (sum(LENGTHS),) if way == "packed" else (2, 16)
        tensors = [sample(device, *shape, 4, 64) for _ in range(3)]
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles and chooses before the capture
            attend(*[x.clone() for x in tensors])
        torch.cuda.current_stream().wait_stream(stream)
        held, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(*held)
        new = [x * 0.5 if x.is_floating_point() else x for x in tensors]
        for mine, x in zip(held, new):
            mine.copy_(x)
        graph.replay()
        close(out, attend(*[x.clone() for x in new]))


# ---- The page ----


def test_every_line_of_the_page_is_kept_by_a_test():
    page = (ROOT / "docs" / "pytorch.md").read_text()
    rows = re.findall(r"^\| (?!what|---).+\|$", page, re.MULTILINE)
    assert len(rows) >= 14
    for row in rows:
        kept = re.findall(r"`(?:(\w+)/)?(test_\w+)\.py::(test_\w+)`", row)
        assert kept, f"no test keeps: {row}"
        for folder, file, name in kept:
            text = (ROOT / "tests" / (folder or "attention") / f"{file}.py").read_text()
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file}.py has no {name}"
