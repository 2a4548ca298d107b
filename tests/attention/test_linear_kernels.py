"""Test the Triton kernels against the primitive in PyTorch in float64, on a GPU, or interpreted on the CPU if
triton is installed.

The project does not depend on triton, and a CPU machine without it skips this file.
"""

from __future__ import annotations

import importlib.util
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from flash_attn.nosoftmax.backends.linear import chunked, primitive
from flash_attn.nosoftmax.backends.linear.form import NOTHING, ROW, SEQUENCE, Form, Given
from torch import Tensor

import linear_checks as checks
from covering import covering
from measure import NAMES
from package import cumulative

# Triton's interpreter takes seconds a test.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("short_segments"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
    ),
]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
PER_VISIBLE = pytest.mark.parametrize("normalization", [None, "1/visible"])
LENGTHS = [(200, 200), (70, 300), (300, 70)]
AND_FEW = [*LENGTHS, (1, 130), (0, 5), (5, 0)]


def cases(*axes, full: int = 2) -> list[tuple]:
    """All combinations on a GPU. Interpreted, those of the first `full` axes and every pair of values."""
    return list(product(*axes)) if ON_GPU else covering(*axes, full=full)


@pytest.fixture(scope="module")
def kernels():
    from flash_attn.nosoftmax.backends.linear import kernels

    return kernels


def draw(*shape: int, seed: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean).to(DEVICE, dtype)


