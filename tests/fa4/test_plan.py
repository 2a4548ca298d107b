"""Test nosoftmax/plan.py: which calls repeat the launches of an earlier call, and which must not. Kernels are
Python functions here.
"""

from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from overlay_package import module

plan = module("plan")


def kernel(x, y, total, out, factor):
    """``total``, memory of the launch itself, must be zero at first."""
    total += x * y
    out.copy_(total * factor)


def zeros(x):
    return torch.zeros(x.shape, dtype=x.dtype)


class Upstream:
    """Host code that counts how often it runs."""

    def __init__(self, kernel=kernel):
        self.kernel, self.runs, self.plans = kernel, 0, {}

    def __call__(self, x, y, factor=2.0, plans=True, before=lambda x: x, memory=zeros):
        out = torch.full_like(x, float("nan"))

        def launch():
            self.runs += 1
            plan.recorded(self.kernel)(before(x.detach()), y.detach(), memory(x), out.detach(), factor)

        plan.run(self.plans if plans else None, ("product", factor), (x, y), (out,), launch)
        return out


def numbers(*shape, seed=0):
    return tuple(torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))


def test_calls_that_look_the_same_run_the_host_code_once():
    upstream = Upstream()
    for seed in range(3):
        x, y = numbers(4, 8, seed=seed)
        assert torch.equal(upstream(x, y), x * y * 2.0)
    assert upstream.runs == 1


@pytest.mark.parametrize("other", [
    dict(x=torch.ones(4, 16), y=torch.ones(4, 16)), dict(x=torch.ones(8, 4).t()), dict(factor=3.0),
        dict(x=torch.ones(4, 8).half()),
], ids=["shape", "strides", "option", "dtype"])  # fmt: skip
def test_other_looks_and_options_have_plans_of_their_own(other):
    upstream = Upstream()
    given = dict(zip("xy", numbers(4, 8)))
    for arguments in (given, {**given, **other}) * 2:
        out = upstream(**arguments)
        assert torch.equal(out, (arguments["x"] * arguments["y"] * arguments.get("factor", 2.0)).to(out))
    assert upstream.runs == len(upstream.plans) == 2


def test_one_tensor_given_twice_is_no_plan_but_may_use_one():
    upstream = Upstream()
    x, y = numbers(4, 8)
    for _ in range(2):
        assert torch.equal(upstream(x, x), x * x * 2.0)
    assert upstream.runs == 2
    assert torch.equal(upstream(x, y), x * y * 2.0)
    assert torch.equal(upstream(x, x), x * x * 2.0)
    assert upstream.runs == 3


@pytest.mark.parametrize(
    "before", [torch.clone, lambda x: x.view(8, 4).t().reshape(4, 8)], ids=["clone", "copy"]
)
def test_host_code_that_copies_a_tensor_always_runs(before):
    upstream = Upstream()
    x, y = numbers(4, 8)
    for _ in range(2):
        upstream(x, y, before=before)
    assert upstream.runs == 2 and not upstream.plans


def test_host_code_that_launches_another_view_always_runs():
    upstream = Upstream(lambda x, *rest: kernel(x.view(4, 8), *rest))
    x, y = numbers(4, 8)
    for _ in range(2):
        assert torch.equal(upstream(x, y, before=lambda x: x.view(8, 4)), x * y * 2.0)
    assert upstream.runs == 2


def test_memory_that_is_not_contiguous_is_no_plan():
    upstream = Upstream(lambda x, y, total, *rest: kernel(x, y, total.t(), *rest))
    x, y = numbers(8, 8)
    for _ in range(2):
        assert torch.equal(upstream(x, y, memory=lambda x: zeros(x).t()), x * y * 2.0)
    assert upstream.runs == 2


def test_unaligned_tensors_go_through_the_host_code():
    upstream = Upstream()
    x, y = numbers(4, 8)
    for other in (x, torch.ones(33)[1:].view(4, 8)):
        assert torch.equal(upstream(other, y), other * y * 2.0)
    assert upstream.runs == 2


