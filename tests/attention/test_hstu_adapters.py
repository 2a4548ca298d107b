"""Test flash_attn.hstu: each function computes what its origin documents, and refuses the rest by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from flash_attn.hstu import delta_hstu_mha, hstu_attn_varlen_func, hstu_mha
from flash_attn.masks import HSTU, Intervals

from measure import NAMES, assert_close, gradients, randn
from oracle import Oracle
from package import cumulative

LENGTHS = [24, 9, 0, 40]
TARGETS, CONTEXTS = torch.tensor([3, 9, 0, 5]), torch.tensor([4, 0, 0, 7])


def jagged(head_dim_v: int = 8, lengths=LENGTHS) -> tuple:
    """(q, k, v, offsets) with offsets int64, as both origins have them."""
    q, k, v = (randn(sum(lengths), 2, d, seed=d + i) for i, d in enumerate((8, 8, head_dim_v)))
    return q, k, v, cumulative(lengths, "cpu").long()


def same(function, q, k, v, lengths_q=LENGTHS, **options) -> None:
    """Compare output and gradients of function(q, k, v) with the oracle."""
    dout = randn(*q.shape[:2], v.shape[-1], seed=9)
    actual = gradients(function, q, k, v, dout=dout)
    expected = gradients(
        lambda *x: Oracle().varlen(*x, lengths_q, LENGTHS, activation="silu", **options), q, k, v, dout=dout
    )
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(name, a, e, baseline=e * (1 + 1e-12))


@pytest.mark.parametrize("options, mask", [
    (dict(), HSTU()),
    (dict(num_targets=TARGETS), HSTU(TARGETS)),
    (dict(num_targets=TARGETS.int(), max_attn_len=6), HSTU(TARGETS, max_attn_len=6)),
    (dict(num_targets=TARGETS, max_attn_len=6, min_full_attn_seq_len=3), HSTU(TARGETS, 0, 6, 3)),
    (dict(max_attn_len=6, contextual_seq_len=4), HSTU(0, 4, 6)),
    (dict(sort_by_length=True, kernel="TRITON", enable_tma=True), HSTU()),
    (dict(dropout_pr=0.5, training=False), HSTU()),
], ids=str)  # fmt: skip
def test_hstu_mha(options, mask):
    """Divided by max_seq_len, which may exceed the longest length."""
    q, k, v, offsets = jagged(head_dim_v=12)
    mask = mask._replace(num_contexts=torch.tensor([4, 4, 0, 4])) if mask.num_contexts else mask
    same(
        lambda *x: hstu_mha(64, 0.4, *x, offsets, **options), q, k, v,
        softmax_scale=0.4, normalization=1 / 64, mask=mask,
    )  # fmt: skip


SCALES = {
    "a number": 0.25,
    "float32": torch.tensor(0.25),
    "float64": torch.tensor(0.25).double(),
    "rows": torch.linspace(0.1, 1.0, 73),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_attn_scale(scale):
    """One factor, or one for each query, in place of 1 / max_seq_len."""
    q, k, v, offsets = jagged()
    given = float(scale) if not isinstance(scale, torch.Tensor) or scale.dim() == 0 else scale
    same(lambda *x: hstu_mha(40, 0.4, *x, offsets, attn_scale=scale), q, k, v, softmax_scale=0.4,
         normalization=given, mask=HSTU())  # fmt: skip


def test_dropout_drops_while_training():
    q, k, v, offsets = jagged()
    torch.manual_seed(0)
    dropped, whole = (hstu_mha(40, 1.0, q, k, v, offsets, dropout_pr=p) for p in (0.5, 0.0))
    assert not torch.allclose(dropped, whole)


@pytest.mark.parametrize("rows", [1, 5])
def test_delta_hstu_mha(rows):
    """The last rows of each sequence."""
    lengths = [24, 9, 40]
    q, k, v, offsets = jagged(lengths=lengths)
    options = dict(num_targets=TARGETS[[0, 1, 3]], max_attn_len=6, contextual_seq_len=0)
    whole = hstu_mha(40, 0.4, q, k, v, offsets, **options)
    last = torch.cat([torch.arange(end - rows, end) for end in offsets[1:].tolist()])
    actual = delta_hstu_mha(40, 0.4, q[last], k, v, offsets, **options)
    torch.testing.assert_close(actual, whole[last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options, mask", [
    (dict(), dict()),
    (dict(window_size=(-1, 0)), dict(causal=True)),
    (dict(window_size=(5, 2)), dict(window_size=(5, 2))),
    (dict(num_targets=TARGETS, window_size=(-1, 0)), dict(mask=HSTU(TARGETS))),
    (
        dict(num_targets=TARGETS, num_contexts=CONTEXTS, target_group_size=2, window_size=(-1, 0)),
        dict(mask=HSTU(TARGETS, CONTEXTS, target_group_size=2)),
    ),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("scaling_seqlen", [-1, 128])
def test_hstu_attn_varlen_func(options, mask, scaling_seqlen):
    q, k, v, offsets = jagged()
    longest = dict(max_seqlen_q=50, max_seqlen_k=60)
    same(
        lambda *x: hstu_attn_varlen_func(
            *x, offsets, offsets, **longest, scaling_seqlen=scaling_seqlen, alpha=0.4, **options
        ),
        q, k, v, softmax_scale=0.4, normalization=1 / (50 if scaling_seqlen == -1 else 128), **mask,
    )  # fmt: skip


def test_fewer_queries():
    """Delta-q: the queries are the last rows."""
    q, k, v, offsets = jagged()
    lengths = [5, 9, 0, 7]
    q = q[: sum(lengths)]
    same(
        lambda *x: hstu_attn_varlen_func(
            *x, cumulative(lengths, "cpu"), offsets, max_seqlen_q=9, max_seqlen_k=40, num_targets=TARGETS,
            window_size=(-1, 0),
        ),
        q, k, v, lengths_q=lengths, softmax_scale=1.0, normalization=1 / 9, mask=HSTU(TARGETS),
    )  # fmt: skip


def semi_local(n: int, first: int, local: int) -> list:
    """(F0, F1, F2) of each row: the first keys, and the last `local` ones; F1 may exceed F2."""
    return [(min(first, i + 1), max(first, i - local + 1), i + 1) for i in range(n)]


def test_func():
    """FBGEMM's intervals, behind which it wants 256 numbers more, and the same as Intervals."""
    q, k, v, offsets = jagged()
    rows = torch.tensor([f for n in LENGTHS for f in semi_local(n, 4, 6)], dtype=torch.int32)
    func = torch.cat([rows.T, torch.full((3, 256), 99, dtype=torch.int32)], 1)[None]
    starts = torch.stack([torch.zeros_like(rows[:, 0]), rows[:, 1]], 1)
    ends = torch.maximum(starts, rows[:, ::2])
    same(
        lambda *x: hstu_attn_varlen_func(*x, offsets, offsets, max_seqlen_q=40, max_seqlen_k=40, func=func),
        q, k, v, softmax_scale=1.0, normalization=1 / 40, mask=Intervals(starts, ends),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    q, k, v, offsets = jagged()

    def attend(q, k, v, offsets, targets, scale):
        out = hstu_mha(40, 0.4, q, k, v, offsets, num_targets=targets, attn_scale=scale)
        return out + hstu_attn_varlen_func(
            q,
            k,
            v,
            offsets,
            offsets,
            max_seqlen_q=40,
            max_seqlen_k=40,
            num_targets=targets,
            window_size=(-1, 0),
        )

    given = offsets, TARGETS, torch.tensor(0.1)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual, expected = (gradients(lambda *x: f(*x, *given), q, k, v) for f in (compiled, attend))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_exported():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, offsets, targets):
            return hstu_mha(40, 0.4, q, k, v, offsets, num_targets=targets, max_attn_len=6)

    given = *jagged(), TARGETS
    program = torch.export.export(Attention(), given).module()
    for targets in (TARGETS, TARGETS.clamp(max=2)):
        torch.testing.assert_close(program(*given[:4], targets), Attention()(*given[:4], targets))


