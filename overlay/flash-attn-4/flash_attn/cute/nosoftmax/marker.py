"""Mark a score_mod, so that the kernels take its value as the attention weight itself.

The mark is an attribute of the callable, like upstream's ``__vec_size__``, so that no signature of the host
code changes. It is part of every compile key, because utils._MIXER_ATTRS lists its name.
"""

import functools
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple, Optional

ATTRIBUTE = "__no_softmax__"

# What NoSoftmax.normalization may be beside the names of score.NORMALIZATIONS: a factor that the caller gives
# for all rows, for each sequence or for each row (launch.Call).
BY_NUMBER, BY_SEQUENCE, BY_ROW = "number", "sequence", "row"


class HSTUKind(NamedTuple):
    """Which parts a mask flash_attn.masks.HSTU has: num_targets and num_contexts, None, BY_NUMBER or
    BY_SEQUENCE, and whether max_attn_len, min_full_attn_seq_len and groups of targets are in use.

    What is in use is an argument of the kernel, in this order: first the aux_tensors and aux_scalars.
    """

    targets: Optional[str] = None
    contexts: Optional[str] = None
    window: bool = False
    full: bool = False
    group: bool = False


class WindowKind(NamedTuple):
    """Which sides of a window that is aligned by a diagonal have a limit. Limits are the first of the
    aux_scalars."""

    left: bool = False
    right: bool = False


@dataclass(frozen=True)
class NoSoftmax:
    """normalization: one of score.NORMALIZATIONS, or BY_NUMBER, BY_SEQUENCE or BY_ROW. finite_at_zero: f and
    f' are finite at a score of 0. has_biases, has_decay: the last of the aux_tensors are sigmoid biases for
    the heads, or slopes of their decay, or both in this order. hstu, intervals: the mask, which the first of
    the aux_tensors and aux_scalars belong to: its parts, or how many intervals a row has, 0 without.
    has_diagonal: before those of the mask comes the diagonal, int32 (batch,). window: given with a diagonal
    and without another mask; causal and window_size are then not upstream's. wide: results stay float32.
    grid: the grid of grid.py; the last of the aux_scalars before a factor is the longest sequence then.

    inf_seen_in: where float16 kernels look for an infinite score, "scores", "weights" or None
    (formulas.Formula).
    """

    normalization: Optional[str] = None
    finite_at_zero: bool = False
    inf_seen_in: Optional[str] = "weights"
    has_biases: bool = False
    has_decay: bool = False
    hstu: Optional[HSTUKind] = None
    intervals: int = 0
    has_diagonal: bool = False
    window: Optional[WindowKind] = None
    wide: bool = False
    grid: bool = False

    @property
    def by_head(self) -> int:
        """The number of aux_tensors with a value for each head."""
        return self.has_biases + self.has_decay

    @property
    def by_row(self) -> bool:
        """Whether the factor differs between the queries of a sequence."""
        return self.normalization in ("1/visible", BY_ROW)


def no_softmax_of(score_mod: Optional[Callable]) -> Optional[NoSoftmax]:
    """Return the mark of a score_mod. None means softmax."""
    return getattr(score_mod, ATTRIBUTE, None)


def on_grid(score_mod: Optional[Callable]) -> bool:
    """Whether the grid says where a tile lies: upstream's tables for the search are not needed."""
    mark = no_softmax_of(score_mod)
    return mark is not None and mark.grid


def marked(score_mod: Callable, mark: NoSoftmax) -> Callable:
    """Return a score_mod that computes the same and carries the mark. The given one stays unchanged."""

    @functools.wraps(score_mod)
    def carrier(*args, **kwargs):
        return score_mod(*args, **kwargs)

    # Point at the function inside. utils.hash_callable hashes __wrapped__ and its closure. For a cute.jit
    # wrapper that is an address, which differs between processes and may be reused for another function.
    carrier.__wrapped__ = getattr(score_mod, "__wrapped__", score_mod)
    setattr(carrier, ATTRIBUTE, mark)
    return carrier


@functools.lru_cache(maxsize=None)  # as of_activation, whose score_mods come here
def with_grid(score_mod: Callable) -> Callable:
    """Return the same score_mod for a launch on the grid."""
    return marked(score_mod, replace(no_softmax_of(score_mod), grid=True))
