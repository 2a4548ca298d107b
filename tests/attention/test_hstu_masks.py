"""Test mask=HSTU(...) and mask=Intervals(...): what is visible, results, derivatives and what is refused."""

from __future__ import annotations

import random

import flash_attn
import pytest
import torch
from flash_attn.masks import HSTU, Intervals
from flash_attn.nosoftmax.backends.cpu import backward_loop, forward_loop
from flash_attn.nosoftmax.intervals import HSTUSequence

from calls import DIFFERENTIABLE, close
from measure import (
    NAMES,
    assert_same,
    compare,
    compare_output,
    gradients,
    integers,
    packed,
    poisoned,
    qkv,
    randn,
)
from oracle import FUNCTIONS, Options, Oracle, visibility
from package import Package, cumulative

# One of each kind: candidates, contexts, a window that hides contexts, rows that see all, groups.
MASKS = {
    "targets": HSTU(num_targets=6),
    "contexts": HSTU(num_contexts=4),
    "targets, contexts": HSTU(num_targets=6, num_contexts=4),
    "window": HSTU(num_targets=6, num_contexts=4, max_attn_len=5),
    "window, no contexts": HSTU(num_targets=6, max_attn_len=5),
    "window, whole rows": HSTU(num_targets=6, num_contexts=4, max_attn_len=5, min_full_attn_seq_len=3),
    "groups": HSTU(num_targets=7, num_contexts=4, max_attn_len=5, target_group_size=3),
    "all targets": HSTU(num_targets=24),
    "all contexts": HSTU(num_contexts=24),
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
LENGTHS = dict(lengths_q=[20, 0, 9, 33], lengths_k=[24, 0, 9, 40])
TARGETS, CONTEXTS = (3, 0, 9, 5), (4, 0, 0, 7)


def random_masks(count: int):
    """Yield (seqlen_q, seqlen_k, mask) with all relations of the numbers, beyond the length as well."""
    choose = random.Random(0)
    for _ in range(count):
        n = choose.randint(1, 30)
        targets = choose.randint(0, n)
        mask = HSTU(
            targets, choose.choice((0, choose.randint(0, n - targets))),
            choose.choice((0, choose.randint(1, n + 2))), choose.choice((0, choose.randint(1, n + 2))),
            choose.randint(1, 5),
        )  # fmt: skip
        yield choose.choice((n, n, choose.randint(1, n), n + 3)), n, mask


def random_intervals(attention, *rows: int, seqlen_k: int, k: int = 3) -> Intervals:
    """Intervals that are apart, of any lengths; some are not used, and some rows see nothing."""
    generator = torch.Generator().manual_seed(sum(rows) + k)
    cuts = torch.randint(0, seqlen_k + 1, (*rows, 2 * k), generator=generator).sort(-1).values
    starts, ends = cuts[..., ::2].clone(), cuts[..., 1::2].clone()
    ends[..., ::3, :] = starts[..., ::3, :]
    return Intervals(*(x.int().to(attention.device) for x in (starts, ends)))


# ---- What is visible


def test_closed_form_equals_the_definition():
    """The intervals are those of comparing positions, key by key, in 6,000 random masks."""
    for seqlen_q, seqlen_k, mask in random_masks(6000):
        starts, ends = HSTUSequence(seqlen_q, seqlen_k, *mask).intervals()
        assert starts.dtype == ends.dtype == torch.int32 and starts.shape == ends.shape == (seqlen_q, 2)
        key = torch.arange(seqlen_k)
        inside = (key >= starts[..., None]) & (key < ends[..., None])
        expected = visibility(seqlen_q, seqlen_k, Options(mask=mask))
        assert torch.equal(inside.any(1), expected), mask
        assert (inside.sum(1) <= 1).all(), f"the intervals overlap: {mask}"


def test_bounds_of_a_block():
    """The ranges of a block hold the keys that any of its rows sees, and no other; what all its rows see is
    the whole common part of contextual keys and history.
    """
    choose = random.Random(1)
    for seqlen_q, seqlen_k, mask in random_masks(6000):
        sequence = HSTUSequence(seqlen_q, seqlen_k, *mask)
        first = choose.randrange(seqlen_q)
        rows = range(first, choose.randint(first + 1, seqlen_q))
        visible = visibility(seqlen_q, seqlen_k, Options(mask=mask))[rows.start : rows.stop]
        seen, inside = visible.any(0), torch.zeros(seqlen_k, dtype=torch.bool)
        ranges = sequence.seen_by_any(rows)
        assert len(ranges) <= 2 and all(ranges)
        assert all(a.stop < b.start for a, b in zip(ranges, ranges[1:])), "they are apart"
        for keys in ranges:
            inside[keys.start : keys.stop] = True
        assert not (seen & ~inside).any(), f"{mask}, {rows}: a visible key is left out"
        assert not (inside & ~seen).any(), f"{mask}, {rows}: a hidden key is visited"
        common = visible[:, : sequence.history_end].all(0).nonzero().flatten().tolist()
        assert list(sequence.seen_by_all(rows)) == common, f"{mask}, {rows}"


def test_some_of_the_rows():
    """With a diagonal, rows anywhere see what they see among all rows, and so do their blocks."""
    choose = random.Random(2)
    for seqlen_q, n, mask in random_masks(3000):
        whole, first = HSTUSequence(seqlen_q, n, *mask), choose.randrange(seqlen_q)
        rows = range(first, choose.randint(first + 1, seqlen_q))
        part, offset = range(len(rows)), first + n - seqlen_q
        some = HSTUSequence(len(rows), n, *mask, diagonal=offset)
        for a, b in zip(some.intervals(), whole.intervals()):
            assert torch.equal(a, b[rows.start : rows.stop]), f"{mask}, {rows}"
        assert some.seen_by_any(part) == whole.seen_by_any(rows), f"{mask}, {rows}"
        assert some.seen_by_all(part) == whole.seen_by_all(rows), f"{mask}, {rows}"


def test_a_mask_written_out():
    """n = 7: two contextual keys, three of history, two candidates, max_attn_len 2."""
    see = visibility(7, 7, Options(mask=HSTU(2, 2, 2))).int().tolist()
    assert see == [
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0, 1],
    ]