FBGEMM = dict(max_seqlen_q=40, max_seqlen_k=40)
X = torch.ones(4)
REFUSED = {
    "not causal": (hstu_mha, dict(causal=False), ValueError, "causal=False"),
    "a scale with a gradient": (
        hstu_mha, dict(attn_scale=torch.ones(4, requires_grad=True)), ValueError, "attn_scale requires",
    ),
    "divided by 0": (hstu_mha, dict(max_seq_len=0), ValueError, "max_seq_len=0"),
    "a scale below 0": (hstu_mha, dict(attn_scale=torch.tensor(-1.0)), ValueError, r"=-1\.0"),
    "too many targets": (hstu_mha, dict(num_targets=TARGETS + 1), ValueError, r"num_targets\[1\]=10"),
    "too many contexts": (hstu_mha, dict(contextual_seq_len=10), ValueError, r"num_contexts\[1\]=10"),
    "rab": (hstu_attn_varlen_func, dict(FBGEMM, rab=X), NotImplementedError, "rab is not served.*bias"),
    "drab": (hstu_attn_varlen_func, dict(FBGEMM, has_drab=True), NotImplementedError, "has_drab=True"),
    "fp8": (hstu_attn_varlen_func, dict(FBGEMM, quant_mode=2), NotImplementedError, "quant_mode=2.*fp8"),
    "seqused_q": (hstu_attn_varlen_func, dict(FBGEMM, seqused_q=X), NotImplementedError, "seqused_q"),
    "seqused_k": (hstu_attn_varlen_func, dict(FBGEMM, seqused_k=X), NotImplementedError, "seqused_k"),
    "pages": (hstu_attn_varlen_func, dict(FBGEMM, kv_cache=X), NotImplementedError, "kv_cache.*block_table"),
    "page ids": (hstu_attn_varlen_func, dict(FBGEMM, page_ids=X), NotImplementedError, "page_ids"),
    "the old order": (hstu_attn_varlen_func, dict(seqused_q=40, seqused_k=40), TypeError, "by keyword"),
    "no longest": (hstu_attn_varlen_func, dict(max_seqlen_q=40), TypeError, "max_seqlen_k is missing"),
    "targets and a window": (
        hstu_attn_varlen_func, dict(FBGEMM, num_targets=TARGETS, window_size=(5, 0)), ValueError,
        r"num_targets with window_size=\(5, 0\)",
    ),
    "contexts and no mask": (
        hstu_attn_varlen_func, dict(FBGEMM, num_contexts=CONTEXTS), ValueError, "num_contexts with window",
    ),
    "func and targets": (
        hstu_attn_varlen_func, dict(FBGEMM, func=X, num_targets=TARGETS), ValueError, "func with num_targets",
    ),
    "func of heads": (
        hstu_attn_varlen_func, dict(FBGEMM, func=torch.zeros(2, 3, 400, dtype=torch.int32)), ValueError,
        r"func has shape \(2, 3, 400\)",
    ),
    "a short func": (
        hstu_attn_varlen_func, dict(FBGEMM, func=torch.zeros(1, 3, 72, dtype=torch.int32)), ValueError,
        "at least 73",
    ),
    "a func that is a list": (hstu_attn_varlen_func, dict(FBGEMM, func=[1]), TypeError, "func is a"),
    "scaled by 0": (hstu_attn_varlen_func, dict(FBGEMM, scaling_seqlen=0), ValueError, "scaling_seqlen=0"),
    "scaled by -2": (hstu_attn_varlen_func, dict(FBGEMM, scaling_seqlen=-2), ValueError, "scaling_seqlen=-2"),
}  # fmt: skip


