"""Test the backward pass: finite differences, determinism, memory, and inputs that are views."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from torch import Tensor

from measure import (
    NAMES,
    assert_same,
    compare,
    compare_results,
    gradients,
    integers,
    poison_allocator,
    qkv,
    randn,
)
from score_functions import FUNCTIONS

PIECES = {
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=torch.tensor([0.3, 0.1])),
    "dropout": dict(dropout_p=0.4),
    "scale": dict(softmax_scale=-0.6),
    "1/n": dict(normalization="1/n"),
    "1/visible": dict(normalization="1/visible"),
}
IMPOSSIBLE = {("softcap", "dropout"), ("softcap", "scale"), ("1/n", "1/visible")}
PAIRS = [pair for pair in itertools.combinations(PIECES, 2) if pair not in IMPOSSIBLE]


def only_wide(device: str) -> None:
    if device != "cpu":
        pytest.skip("finite differences need float64, which the CUDA kernels do not take")


def gradcheck(attention, nheads_k: int = 1, **options) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(attention, 1, 4, 5, nheads=2, nheads_k=nheads_k, head_dim=2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same dropout mask every time
        return attention.dense(q, k, v, **options)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_gradcheck_pairs(attention, device, pair):
    """Gradients match finite differences for each allowed pair of options, with grouped heads."""
    only_wide(device)
    gradcheck(attention, **PIECES[pair[0]], **PIECES[pair[1]])


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("function", FUNCTIONS[1:], ids=lambda f: "-".join(map(str, f.values())))
def test_gradcheck_functions(attention, device, function, name):
    """Gradients match finite differences for each activation with each option."""
    only_wide(device)
    gradcheck(attention, **function, **PIECES[name])


@pytest.mark.parametrize("name", [name for name in PIECES if not name.startswith("1/")])
def test_gradcheck_softmax(attention, device, name):
    """Gradients match finite differences with softmax on."""
    only_wide(device)
    gradcheck(attention, use_softmax=True, **PIECES[name])


@pytest.mark.scores
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_common_head_sizes(attention, dtype, function, head_dim, causal):
    """The sizes at which kernels have a form for one activation, in every dtype: what waits for the end of a
    sum depends on it.
    """
    q, k, v = qkv(attention, 1, 150, 170, nheads=4, nheads_k=2, head_dim=head_dim, dtype=dtype)
    compare(attention, q, k, v, causal=causal, **function)


@pytest.mark.parametrize("options", [dict(causal=True), dict(dropout_p=0.2), dict(softcap=2.0)], ids=str)
def test_deterministic(attention, options):
    """Two runs from poisoned memory agree bit for bit, and with a run without the flag up to rounding."""
    q, k, v = qkv(attention, 2, 130, 150, nheads=4, nheads_k=2)

    def run(deterministic: bool) -> tuple[Tensor, ...]:
        poison_allocator(attention.device)
        torch.manual_seed(0)
        return gradients(lambda *x: attention.dense(*x, deterministic=deterministic, **options), q, k, v)

    first, again, free = run(True), run(True), run(False)
    for name, a, b, c in zip(NAMES, first, again, free):
        assert torch.equal(a, b), name
        assert_same(name, c, a)


def test_without_dropout_nothing_else_is_returned(attention):
    """The log-sum-exp and the mask are empty, never uninitialised, and a second run is bit for bit the
    same.
    """
    q, k, v = qkv(attention, 2, 33, 41)
    first, again = (attention.dense(q, k, v, causal=True, return_attn_probs=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    _, lse, mask = first
    assert lse.shape == mask.shape == (0,) and lse.dtype == torch.float32


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch, of which a run with several processes leaves each the same few."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("nheads_k", [2, 4])
def test_any_number_of_threads(attention, threads, nheads_k):
    """The CPU takes as many heads at once as keep the threads busy: here one, or all. Each time it adds in
    the same order.
    """
    tensors = qkv(attention, 1, 300, 560, nheads=4, nheads_k=nheads_k, head_dim=16)
    dout = randn(*tensors[0].shape, seed=99, like=attention)
    first, again = (
        gradients(lambda *x: attention.dense(*x, causal=True, deterministic=True), *tensors, dout=dout)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, again))
    compare_results(first, *tensors, dout, "dense", causal=True)


def test_saved_for_backward(attention):
    """q, k, v and the generator's state are saved for backward, but neither the output nor a log-sum-exp."""
    q, k, v = (x.requires_grad_() for x in qkv(attention, 2, 64, 96, nheads=4, nheads_k=2, head_dim=16))
    bytes_saved = {}
    for use_softmax in (False, True):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out = attention.dense(q, k, v, causal=True, use_softmax=use_softmax)
        storages = {x.untyped_storage().data_ptr(): x.nbytes for x in saved}
        assert use_softmax or out.untyped_storage().data_ptr() not in storages
        bytes_saved[use_softmax] = sum(storages.values())
    assert bytes_saved[False] <= sum(x.nbytes for x in (q, k, v)) + 64
    assert bytes_saved[False] + out.nbytes <= bytes_saved[True]