# ---- Results


@masks
@pytest.mark.parametrize("seqlen_q", [24, 9, 30])
def test_hstu(attention, mask, seqlen_q):
    """With all rows, the last ones alone, and rows before position 0, which see nothing."""
    compare(attention, *qkv(attention, 2, seqlen_q, 24, nheads=4, nheads_k=2), activation="silu", mask=mask)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("normalization", [None, "1/n", "1/visible", "1/sqrt(n)", 0.1])
def test_functions(attention, activation, normalization):
    options = dict(activation=activation, normalization=normalization)
    tensors, intervals = qkv(attention, 2, 20, 24), random_intervals(attention, 2, 20, seqlen_k=24)
    for mask in (MASKS["groups"], intervals):
        compare(attention, *tensors, mask=mask, **options)


def test_counts_of_each_sequence(attention):
    mask = HSTU(integers(attention, 3, 0), integers(attention, 0, 7), max_attn_len=6)
    score = dict(activation="sigmoid", normalization="1/visible")
    compare(attention, *qkv(attention, 2, 20, 24), mask=mask, **score)


@pytest.mark.parametrize("options", [
    dict(max_attn_len=5), dict(max_attn_len=5, min_full_attn_seq_len=2), dict(target_group_size=2),
], ids=str)  # fmt: skip
def test_packed(attention, options):
    """Each sequence has its own counts, or one number holds for all but the empty one."""
    tensors = packed(attention, **LENGTHS, nheads=4)
    score = dict(activation="silu", normalization="1/n", softmax_scale=0.4)
    counts = integers(attention, *TARGETS), integers(attention, *CONTEXTS)
    for given in (counts, (counts[0], 0), (4, 5)):
        mask = HSTU(*given, **options)
        compare(attention, *tensors, method="varlen", **LENGTHS, mask=mask, **score)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_packed_intervals(attention, k):
    """Columns count from the start of the own sequence."""
    rows = [
        random_intervals(attention, lq, seqlen_k=lk, k=k)
        for lq, lk in zip(LENGTHS["lengths_q"], LENGTHS["lengths_k"])
    ]
    mask = Intervals(*(torch.cat(x) for x in zip(*rows)))
    tensors = packed(attention, **LENGTHS, nheads=4)
    compare(attention, *tensors, method="varlen", **LENGTHS, mask=mask, normalization="1/visible")


