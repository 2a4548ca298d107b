"""Test that calls which look the same, checked and dispatched only once, each get the right result."""

from __future__ import annotations

from types import SimpleNamespace

import flash_attn
import pytest
import torch
from flash_attn import extension, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.nosoftmax import backward, forward, interface
from flash_attn.nosoftmax.backends import fa2

from measure import qkv
from package import cumulative

OFF = dict(use_softmax=False, algorithm="quadratic")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(interface, "_known", {})


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_one_tensor_for_all_three_and_then_others():
    q, k, v = qkv(None, 2, 9, 9)
    flash_attn_func(q, q, q, **OFF)
    expected = torch.einsum("bqhd,bkhd,bkhe->bqhe", q, k, v) * q.shape[-1] ** -0.5
    close(flash_attn_func(q, k, v, **OFF), expected)
    close(flash_attn_func(k=k, v=v, q=q, **OFF), expected)


def test_positional_arguments_and_keywords():
    """The positional arguments are dropout_p, softmax_scale and causal, in this order."""
    q, k, v = qkv(None, 2, 9, 9)
    by_name = flash_attn_func(q, k, v, causal=True, softmax_scale=0.5, **OFF)
    for _ in range(2):
        close(flash_attn_func(q, k, v, 0.0, 0.5, True, **OFF), by_name)
        close(flash_attn_func(q, k, v, softmax_scale=0.5, causal=True, **OFF), by_name)
        assert (flash_attn_func(q, k, v, 0.0, 0.25, True, **OFF) - by_name).abs().max() > 0.1


def test_equal_numbers_of_another_type():
    q, k, v = qkv(None, 2, 9, 9)
    flash_attn_func(q, k, v, causal=True, **OFF)
    with pytest.raises(TypeError, match="causal=1.0"):
        flash_attn_func(q, k, v, causal=1.0, **OFF)


def test_lists_and_tensors_in_the_place_of_numbers():
    """Lists and tensors are read at each call."""
    q, k, v = qkv(None, 2, 9, 9)
    for make in (list, torch.tensor):
        window = make([-1, 0])
        first = flash_attn_func(q, k, v, window_size=window, **OFF)
        window[0] = 1
        close(
            flash_attn_func(q, k, v, window_size=window, **OFF),
            flash_attn_func(q, k, v, window_size=(1, 0), **OFF),
        )
        assert (flash_attn_func(q, k, v, window_size=window, **OFF) - first).abs().max() > 0.1
    scale = torch.tensor(0.5)
    first = flash_attn_func(q, k, v, softmax_scale=scale, **OFF)
    scale.fill_(1.0)
    close(flash_attn_func(q, k, v, softmax_scale=scale, **OFF), 2 * first)


def test_lengths_that_are_not_contiguous(monkeypatch):
    """A kernel reads lengths as if they were contiguous."""
    attend, calls = interface.ops.attend, []
    monkeypatch.setattr(
        interface.ops, "attend", lambda call, *more: calls.append(call) or attend(call, *more)
    )
    lengths = cumulative((4, 5), "cpu")
    spread = torch.stack([lengths, torch.full_like(lengths, 7)], 1)[:, 0]
    x = [t.flatten(0, 1) for t in qkv(None, 1, 9, 9)]
    expected = flash_attn_varlen_func(*x, lengths, lengths, 5, 5, **OFF)
    close(flash_attn_varlen_func(*x, spread, spread, 5, 5, **OFF), expected)
    close(flash_attn_varlen_func(*x, lengths.long(), lengths.long(), 5, 5, **OFF), expected)
    assert all(call.cu_seqlens_q.is_contiguous() and call.cu_seqlens_k.is_contiguous() for call in calls)


def test_what_lies_in_the_tensors_is_looked_at_again():
    """On the CPU values are checked again: the offsets of the second call are wrong."""
    x = [t.flatten(0, 1) for t in qkv(None, 1, 9, 9)]
    flash_attn_varlen_func(*x, *[cumulative((4, 5), "cpu")] * 2, 5, 5, **OFF)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        flash_attn_varlen_func(*x, *[cumulative((3, 6), "cpu")] * 2, 5, 5, **OFF)


def test_gradients_after_a_call_without(device):
    dtype = torch.float16 if device == "cuda" else torch.float64
    tensors = [x.to(device, dtype) for x in qkv(None, 2, 9, 9)]
    out = flash_attn_func(*tensors, **OFF)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for _ in range(2):
        again = flash_attn_func(*leaves, **OFF)
        assert again.requires_grad
        with torch.no_grad():
            assert not flash_attn_func(*leaves, **OFF).requires_grad
        close(again.detach(), out)


def test_packed_qkv():
    packed = torch.stack(qkv(None, 2, 9, 9), 2)
    expected = flash_attn_func(*packed.unbind(2), **OFF)
    for x in (packed, packed + 1, packed):
        close(flash_attn_qkvpacked_func(x, **OFF), flash_attn_func(*x.unbind(2), **OFF))
    close(flash_attn_qkvpacked_func(packed, **OFF), expected)


