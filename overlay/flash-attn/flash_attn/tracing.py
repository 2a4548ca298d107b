"""What torch.compile is told about functions of this package."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_when_traced(function: F) -> F:
    """torch.compiler.assume_constant_result: torch.compile calls the function and keeps its result, and traces nothing in it.

    That one imports torch._dynamo, which takes far longer than all of this package. This leaves the mark that it leaves.
    """
    function._dynamo_marked_constant = True
    return function