def test_beside_other_options(attention):
    """Softcap, a bias for each head and factors for each row act as without a mask; a decay and ALiBi too
    beside intervals, which keep the distances by index.
    """
    tensors = qkv(attention, 2, 20, 24)
    factors = torch.rand(2, 20).to(attention.device)
    slopes = torch.tensor([0.3, 0.1], device=attention.device)
    compare(attention, *tensors, mask=MASKS["window"], softcap=2.0, activation="gelu", normalization=factors)
    compare(attention, *tensors, mask=MASKS["window"], activation="sigmoid", sigmoid_bias=-slopes)
    intervals = random_intervals(attention, 2, 20, seqlen_k=24)
    compare(attention, *tensors, mask=intervals, activation="silu", alibi_slopes=slopes, decay_slopes=slopes)


def test_head_dim_v(attention):
    q, k, v = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2)
    v, dout = torch.cat([v, -v], -1)[..., :12], randn(2, 20, 4, 12, seed=5, like=attention)
    compare(attention, q, k, v, dout, activation="silu", mask=MASKS["window"])


def test_dropout(attention):
    """Dropped weights are those of the same seed without a mask."""
    tensors = qkv(attention, 2, 20, 24)
    mask = MASKS["window"]
    out, keep = attention.dropped(*tensors, 0.3, seed=1, mask=mask)
    expected = Oracle().dense(*(x.cpu() for x in tensors), keep=keep.cpu(), dropout_p=0.3, mask=mask)
    assert_same("out", out, expected.to(out), 8)


@pytest.mark.parametrize("seqlen_q", [40, 12])
def test_pages(attention, seqlen_q):
    """The last rows of two sequences over paged keys, with the lengths of the sequences."""
    lengths, table = [40, 37], integers(attention, 3, 0, 2, 1, 4, 5).reshape(2, 3)
    shapes = (2 * seqlen_q, 2), (6, 16, 2), (6, 16, 2)
    q, k, v = (randn(*shape, 8, seed=i, like=attention) for i, shape in enumerate(shapes))
    mask = HSTU(integers(attention, 6, 3), integers(attention, 4, 0), max_attn_len=9)
    lengths_q = [min(seqlen_q, n) for n in lengths]
    compare_output(
        attention, q[: sum(lengths_q)], k, v, method="varlen", lengths_q=lengths_q, lengths_k=lengths,
        seqused_k=integers(attention, *lengths), block_table=table, mask=mask, activation="silu",
    )  # fmt: skip


