"""What every entry point of the backend runs under."""

import functools
from typing import Callable, TypeVar

import torch

_F = TypeVar("_F", bound=Callable)


def entry_point(function: _F) -> _F:
    """Record no graph, and keep autocast from lowering the precision of the products within."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def round128(length: int) -> int:
    """The length that the extension pads the sides of S_dmask and softmax_d to."""
    return -(-length // 128) * 128
