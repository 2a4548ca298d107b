"""Checks of the arguments that hold on any device: what was wrong, with the values, and what to do."""

from typing import Optional

import torch


def alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: Optional[torch.Tensor]) -> None:
    """q, k and v have one floating dtype; they and the others, where given, are on one device."""
    if not q.dtype.is_floating_point:
        raise TypeError(f"q has dtype {q.dtype}: attention takes floating-point tensors")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert one of them")
    for name, x in (("k", k), ("v", v), *others.items()):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move one of them with .to()")