def exact(
    q: Tensor, k: Tensor, v: Tensor, form: Form, lengths_q=None, lengths_k=None, given: Given = NOTHING
) -> Tensor:
    """Compute the output in float64."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    given = Given(*[x if x is None else x.cpu() for x in given])
    if lengths_q is None:
        return primitive.attend(q, k, v, form, given=given)
    starts = [cumulative(lengths, "cpu") for lengths in (lengths_q, lengths_k)]
    return primitive.attend(q, k, v, form, *starts, given=given)


def check(kernels, q, k, v, dout, form: Form, lengths_q=None, lengths_k=None, given: Given = NOTHING) -> None:
    """Compare output and gradients, within about one 16-bit rounding of the largest value."""
    options, back = (None, None, 0, 0), (lengths_k, lengths_q)
    if lengths_q is not None:
        options = (
            cumulative(lengths_q, DEVICE),
            cumulative(lengths_k, DEVICE),
            max(lengths_q),
            max(lengths_k),
        )
    actual = (
        kernels.attend(q, k, v, form, *options, given),
        *kernels.gradients(dout, q, k, v, form, *options, given),
    )
    expected = (
        exact(q, k, v, form, lengths_q, lengths_k, given),
        exact(dout, v, k, form, lengths_q, lengths_k, given),
        exact(v, dout, q, form.of_dk(), *back, given),
        exact(k, q, dout, form.of_dk(), *back, given),
    )
    for name, a, e in zip(NAMES, actual, expected):
        if e.numel():
            error, size = (a.double().cpu() - e).abs().max().item(), e.abs().max().item()
            assert error <= torch.finfo(q.dtype).eps * size, f"{name} is off by {error:.3g} of {size:.3g}"
        assert a.dtype == form.out_dtype(q.dtype), name


@pytest.mark.parametrize(
    "lengths, causal, dtype, heads", cases(AND_FEW, [False, True], DTYPES, [(2, 2), (4, 2)]), ids=str
)
def test_dense(kernels, lengths, causal, dtype, heads):
    (seqlen_q, seqlen_k), (nheads, nheads_k) = lengths, heads
    q, dout = (draw(2, seqlen_q, nheads, 24, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen_k, nheads_k, 24, seed=i, dtype=dtype) for i in (2, 3))
    check(kernels, q, k, v, dout, Form(0.2, causal))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS)
def test_per_visible(kernels, transposed, dtype, seqlen_q, seqlen_k):
    """ "1/visible" is right, also for the transposed form of second derivatives."""
    q, dout = (draw(2, seqlen_q, 2, 24, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen_k, 1, 24, seed=i, dtype=dtype) for i in (2, 3))
    check(kernels, q, k, v, dout, Form(0.2, True, transposed, "1/visible"))


@pytest.mark.parametrize(
    "sizes",
    [(2**-10, 2**10, 2**10, 2**-10), (2**10, 2**-10, 2**-5, 2**-5), (2**-5, 2**-5, 2**-10, 2**10)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_visible_keeps_what_is_small(kernels, dtype, sizes):
    """dk and dv at the last keys, which have the factor 1/700, are as exact as at the first, for small q,
    dout, v . dout and q . k.
    """
    heads = (2, 1, 1, 2)
    q, k, v, dout = (draw(1, 700, heads[i], 16, seed=i, dtype=dtype) * size for i, size in enumerate(sizes))
    form = Form(0.25, causal=True, normalization="1/visible")
    actual = kernels.gradients(dout, q, k, v, form, None, None, 0, 0)[1:]
    expected = exact(v, dout, q, form.of_dk()), exact(k, q, dout, form.of_dv())
    for name, gradient, right in zip(("dk", "dv"), actual, expected):
        for at in range(0, 700, 50):
            a, e = gradient[:, at : at + 50].double().cpu(), right[:, at : at + 50]
            error, size = (a - e).abs().max().item(), e.abs().max().item()
            assert error <= torch.finfo(dtype).eps * size, (
                f"{name} is off by {error:.3g} of {size:.3g} from key {at} on"
            )


@MASKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@PER_VISIBLE
def test_factor(kernels, causal, dtype, normalization):
    """A given number applies beside the normalization."""
    q, dout = (draw(2, 70, 2, 16, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, 90, 1, 16, seed=i, dtype=dtype) for i in (2, 3))
    check(kernels, q, k, v, dout, Form(0.25, causal, normalization=normalization, factor=1 / 640))


KINDS = pytest.mark.parametrize("kind", [SEQUENCE, ROW])


@pytest.mark.parametrize(
    "causal, kind, transposed, lengths, dtype",
    cases([False, True], [SEQUENCE, ROW], [False, True], LENGTHS, DTYPES, full=3), ids=str,
)  # fmt: skip
def test_row_factors(kernels, causal, kind, transposed, lengths, dtype):
    """Factors of very different sizes are right, also for the transposed form of second derivatives."""
    seqlen_q, seqlen_k = lengths
    q, dout = (draw(2, seqlen_q, 2, 24, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen_k, 1, 24, seed=i, dtype=dtype) for i in (2, 3))
    queries = seqlen_k if transposed else seqlen_q
    given = Given(checks.factors(q, *(2, queries)[: 2 if kind == ROW else 1]))
    check(kernels, q, k, v, dout, Form(0.2, causal, transposed, row_factors=kind), given=given)


@MASKS
@KINDS
def test_row_factors_of_packed_sequences(kernels, causal, kind):
    lengths = checks.PACKED["lengths_q"], checks.PACKED["lengths_k"]
    q, dout = (draw(sum(lengths[0]), 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(sum(lengths[1]), 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    given = Given(checks.factors(q, sum(lengths[0]) if kind == ROW else len(lengths[0])))
    check(kernels, q, k, v, dout, Form(0.25, causal, row_factors=kind), *lengths, given)


@MASKS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, of_keys", [(1e-7, 300.0), (1e-3, 1.0), (1e5, 1e-3)])
def test_row_factors_keep_what_is_small(kernels, causal, dtype, size, of_keys):
    """Factors of 1e-7 lose no precision in dk and dv, nor do those of 1e5 overflow, whatever comes between.
    of_keys: the size of k and v, which gives results that float16 holds.
    """
    q, k, v, dout = (
        draw(1, 700, nheads, 16, seed=i, dtype=dtype) * (of_keys if i in (1, 2) else 1.0)
        for i, nheads in enumerate((2, 1, 1, 2))
    )
    factors = size * torch.rand(1, 700, generator=torch.Generator().manual_seed(5))
    factors[:, 100:300] = 0.0  # whole chunks without a weight
    given = Given(factors.to(DEVICE))
    check(kernels, q, k, v, dout, Form(0.25, causal, row_factors=ROW), given=given)


def decaying(*shape: int) -> Given:
    """Slopes from nearly none to one that leaves little but the neighbours."""
    return Given(None, checks.decays(torch.empty(0, device=DEVICE), *shape))


@pytest.mark.parametrize(
    "lengths, causal, shape, dtype", cases(AND_FEW, [False, True], [(2,), (2, 4)], DTYPES), ids=str
)
def test_decay(kernels, lengths, causal, shape, dtype):
    """Slopes of all sequences, and slopes of each with grouped heads, across chunks and segments."""
    seqlen_q, seqlen_k = lengths
    q, dout = (draw(2, seqlen_q, shape[-1], 24, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen_k, 2, 24, seed=i, dtype=dtype) for i in (2, 3))
    form, given = Form(0.2, causal, decay=shape), decaying(*shape)
    check(kernels, q, k, v, dout, form, given=given)


@MASKS
@pytest.mark.parametrize("shape", [(2,), (5, 2)], ids=str)
def test_decay_of_packed_sequences(kernels, causal, shape):
    lengths = checks.PACKED["lengths_q"], checks.PACKED["lengths_k"]
    q, dout = (draw(sum(lengths[0]), 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(sum(lengths[1]), 1, 24, seed=i, dtype=torch.float16) for i in (2, 3))
    k, dout = k[..., :16], draw(sum(lengths[0]), 2, 24, seed=1, dtype=torch.float16)
    form, given = Form(0.25, causal, decay=shape), decaying(*shape)
    check(kernels, q, k, v, dout, form, *lengths, given)


@pytest.mark.parametrize(
    "causal, kind, transposed", cases([False, True], ["1/n", "1/visible", SEQUENCE, ROW], [False, True])
)
def test_decay_beside_a_normalization(kernels, causal, kind, transposed):
    q, dout = (draw(2, 150, 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(2, 200, 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    named = kind in ("1/n", "1/visible")
    options = dict(normalization=kind) if named else dict(row_factors=kind)
    shape = (2, 200 if transposed else 150)[: 2 if kind == ROW else 1]
    given = Given(None if named else checks.factors(q, *shape), decaying(2).decay_slopes)
    check(kernels, q, k, v, dout, Form(0.25, causal, transposed, decay=(2,), **options), given=given)


@pytest.mark.parametrize(
    "lengths, causal, kind, d, heads, dtype",
    cases([(640, 640), (192, 320), (320, 192)], [False, True],
          [None, "decay", "1/visible", ROW, "diagonal"], [32, 24], [(2, 2), (2, 1)], DTYPES, full=3),
    ids=str,
)  # fmt: skip
def test_whole_chunks(kernels, lengths, causal, kind, d, heads, dtype):
    """Loads and stores without masks where all positions of all chunks are rows and keys, and only there; and
    distances that q, k, v and out share where their strides are alike, and only there.
    """
    (seqlen_q, seqlen_k), (nheads, nheads_k) = lengths, heads
    q, dout = (draw(2, seqlen_q, nheads, d, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen_k, nheads_k, d, seed=i, dtype=dtype) for i in (2, 3))
    form = Form(
        0.2, causal, normalization="1/visible" if kind == "1/visible" else None,
        row_factors=ROW if kind == ROW else None, decay=(2,) if kind == "decay" else None,
        diagonal=kind == "diagonal",
    )  # fmt: skip
    given = aligned([3, -70]) if kind == "diagonal" else NOTHING
    if kind == "decay":  # by a part of a chunk, and of a segment
        given = Given(None, torch.tensor([0.01, 0.1], device=DEVICE))
    if kind == ROW:
        given = Given(checks.factors(q, 2, seqlen_q))
    q_like, k_like = kernels._laid_out(q)[1], kernels._laid_out(k)[1]
    _, walk = kernels._forward_plan(kernels._sequences(q, None, 0, 0), form, q_like, k_like, k_like)
    walks = walk._parts if kind == "decay" and not causal else (walk,)
    flags = seqlen_q == seqlen_k and d == 32 and kind != "diagonal", nheads == nheads_k
    assert all(x._walk._arguments[-2:] == flags for x in walks), "whole, near"
    check(kernels, q, k, v, dout, form, given=given)


def test_distances_that_32_bits_do_not_hold(kernels):
    """A kernel that computes distances in a chunk in 32 bits is for tensors whose distances fit."""
    fits, does_not = (kernels._Layout((1, 128, 2, 16), (2**40, stride, 16, 1)) for stride in (2**24, 2**25))
    assert kernels._near(64, fits, fits) and not kernels._near(64, fits, does_not)


# Keys that query 0 is aligned with: at and beside both ends of 200 queries and 70 keys, between them, and as
# far away as they may be.
DIAGONALS = [0, -130, 33, 69, 70, 71, -199, -200, -201, 2**30, -(2**30)]


def aligned(diagonals: list[int], given: Given = NOTHING) -> Given:
    return given._replace(diagonal=torch.tensor(diagonals, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "decay", "1/visible", ROW])
def test_diagonal(kernels, transposed, dtype, kind):
    """Each sequence has its own, also for the transposed form of second derivatives."""
    batch, lengths = len(DIAGONALS), (70, 200) if transposed else (200, 70)
    q, dout = (draw(batch, lengths[0], 2, 16, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(batch, lengths[1], 1, 16, seed=i, dtype=dtype) for i in (2, 3))
    given = aligned(DIAGONALS, decaying(2) if kind == "decay" else NOTHING)
    if kind == ROW:
        given = given._replace(row_factors=checks.factors(q, batch, 200))
    form = Form(
        0.2, True, transposed, normalization="1/visible" if kind == "1/visible" else None,
        row_factors=ROW if kind == ROW else None, decay=(2,) if kind == "decay" else None, diagonal=True,
    )  # fmt: skip
    check(kernels, q, k, v, dout, form, given=given)


@pytest.mark.parametrize(
    "diagonals, shape", [(DIAGONALS, (2,)), ([100 * x for x in range(-5, 6)], (11, 2))], ids=["edges", "far"]
)
def test_diagonal_of_a_full_form_that_decays(kernels, diagonals, shape):
    """What lies between the queries and the keys decays too, for small slopes as well as for steep ones."""
    q, dout = (draw(11, 200, 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(11, 70, 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    given = aligned(diagonals, decaying(*shape))
    given = given._replace(decay_slopes=given.decay_slopes / 100)
    check(kernels, q, k, v, dout, Form(0.2, False, decay=shape, diagonal=True), given=given)


@MASKS
@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_diagonal_of_packed_sequences(kernels, causal, wide):
    lengths = checks.PACKED["lengths_q"], checks.PACKED["lengths_k"]
    q, dout = (draw(sum(lengths[0]), 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(sum(lengths[1]), 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    given = aligned([5, -3, 0, 250, -40][: len(lengths[0])], decaying(2))
    form = Form(0.25, causal, decay=(2,), wide=wide, diagonal=True)
    check(kernels, q, k, v, dout, form, *lengths, given)


@pytest.mark.parametrize("kind", [None, "decay", "1/visible"])
def test_what_the_diagonal_puts_out_of_sight_is_not_read(kernels, kind):
    """NaN in queries before all keys, and in keys behind all queries."""
    decay = (1,) if kind == "decay" else None
    form = Form(
        0.25, True, normalization="1/visible" if kind == "1/visible" else None, decay=decay, diagonal=True
    )
    for key, rows, keys in ((-100, slice(0, 100), slice(200, 300)), (-400, slice(0, 300), slice(0, 300))):
        q, k, v, dout = (draw(1, 300, 1, 16, seed=i, dtype=torch.float16) for i in range(4))
        q[:, rows] = dout[:, rows] = float("nan")
        k[:, keys] = v[:, keys] = float("nan")
        given = aligned([key], decaying(1) if decay else NOTHING)
        out, (dq, dk, dv) = (
            kernels.attend(q, k, v, form, None, None, 0, 0, given),
            kernels.gradients(dout, q, k, v, form, None, None, 0, 0, given),
        )
        assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))
        assert not any(x[:, at].any() for x, at in ((out, rows), (dq, rows), (dk, keys), (dv, keys)))


@MASKS
@pytest.mark.parametrize("decay", [None, (2,), (2, 2)], ids=str)
def test_wide(kernels, causal, decay):
    """Results stay in float32: neither rounded, so that parts add up, nor saturated."""
    q, dout = (draw(2, 150, 2, 16, seed=i, dtype=torch.float16, mean=1.0) for i in (0, 1))
    k, v = (draw(2, 200, 1, 16, seed=i, dtype=torch.float16, mean=1.0) for i in (2, 3))
    form, given = Form(0.25, causal, decay=decay, wide=True), NOTHING if decay is None else decaying(*decay)
    check(kernels, q, k, v, dout, form, given=given)
    large, lengths = [64.0 * x for x in (q, k, v, dout)], (None, None, 0, 0)
    wide = results(kernels, large, form, *lengths, given)
    narrow = results(kernels, large, form._replace(wide=False), *lengths, given)
    for name, x, y in zip(NAMES, wide, narrow):
        assert x.abs().max() > 65504, name
        assert torch.equal((x.clamp(-65504, 65504) if name == "out" else x).half(), y), name


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_wide_results_of_nothing(kernels, lengths):
    q, k = (draw(2, length, 2, 16, seed=0, dtype=torch.float16) for length in lengths)
    for x, y in zip(results(kernels, (q, k, k, q), Form(0.25, True, wide=True)), (q, q, k, k)):
        assert x.shape == y.shape and x.dtype == torch.float32 and not x.any()


@pytest.mark.parametrize(
    "causal, decay, seqlen_kind, dtype",
    cases([False, True], [None, (2, 4)], [(40, None), (330, SEQUENCE), (330, ROW)], DTYPES), ids=str,
)  # fmt: skip
def test_pieces(kernels, causal, decay, seqlen_kind, dtype):
    """A piece starts from the states of what is not there, on both sides, and gives its own to others. Its
    end is not that of a chunk.
    """
    seqlen, kind = seqlen_kind
    q, dout = (draw(2, seqlen, 4, 16, seed=i, dtype=dtype) for i in (0, 1))
    k, v = (draw(2, seqlen, 2, 16, seed=i, dtype=dtype) for i in (2, 3))
    shape = (2, 4 if decay else 2, 16, 16)
    states = [
        10 * torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(4)
    ]
    there, back = states[:2], [states[2], None]
    factors = None if kind is None else checks.factors(q, *(2, seqlen)[: 2 if kind == ROW else 1])
    given = Given(factors, None if decay is None else decaying(*decay).decay_slopes)
    form = Form(0.25, causal, row_factors=kind, decay=decay, wide=True)
    pair = (lambda x: tuple(x)) if decay and not causal else (lambda x: (x[0],))
    actual = (
        kernels.attend(q, k, v, form, None, None, 0, 0, given, *pair(there)),
        *kernels.gradients(dout, q, k, v, form, None, None, 0, 0, given, pair(there), pair(back)),
        *(kernels.state_of(q, k, v, form, given, late)[0] for late in (False, True)),
        *(kernels.state_of(k, q, dout, form.of_dv(), given, late)[0] for late in (False, True)),
    )
    if causal:  # what is found beside a state spares another pass over the keys and values
        _, inside = kernels.state_of(q, k, v, form, given, True)
        _, inside_back = kernels.state_of(k, q, dout, form.of_dv(), given, False)
        # Results may be written to where they belong.
        outs = [torch.full_like(x, torch.nan) for x in actual[:4]]
        again = (
            kernels.attend(q, k, v, form, None, None, 0, 0, given, *pair(there), states=inside, out=outs[0]),
            *kernels.gradients(
                dout, q, k, v, form, None, None, 0, 0, given, pair(there), pair(back), inside_back, outs[1:]
            ),
        )
        assert again[0] is outs[0] and again[1] is outs[1]
        for a, b in zip(again, actual):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    q, k, v, dout = (x.double().cpu() for x in (q, k, v, dout))
    given = Given(*(x if x is None else x.cpu() for x in given))
    there, back = ([None if x is None else x.double().cpu() for x in pair] for pair in (there, back))
    expected = (
        primitive.attend_between(q, k, v, form, given, *there),
        *primitive.gradients_between(dout, q, k, v, form, given, there, back),
        *(primitive.state_of(q, k, v, form, given, late)[0] for late in (False, True)),
        *(primitive.state_of(k, q, dout, form.of_dv(), given, late)[0] for late in (False, True)),
    )
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error, size = (a.double().cpu() - e).abs().max().item(), e.abs().max().item()
        assert a.dtype == torch.float32 and error <= torch.finfo(dtype).eps * size, (i, error, size)


@MASKS
@pytest.mark.parametrize("slope", [0.0, 1e-6, 5.0, 1e4])
def test_decay_of_any_size(kernels, causal, slope):
    """Slopes of 0 are no decay, up to rounding, and steep ones leave the diagonal."""
    q, k, v, dout = (draw(1, 500, 1, 16, seed=i, dtype=torch.float16) for i in range(4))
    form, given = Form(0.25, causal, decay=(1,)), Given(None, torch.full((1,), slope, device=DEVICE))
    check(kernels, q, k, v, dout, form, given=given)
    if slope in (0.0, 1e4):
        out = kernels.attend(q, k, v, form, None, None, 0, 0, given)
        plain = kernels.attend(q, k, v, Form(0.25, causal), None, None, 0, 0)
        diagonal = (0.25 * (q.float() * k.float()).sum(-1, keepdim=True) * v.float()).half()
        torch.testing.assert_close(out, plain if slope == 0.0 else diagonal, rtol=2e-3, atol=2e-2)


def test_rounding_of_a_gentle_decay_does_not_add_up(kernels, monkeypatch):
    """One key decays right in float32 over 600 chunks, though float32 holds no chunk's decay."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)  # one segment
    chunks, length = 600, 64
    slopes = torch.linspace(1e-5, 2e-5, 100)
    decays = torch.exp(-slopes.double() * length)
    rounding = (decays.float() / decays - 1).abs()
    slope = slopes[rounding.argmax()]
    q = torch.ones(1, chunks * length, 2, 16, dtype=torch.float16, device=DEVICE)
    k = torch.zeros_like(q)
    k[:, length - 1] = 1.0  # the end of a chunk, to which no key decays, and so none is rounded
    form, given = Form(1 / 16, True, decay=(2,), wide=True), Given(None, slope.repeat(2).to(DEVICE))
    out = kernels.attend(q, k, k, form, None, None, 0, 0, given)[0, length - 1 :, 0, 0].double().cpu()
    error = (out * torch.exp(slope.double() * torch.arange(len(out))) - 1).abs().max()
    assert error < 3e-6 < chunks * rounding.max() / 4