def test_autocast():
    q, k, v = (x.float() for x in qkv(None, 2, 9, 9))
    assert flash_attn_func(q, k, v, **OFF).dtype == torch.float32
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert flash_attn_func(q, k, v, **OFF).dtype == torch.bfloat16
        assert flash_attn_func(q, k, v, **OFF).dtype == torch.float32


def test_the_environment(monkeypatch):
    """FLASH_ATTENTION_NOSOFTMAX_BACKEND is read at each call that names no backend."""
    q, k, v = qkv(None, 2, 9, 9)
    flash_attn_func(q, k, v, use_softmax=False)
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "no such backend")
    with pytest.raises(ValueError, match="no such backend"):
        flash_attn_func(q, k, v, use_softmax=False)


def test_factors_and_biases():
    """Tensors in our own keywords are read at each call."""
    q, k, v = qkv(None, 2, 9, 9)
    plain = flash_attn_func(q, k, v, **OFF)
    for factor in (1.0, 2.0, 3.0):
        given = torch.full((2,), factor)
        close(flash_attn_func(q, k, v, normalization=given, **OFF), plain * factor)
        close(forward(q, k, v, normalization=given, algorithm="quadratic")[0], plain * factor)


def test_the_pair():
    tensors = qkv(None, 2, 9, 9)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = flash_attn_func(*leaves, causal=True, **OFF)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout)
    for _ in range(2):
        forward(*[tensors[0]] * 3, causal=True, algorithm="quadratic")
        close(forward(*tensors, causal=True, algorithm="quadratic")[0], out.detach())
        for a, b in zip(backward(dout, *tensors, causal=True, algorithm="quadratic"), expected):
            close(a, b)


@pytest.mark.parametrize("algorithm", ["linear", "quadratic"])
def test_what_follows_a_call_follows_its_repetition(algorithm):
    """Forward derivatives, transforms and profiles see a call that was made before without them."""
    q, k, v = qkv(None, 2, 9, 9)
    options = dict(use_softmax=False, algorithm=algorithm, causal=True)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(x, k, v, **options)

    out = attend(q)
    close(attend(q), out)
    close(torch.func.jvp(attend, (q,), (q,))[1], out)  # linear in q
    close(torch.func.vmap(attend)(torch.stack([q, 2 * q])), torch.stack([out, 2 * out]))
    backend = "linear" if algorithm == "linear" else "cpu"
    with torch.profiler.profile() as profile:
        close(attend(q), out)
    assert f"flash_attn_nosoftmax::forward[{backend}]" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("head_dim", [32, 12])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(causal=True), dict(window_size=(3, 1)), dict(softcap=2.0, activation="silu"),
        dict(activation="sigmoid", sigmoid_bias=-1.5, normalization="1/n", softmax_scale=0.5),
        dict(normalization=0.25),
    ],
    ids=str,
)  # fmt: skip
def test_the_extension_gets_the_same_arguments(monkeypatch, options, head_dim):
    """From a call that is prepared, and from one that is not."""
    tensors = [torch.randn(2, 9, 3, head_dim).transpose(0, 1).to(torch.bfloat16) for _ in range(3)]
    asked = []
    module = SimpleNamespace(fwd=lambda *given: asked.append(given) or (given[0] + 1, None, None, None))
    monkeypatch.setattr(extension, "load", lambda: module)
    calls = []
    monkeypatch.setattr(interface.ops, "attend", lambda call, *more: calls.append(call) or fa2.forward(call))
    expected = flash_attn_func(*tensors, use_softmax=False, backend="cpu", **options)
    out = fa2.prepared(calls[0])(*tensors)
    assert out.equal(expected) and out.shape == tensors[0].shape
    first, second = asked
    assert all(a.equal(b) for a, b in zip(first[:3], second[:3])) and first[3:] == second[3:]


def test_what_is_prepared():
    """Not what depends on other tensors, or is random."""
    q, k, v = qkv(None, 2, 9, 9)
    prepared = {}
    for name, options in {
        "plain": dict(), "causal": dict(causal=True), "factors": dict(normalization=torch.ones(2)),
    }.items():  # fmt: skip
        flash_attn_func(q, k, v, use_softmax=False, algorithm="linear", **options)
        *_, known = interface._known.values()
        prepared[name] = known.repeated is not None
    flash_attn_func(q, k, v, dropout_p=0.5, **OFF)
    *_, known = interface._known.values()
    assert prepared == {"plain": True, "causal": True, "factors": False} and known.repeated is None


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(interface, "_MOST_LOOKS", 3)
    for n in range(1, 9):
        x = torch.zeros(1, n, 1, 8)
        flash_attn.flash_attn_func(x, x, x, **OFF)
    assert len(interface._known) <= 3
