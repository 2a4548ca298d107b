"""Test which mask of a call reaches the Hopper kernels, with nvidia-cutlass-dsl and without a GPU."""

import pytest
import torch

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl: make toolchain FAMILY=flash-attn-4")
hopper = pytest.importorskip("flash_attn.cute.nosoftmax.hopper", reason="needs flash-attn-4's wheel")
from flash_attn.cute.nosoftmax import checks, launch  # noqa: E402
from flash_attn.cute.nosoftmax.call import Call  # noqa: E402
from flash_attn.cute.nosoftmax.marker import HSTUKind, no_softmax_of  # noqa: E402

COUNTS = torch.tensor([3, 4], dtype=torch.int32)


def call(tensors: dict | None = None, **fields) -> Call:
    q, k, v = torch.empty(3, 2, 30, 2, 64, dtype=torch.bfloat16, device="meta")
    options = checks.options(
        64, 30, 30, 0.0, None, False, (None, None), 0.0, False, False, "silu", 0.0,
        fields.pop("normalization", None),
    )  # fmt: skip
    return Call.of(options._replace(**fields), q=q, k=k, v=v, **(tensors or {}))


def launched(asked: Call) -> launch.Call:
    return hopper._launched(asked, hopper.Extras((None, None)))


@pytest.mark.parametrize(
    "tensors, fields, kind, numbers",
    [
        ({}, dict(num_targets=5), HSTUKind("number"), (5,)),
        ({}, dict(num_targets=5, num_contexts=2), HSTUKind("number", "number"), (5, 2)),
        ({"target_counts": COUNTS}, {}, HSTUKind("sequence"), ()),
        (
            {"target_counts": COUNTS, "context_counts": COUNTS + 1},
            dict(max_attn_len=7, min_full_attn_seq_len=2, target_group_size=3),
            HSTUKind("sequence", "sequence", True, True, True), (7, 2, 3),
        ),
        # What has no effect compiles nothing: whole rows without a window, groups without targets.
        (
            {"context_counts": COUNTS}, dict(min_full_attn_seq_len=2, target_group_size=3),
            HSTUKind(None, "sequence"), (),
        ),
        ({}, dict(num_targets=5, max_attn_len=2**31 - 1), HSTUKind("number", window=True), (5, 2**30)),
    ],
)  # fmt: skip
def test_hstu(tensors, fields, kind, numbers):
    given = launched(call(tensors, mask="hstu", **fields))
    mark = no_softmax_of(given.mods.score_mod)
    assert (mark.hstu, mark.intervals) == (kind, 0)
    assert given.mask_numbers == numbers
    assert [x.tolist() for x in given.mask_tensors] == [x.tolist() for x in tensors.values()]
    assert given.hides and not launched(call()).hides


@pytest.mark.parametrize("k", [1, 3])
def test_intervals(k):
    starts, ends = torch.zeros(2, 2, 30, k, dtype=torch.int32)
    given = launched(call({"interval_starts": starts, "interval_ends": ends}, mask="intervals"))
    mark = no_softmax_of(given.mods.score_mod)
    assert (mark.hstu, mark.intervals, given.mask_numbers) == (None, k, ())
    assert all(a is b for a, b in zip(given.mask_tensors, (starts, ends)))
    assert [x.shape for x in given.masks(packed=True)] == [(60, k)] * 2
    assert [x.shape for x in given.masks(packed=False)] == [(2, 30, k)] * 2


def test_visible_keys_are_those_of_the_mask():
    """Without a mask "1/visible" is "1/n" where every query sees every key."""
    asked = dict(normalization="1/visible")
    assert no_softmax_of(launched(call(**asked)).mods.score_mod).normalization == "1/n"
    for mask in (dict(mask="hstu", num_targets=3), dict(mask="hstu", max_attn_len=3, num_contexts=2)):
        mark = no_softmax_of(launched(call(**mask, **asked)).mods.score_mod)
        assert mark.normalization == "1/visible"


def test_masked_tiles_are_those_of_causal():
    """Upstream chooses by causal, which it does not see here; and a tile has the rows of one head."""
    masked, plain = (launched(call(**x)) for x in (dict(mask="hstu", num_targets=3), {}))
    q, v = torch.empty(2, 2, 30, 4, 96, device="meta")
    assert launch._tile(masked, q, v, None)["tile_mn"] == (192, 128)
    assert launch._tile(plain, q, v, None)["tile_mn"] == (192, 144)
    assert launch._pack_gqa(masked, None, q, q[:, :, :2]) is False
    assert launch._pack_gqa(plain, None, q, q[:, :, :2]) is None


def test_rows_before_the_first_position_are_left_out_of_a_batch():
    """They see nothing under HSTU, and may under intervals."""
    q, k, v = (torch.empty(2, n, 2, 64, dtype=torch.bfloat16, device="meta") for n in (40, 30, 30))
    for mask, first in (("hstu", 10), ("intervals", 0)):
        asked = call(mask=mask, num_targets=3)._replace(q=q, k=k, v=v)
        assert hopper._first_query(asked, hopper.Extras((None, None))) == first


def test_results_are_float32_if_asked_for():
    """A tile then has the rows of one head: no TMA scatters float32."""
    q, v = torch.empty(2, 2, 30, 4, 64, dtype=torch.float16, device="meta")
    for wide, dtype, packs in ((False, torch.float16, None), (True, torch.float32, False)):
        given = launched(call(wide=wide))
        assert no_softmax_of(given.mods.score_mod).wide == wide
        assert given.result_type(q) == dtype
        assert launch._pack_gqa(given, None, q, q[:, :, :2]) is packs
        assert launch.forward(given, q[:0], v[:0], v[:0]).dtype == dtype
        assert {x.dtype for x in launch.backward(given, v[:0], q[:0], v[:0], v[:0])} == {dtype}


SLOPES = {"decay_slopes": torch.ones(2)}


@pytest.mark.parametrize(
    "tensors, fields, window, numbers",
    [
        ({}, dict(window_right=0), (False, True), (0,)),
        ({}, dict(window_left=2**31 - 1, window_right=3), (True, True), (2**30, 3)),
        ({}, dict(window_left=7), (True, False), (7,)),
        (SLOPES, {}, (False, False), ()),
        ({"target_counts": COUNTS}, dict(mask="hstu"), None, ()),
        (
            {**SLOPES, **dict.fromkeys(("interval_starts", "interval_ends"), torch.zeros(2, 30, 3))},
            dict(mask="intervals"), None, (),
        ),
    ],
)  # fmt: skip
def test_a_diagonal_makes_a_mask_of_the_window(tensors, fields, window, numbers):
    diagonal = torch.tensor([5, -3], dtype=torch.int32)
    asked = call({**tensors, "diagonal": diagonal}, **fields)
    given = launched(asked)
    mark = no_softmax_of(given.mods.score_mod)
    assert mark.has_diagonal and mark.window == window
    assert (given.mask_numbers, given.causal, given.window) == (numbers, False, (None, None))
    assert given.hides and given.masks(packed=True)[0].tolist() == [5, -3]
    assert hopper._indexed(asked, hopper.Extras((None, None)))


def test_a_diagonal_counts_where_a_position_does():
    diagonal = torch.tensor([5, -3], dtype=torch.int32)
    asked = (
        call({"diagonal": diagonal}),
        call(
            {"diagonal": diagonal, "interval_starts": COUNTS[:, None, None], "interval_ends": COUNTS},
            mask="intervals",
        ),
    )
    for given in map(launched, asked):
        assert given.diagonal is None and not no_softmax_of(given.mods.score_mod).has_diagonal