@MASKS
@pytest.mark.parametrize("poisoned", range(4), ids=["q", "k", "v", "dout"])
def test_not_finite_shows_with_a_decay(kernels, causal, poisoned):
    """NaN in one sequence reaches every result of it that depends on it, and no other sequence."""
    lengths, slopes = [200, 100], Given(None, torch.full((1,), 0.01, device=DEVICE))
    x = [draw(300, 1, 16, seed=i, dtype=torch.float16) for i in range(4)]
    at = 127 if poisoned in (0, 3) else 128  # at the edge of a chunk, as in test_not_finite_shows
    x[poisoned][at] = float("nan")
    starts = cumulative(lengths, DEVICE)
    got = results(kernels, x, Form(0.25, causal, decay=(1,)), starts, starts, 200, 200, slopes)
    for name, a in zip(NAMES, got):
        assert torch.isfinite(a[200:]).all(), name
    rows, keys = slice(128, 200) if causal else slice(0, 200), slice(0, 128) if causal else slice(0, 200)
    hit = (
        [(0, at), (2, keys), (3, keys)],
        [(0, rows), (1, rows), (3, at)],
        [(0, rows), (1, rows), (2, at)],
        [(1, at), (2, keys), (3, keys)],
    )
    for which, where in hit[poisoned]:
        assert not torch.isfinite(got[which][where]).any(), NAMES[which]


