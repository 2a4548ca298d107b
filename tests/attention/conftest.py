"""Provide fixtures: the implementation under test, once per device, and the dtypes that it takes.

A test depends on the machine only through its implementation, so that ``test_mutations.py`` can call the same
test with the oracle and with wrong kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

import interpreter

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is imported, which flash_attn does if it is installed
    interpreter.quicken()

from linear_checks import shorten_segments
from package import VARIANTS, Package, devices, missing, not_in_this_build, supports

# Derandomized, so that a failure repeats on every machine.
settings.register_profile("attention", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("attention")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "scores: tests what happens to the scores, which the linear algorithm does not form"
    )


def pytest_report_header() -> str:
    return "\n".join(
        f"attention {variant} on {device}: {missing(device, variant) or 'tested'}"
        for device, variant in VARIANTS
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Skip a test that needs CUDA kernels which are not installed, with the package's own message. Any other
    error fails the test.
    """
    try:
        return (yield)
    except (ValueError, RuntimeError) as error:
        if not_in_this_build(error):
            pytest.skip(str(error).splitlines()[0])
        raise


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One device at a time. A test that asks for no other backend runs on the extension, even where FA4 would
    be chosen.
    """
    if request.param == "cuda":
        monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "fa2")
        if "attention" not in request.fixturenames and (why := missing("cuda")):
            pytest.skip(why)
    return request.param


@pytest.fixture(params=["quadratic", "linear"] + ["fa4"] * ("cuda" in devices()))
def attention(request: pytest.FixtureRequest, device: str) -> Package:
    """The installed package on one device, in each variant."""
    if request.param == "linear" and request.node.get_closest_marker("scores"):
        pytest.skip("the linear algorithm does not form scores")
    if (device, request.param) not in VARIANTS:
        pytest.skip(f"{request.param} does not run on {device} tensors")
    if why := missing(device, request.param):
        pytest.skip(why)
    return Package(device, request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    """Every dtype that the device's kernels take."""
    if not supports(device, request.param):
        pytest.skip(f"the kernels on {device} take float16 and bfloat16 alone, not {request.param}")
    return request.param


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch):
    """See linear_checks.shorten_segments. Plans that were made before, and those made here, are forgotten."""
    from flash_attn.nosoftmax.backends.linear import kernels

    shorten_segments(monkeypatch, kernels)
    plans = (kernels._forward_plan, kernels._backward_plan)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()
