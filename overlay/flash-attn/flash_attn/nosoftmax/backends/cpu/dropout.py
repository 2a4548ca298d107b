"""Compute dropout masks that can be recomputed, because they depend only on the seed and the position.

A stream of random numbers would tie the mask to the order in which blocks are visited. A hash of (seed, head,
query, key) gives the same mask in the forward and the backward pass, with softmax and without, whatever the
blocking.
"""

from dataclasses import dataclass
from typing import Optional

import torch

from .visibility import is_negative


def new_rng_state(dropout_p: float, generator: Optional[torch.Generator]) -> torch.Tensor:
    """Return [seed, 0], int64 (2,), with a seed from the generator or PyTorch's default one. At p = 0, draw
    none and return [0, 0].
    """
    state = torch.zeros(2, dtype=torch.int64, device="cpu")
    if dropout_p > 0.0:
        state[0] = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, generator=generator, device="cpu")
    return state


def seed_of(rng_state: torch.Tensor) -> int:
    return int(rng_state[0])


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability p under a seed. first_head: the number of the first head, counted through the
    batch: batch index * nheads.
    """

    seed: int
    p: float
    first_head: int = 0

    def kept(self, heads: range, rows: range, keys: range) -> torch.Tensor:
        """Return the mask (see visibility.py) of the weights that stay, (len(heads), len(rows), len(keys)).

        Heads are numbered from first_head.
        """
        head = torch.arange(heads.start, heads.stop, device="cpu")[:, None] + self.first_head
        row = torch.arange(rows.start, rows.stop, device="cpu")
        column = torch.arange(keys.start, keys.stop, device="cpu")
        row_key = _mix64(_mix64(head + self.seed) + row).to(torch.int32)
        column_key = _mix64(column + ~self.seed).to(torch.int32)
        # Two rounds of multiply and xor-shift: neighbouring entries share row or column keys, and must not
        # correlate.
        number = row_key[:, :, None] ^ column_key
        number.mul_(0x7FEB352D)
        number.bitwise_xor_(number >> 15)
        number.mul_(0x2C1B3C6D)
        # 31 random bits; a weight is kept where they are at least p * 2^31.
        number.bitwise_and_(2**31 - 1)
        return is_negative(number.neg_().add_(round(self.p * 2**31) - 1))


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 whose every output bit depends on every input bit (the finaliser of
    SplitMix64).
    """
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift logically: PyTorch's >> shifts the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
