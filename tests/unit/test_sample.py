"""Test the choice of upstream's cases: the same for a seed, every stratum represented, nothing left out
silently.
"""

from __future__ import annotations

import pytest

from fapatch.upstream.sample import Axis, Rule, case_id, choose, eligible

SEQLENS = Axis(("seqlen_q", "seqlen_k"), ("1-128", "64-256", "1024-1024"))
DTYPE = Axis(("dtype",), ("dtype0", "dtype1"))
SOFTMAX = Axis(("use_softmax",), ("True", "False"))
FUNCTIONS = {
    "test_large": [DTYPE, SEQLENS, Axis(("d",), tuple(map(str, range(32, 96)))), SOFTMAX],
    "test_small": [DTYPE, SOFTMAX],
    "test_softmax_only": [SEQLENS],
    "test_plain": [],
}


def ids(sample) -> list[str]:
    return [case.id for case in sample.cases]


def test_ids_join_the_labels_in_order():
    found = [case_id("test_x", [DTYPE, SEQLENS], index) for index in eligible("test_x", [DTYPE, SEQLENS])]
    assert found[:3] == ["test_x[dtype0-1-128]", "test_x[dtype0-64-256]", "test_x[dtype0-1024-1024]"]
    assert len(found) == len(set(found)) == 6
    assert [case_id("test_plain", [], index) for index in eligible("test_plain", [])] == ["test_plain"]


def test_same_seed_same_sample_other_seed_another():
    once, again, other = (choose(FUNCTIONS, seed, 60, 0) for seed in (0, 0, 1))
    assert ids(once) == ids(again)
    assert set(ids(once)) != set(ids(other))


def test_every_function_with_and_without_softmax_is_represented():
    sample = choose(FUNCTIONS, 0, 20, 0)
    assert len(sample.cases) == 20
    assert {(c.function, c.use_softmax) for c in sample.cases} == {
        ("test_large", True),
        ("test_large", False),
        ("test_small", True),
        ("test_small", False),
        ("test_softmax_only", True),
        ("test_plain", True),
    }


def test_a_larger_sample_holds_the_smaller_one():
    assert set(ids(choose(FUNCTIONS, 3, 15, 0))) < set(ids(choose(FUNCTIONS, 3, 100, 0)))


def test_small_strata_are_taken_whole_and_the_rest_dealt_on():
    sample = choose(FUNCTIONS, 0, 100, 0)
    assert len(sample.cases) == 100
    assert sum(c.function == "test_small" for c in sample.cases) == 4
    assert sum(c.function == "test_large" for c in sample.cases) == 100 - 4 - 3 - 1


@pytest.mark.parametrize("count", [392, 10_000])
def test_a_count_beyond_all_cases_takes_all(count):
    everything = 2 * 3 * 64 * 2 + 4 + 3 + 1
    sample = choose(FUNCTIONS, 0, count, 0)
    assert sample.eligible == everything
    assert len(sample.cases) == min(count, everything)


def test_fraction_takes_its_share_of_every_stratum():
    sample = choose(FUNCTIONS, 0, None, 0.25)
    assert sum(c.function == "test_large" for c in sample.cases) == 2 * 3 * 64 * 2 // 4
    assert {c.function for c in sample.cases} == set(FUNCTIONS)
    assert len(choose(FUNCTIONS, 0, None, 1.0).cases) == sample.eligible


def test_what_a_rule_leaves_out_is_counted():
    long = Rule("too long", frozenset({"seqlen_k"}), lambda function, p: int(p.get("seqlen_k", 0)) > 256)
    half = Rule(
        "of the other dtype", frozenset({"dtype", "d"}), lambda function, p: p.get("dtype") == "dtype1"
    )
    everything, sample = choose(FUNCTIONS, 0, None, 1.0), choose(FUNCTIONS, 0, None, 1.0, [long, half])
    assert sample.left_out == {"too long": 2 * 64 * 2 + 1, "of the other dtype": 2 * 64 * 2 + 2}
    assert sample.eligible + sum(sample.left_out.values()) == everything.eligible and not everything.left_out
    assert not any("1024" in i or "dtype1" in i for i in ids(sample))
