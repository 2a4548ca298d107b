"""The operations of ranges.py on integers of a kernel."""

from typing import Any

import cutlass
from cutlass import Boolean, Int32


class Registers:
    @staticmethod
    def min(a: Any, b: Any) -> Any:
        return min(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.min(a, b)

    @staticmethod
    def max(a: Any, b: Any) -> Any:
        return max(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.max(a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool):
            return a if condition else b
        return Int32(cutlass.select_(Boolean(condition).ir_value(), Int32(a).ir_value(), Int32(b).ir_value()))
