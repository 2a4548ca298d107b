"""Test the tests: each wrong kernel fails the test that the table names, and right kernels pass it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kernel import Kernel
from mutations import MUTANTS, MaskedWithZero, Mutant, SoftmaxCommentedOut
from oracle import Oracle
from suite import every_test_of, failures, named

pytestmark = pytest.mark.slow

FINITE_TESTS = every_test_of("test_finite")
NEED_SATURATION = {
    mutant.caught_by
    for mutant in MUTANTS
    if "in_float16" in mutant.caught_by or "largest" in mutant.caught_by
}
# autograd computes relu'(NaN) as 1.
NEED_OWN_DERIVATIVE = {"test_law_nonfinite.test_visible_values_show"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant):
    """The named test fails by an assertion, not by a crash."""
    assert next(failures(named(mutant.caught_by), mutant.build()), None), (
        f"{mutant.caught_by} passes with: {mutant.name}"
    )


@pytest.mark.parametrize("test", sorted({mutant.caught_by for mutant in MUTANTS}))
def test_right_kernel_passes(test: str):
    """The model from which the mutants are made passes every test that catches one. (The package runs these
    tests itself.)
    """
    assert list(failures(named(test), Kernel())) == []


@pytest.mark.parametrize(
    "test", sorted({mutant.caught_by for mutant in MUTANTS} - NEED_SATURATION - NEED_OWN_DERIVATIVE)
)
def test_oracle_passes(test: str):
    """The oracle passes them too, except tests of 16-bit overflow, because it does not saturate, and of
    derivatives that autograd gets wrong.
    """
    assert list(failures(named(test), Oracle())) == []


def test_names_differ():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("test", FINITE_TESTS, ids=lambda test: test.__name__)
def test_commented_out_softmax_fails_every_finite_test(test: Callable):
    """Each of these tests fails for a kernel whose softmax was commented out by hand."""
    assert next(failures(test, SoftmaxCommentedOut()), None)


# The last two test precision: they catch too low a limit, but not a missing one.
ZERO_IS_ENOUGH = {
    "test_masked_entries",
    "test_rows_without_keys",
    "test_zero_queries",
    "test_weights_do_not_saturate_in_bfloat16",
    "test_finite_gradients_are_right_in_float16",
}


@pytest.mark.parametrize("test", FINITE_TESTS, ids=lambda test: test.__name__)
def test_masking_with_zero_is_not_enough(test: Callable):
    """Writing 0 for -inf corrects masked entries, but unwritten memory and 16-bit overflow still spoil the
    output.
    """
    assert any(failures(test, MaskedWithZero())) == (test.__name__ not in ZERO_IS_ENOUGH)
