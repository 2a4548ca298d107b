"""Test ``diagonal`` and ``out_dtype`` of nosoftmax.forward and backward: parts of a sequence, cut anywhere,
add up to the whole, which the oracle computes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from flash_attn import flash_attn_func, nosoftmax
from flash_attn.masks import HSTU, Intervals
from flash_attn.nosoftmax.backends.linear import primitive
from torch import Tensor

from linear_checks import shorten_segments
from oracle import Oracle
from package import VARIANTS, missing, not_in_this_build

F64 = torch.float64
OPTIONS = {
    "full": dict(),
    "causal": dict(causal=True),
    "left": dict(window_size=(20, -1)),
    "right": dict(window_size=(-1, 15)),
    "both": dict(window_size=(30, 4)),
}
MORE = {
    "identity": dict(),
    "silu": dict(activation="silu"),
    "alibi": dict(alibi_slopes=torch.tensor([0.1, 0.5, 0.0, 0.02]), activation="sigmoid", sigmoid_bias=-1.0),
    "decay": dict(decay_slopes=torch.tensor([0.01, 0.2, 0.0, 3.0])),
    "softcap": dict(softcap=2.0),
}
MASKS = {
    "targets": HSTU(num_targets=40),
    "contexts": HSTU(num_targets=40, num_contexts=12),
    "window": HSTU(torch.tensor([40]), torch.tensor([12]), max_attn_len=30),
    "rows that see all": HSTU(40, 12, max_attn_len=30, min_full_attn_seq_len=20),
    "groups": HSTU(40, 12, max_attn_len=30, target_group_size=7),
}


@dataclass(frozen=True)
class Runner:
    """A backend on one device, with tensors of one dtype and heads of one size.

    forced: the argument that chooses it. slack: of float32 results, in units of 16-bit rounding.
    """

    device: str
    forced: tuple[str, str]
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    slack: float = 2.0

    @property
    def linear(self) -> bool:
        return self.forced[1] == "linear"

    @property
    def hopper(self) -> bool:
        return self.forced == ("backend", "fa4")

    @property
    def exact(self) -> bool:
        return self.dtype == F64

    @property
    def cuts(self) -> tuple:
        """Where parts of the queries and of the keys begin: few for the interpreter, which is slow."""
        interpreted = self.device == "cpu" and not self.exact
        return ((0, 100), (0, 61)) if interpreted else ((0, 3, 100), (0, 60, 61, 140))

    def sample(self, seqlen_q: int, seqlen_k: int, batch: int = 1) -> list[Tensor]:
        """q, k, v and dout, of numbers that the dtype holds, in float64 on the CPU."""
        torch.manual_seed(seqlen_q)
        d, d_v = self.head_dim, self.head_dim_v
        shapes = (seqlen_q, 4, d), (seqlen_k, 2, d), (seqlen_k, 2, d_v), (seqlen_q, 4, d_v)
        return [torch.randn(batch, *shape, dtype=F64).to(self.dtype).double() for shape in shapes]

    def taken(self, options: dict) -> dict:
        """Skip the test if the backend does not take these options, else return them for it."""
        if self.linear and options.keys() & {"activation", "alibi_slopes", "softcap", "window_size", "mask"}:
            pytest.skip("linear time is not exact with these options")
        if self.hopper and "alibi_slopes" in options:
            pytest.skip("FA4 has no alibi_slopes")
        if "mask" in options and self.device != "cpu" and not self.hopper:
            pytest.skip("the extension has no kernels for masks")

        def on_device(x):
            return x.to(self.device) if isinstance(x, Tensor) else x

        options = {
            name: type(x)(*map(on_device, x)) if isinstance(x, (HSTU, Intervals)) else on_device(x)
            for name, x in options.items()
        }
        return {**options, self.forced[0]: self.forced[1]}

    def both(self, q, k, v, dout, **options) -> tuple[Tensor, ...]:
        """The output and the gradients of a part, in float64 on the CPU."""
        options = self.taken(options)
        q, k, v, dout = (x.to(self.device, self.dtype) for x in (q, k, v, dout))
        try:
            found = nosoftmax.forward(q, k, v, **options)[0], *nosoftmax.backward(dout, q, k, v, **options)
        except (ValueError, RuntimeError) as error:
            if not_in_this_build(error):
                pytest.skip(str(error).splitlines()[0])
            raise
        return tuple(x.double().cpu() for x in found)

    def both_wide(self, q, k, v, dout, **options) -> tuple[Tensor, ...]:
        """The same of parts that are added up."""
        wide = F64 if self.exact else torch.float32
        return self.both(q, k, v, dout, out_dtype=wide, **options)

    def close(self, found, expected) -> None:
        for x, y in zip(found, expected, strict=True):
            largest = y.abs().max().item() if y.numel() else 0.0
            atol = 1e-10 if self.exact else self.slack * torch.finfo(self.dtype).eps * max(largest, 1.0)
            torch.testing.assert_close(x, y, rtol=0, atol=atol)

    def reads_no_more_than_is_seen(self) -> None:
        """Skip the test if the backend does."""
        if self.hopper:
            pytest.skip("a tile of FA4 has keys that no query sees beside others: docs/fa4.md, Limits")

    def same_gradient(self, wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> bool:
        """Whether the narrow gradient is the wide one, rounded. The extension adds up dQ in any order, and
        the query heads of a group in 16 bit, where Inf and NaN tell nothing of the wide sum.
        """
        if self.forced != ("backend", "fa2"):
            return torch.equal(wide.to(dtype).double(), narrow)
        finite = narrow.isfinite()
        atol = self.slack * torch.finfo(dtype).eps * narrow[finite].abs().max()
        return bool(finite.any()) and bool(((wide - narrow)[finite].abs() <= atol).all())


INTERPRETED = "linear kernels"  # takes seconds a test
RUNNERS = {
    "quadratic": Runner("cpu", ("algorithm", "quadratic"), F64, 8, 6),
    "linear": Runner("cpu", ("algorithm", "linear"), F64, 8, 6),
    INTERPRETED: Runner("cpu", ("algorithm", "linear"), torch.float16, 16, 16),
}
# Heads of 64 fill a tile, and heads of 40 do not.
for name, variant in (("fa2", "quadratic"), ("linear", "linear"), ("fa4", "fa4")):
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float16, 40)):
        (forced,) = VARIANTS["cuda", variant].items()
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        RUNNERS[label] = Runner("cuda", forced, dtype, head_dim, head_dim, slack=4.0)


@pytest.fixture(params=[pytest.param(x, marks=pytest.mark.slow) if x == INTERPRETED else x for x in RUNNERS])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Each backend that takes the options; the Triton kernels are interpreted where there is no GPU."""
    runner = RUNNERS[request.param]
    if runner.device == "cuda":
        if why := missing("cuda", "linear" if runner.linear else "fa4" if runner.hopper else "quadratic"):
            pytest.skip(why)
    elif not runner.exact:
        if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
            pytest.skip("needs triton, and a machine without a GPU, where it interprets kernels")
        monkeypatch.setattr(primitive, "has_kernels", lambda x: x.dtype == torch.float16)
        kernels = primitive.kernels()
        shorten_segments(monkeypatch, kernels)
    return runner


