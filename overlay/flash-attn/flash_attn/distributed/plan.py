"""Plan which rank of a group holds which tokens, and move tensors into and out of that order."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Optional, Union

import torch
import torch.distributed as dist

from ..nosoftmax import checks
from . import exchange
from .layout import LAYOUTS, Layout

_MOST_CUTS = 64  # that are put together one by one

METHODS = ("auto", "state", "ulysses", "allgather", "ring")


class ContextParallel:
    """A plan for one batch whose sequences are cut over the ranks of a group (docs/distributed.md).

    group_or_mesh: a ProcessGroup, a DeviceMesh with one dimension, such as mesh["cp"], or None for the
    default group. Every rank makes the same plan.

    layout: "contiguous" or "zigzag". Contiguous pieces follow each other in the order of the ranks. Zigzag
    gives each rank one early and one late piece of each sequence, so that with a causal mask all ranks have
    the same work. Lengths need not divide.

    cu_seqlens: the cumulative lengths of packed sequences as the whole batch has them, integers (batch + 1,),
    a tensor or a sequence, beginning with 0. None: dense tensors, (batch, seqlen, …), of which every sequence
    is cut in the same way. seqlen: their length; None takes it from the first tensor that `shard` gets.

    method: how attention moves tensors. "state" gathers the states of linear time; "ulysses" exchanges tokens
    for heads; "allgather" gathers keys and values, and adds up their gradients in float32; "ring" passes them
    on from rank to rank while it computes. "auto" takes the one that moves the fewest bytes, of those that
    can run the call.

    check: whether each attention call compares its options between the ranks before it moves anything, which
    costs one small all-gather, and on a GPU waits for it. Without it, ranks that differ hang or give wrong
    results.

    Raises ValueError or TypeError for arguments that are wrong.
    """

    def __init__(
        self,
        group_or_mesh: Any = None,
        layout: str = "contiguous",
        cu_seqlens: Any = None,
        *,
        seqlen: Optional[int] = None,
        method: str = "auto",
        check: bool = True,
    ) -> None:
        self.group = _group(group_or_mesh)
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not a member of the group: make the plan on its members alone")
        for name, value, names in (("layout", layout, LAYOUTS), ("method", method, METHODS)):
            if value not in names:
                raise ValueError(f"{name}={value!r} is not one of {names}")
        if cu_seqlens is not None and seqlen is not None:
            raise ValueError("seqlen with cu_seqlens: the latter has the lengths, leave seqlen out")
        self.layout, self.method, self.check = layout, method, checks.flag("check", check)
        self.packed = cu_seqlens is not None
        self._plan: Optional[Layout] = None
        self._on: dict = {}
        self.known: dict = {}  # of attention.attend, for calls that look the same
        if self.packed:
            self._plan = Layout(self.world, layout, _offsets(cu_seqlens))
        elif seqlen is not None:
            self._fix(checks.integer("seqlen", seqlen))

    def _fix(self, seqlen: int) -> None:
        if seqlen < 0:
            raise ValueError(f"seqlen={seqlen}: give the length of the whole sequences")
        self._plan = Layout(self.world, self.layout, (0, seqlen))

    @property
    def plan(self) -> Layout:
        """The tokens of each rank. Raises ValueError while the length is unknown."""
        if self._plan is None:
            raise ValueError(
                "the plan has no length yet: give ContextParallel seqlen or cu_seqlens, or shard a tensor"
            )
        return self._plan

    @property
    def tokens(self) -> int:
        """The number of this rank's tokens: the length of what `shard` returns."""
        return self.plan.sizes[self.rank]

    @cached_property
    def positions(self) -> torch.Tensor:
        """The position of each of this rank's tokens in its sequence, int64 (tokens,) on the CPU, for rotary
        and learned embeddings."""
        pieces = self.plan.pieces(self.rank)
        return _ranges([range(piece.start, piece.stop) for piece in pieces])

    @cached_property
    def indices(self) -> torch.Tensor:
        """The place of each of this rank's tokens in the whole batch, int64 (tokens,) on the CPU."""
        return _ranges(self.plan.tokens(self.rank))

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return this rank's tokens of the whole tensor x, along dim: 1 for dense tensors, 0 for packed ones.

        Communicates nothing. The gradient of x holds this rank's share alone, and zeros elsewhere.
        """
        checks.is_tensor("x", x)
        if self._plan is None:
            self._fix(x.shape[dim])
        if x.shape[dim] != self.plan.total:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, with {x.shape[dim]} tokens along dim={dim}, but the plan is "
                f"for {self.plan.total}"
            )
        return x.index_select(dim, self.on(x.device, "indices"))

    def unshard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Gather the tokens of all ranks along dim, in the order of the whole batch. Every rank calls it.

        In the backward pass a rank gets the sum of the gradients that all ranks have for its tokens.
        """
        checks.is_tensor("x", x)
        if x.shape[dim] != self.tokens:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, with {x.shape[dim]} tokens along dim={dim}, but the plan "
                f"gives rank {self.rank} {self.tokens}"
            )
        return _Unshard.apply(x, self, dim)

    # ---- For the methods ----

    def on(self, device: torch.device, name: str, *of: Any) -> torch.Tensor:
        """Return a tensor of the plan on a device, made once. name: an attribute, or a method called with
        `of`."""
        key = device, name, *of
        if key not in self._on:
            with torch.inference_mode(False):  # the plan may serve a call with gradients next
                made = getattr(self, name)
                self._on[key] = (made(*of) if of else made).to(device)
        return self._on[key]

    @cached_property
    def order(self) -> Optional[torch.Tensor]:
        """Where in the tokens of all ranks, one rank after the other, the tokens of the whole batch are; None
        if that is the same order."""
        by_rank = self.by_rank
        return None if by_rank is None else torch.argsort(by_rank)

    @cached_property
    def by_rank(self) -> Optional[torch.Tensor]:
        """Where in the whole batch the tokens of all ranks are, one rank after the other; None if that is the
        same order."""
        found = _ranges([x for rank in range(self.world) for x in self.plan.tokens(rank)])
        return None if torch.equal(found, torch.arange(self.plan.total)) else found

    def gathered(self, tensors: list, dim: int) -> list:
        """Gather the tokens of several tensors of one dtype, in the order of the whole batch."""
        return self.gathering(tensors, dim)()

    def gathering(self, tensors: list, dim: int) -> Callable[[], list]:
        """Begin `gathered`, and return a function that waits for the result."""
        if self.world == 1:
            return lambda: tensors
        wait = self.gathering_by_rank(tensors, dim)
        return lambda: [self._together(parts, dim) for parts in wait()]

    def gathering_by_rank(self, tensors: list, dim: int) -> Callable[[], list]:
        """Begin to gather the tokens of several tensors of one dtype. Returns a function that waits, and
        returns for each tensor those of all ranks.
        """
        sizes = [[(*x.shape[:dim], size, *x.shape[dim + 1 :]) for x in tensors] for size in self.plan.sizes]
        return exchange.gathering_flat(tensors, sizes, self.group)

    def _together(self, parts: list, dim: int) -> torch.Tensor:
        """Put the tokens of all ranks together, in the order of the whole batch."""
        if len(self.cuts) > _MOST_CUTS:
            return self.in_order(torch.cat(parts, dim), dim)
        return torch.cat([parts[rank].narrow(dim, at, count) for rank, at, count in self.cuts], dim)

    @cached_property
    def cuts(self) -> list:
        """(rank, first token there, tokens) of each range of tokens, in the order of the whole batch."""
        found = []
        for rank in range(self.world):
            at = 0
            for tokens in self.plan.tokens(rank):
                found.append((tokens.start, rank, at, len(tokens)))
                at += len(tokens)
        return [cut[1:] for cut in sorted(found)]

    def scattered(self, tensors: list, dim: int) -> list:
        """Add up what all ranks have for each token of the whole batch, and return this rank's tokens. The
        sum is in the order of the ranks."""
        return self.scattering(tensors, dim)()

    def scattering(self, tensors: list, dim: int) -> Callable[[], list]:
        """Begin `scattered`, and return a function that waits for the result."""
        if self.world == 1:
            return lambda: tensors
        # Each range of tokens is copied once, into the message.
        ranges = [self.plan.tokens(rank) or [range(0)] for rank in range(self.world)]
        parts = [[x.narrow(dim, r.start, len(r)) for x in tensors for r in own] for own in ranges]
        own = [x.shape for x in parts[self.rank]]
        wait, count = exchange.exchanging(parts, [own] * self.world, self.group), len(ranges[self.rank])

        def result() -> list:
            sums = exchange.add_up(wait())
            return [torch.cat(sums[i : i + count], dim) for i in range(0, len(sums), count)]

        return result

    def in_order(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Bring the tokens of all ranks, one rank after the other, into the order of the whole batch."""
        return x if self.order is None else x.index_select(dim, self.on(x.device, "order"))

    def in_ranks(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Undo `in_order`."""
        return x if self.by_rank is None else x.index_select(dim, self.on(x.device, "by_rank"))

    def cumulative(self, lengths: tuple) -> torch.Tensor:
        return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)

    def numbers(self, given: tuple) -> torch.Tensor:
        return torch.tensor(given, dtype=torch.int32)

    @cached_property
    def sequences(self) -> torch.Tensor:
        """The sequence of each of this rank's tokens, int64 (tokens,)."""
        pieces = self.plan.pieces(self.rank)
        of = torch.tensor([piece.sequence for piece in pieces], dtype=torch.int64)
        return of.repeat_interleave(torch.tensor([p.stop - p.start for p in pieces], dtype=torch.int64))

    def __repr__(self) -> str:
        lengths = "unknown length" if self._plan is None else f"{self.plan.total} tokens"
        return (
            f"ContextParallel(rank {self.rank} of {self.world}, layout={self.layout!r}, {lengths}, "
            f"method={self.method!r})"
        )


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, dim):
        ctx.plan, ctx.dim = plan, dim % x.dim()
        return plan.gathered([x], ctx.dim)[0].clone()

    @staticmethod
    def backward(ctx, dout):
        return _AddUp.apply(dout, ctx.plan, ctx.dim), None, None


