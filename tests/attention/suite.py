"""Load the attention tests as objects, for test_mutations.py to call with wrong kernels."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator

import torch

from oracle import Oracle


def every_test_of(module: str) -> list[Callable]:
    return [test for name, test in vars(importlib.import_module(module)).items() if name.startswith("test_")]


def named(test: str) -> Callable:
    module, function = test.split(".")
    return getattr(importlib.import_module(module), function)


def parameters(test: Callable) -> Iterator[dict]:
    """Yield every set of arguments that the test's parametrize marks give it, without the implementation."""
    axes = []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            axes.append([dict(zip(names, value if len(names) > 1 else (value,))) for value in mark.args[1]])
    if "dtype" in inspect.signature(test).parameters and not any("dtype" in axis[0] for axis in axes):
        axes.append([dict(dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)])
    for chosen in itertools.product(*axes):
        yield {name: value for part in chosen for name, value in part.items()}


def failures(test: Callable, attention: Oracle) -> Iterator[AssertionError]:
    for arguments in parameters(test):
        try:
            test(attention, **arguments)
        except AssertionError as error:
            yield error