def whole(q, k, v, dout, **options) -> tuple[Tensor, ...]:
    """The output and the gradients of the oracle."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = Oracle().dense(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("mask", OPTIONS)
def test_parts_add_up(mask, more, runner):
    options: dict[str, Any] = {**OPTIONS[mask], **MORE[more]}
    runner.taken(options)
    for seqlen_q, seqlen_k in ((150, 180), (180, 150)):
        given = runner.sample(seqlen_q, seqlen_k)
        q, k, v, dout = given
        out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
        for start_q, stop_q in pairwise((*runner.cuts[0], seqlen_q)):
            for start_k, stop_k in pairwise((*runner.cuts[1], seqlen_k)):
                rows, keys = slice(start_q, stop_q), slice(start_k, stop_k)
                part = runner.both_wide(
                    q[:, rows], k[:, keys], v[:, keys], dout[:, rows], **options,
                    diagonal=start_q + seqlen_k - seqlen_q - start_k,
                )  # fmt: skip
                for total, at, x in zip((out, dq, dk, dv), (rows, rows, keys, keys), part):
                    total[:, at] += x
        runner.close((out, dq, dk, dv), whole(*given, **options))


@pytest.mark.parametrize("more", ["identity", "silu"])
@pytest.mark.parametrize("normalization", ["1/visible", "1/n"])
def test_rows_count_the_keys_that_they_see(normalization, more, runner):
    given = runner.sample(90, 70)
    q, k, v, dout = given
    for mask in ("full", "causal") if runner.linear else OPTIONS:
        options: dict[str, Any] = dict(normalization=normalization, **OPTIONS[mask], **MORE[more])
        out, dq, _, _ = whole(*given, **options)
        for rows in (slice(0, 15), slice(15, 89), slice(89, 90)):
            part = runner.both(q[:, rows], k, v, dout[:, rows], diagonal=rows.start - 20, **options)
            runner.close(part[:2], (out[:, rows], dq[:, rows]))


def test_rows_behind_the_keys_count_all_of_them(runner):
    q, k, v, dout = runner.sample(40, 16)
    options: dict[str, Any] = dict(causal=True, diagonal=3)
    found = runner.both(q, k, v, dout, normalization="1/visible", **options)
    seen = torch.arange(4, 44).clamp(max=16)[:, None, None]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    hidden = torch.arange(16) > torch.arange(3, 43)[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * runner.head_dim**-0.5
    weights = scores.masked_fill(hidden, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2)) / seen
    runner.close(found, (out.detach(), *torch.autograd.grad(out, (q, k, v), dout)))


def test_each_sequence_has_its_own(runner):
    """Dense and packed, as a tensor; far beyond both ends of the keys too."""
    diagonals = [40, -7, 0, 3000, -3000]
    options: dict[str, Any] = dict(causal=True, decay_slopes=torch.tensor([0.01, 0.2, 0.0, 0.001]))
    given = runner.sample(20, 30, batch=len(diagonals))
    alone = [
        runner.both(*(x[b : b + 1] for x in given), diagonal=key, **options)
        for b, key in enumerate(diagonals)
    ]
    expected = [torch.cat(parts) for parts in zip(*alone)]
    diagonal = torch.tensor(diagonals, dtype=torch.int32)
    runner.close(runner.both(*given, diagonal=diagonal, **options), expected)
    offsets = torch.arange(len(diagonals) + 1, dtype=torch.int32)
    packed = dict(cu_seqlens_q=20 * offsets, cu_seqlens_k=30 * offsets, max_seqlen_q=20, max_seqlen_k=30)
    found = runner.both(*(x.flatten(0, 1) for x in given), diagonal=diagonal.long(), **packed, **options)
    runner.close(found, [x.flatten(0, 1) for x in expected])
    assert expected[0][3].abs().max() > 0 and not expected[0][4].any()  # sees all keys, and none


def intervals(seqlen_q: int, seqlen_k: int) -> Intervals:
    """Three intervals of any keys for each row of one sequence; every fifth row sees nothing."""
    generator = torch.Generator().manual_seed(seqlen_q)
    cuts = torch.randint(0, seqlen_k + 1, (1, seqlen_q, 6), generator=generator, dtype=torch.int32)
    cuts = cuts.sort(-1).values
    starts, ends = cuts[..., ::2], cuts[..., 1::2].clone()
    ends[:, ::5] = starts[:, ::5]
    return Intervals(starts, ends)


def of_rows(mask: Any, rows: slice) -> Any:
    """The mask of some rows: intervals are listed, and HSTU follows from the diagonal."""
    return Intervals(*(x[:, rows] for x in mask)) if isinstance(mask, Intervals) else mask


SCORES_UNDER_A_MASK = {
    "silu": dict(activation="silu", normalization="1/n"),
    "1/visible": dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/visible"),
}
LISTED = {**SCORES_UNDER_A_MASK, "alibi": MORE["alibi"], "decay": MORE["decay"]}


@pytest.mark.parametrize("seqlen_q", [180, 100, 210])
@pytest.mark.parametrize(
    "mask, score",
    [*((mask, score) for mask in MASKS for score in SCORES_UNDER_A_MASK), *(("", score) for score in LISTED)],
)
def test_rows_under_a_mask(mask, score, seqlen_q, runner):
    """Parts of the rows see what they see in the whole, be it all rows, the last ones, or some before 0."""
    seqlen_k = 180
    of_all = MASKS[mask] if mask else intervals(seqlen_q, seqlen_k)
    options: dict[str, Any] = {"mask": of_all, **LISTED[score]}
    runner.taken(options)
    for as_dtype in (runner, replace(runner, dtype=torch.bfloat16)):
        given = as_dtype.sample(seqlen_q, seqlen_k)
        q, k, v, dout = given
        out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
        for start, stop in pairwise((0, 3, 60, 77, 95, seqlen_q)):
            rows = slice(start, stop)
            part = as_dtype.both_wide(
                q[:, rows], k, v, dout[:, rows], diagonal=start + seqlen_k - seqlen_q,
                **{**options, "mask": of_rows(of_all, rows)},
            )  # fmt: skip
            for total, at, x in zip((out, dq, dk, dv), (rows, rows, slice(None), slice(None)), part):
                total[:, at] += x
        as_dtype.close((out, dq, dk, dv), whole(*given, **options))


def test_rows_of_each_sequence_under_a_mask(runner):
    """Packed: each sequence has its own length, counts and diagonal, and one has no rows or no keys."""
    lengths, rows = (30, 0, 44, 17), (slice(5, 25), slice(0, 0), slice(40, 44), slice(0, 0))
    counts = torch.tensor([9, 0, 20, 3]), torch.tensor([4, 0, 11, 0])
    options: dict[str, Any] = dict(activation="silu", normalization="1/visible")
    alone, parts = [], []
    for n, at, targets, contexts in zip(lengths, rows, *(x.tolist() for x in counts)):
        parts.append([x[0] for x in runner.sample(n, n)])
        q, k, v, dout = parts[-1]
        mask = HSTU(targets, contexts, max_attn_len=8, target_group_size=4)
        more = {**options, "mask": mask, "diagonal": at.start}
        alone.append([x[0] for x in runner.both(q[None, at], k[None], v[None], dout[None, at], **more)])
    q, k, v, dout = (torch.cat(x) for x in zip(*parts))
    at = torch.cat([torch.arange(at.start, at.stop) + first for at, first in zip(rows, (0, 30, 30, 74))])
    packed = dict(
        cu_seqlens_q=torch.tensor([0, 20, 20, 24, 24]), cu_seqlens_k=torch.tensor([0, 30, 30, 74, 91]),
        max_seqlen_q=20, max_seqlen_k=44, diagonal=torch.tensor([at.start for at in rows]),
    )  # fmt: skip
    mask = HSTU(*counts, max_attn_len=8, target_group_size=4)
    found = runner.both(q[at], k, v, dout[at], mask=mask, **packed, **options)
    runner.close(found, [torch.cat(x) for x in zip(*alone)])


def test_rows_of_no_sequence_are_zero(runner):
    """Before the first packed sequence and behind the last one, wide or not."""
    given = [x[0] for x in runner.sample(40, 50)]
    lengths = dict(
        cu_seqlens_q=torch.tensor([3, 20, 35], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([2, 9, 44], dtype=torch.int32), max_seqlen_q=17, max_seqlen_k=35,
    )  # fmt: skip
    for both in (runner.both, runner.both_wide):
        for x, outside in zip(
            both(*given, causal=True, diagonal=torch.tensor([2, 10], dtype=torch.int32), **lengths),
            ([0, 2, 35, 39], [0, 2, 35, 39], [0, 1, 44, 49], [0, 1, 44, 49]),
        ):
            assert not x[outside].any() and x.any()


def test_what_is_out_of_sight_is_not_read(runner):
    """NaN in queries before and behind all keys that they may see, and in keys that no query sees."""
    runner.reads_no_more_than_is_seen()
    window: dict[str, Any] = dict(causal=True, **({} if runner.linear else {"window_size": (5, 0)}))
    for diagonal, rows, keys in ((10, slice(25, 30), slice(0, 5)), (-10, slice(0, 10), slice(20, 30))):
        given = runner.sample(30, 30)
        hidden = [(1, keys), (2, keys)]
        if diagonal < 0 or not runner.linear:
            hidden += [(0, rows), (3, rows)]
        if diagonal > 0 and runner.linear:
            hidden = []  # each query sees keys, and each key is seen
        for i, at in hidden:
            given[i][:, at] = torch.nan
        found = runner.both(*given, diagonal=diagonal, **window)
        assert all(torch.isfinite(x).all() for x in found)


def test_what_is_out_of_sight_of_a_mask_is_not_read(runner):
    """NaN in rows before position 0, and in keys that the rows given do not see."""
    runner.reads_no_more_than_is_seen()
    given = runner.sample(30, 30)
    for i, at in ((0, slice(10)), (3, slice(10)), (1, slice(20, 30)), (2, slice(20, 30))):
        given[i][:, at] = torch.nan
    found = runner.both(*given, mask=HSTU(num_targets=4, max_attn_len=25), diagonal=-10)
    assert all(torch.isfinite(x).all() for x in found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("more", ["identity", "relu"])
def test_wide_results_are_neither_rounded_nor_saturated(causal, more, runner):
    """The weights saturate, in either dtype of the results, and so they stay small here."""
    dtype = torch.float16 if runner.exact else runner.dtype
    given = [16 * x.to(dtype).double() for x in runner.sample(150, 150)]
    options: dict[str, Any] = dict(causal=causal, softmax_scale=2.0**-2)
    if more != "identity":
        options["activation"] = more
    as_16_bit = replace(runner, dtype=dtype)
    found = as_16_bit.both(*given, out_dtype=torch.float32, **options)
    narrow = as_16_bit.both(*given, **options)
    expected = whole(*given, **options)
    as_16_bit.close(found, expected)
    for x, z in zip(found, expected, strict=True):
        assert z.abs().max() > 65504
        assert (x.to(dtype).double() != x).any()
    limit = 65504 if dtype == torch.float16 else torch.inf
    assert torch.equal(found[0].clamp(-limit, limit).to(dtype).double(), narrow[0])
    for x, y in zip(found[1:], narrow[1:], strict=True):
        assert as_16_bit.same_gradient(x, y, dtype)


def results(q, k, v, dout, **options) -> tuple[Tensor, ...]:
    return nosoftmax.forward(q, k, v, **options)[0], *nosoftmax.backward(dout, q, k, v, **options)


@pytest.mark.parametrize(
    "dtype, out_dtype",
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)],
)
def test_the_own_dtype_may_be_named(dtype, out_dtype):
    given = [x.to(dtype) for x in RUNNERS["quadratic"].sample(5, 5)]
    for x, y in zip(results(*given, out_dtype=out_dtype), results(*given)):
        assert torch.equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(diagonal=2**31), ValueError, "diagonal=2147483648: give the key"),
        (dict(diagonal=1.5), TypeError, "diagonal=1.5: give an integer"),
        (dict(diagonal=torch.zeros(2)), TypeError, "diagonal has dtype torch.float32"),
        (dict(diagonal=torch.zeros(2, dtype=torch.int32)), ValueError, r"diagonal has shape \(2,\)"),
        (
            dict(diagonal=torch.tensor([-(2**31)], dtype=torch.int32)),
            ValueError,
            r"diagonal\[0\]=-2147483648",
        ),
        (
            dict(mask=HSTU(2), diagonal=1),
            ValueError,
            r"diagonal\[0\]=1: query 4 of sequence 0 would have position 5, but HSTU is a mask of its 5 keys",
        ),
        (dict(out_dtype=torch.float16), ValueError, "out_dtype=torch.float16: with q in torch.float64 give"),
        (dict(out_dtype=torch.float32), ValueError, "out_dtype=torch.float32: with q in torch.float64 give"),
    ],
)
def test_wrong_use(options, error, words):
    q, k, v, dout = RUNNERS["quadratic"].sample(5, 5)
    with pytest.raises(error, match=words):
        nosoftmax.forward(q, k, v, **options)
    with pytest.raises(error, match=words):
        nosoftmax.backward(dout, q, k, v, **options)


def test_the_public_functions_do_not_have_them():
    q, k, v, _ = RUNNERS["quadratic"].sample(5, 5)
    for name, value in (("diagonal", 0), ("out_dtype", F64)):
        with pytest.raises(TypeError, match=name):
            flash_attn_func(q, k, v, use_softmax=False, **{name: value})