def test_fake_tensors_and_calls_without_plans_go_through_the_host_code():
    from torch._subclasses.fake_tensor import FakeTensorMode

    upstream = Upstream()
    x, y = numbers(4, 8)
    for runs in (1, 2):
        upstream(x, y, plans=False)
        assert upstream.runs == runs and not upstream.plans
    upstream(x, y)
    with FakeTensorMode():
        upstream(torch.empty(4, 8), torch.empty(4, 8))
    assert upstream.runs == 4


def test_a_plan_keeps_no_tensor():
    upstream = Upstream()
    kept = []
    for _ in range(2):
        x, y = numbers(4, 8)
        kept += [weakref.ref(x), weakref.ref(upstream(x, y))]
    del x, y
    gc.collect()
    assert upstream.plans and not any(x() is not None for x in kept)


class AuxData(NamedTuple):
    """Upstream's."""

    tensors: list | None = None
    scalars: tuple | None = None


def test_tensors_in_a_list_are_those_of_the_call():
    """Upstream passes a list of tensors, with scalars, as one argument."""
    runs, plans, kept = [], {}, []

    def kernel(out, aux, none):
        x, y = aux.tensors
        assert none == AuxData()
        out.copy_(x * aux.scalars[0] - y)

    def difference(x, y, factor):
        out = torch.full_like(x, float("nan"))

        def launch():
            runs.append(factor)
            plan.recorded(kernel)(out, AuxData([x, y], (factor,)), AuxData())

        plan.run(plans, (factor,), (x, y), (out,), launch)
        return out

    for seed in range(3):
        for factor in (2.0, 3.0):
            x, y = numbers(4, 8, seed=seed)
            kept += [weakref.ref(x), weakref.ref(y)]
            assert torch.equal(difference(x, y, factor), x * factor - y)
    assert runs == [2.0, 3.0]
    del x, y
    gc.collect()
    assert not any(x() is not None for x in kept)


def test_memory_in_a_list_is_new_at_each_launch():
    """A first kernel may write what a second one reads from a list."""
    runs, plans, seen = [], {}, []

    def first(x, memory):
        memory.copy_(x + 1.0)

    def second(out, aux):
        seen.append(aux.tensors[0].data_ptr())
        out.copy_(aux.tensors[0] * 2.0)

    def launch_on(x):
        out = torch.full_like(x, float("nan"))

        def launch():
            runs.append(x)
            memory = plan.not_read(torch.empty_like(x))
            plan.recorded(first)(x, memory)
            plan.recorded(second)(out, AuxData([memory]))

        plan.run(plans, (), (x,), (out,), launch)
        return out

    for seed in range(3):
        x, _ = numbers(4, 8, seed=seed)
        assert torch.equal(launch_on(x), (x + 1.0) * 2.0)
    assert len(runs) == 1 and len(plans) == 1


@pytest.mark.parametrize("size, is_kept", [(8, True), (2**15, False)])
def test_memory_that_no_launch_uses_is_kept_if_it_is_small(size, is_kept):
    plans, seen = {}, []

    def kernel(out, x, unused):
        seen.append(unused)
        out.copy_(x)

    def launch_on(x):
        out = torch.full_like(x, float("nan"))

        def launch():
            unused = torch.empty(size, 4)
            plan.not_used(unused)
            plan.recorded(kernel)(out, x, unused)

        plan.run(plans, (), (x,), (out,), launch)
        return out

    for x in numbers(4, 8):
        assert torch.equal(launch_on(x), x)
    first, again = seen
    assert again.shape == first.shape and (again is first) == is_kept
    gone = weakref.ref(first)
    del seen[:], first, again
    gc.collect()
    assert (gone() is None) != is_kept


def test_an_error_ends_the_recording():
    def fails(*args):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Upstream(fails)(*numbers(4, 8))
    assert plan.recorded(fails) is fails


def test_plans_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(plan, "_MOST_PLANS", 3)
    upstream = Upstream()
    for n in range(1, 9):
        upstream(*numbers(n, 8))
    assert len(upstream.plans) <= 3
