"""Test that with use_softmax=True, or without the argument, everything is as upstream documents it."""

from __future__ import annotations

import pytest
import torch

from caches import LENGTHS, caches, check, rotary, step
from dropping import P, compare_dropped
from measure import compare, gradients, integers, packed, qkv, single, slopes
from oracle import Options, visibility
from ragged import EMPTY, RAGGED

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(window_size=(4, 3)),
    dict(softcap=2.0),
    dict(softmax_scale=0.3, causal=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(33, 65), (65, 33), (1, 20)])
def test_dense(attention, options, seqlen_q, seqlen_k):
    q, k, v = qkv(attention, 2, seqlen_q, seqlen_k, nheads=4, nheads_k=2, dtype=single(attention))
    compare(attention, q, k, v, use_softmax=True, **options)


def test_every_dtype(attention, dtype):
    if dtype == torch.float64:
        pytest.skip(
            "with a float32 log-sum-exp gradients are no more exact than in float32; test_backward.py has "
            "the gradcheck"
        )
    compare(attention, *qkv(attention, 2, 65, 130, head_dim=64, dtype=dtype), causal=True, use_softmax=True)


@pytest.mark.parametrize("causal", [False, True])
def test_alibi(attention, causal):
    q, k, v = qkv(attention, 2, 33, 65, dtype=single(attention))
    compare(attention, q, k, v, causal=causal, alibi_slopes=slopes(attention, 2), use_softmax=True)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout(attention, causal):
    compare_dropped(
        attention, *qkv(attention, 2, 33, 65, dtype=single(attention)), causal=causal, use_softmax=True
    )


@pytest.mark.parametrize("lengths", [RAGGED, EMPTY], ids=["ragged", "empty"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen(attention, lengths, options):
    tensors = packed(attention, **lengths, nheads=4, dtype=single(attention))
    compare(attention, *tensors, method="varlen", **lengths, use_softmax=True, **options)


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(num_splits=3), dict(cache_leftpad=(3, 0, 20))], ids=str
)
def test_kvcache(attention, options):
    if "cache_leftpad" in options:
        options = dict(cache_leftpad=integers(attention, *options["cache_leftpad"]))
    q, *new = step(attention, 3)
    arguments = dict(cache_seqlens=integers(attention, *LENGTHS), use_softmax=True)
    check(attention, q, *caches(attention), *new, **arguments, **rotary(attention), **options)


def test_is_the_default(attention):
    """A call without use_softmax gets softmax."""
    from flash_attn import flash_attn_func

    q, k, v = qkv(attention)
    assert torch.equal(
        flash_attn_func(q, k, v, causal=True), attention.dense(q, k, v, causal=True, use_softmax=True)
    )


def test_rows_without_keys_are_zero(attention):
    out, dq, *_ = gradients(
        lambda *x: attention.dense(*x, causal=True, use_softmax=True), *qkv(attention, seqlen_q=9, seqlen_k=3)
    )
    assert not out[:, :6].any() and not dq[:, :6].any()


def test_log_sum_exp(attention):
    """softmax_lse is the natural log of each row's sum of exp(s), float32."""
    q, k, v = qkv(attention, 2, 33, 65)
    _, lse, mask = attention.dense(q, k, v, causal=True, use_softmax=True, return_attn_probs=True)
    s = torch.einsum("bihd,bjhd->bhij", q.double().cpu(), k.double().cpu()) * 8**-0.5
    expected = s.masked_fill(~visibility(33, 65, Options(causal=True)), -torch.inf).logsumexp(-1)
    assert lse.shape == (2, 2, 33) and lse.dtype == torch.float32 and mask.numel() == 0
    assert torch.allclose(
        lse.double().cpu(), expected, rtol=1e-3 if q.dtype == torch.float16 else 1e-6, atol=1e-6
    )


def test_encoded_weights(attention, device):
    """S_dmask is exp(s - row maximum), with a minus sign for dropped entries."""
    if device != "cpu":
        pytest.skip(
            "the CUDA kernels encode relative to the maxima of their blocks, which upstream's own tests undo"
        )
    q, k, v = qkv(attention, 2, 33, 65)
    _, _, encoded = attention.dense(q, k, v, dropout_p=P, use_softmax=True, return_attn_probs=True)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    assert torch.allclose(encoded[:, :, :33, :65].abs(), (s - s.amax(-1, keepdim=True)).exp(), rtol=1e-6)
    assert (encoded[:, :, :33, :65] < 0).any()


def test_large_scores_do_not_overflow(attention):
    """The row maximum is subtracted before exp."""
    q, k, v = qkv(attention, size=30, dtype=single(attention))
    compare(attention, q, k, v, causal=True, use_softmax=True, softmax_scale=1.0)