@pytest.mark.parametrize("function, options, error, words", REFUSED.values(), ids=REFUSED)
def test_refused(function, options, error, words):
    q, k, v, offsets = jagged()
    if function is hstu_mha:
        options = dict(max_seq_len=40, alpha=0.4, seq_offsets=offsets) | options
    else:
        options = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets) | options
    with pytest.raises(error, match=words):
        function(q=q, k=k, v=v, **options)


def test_refused_delta():
    q, k, v, offsets = jagged()
    with pytest.raises(ValueError, match="delta_q has 7 rows for 4 sequences"):
        delta_hstu_mha(40, 0.4, q[:7], k, v, offsets)


def test_page():
    """The blocks of docs/hstu.md run as printed, one after the other."""
    page = Path(__file__).resolve().parents[2] / "docs" / "hstu.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
        assert torch.isfinite(names["out"]).all() and names["out"].shape == names["q"].shape


NAMES_OF = {
    hstu_mha: "max_seq_len alpha q k v seq_offsets causal dropout_pr training num_targets attn_scale"
    " max_attn_len contextual_seq_len min_full_attn_seq_len sort_by_length kernel enable_tma",
    hstu_attn_varlen_func: "q k v cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k"
    " scaling_seqlen num_contexts num_targets target_group_size window_size alpha rab has_drab kv_cache"
    " page_offsets page_ids last_page_lens func quant_mode",
}


@pytest.mark.parametrize("function, names", NAMES_OF.items())
def test_arguments_of_the_origin(function, names):
    """The order is that of generative-recommenders' function, and of FBGEMM's newest."""
    assert list(inspect.signature(function).parameters) == names.split()