class _AddUp(torch.autograd.Function):
    """The transpose of `_Unshard`, which is its derivative again."""

    @staticmethod
    def forward(ctx, x, plan, dim):
        ctx.plan, ctx.dim = plan, dim
        return plan.scattered([x], dim)[0].clone()

    @staticmethod
    def backward(ctx, dout):
        return _Unshard.apply(dout, ctx.plan, ctx.dim), None, None


def _group(given: Any) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "torch.distributed is not initialized: call init_process_group first, as torchrun does"
        )
    if given is None:
        return dist.group.WORLD
    if isinstance(given, dist.ProcessGroup):
        return given
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        if given.ndim != 1:
            raise ValueError(
                f"the mesh has {given.ndim} dimensions {given.mesh_dim_names}: give the one of the context, "
                'such as mesh["cp"]'
            )
        return given.get_group()
    raise TypeError(
        f"group_or_mesh is a {type(given).__module__}.{type(given).__name__}: give a ProcessGroup or a "
        "DeviceMesh with one dimension"
    )


def _offsets(given: Union[torch.Tensor, Any]) -> tuple:
    offsets = tuple(given.tolist() if isinstance(given, torch.Tensor) else map(int, given))
    if not offsets or offsets[0] != 0:
        raise ValueError(f"cu_seqlens={offsets}: give cumulative lengths, which begin with 0")
    for i, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        if stop < start:
            raise ValueError(f"cu_seqlens descends from {start} to {stop} at entry {i + 1}")
    return offsets


def _ranges(ranges: list) -> torch.Tensor:
    found = [torch.arange(x.start, x.stop) for x in ranges]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