@pytest.mark.parametrize("decay", [None, (1,)], ids=str)
def test_scores_of_a_hidden_key_count_for_nothing(kernels, decay):
    """A NaN in a key, in the middle of a chunk, does not reach the rows before it."""
    q, k, v = (draw(1, 128, 1, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    k[:, 70] = float("nan")
    given = NOTHING if decay is None else Given(None, torch.full((1,), 0.01, device=DEVICE))
    out = kernels.attend(q, k, v, Form(0.25, True, decay=decay), None, None, 0, 0, given)
    assert torch.isfinite(out[:, :70]).all() and not torch.isfinite(out[:, 70:]).any()


@MASKS
@pytest.mark.parametrize("normalization", ["1/n", "1/sqrt(n)", "1/visible"])
def test_packed(kernels, causal, normalization):
    lengths = checks.PACKED["lengths_q"], checks.PACKED["lengths_k"]
    q, dout = (draw(sum(lengths[0]), 2, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(sum(lengths[1]), 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    check(kernels, q, k, v, dout, Form(0.25, causal, normalization=normalization), *lengths)


@PER_VISIBLE
def test_packed_neighbours_are_nan(kernels, normalization):
    """NaN in a packed sequence does not reach its neighbours."""
    lengths = [150, 100]
    x = [draw(250, 1, 16, seed=i, dtype=torch.float16) for i in range(4)]
    for y in x:
        y[:150] = float("nan")
    options = (cumulative(lengths, DEVICE), cumulative(lengths, DEVICE), 150, 150)
    q, k, v, dout = x
    form = Form(0.25, causal=True, normalization=normalization)
    for a in (kernels.attend(q, k, v, form, *options), *kernels.gradients(dout, q, k, v, form, *options)):
        assert torch.isfinite(a[150:]).all()


@PER_VISIBLE
def test_rows_without_keys_are_zero(kernels, normalization):
    q, dout = (draw(1, 300, 1, 16, seed=i, dtype=torch.float16) for i in (0, 1))
    k, v = (draw(1, 70, 1, 16, seed=i, dtype=torch.float16) for i in (2, 3))
    q[:, :230] = dout[:, :230] = float("nan")
    form = Form(0.25, causal=True, normalization=normalization)
    out, (dq, dk, dv) = (
        kernels.attend(q, k, v, form, None, None, 0, 0),
        kernels.gradients(dout, q, k, v, form, None, None, 0, 0),
    )
    assert not out[:, :230].any() and not dq[:, :230].any()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


@MASKS
@PER_VISIBLE
@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)][: len(DTYPES)], ids=str
)
def test_largest_inputs(kernels, causal, normalization, dtype, largest):
    q, k, v, dout = (draw(1, 200, 1, 16, seed=i, dtype=dtype).sign().abs() * largest for i in range(4))
    form = Form(0.25, causal, normalization=normalization)
    assert torch.isfinite(kernels.attend(q, k, v, form, None, None, 0, 0)).all()
    for x in kernels.gradients(dout, q, k, v, form, None, None, 0, 0):
        assert torch.equal(torch.isfinite(x), torch.full_like(x, dtype != torch.float16, dtype=torch.bool))


def results(kernels, x, form: Form, *options) -> tuple[Tensor, ...]:
    """Return the output and the gradients for x = (q, k, v, dout)."""
    q, k, v, dout = x
    options = options or (None, None, 0, 0)
    return kernels.attend(q, k, v, form, *options), *kernels.gradients(dout, q, k, v, form, *options)


def expected_results(x, form: Form) -> tuple[Tensor, ...]:
    """Return them by the primitive in PyTorch, in the dtype of x."""
    q, k, v, dout = (y.cpu() for y in x)
    return tuple(
        chunked.attend(*y, f)[0]
        for y, f in (
            ((q, k, v), form),
            ((dout, v, k), form.of_dq()),
            ((v, dout, q), form.of_dk()),
            ((k, q, dout), form.of_dv()),
        )
    )


@MASKS
@pytest.mark.parametrize("d, d_v", [(16, 40), (40, 16)])
def test_head_dim_v(kernels, causal, d, d_v):
    """Another head_dim of v is right, dense with grouped heads and packed."""
    dtype = torch.float16
    q, k, v, dout = (
        draw(1, 150, h, w, seed=i, dtype=dtype)
        for i, (h, w) in enumerate(((4, d), (2, d), (2, d_v), (4, d_v)))
    )
    check(kernels, q, k, v, dout, Form(0.2, causal))
    check(
        kernels,
        *(x[0] for x in (q, k, v, dout)),
        Form(0.2, causal, normalization="1/visible"),
        [20, 130],
        [20, 130],
    )


@pytest.mark.parametrize(
    "causal, normalization, poisoned, value, dtype",
    cases([False, True], [None, "1/visible"], range(4), [torch.nan, torch.inf], DTYPES, full=3),
    ids=str,
)
def test_not_finite_shows(kernels, causal, normalization, poisoned, value, dtype):
    """A non-finite value shows in every entry that depends on it, and all others stay right.

    The value is at the edge of a chunk: within a chunk, products with 0 would pass a NaN from a row that sees
    it to one that does not.
    """
    form = Form(0.25, causal, normalization=normalization)
    x = [draw(1, 200, 1, 16, seed=i, dtype=dtype) for i in range(4)]
    at = (0, 127 if poisoned in (0, 3) else 128, 0, 5)

    def changed(number: float, dtype: torch.dtype) -> list[Tensor]:
        y = [t.to(dtype, copy=True) for t in x]
        y[poisoned][at] = number
        return y

    right = expected_results(changed(0.5, torch.float64), form)
    others = expected_results(changed(-0.75, torch.float64), form)
    for name, a, e, other in zip(NAMES, results(kernels, changed(value, dtype), form), right, others):
        a, depends = a.double().cpu(), e != other
        assert not torch.isfinite(a[depends]).any(), f"{name} has finite values that depend on {value}"
        error = (a[~depends] - e[~depends]).abs()
        assert (error <= torch.finfo(dtype).eps * e.abs().max()).all(), (
            f"{name} is off where it does not depend on {value}"
        )


@pytest.mark.parametrize("normalization, dv", [(None, (32752.0, 16376.0)), ("1/visible", (24560.0, 8188.0))])
def test_weights_saturate_and_their_gradients_do_not(kernels, normalization, dv):
    """With two tokens and weights of a million, P is 65504 in the output and in dv. Products dO . v of a
    million are Inf.
    """
    q, k = (torch.full((1, 2, 1, 16), 250.0, dtype=torch.float16, device=DEVICE) for _ in range(2))
    v, dout = (torch.full((1, 2, 1, 16), 0.25, dtype=torch.float16, device=DEVICE) for _ in range(2))
    form = Form(1.0, causal=True, normalization=normalization)
    out, _, _, actual = results(kernels, (q, k, v, dout), form)
    first, second = out[0, :, 0, 0].tolist()
    assert (first, second) == (16376.0, 32752.0 if normalization is None else 16376.0)
    assert tuple(actual[0, :, 0, 0].tolist()) == dv
    for a, e in zip((out, actual), expected_results((q, k, v, dout), form)[::3]):
        assert torch.equal(a.cpu(), e)
    _, dq, dk, _ = results(kernels, (v / 2**10, v / 2**10, q, k), form)
    assert not torch.isfinite(dq).any() and not torch.isfinite(dk).any()


@MASKS
def test_output_saturates(kernels, causal):
    """Finite inputs saturate the output; only a non-finite input gives a non-finite output."""
    q, k = (torch.full((1, 150, 1, 16), 1.0, dtype=torch.float16, device=DEVICE) for _ in range(2))
    v = torch.full((1, 150, 1, 16), 60000.0, dtype=torch.float16, device=DEVICE)
    v[..., 8:] *= -1
    out = kernels.attend(q, k, v, Form(1.0, causal), None, None, 0, 0)
    assert (out[..., :8] == 65504).all() and (out[..., 8:] == -65504).all()
    v[0, 0, 0, 0] = float("inf")
    out = kernels.attend(q, k, v, Form(1.0, causal), None, None, 0, 0)
    assert not torch.isfinite(out[..., 0]).any() and torch.isfinite(out[..., 1:]).all()


def _shifted(lengths: list[int], before: int) -> Tensor:
    return cumulative(lengths, DEVICE) + before


@MASKS
@pytest.mark.parametrize("max_seqlen, decay", [(130, None), (1000, None), (1000, (2,))])
def test_slack_rows_are_zero(kernels, causal, max_seqlen, decay, monkeypatch):
    """Rows before the first and behind the last sequence are 0, although the inputs there and unwritten
    memory hold NaN. A max_seqlen longer than any sequence changes nothing.
    """
    new_empty = torch.Tensor.new_empty

    def unwritten(*arguments, **options) -> Tensor:
        x = new_empty(*arguments, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    (rows, keys), (before, behind) = ([130, 0, 20], [60, 7, 130]), ((70, 3), (2, 150))
    given = NOTHING if decay is None else decaying(*decay)
    form, widths = Form(0.25, causal, normalization="1/n", decay=decay), ((2, 16), (1, 16), (1, 24), (2, 24))
    owns = [sum(rows), sum(keys), sum(keys), sum(rows)]
    x = [draw(n, *w, seed=i, dtype=torch.float16) for i, (n, w) in enumerate(zip(owns, widths))]
    tight = results(kernels, x, form, cumulative(rows, DEVICE), cumulative(keys, DEVICE), 130, 130, given)
    padded = []
    for y, side in zip(x, (0, 1, 1, 0)):
        wide = torch.full(
            (before[side] + len(y) + behind[side], *y.shape[1:]), float("nan"), dtype=y.dtype, device=DEVICE
        )
        wide[before[side] : before[side] + len(y)] = y
        padded.append(wide)
    starts = _shifted(rows, before[0]), _shifted(keys, before[1])
    for name, a, e, side in zip(
        NAMES, results(kernels, padded, form, *starts, max_seqlen, max_seqlen, given), tight, (0, 0, 1, 1)
    ):
        own = slice(before[side], before[side] + len(e))
        torch.testing.assert_close(a[own], e, msg=lambda m: f"{name}: {m}")
        assert not a[: own.start].any() and not a[own.stop :].any(), f"{name} has slack rows that are not 0"


@MASKS
@pytest.mark.parametrize("batch, heads", [(3, 2), (2, 3)])
def test_more_than_an_axis_of_the_grid(kernels, causal, batch, heads, monkeypatch):
    """With more sequences or heads than an axis of the grid holds, here 2, results are bit for bit the
    same.
    """
    form = Form(0.25, causal)
    x = [draw(batch, 140, h, 16, seed=i, dtype=torch.float16) for i, h in enumerate((heads, 1, 1, heads))]
    packed = [y.flatten(0, 1) for y in x]
    starts = cumulative([140] * batch, DEVICE)
    causal_form, state = Form(0.25, causal=True), torch.ones(batch, 1, 16, 16, device=DEVICE)

    def everything() -> tuple[Tensor, ...]:
        for plan in (kernels._forward_plan, kernels._backward_plan):
            plan.cache_clear()
        dense = results(kernels, x, form)
        return (
            *dense,
            *results(kernels, packed, form, starts, starts, 140, 140),
            *kernels.attend_with_state(*x[:3], causal_form, state),
        )

    right = everything()
    grids, launch = [], kernels._Launch.__init__

    def record(self, kernel, grid, *arguments, **options):
        grids.append(grid)
        launch(self, kernel, grid, *arguments, **options)

    monkeypatch.setattr(kernels._Launch, "__init__", record)
    monkeypatch.setattr(kernels, "_MOST_PLACES", 2)
    for a, e in zip(everything(), right):
        assert torch.equal(a, e)
    assert grids and all(max(grid[1:]) <= 2 for grid in grids)


@MASKS
def test_plans_are_for_what_looks_the_same(kernels, causal):
    """Calls in turn with other shapes, strides, sequences or normalization each use the right plan."""
    form = Form(0.2, causal)
    for seqlen in (150, 90, 150):
        x = [draw(1, seqlen, 2, 16, seed=i, dtype=torch.float16) for i in range(4)]
        check(kernels, *x, form)
        check(kernels, *(y.transpose(1, 2).contiguous().transpose(1, 2) for y in x), form)
        check(kernels, *x, Form(0.2, causal, normalization="1/n"))
    for lengths in ([150, 50], [50, 150], [60, 80, 60]):
        check(
            kernels,
            *(draw(200, 2, 16, seed=i, dtype=torch.float16) for i in range(4)),
            form,
            lengths,
            lengths,
        )
    for d_v in (16, 32, 16):
        q, k, v = (draw(1, 200, 1, d, seed=d, dtype=torch.float16) for d in (16, 16, d_v))
        out, state = kernels.attend_with_state(q, k, v, Form(0.2, causal=True), None)
        assert out.shape == v.shape and state.shape == (1, 1, 16, d_v)


class _Kernel:
    """Stands in for a Triton kernel and its compiled form, and records the arguments of each."""

    def __init__(self, calls, name="kernel"):
        self._calls, self._name = calls, name

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self._calls.append((self._name, grid, arguments))
            return _Kernel(self._calls, "compiled")

        return launch


def test_compiled_is_called_where_16_divides_the_addresses(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_COMPILED_TAKE_CONSTANTS", True)
    calls, grid, x = [], (1, 2, 3), torch.zeros(64, dtype=torch.float16)
    launch = kernels._Launch(_Kernel(calls), grid, (7,), (8,), num_warps=4)
    aligned, other, shifted = x[:16], x[32:], x[1:17]
    for tensors in ((shifted, None), (aligned, None), (other, None), (other, shifted)):
        launch(*tensors)
    names, grids, arguments = zip(*calls)
    assert names == ("kernel", "kernel", "compiled", "kernel") and set(grids) == {grid}
    assert arguments[2] == (other.data_ptr(), 0, 7, 8)
    assert arguments[3][0] is other and arguments[3][1] is shifted


@pytest.mark.parametrize("mean", [0.0, 4.0])
def test_state_in_pieces(kernels, mean):
    q, k, v = (draw(1, 300, n, 16, seed=n, dtype=torch.float16, mean=mean) for n in (4, 2, 2))
    form = Form(0.01, causal=True)
    whole, whole_state = kernels.attend_with_state(q, k, v, form, None)
    parts, state = [], None
    for start, stop in ((0, 1), (1, 130), (130, 130), (130, 300)):
        out, state = kernels.attend_with_state(*(x[:, start:stop] for x in (q, k, v)), form, state)
        parts.append(out)
    expected = exact(q, k, v, form)
    for a in (whole, torch.cat(parts, 1)):
        assert (a.double().cpu() - expected).abs().max() <= torch.finfo(a.dtype).eps * expected.abs().max()
    torch.testing.assert_close(state, whole_state, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        state.double().cpu(),
        torch.einsum("bthd,bthe->bhde", k.double(), v.double()).cpu(),
        rtol=1e-5,
        atol=1e-3,
    )


@pytest.mark.parametrize("lengths", [None, [130, 0, 70]], ids=["dense", "packed"])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_state_with_a_decay(kernels, lengths, shape):
    """States of key heads decay, dense and packed, with a state before and factors of the caller."""
    batch, tokens = 3, (3, 200) if lengths is None else (200,)
    q, k, v = (draw(*tokens, n, 16, seed=n, dtype=torch.float16) for n in (4, 2, 2))
    state = torch.randn(batch, 2, 16, 16, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    form = Form(0.25, causal=True, row_factors=ROW, decay=shape)
    given = Given(checks.factors(q, *tokens), decaying(*shape).decay_slopes)
    starts = None if lengths is None else cumulative(lengths, DEVICE)
    out, after = kernels.attend_with_state(q, k, v, form, state, starts, given)
    wide = [x.double().cpu() for x in (q, k, v)]
    expected = primitive.attend_with_state(
        *wide,
        form,
        state.cpu(),
        None if starts is None else starts.cpu(),
        Given(*(x if x is None else x.cpu() for x in given)),
    )
    for a, e in zip((out, after), expected):
        error, size = (a.double().cpu() - e).abs().max().item(), e.abs().max().item()
        assert error <= torch.finfo(torch.float16).eps * size, f"off by {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("d, d_v, group", [(40, 24, 1), (12, 16, 3), (16, 12, 6)])
@pytest.mark.parametrize("decay", [None, (2,), (3, 2)], ids=str)
@pytest.mark.parametrize("by_slot", [False, True])
def test_step(kernels, d, d_v, group, decay, by_slot):
    """A token enters the states in place, those of a pool by slot, and grouped queries attend."""
    from flash_attn.linear import linear_attention_step

    q = draw(3, 2 * group, d, seed=4, dtype=torch.float16)
    k, v = (draw(3, 2, width, seed=seed, dtype=torch.float16) for seed, width in enumerate((d, d_v)))
    pool = torch.randn(5, 2, d_v, d, generator=torch.Generator().manual_seed(5)).to(DEVICE).mT  # any strides
    slots = torch.tensor([4, 0, 1], dtype=torch.int32, device=DEVICE) if by_slot else None
    given = Given(checks.factors(q, 3), None if decay is None else decaying(*decay).decay_slopes)
    right = pool.cpu().clone() if by_slot else pool[:3].cpu().clone()
    expected, _ = linear_attention_step(
        *(x.cpu() for x in (q, k, v)), right, 0.3, normalization=given.row_factors.cpu(),
        decay_slopes=None if decay is None else given.decay_slopes.cpu(),
        state_indices=None if slots is None else slots.cpu(),
    )  # fmt: skip
    own = pool if by_slot else pool[:3]
    version = own._version
    out = kernels.step(q, k, v, own, 0.3, given, slots)
    assert own._version > version, "autograd does not notice that the states changed"
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(own.cpu(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [101376, 166912, 232448], ids=["99 KiB", "163 KiB", "227 KiB"])
def test_tunings_fit_the_shared_memory(kernels, limit):
    """Tunings fit compute capability 8.9, 8.0 and 9.0. The largest limit needs no change of the table."""
    for block_d, tuning in (*kernels._WALK.items(), *kernels._WALK_BEFORE_9.items()):
        fitted = tuning.within(limit, block_d)
        assert (
            fitted.shared_memory(block_d) <= limit
            and fitted.chunk >= 16
            and fitted.block_v >= min(block_d, 32)
        )
        assert limit < 200_000 or fitted == tuning


@pytest.mark.parametrize(
    "major, limit, block_v, num_warps",
    [(8, 166912, 64, 4), (8, 101376, 64, 8), (9, 232448, 128, 8), (12, 101376, 64, 8)],
)
def test_tunings_are_those_of_the_device(kernels, major, limit, block_v, num_warps, monkeypatch):
    """Where both operands of a product are in registers, half as many columns leave enough of them."""
    device = SimpleNamespace(major=major, shared_memory_per_block_optin=limit)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    tuning = kernels._walk_tuning.__wrapped__(torch.device("cuda"), 128, 128)
    assert tuning.block_v == block_v and tuning.num_warps == num_warps
    assert kernels._walk_tuning.__wrapped__(torch.device("cuda"), 128, 20).block_v == 32


def test_two_programs_fit_a_multiprocessor(kernels):
    """Tunings for two programs fit the 228 KiB of compute capability 9.0. Each program takes 1 more."""
    pairs = {d: tuning for d, tuning in kernels._WALK.items() if tuning.segments > 1}
    assert sorted(pairs) == [16, 32, 64]
    for block_d, tuning in pairs.items():
        assert 2 * (tuning.shared_memory(block_d) + 1024) <= 228 * 1024, block_d


@pytest.mark.parametrize(
    "longest, positions, d, length",
    [
        (512, 512, 64, 512),  # one segment, without a state
        (512, 1 << 20, 64, 65536),  # as many slots for states as sequences, and few more
        (513, 513, 64, 128),
        (1024, 1024, 64, 128),  # 8 segments of 16 heads, one on a multiprocessor
        (2048, 2048, 64, 256),
        (4096, 4096, 64, 256),  # two on a multiprocessor
        (4096, 16384, 64, 1024),
        (65536, 65536, 64, 4096),
        (1024, 1024, 128, 128),
        (4096, 4096, 128, 512),
        (65536, 65536, 128, 8192),
        (1024, 1024, 256, 512),
        (16384, 16384, 256, 2048),
    ],
)
def test_segments_fill_the_gpu(kernels, longest, positions, d, length, monkeypatch):
    monkeypatch.undo()  # the short segments of other tests
    at_once = kernels._WALK[d].segments
    assert kernels._segment_length(longest, positions, 16, d, 132, at_once) == length


@pytest.mark.parametrize("decay", [None, (4,)], ids=str)
@pytest.mark.parametrize("d, d_v", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_states_have_the_segments_of_their_walks(kernels, d, d_v, decay, monkeypatch):
    """A walk may take the states that `state_of` found, so both are cut alike, whatever the head sizes."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 12)
    form, n, nheads = Form(0.1, True, decay=decay), 4096, 4
    q, v = (
        kernels._Layout((1, n, nheads, width), (n * nheads * width, nheads * width, width, 1))
        for width in (d, d_v)
    )
    sequences = kernels._Sequences(torch.device("cpu"), torch.bfloat16, None, 0, 0)
    states, walk = kernels._forward_plan(sequences, form, q, q, v)
    _, _, back, _, _ = kernels._backward_plan(sequences, form, v, q, q, v)
    inside = kernels._state_plan(sequences, form, q, q, v, True)
    inside_back = kernels._state_plan(sequences, form.of_dv(), q, q, v, False)
    numbers = [x._segments.numbers for x in (states, back, inside, inside_back)]
    assert len(set(numbers)) == 1
    # 12 multiprocessors and 4 heads.
    count = 6 if d == 64 else 3
    assert numbers[0][2] == count
    assert walk._walk._grid[0] == count * (2 if d_v == 128 and d == 64 else 1)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_captured_in_a_cuda_graph(kernels):
    """No call reads a tensor on the host, so a captured graph replays on other lengths and numbers."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (draw(400, 2, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    lengths = cumulative([100, 300], DEVICE)

    def attend():
        return flash_attn_varlen_func(
            q, k, v, lengths, lengths, 300, 300, causal=True, use_softmax=False, algorithm="linear"
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    lengths.copy_(cumulative([250, 150], DEVICE))
    q.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, attend())