MEMORY_PROBE = """
import resource, torch
from flash_attn import flash_attn_func
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for _ in range(3))
    flash_attn_func(q, k, v, causal=True, use_softmax=False, algorithm="{algorithm}").sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(256)
before = peak()
run({seqlen})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["quadratic", "linear"])
def test_memory_grows_with_the_length_not_its_square(device, algorithm):
    """Forward and backward run over 8192 tokens and 2 heads, where one matrix of scores would be 512 MiB."""
    if device != "cpu":
        pytest.skip("measures the memory of a CPU process")
    probe = [sys.executable, "-c", MEMORY_PROBE.format(seqlen=8192, algorithm=algorithm)]
    mebibytes = float(subprocess.run(probe, check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 100, f"peak memory grew by {mebibytes:.0f} MiB"


def test_packed_views(attention):
    """q, k and v of a packed qkv or kv are views with gaps; their gradients land in one tensor of the same
    layout.
    """
    q, k, v = qkv(attention, 2, 20, 20, nheads=4)
    dout = randn(*q.shape, seed=99, like=attention)
    expected = gradients(lambda *x: attention.dense(*x, causal=True), q, k, v, dout=dout)
    options = dict(causal=True, use_softmax=False)
    out, dqkv = gradients(
        lambda x: flash_attn_qkvpacked_func(x, **options), torch.stack([q, k, v], 2), dout=dout
    )
    out_kv, dq, dkv = gradients(
        lambda a, b: flash_attn_kvpacked_func(a, b, **options), q, torch.stack([k, v], 2), dout=dout
    )
    cu_seqlens = integers(attention, 0, 20, 40)
    flat, dflat = gradients(
        lambda x: flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 20, **options),
        torch.stack([q, k, v], 2).flatten(0, 1), dout=dout.flatten(0, 1),
    )  # fmt: skip
    for actual in (
        (out, *dqkv.unbind(2)),
        (out_kv, dq, *dkv.unbind(2)),
        (flat.view_as(out), *dflat.view(2, 20, 3, 4, 8).unbind(2)),
    ):
        for name, a, b in zip(NAMES, actual, expected):
            assert_same(name, a, b)


def test_strided_inputs(attention):
    """Inputs may be strided: q, k, v and dout cut from larger tensors, heads before tokens; dout as one
    expanded number.
    """
    q, k, v = qkv(attention, 2, 20, 24, nheads=2)

    def run(*tensors, dout):
        return gradients(lambda *x: attention.dense(*x, causal=True, deterministic=True), *tensors, dout=dout)

    dout = randn(*q.shape, seed=99, like=attention)
    heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v, dout))
    strided = [torch.cat([x, x], -1)[..., : q.shape[-1]].transpose(1, 2) for x in heads_first]
    for a, b in zip(run(q, k, v, dout=dout), run(*strided[:3], dout=strided[3])):
        assert torch.equal(a, b)
    one = torch.ones((), dtype=q.dtype, device=q.device)
    for a, b in zip(run(q, k, v, dout=torch.ones_like(q)), run(q, k, v, dout=one.expand_as(q))):
        assert torch.equal(a, b)
    reversed_dout = dout.flip(-1).contiguous().flip(-1)
    wide = torch.stack([reversed_dout, torch.full_like(dout, float("nan"))], -1)[..., 0]
    for a, b in zip(run(q, k, v, dout=dout), run(q, k, v, dout=wide)):
        assert torch.equal(a, b)