@pytest.mark.parametrize("mask", [
    HSTU(300, 20, 150, 40), HSTU(700, 20, 150), HSTU(33, 3, 0), HSTU(600, 0, 60, target_group_size=200),
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_long(attention, mask):
    """Several blocks of rows and of keys."""
    tensors = qkv(attention, 1, 1300, 1300, nheads=1, head_dim=8)
    compare(attention, *tensors, activation="silu", normalization="1/n", mask=mask)


@pytest.mark.slow
def test_long_intervals(attention):
    mask = random_intervals(attention, 1, 600, seqlen_k=2200)
    compare(attention, *qkv(attention, 1, 600, 2200, nheads=1), activation="silu", mask=mask)


def test_without_counts_it_is_causal(attention):
    """HSTU() and HSTU(max_attn_len=w) are causal and a window, on every backend and bit for bit."""
    tensors = qkv(attention, 2, 20, 24)
    for mask, same in (
        (HSTU(), dict(causal=True)), (HSTU(min_full_attn_seq_len=3), dict(causal=True)),
        (HSTU(max_attn_len=5), dict(window_size=(5, 0))), (HSTU(max_attn_len=99), dict(window_size=(99, 0))),
    ):  # fmt: skip
        actual, expected = (
            gradients(lambda *x: attention.dense(*x, deterministic=True, **options), *tensors)
            for options in (dict(mask=mask), same)
        )
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


# ---- Laws


def test_packed_equals_alone(attention):
    q, k, v = packed(attention, **LENGTHS)
    counts = [integers(attention, *x) for x in (TARGETS, CONTEXTS)]
    options = dict(max_attn_len=6, target_group_size=2)
    score = dict(activation="silu", normalization="1/visible", deterministic=True)
    dout = randn(*q.shape, seed=9, like=attention)
    together = gradients(
        lambda *x: attention.varlen(*x, **LENGTHS, mask=HSTU(*counts, **options), **score), q, k, v, dout=dout
    )
    starts = [[0, *torch.tensor(x).cumsum(0).tolist()] for x in LENGTHS.values()]
    for b in range(4):
        own_q, own_k = (slice(at[b], at[b + 1]) for at in starts)
        alone = gradients(
            lambda *x: attention.dense(*x, mask=HSTU(TARGETS[b], CONTEXTS[b], **options), **score),
            q[None, own_q], k[None, own_k], v[None, own_k], dout=dout[None, own_q],
        )  # fmt: skip
        for name, a, e, own in zip(NAMES, together, alone, (own_q, own_q, own_k, own_k)):
            assert torch.equal(a[own], e[0]), name


def test_the_last_rows_alone(attention):
    """Delta-q: a call with the last queries gives the last rows of the whole."""
    q, k, v = qkv(attention, 2, 40, 40)
    options = dict(activation="silu", normalization="1/n", mask=HSTU(integers(attention, 6, 9), 4, 7))
    whole = attention.dense(q, k, v, **options)
    for rows in (1, 8, 25):
        assert_same("out", attention.dense(q[:, -rows:], k, v, **options), whole[:, -rows:], 8)


def test_nested_tensors(attention):
    lengths = [24, 9, 40]
    q, k, v = packed(attention, lengths, lengths)
    counts = [integers(attention, *x) for x in ((3, 9, 5), (4, 0, 7))]
    intervals = random_intervals(attention, len(q), seqlen_k=9)
    offsets = cumulative(lengths, attention.device).long()
    for mask in (HSTU(*counts, max_attn_len=6), intervals):
        expected = attention.varlen(q, k, v, lengths, lengths, activation="silu", mask=mask)
        jagged = (torch.nested.nested_tensor_from_jagged(x, offsets) for x in (q, k, v))
        actual = attention._call(flash_attn.flash_attn_func, *jagged, activation="silu", mask=mask)
        assert torch.equal(actual.values(), expected)


def hidden(seqlen_q: int, seqlen_k: int, mask) -> tuple:
    """(queries that see no key, keys that no query sees), bool."""
    visible = visibility(seqlen_q, seqlen_k, Options(mask=mask))
    return ~visible.any(1), ~visible.any(0)


GAPS = Intervals(
    torch.tensor([[[0, 7]] * 10 + [[3, 3]] * 4 + [[20, 29]] * 16], dtype=torch.int32),
    torch.tensor([[[5, 9]] * 10 + [[3, 3]] * 4 + [[23, 31]] * 16], dtype=torch.int32),
)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("seqlen_q, mask", [
    (3, HSTU(6, 4, 5)), (3, HSTU(9, target_group_size=2)), (3, HSTU(6, 4)), (45, HSTU(6, 4, 5)), (30, GAPS),
], ids=["window", "groups", "targets", "rows before 0", "gaps"])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poison_in_what_is_hidden(attention, mask, seqlen_q, activation, value):
    """A NaN in a key that no query sees, or in a query that sees no key, reaches no result."""
    if isinstance(mask, Intervals):
        mask = Intervals(*(x.to(attention.device) for x in mask))
    q, k, v = qkv(attention, 1, seqlen_q, 40, nheads=4, nheads_k=2)
    options = dict(activation=activation, normalization="1/visible", mask=mask, deterministic=True)
    blind, unseen = hidden(seqlen_q, 40, Options(mask=mask).of_sequence(0, None).mask)
    assert unseen.any() or blind.any()
    if attention.variant == "fa4" and seqlen_q <= 40:
        pytest.skip("docs/fa4.md: what is hidden shares a tile with what is visible, and 0 * NaN is NaN")
    dout = randn(*q.shape, seed=9, like=attention)
    results = []
    for filling in (0.0, value):
        keys = [poisoned(x, (slice(None), unseen), filling) for x in (k, v)]
        queries, dout_ = (poisoned(x, (slice(None), blind), filling) for x in (q, dout))
        results.append(gradients(lambda *x: attention.dense(*x, **options), queries, *keys, dout=dout_))
    for name, a, b in zip(NAMES, *results):
        assert torch.equal(a, b) and torch.isfinite(b).all(), name
    out, dq, dk, dv = results[1]
    assert not out[:, blind].any() and not dq[:, blind].any()
    assert not dk[:, unseen].any() and not dv[:, unseen].any()


@pytest.mark.parametrize("mask, most", [
    (HSTU(num_targets=1024), 1.2), (HSTU(3072, max_attn_len=256), 2.5), (HSTU(256, max_attn_len=256), 2.2),
    (HSTU(64, 16, max_attn_len=256), 3.0),
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_hidden_blocks_are_not_computed(monkeypatch, mask, most):
    """The CPU's loops form few more scores than the visible ones; candidates by candidates cost nothing."""
    formed = []
    for loop in (forward_loop, backward_loop):
        real = loop.products

        def products(sequences, q, k, real=real):
            formed.append(q.shape[1] * k.shape[1])
            return real(sequences, q, k)

        monkeypatch.setattr(loop, "products", products)
    seqlen, options = 4096, dict(use_softmax=False, activation="silu", mask=mask)
    q, k, v = qkv(Package("cpu"), 1, seqlen, seqlen, nheads=1, dtype=torch.float32)
    gradients(lambda *x: flash_attn.flash_attn_func(*x, **options), q, k, v)
    starts, ends = HSTUSequence(seqlen, seqlen, *mask).intervals()
    visible = (ends - starts).sum().item()
    assert sum(formed) <= 2 * most * visible, f"{sum(formed) / 2 / visible:.2f} scores for each visible one"


# ---- Every function, derivatives, compilers


def call(name: str, tensors: tuple, mask, **options):
    """Call a public function on q, k, v (batch, seqlen, nheads, head_dim), and return its output so."""
    q, k, v = tensors
    if "qkvpacked" in name:
        given = [torch.stack([q, k, v], 2)]
    elif "kvpacked" in name:
        given = [q, torch.stack([k, v], 2)]
    else:
        given = [q, k, v]
    if "varlen" not in name:
        return getattr(flash_attn, name)(*given, mask=mask, use_softmax=False, **options)
    batch, seqlen = q.shape[:2]
    copies = 1 if "qkvpacked" in name else 2
    starts = [torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32) for _ in range(copies)]
    if isinstance(mask, Intervals):
        mask = Intervals(*(x.flatten(0, 1) for x in mask))
    given = [x.flatten(0, 1) for x in given]
    out = getattr(flash_attn, name)(
        *given, *starts, *[seqlen] * copies, mask=mask, use_softmax=False, **options
    )
    return out.unflatten(0, (batch, seqlen))


TRACED = {
    "numbers": lambda: HSTU(3, 2, 4, target_group_size=2),
    "tensors": lambda: HSTU(torch.tensor([3, 0], dtype=torch.int32), torch.tensor([1, 2]), 4),
    "intervals": lambda: random_intervals(Package("cpu"), 2, 12, seqlen_k=12),
}
traced = pytest.mark.parametrize("kind", TRACED)


SCORE = dict(activation="silu", normalization="1/n")


@traced
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_public_functions(name, kind):
    tensors, mask = qkv(None, 2, 12, 12), TRACED[kind]()
    expected, actual = (
        gradients(lambda *x: call(function, x, mask, **SCORE), *tensors)
        for function in ("flash_attn_func", name)
    )
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@traced
@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("name", [
    "flash_attn_func", "flash_attn_varlen_func",
    *(pytest.param(name, marks=pytest.mark.slow) for name in DIFFERENTIABLE if "packed" in name),
])  # fmt: skip
def test_compiled(name, kind, made):
    """One graph, whether the mask is made in it or given to it."""
    torch._dynamo.reset()
    tensors, mask = qkv(None, 2, 12, 12), TRACED[kind]()

    def attend(given, *x):
        return call(name, x, type(mask)(*given) if made == "inside" else given, **SCORE)

    given = tuple(mask) if made == "inside" else mask
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual, expected = (gradients(lambda *x: f(given, *x), *tensors) for f in (compiled, attend))
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@traced
def test_export(kind):
    """The program keeps no count: it is right for other counts of the same looks."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return flash_attn.flash_attn_func(q, k, v, use_softmax=False, activation="silu", mask=mask)

    tensors, mask = qkv(None, 2, 12, 12), TRACED[kind]()
    program = torch.export.export(Attention(), (*tensors, mask)).module()
    given = [mask]
    if kind == "tensors":
        given.append(mask._replace(num_targets=mask.num_targets + 2))
    for other in given:
        close(program(*tensors, other), Attention()(*tensors, other))


@pytest.mark.parametrize("device", ["meta", "cuda"])
@traced
def test_tensors_without_memory(kind, device):
    """No value of a mask is read: on meta tensors, and on those of a GPU that is not there."""
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    mask = TRACED[kind]()
    with mode:
        q = torch.empty(2, 12, 2, 8, device=device, dtype=torch.float16)
        parts = (
            torch.empty(x.shape, dtype=x.dtype, device=device) if isinstance(x, torch.Tensor) else x
            for x in mask
        )
        mask = type(mask)(*parts)
        out = flash_attn.flash_attn_func(q, q, q, use_softmax=False, mask=mask)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, device)


@traced
def test_forward_and_backward(kind):
    q, k, v = qkv(None, 2, 12, 12)
    options = dict(activation="silu", mask=TRACED[kind]())

    def attend(*x):
        return flash_attn.flash_attn_func(*x, use_softmax=False, **options)

    out, *grads = gradients(attend, q, k, v, dout=q)
    assert torch.equal(out, flash_attn.nosoftmax.forward(q, k, v, **options)[0])
    for a, e in zip(flash_attn.nosoftmax.backward(q, q, k, v, **options), grads):
        assert torch.equal(a, e)


@traced
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_derivatives(kind, activation):
    """Finite differences in float64; for the identity, of second order and in forward mode too."""
    tensors = [x.requires_grad_() for x in qkv(None, 2, 12, 12, nheads=2, nheads_k=1, head_dim=2, seed=4)]
    mask, linear = TRACED[kind](), activation == "identity"

    def attend(q, k, v):
        return flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, activation=activation, normalization="1/visible", mask=mask
        )

    torch.autograd.gradcheck(attend, tensors, check_forward_ad=linear, fast_mode=True)
    if linear:
        torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@traced
def test_vmap(kind):
    """Each entry has its own mask, or all share one."""
    tensors = [torch.stack([x, x + 1]) for x in qkv(None, 2, 12, 12)]
    mask = TRACED[kind]()
    is_tensor = [isinstance(x, torch.Tensor) for x in mask]
    other = type(mask)(*(x.flip(0) if given else x for x, given in zip(mask, is_tensor)))

    def loss(q, k, v, *parts):
        out = flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, activation="silu", mask=type(mask)(*parts)
        )
        return out.square().sum()

    for both, dims in (((mask, mask), None), ((mask, other), 0)):
        parts = [
            torch.stack(pair) if given and dims == 0 else pair[0]
            for pair, given in zip(zip(*both), is_tensor)
        ]
        in_dims = (0, 0, 0, *(dims if given else None for given in is_tensor))
        actual = torch.func.vmap(torch.func.grad(loss), in_dims)(*tensors, *parts)
        alone = torch.stack([torch.func.grad(loss)(*x, *m) for *x, m in zip(*tensors, both)])
        torch.testing.assert_close(actual, alone, rtol=0, atol=1e-10)


# ---- Repeated calls, what runs where, what is refused


def test_values_that_change_are_read_again():
    """A call that looks like an earlier one is not checked again, but reads its own mask."""
    q, k, v = qkv(None, 2, 12, 12)

    def run(mask):
        return flash_attn.flash_attn_func(q, k, v, use_softmax=False, mask=mask)

    counts = torch.tensor([3, 0], dtype=torch.int32)
    first, same, other = (run(HSTU(x)) for x in (counts, counts.clone(), counts.flip(0)))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(run(HSTU(3)), run(HSTU(4)))
    assert torch.equal(run(HSTU(num_targets=counts, num_contexts=0)), first)
    assert not torch.equal(run(HSTU(num_targets=0, num_contexts=counts)), first)
    with pytest.raises(ValueError, match=r"num_targets\[0\]=13"):
        run(HSTU(counts + 10))
    starts = torch.zeros(2, 12, 1, dtype=torch.int32)
    assert not torch.equal(run(Intervals(starts, starts + 3)), run(Intervals(starts, starts + 4)))


def test_what_runs_it():
    q, k, v = qkv(None, 2, 12, 12)
    choice = flash_attn.explain(flash_attn.flash_attn_func, q, k, v, use_softmax=False, mask=HSTU(3))
    assert choice.backend == "cpu"
    assert choice.passed_over["linear"] == "mask has no exact algorithm in linear time"


def one(value, dtype=torch.int32):
    return torch.full((2, 12, 1), value, dtype=dtype)


LARGE = torch.tensor([3, 13], dtype=torch.int32)
# Fault -> (options, error class, regular expression for the message)
WRONG = {
    "targets beyond the length": (dict(mask=HSTU(LARGE)), ValueError, r"num_targets\[1\]=13.*12 keys"),
    "contexts beyond the length": (
        dict(mask=HSTU(0, LARGE)), ValueError, r"num_contexts\[1\]=13.*sequence 1 has 12",
    ),
    "both beyond the length": (
        dict(mask=HSTU(LARGE - 3, 3)), ValueError, r"num_targets\[1\]=10 and num_contexts\[1\]=3",
    ),
    "a number beyond the length": (dict(mask=HSTU(7, 6)), ValueError, "num_targets=7 and num_contexts=6"),
    "negative targets": (dict(mask=HSTU(-1)), ValueError, "num_targets=-1"),
    "negative contexts": (dict(mask=HSTU(num_contexts=-1)), ValueError, "num_contexts=-1"),
    "negative targets in a tensor": (dict(mask=HSTU(LARGE - 4)), ValueError, r"num_targets\[0\]=-1"),
    "negative window": (dict(mask=HSTU(3, max_attn_len=-1)), ValueError, "max_attn_len=-1"),
    "negative rows": (dict(mask=HSTU(3, 0, 2, -1)), ValueError, "min_full_attn_seq_len=-1"),
    "group of 0": (dict(mask=HSTU(target_group_size=0)), ValueError, "target_group_size=0"),
    "half a target": (dict(mask=HSTU(2.5)), TypeError, r"num_targets=2\.5"),
    "half a window": (dict(mask=HSTU(2, 0, 2.5)), TypeError, r"max_attn_len=2\.5"),
    "counts of another dtype": (
        dict(mask=HSTU(LARGE.float())), TypeError, "num_targets has dtype torch.float32",
    ),
    "counts of another batch": (dict(mask=HSTU(LARGE[:1])), ValueError, r"num_targets has shape \(1,\)"),
    "one count as a tensor": (dict(mask=HSTU(LARGE[0])), ValueError, r"num_targets has shape \(\)"),
    "counts elsewhere": (dict(mask=HSTU(LARGE.to("meta"))), ValueError, "num_targets on meta"),
    "causal": (dict(mask=HSTU(3), causal=True), ValueError, "mask=HSTU with causal=True"),
    "window": (dict(mask=HSTU(), window_size=(2, 0)), ValueError, r"mask=HSTU with .*leave out causal"),
    "window on one side": (
        dict(mask=Intervals(one(0), one(1)), window_size=(2, -1)), ValueError, r"window_size=\(2, -1\)",
    ),
    "alibi": (dict(mask=HSTU(3), alibi_slopes=torch.ones(2)), ValueError, "alibi_slopes with mask=HSTU"),
    "decay": (dict(mask=HSTU(), decay_slopes=torch.ones(2)), ValueError, "decay_slopes with mask=HSTU"),
    "softmax": (dict(mask=HSTU(3), use_softmax=True), ValueError, "mask is for attention without softmax"),
    "linear time": (dict(mask=HSTU(3), algorithm="linear"), ValueError, "mask has no exact algorithm"),
    "a string": (dict(mask="hstu"), TypeError, "mask='hstu': give a flash_attn.masks.HSTU"),
    "a tuple": (dict(mask=(3, 0)), TypeError, r"mask=\(3, 0\): give"),
    "a bool tensor": (dict(mask=torch.ones(2, 2).bool()), TypeError, "give a flash_attn.masks.HSTU"),
    "starts as a list": (dict(mask=Intervals([0], one(1))), TypeError, "starts is a builtins.list"),
    "too many intervals": (
        dict(mask=Intervals(one(0).expand(2, 12, 4), one(0))), ValueError, "1 to 3 intervals",
    ),
    "no interval": (
        dict(mask=Intervals(one(0)[..., :0], one(0)[..., :0])), ValueError, "1 to 3 intervals",
    ),
    "starts of other rows": (
        dict(mask=Intervals(one(0)[:, :11], one(1)[:, :11])), ValueError, r"starts has shape \(2, 11, 1\)",
    ),
    "ends of another shape": (
        dict(mask=Intervals(one(0), one(1)[:1])), ValueError, r"ends has shape \(1, 12, 1\)",
    ),
    "ends of another dtype": (
        dict(mask=Intervals(one(0), one(1, torch.int16))), TypeError, "ends has dtype torch.int16",
    ),
    "one interval for all rows": (
        dict(mask=Intervals(one(0)[0, 0], one(1)[0, 0])), ValueError, "starts has shape",
    ),
    "ends elsewhere": (dict(mask=Intervals(one(0), one(1).to("meta"))), ValueError, "ends on meta"),
    "an interval that descends": (
        dict(mask=Intervals(one(5), one(3))), ValueError, r"starts\[0, 0, 0\]=5, ends\[0, 0, 0\]=3.*descends",
    ),
    "an interval before 0": (dict(mask=Intervals(one(-1), one(3))), ValueError, r"starts\[0, 0, 0\]=-1"),
    "an interval beyond the keys": (
        dict(mask=Intervals(one(3), one(13))), ValueError, r"ends\[0, 0, 0\]=13: its sequence has fewer keys",
    ),
    "intervals that overlap": (
        dict(mask=Intervals(torch.cat([one(0), one(2)], 2), torch.cat([one(3), one(4)], 2))), ValueError,
        r"starts\[0, 0, 1\]=2, ends\[0, 0, 1\]=4: it begins before",
    ),
    "intervals in another order": (
        dict(mask=Intervals(torch.cat([one(6), one(0)], 2), torch.cat([one(9), one(4)], 2))), ValueError,
        r"starts\[0, 0, 1\]=0, ends\[0, 0, 1\]=4: it begins before",
    ),
    "overlap behind an unused interval": (
        dict(mask=Intervals(torch.cat([one(0), one(9), one(2)], 2), torch.cat([one(3), one(9), one(4)], 2))),
        ValueError, r"starts\[0, 0, 2\]=2",
    ),
}  # fmt: skip


ASKED = [
    (name, ask)
    for name, (options, *_) in WRONG.items()
    for ask in ("call", "explain", "packed", "pair")
    if not (ask == "packed" and isinstance(options["mask"], Intervals))
    and not (ask == "pair" and "use_softmax" in options)
]


@pytest.mark.parametrize("name, ask", ASKED)
def test_refused(name, ask):
    (options, error, words), (q, k, v) = WRONG[name], qkv(None, 2, 12, 12)
    with pytest.raises(error, match=words):
        if ask == "pair":
            flash_attn.nosoftmax.backward(q, q, k, v, **options)
        options = {"use_softmax": False, **options}
        if ask == "call":
            flash_attn.flash_attn_func(q, k, v, **options)
        elif ask == "explain":
            flash_attn.explain(flash_attn.flash_attn_func, q, k, v, **options)
        elif ask == "packed":
            starts = cumulative([12, 12], "cpu")
            flash_attn.flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), starts, starts, 12, 12, **options
            )


def test_refused_in_packed_intervals():
    """The message names the packed row; a row outside of all sequences may hold anything."""
    q, cu_seqlens = torch.randn(9, 2, 8), torch.tensor([1, 4, 8])
    starts, ends = torch.zeros(9, 1, dtype=torch.int32), torch.full((9, 1), 3, dtype=torch.int32)
    starts[0], ends[8] = 7, 99

    def run():
        return flash_attn.flash_attn_varlen_func(
            q, q, q, cu_seqlens, cu_seqlens, 4, 4, use_softmax=False, mask=Intervals(starts, ends)
        )

    assert torch.isfinite(run()).all()
    ends[2] = 4
    with pytest.raises(ValueError, match=r"ends\[2, 0\]=4: its sequence has fewer keys"):
        run()


def test_refused_with_a_cache():
    q, k, v = qkv(None, 2, 1, 12)
    with pytest.raises(ValueError, match="mask with flash_attn_with_kvcache.*block_table"):
        flash_attn.flash_attn_with_kvcache(q, k, v, use_softmax=False, mask=HSTU(3))
