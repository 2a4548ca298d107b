"""Launch one forward and one backward without softmax, through upstream's functions that compile and launch.

Both work on tensors outside of autograd. Shapes are those of the public functions; `window` is (left, right),
None for no limit. A batch with seqused and without cu_seqlens is passed on as packed, so that tiles end at
the used length and nothing behind it is read (kernel.ends_at_seqlen). A batch with too many sequences or
heads for the second and third dimension of a grid is passed on as packed too: upstream's schedulers of dense
batches use these dimensions, and those of packed batches number their tiles in the first, which has 2^31.
"""

from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
from cutlass import Float32, Int32
from flash_attn.cute.interface import (
    _flash_attn_bwd,
    _flash_attn_fwd,
    _resolve_causal_local_window,
    _tile_size_bwd_sm90,
    _tile_size_fwd_sm90,
)
from flash_attn.cute.nosoftmax import grid, plan
from flash_attn.cute.nosoftmax.hulls import hulls, visits
from flash_attn.cute.nosoftmax.kernel import bwd_tile_with, result_type, wide
from flash_attn.cute.nosoftmax.largest import largest_factors
from flash_attn.cute.nosoftmax.marker import BY_NUMBER, no_softmax_of, with_grid
from flash_attn.cute.nosoftmax.masked import hides
from flash_attn.cute.nosoftmax.schedule import small
from flash_attn.cute.nosoftmax.score_mods import ScoreMods
from flash_attn.cute.nosoftmax.slack import zero_slack

_MOST_BLOCKS = grid.MOST_BLOCKS
_MOST_KEYS_OF_CAUSAL_GRID = 2048


class Call(NamedTuple):  # not a dataclass, which takes several times as long to make
    """The arguments that forward and backward share.

    mask_numbers and mask_tensors: numbers and tensors int32 (batch,) for the parts of a marker.HSTUKind or
    WindowKind, in its order; or starts and ends of intervals, int32 (batch, seqlen_q, k), packed (total_q,
    k). The last six are given if mods need them: diagonal, int32 (batch,); factor, a factor of every row;
    sequence_factors, float32 (batch,); row_factors, float32 (batch, seqlen_q), packed (total_q,);
    sigmoid_biases and decay_slopes, float32 (nheads,) or (batch, nheads). At most one kind of factors is
    given.
    """

    mods: ScoreMods
    softmax_scale: float
    causal: bool
    window: tuple[Optional[int], Optional[int]]
    cu_seqlens_q: Optional[torch.Tensor] = None
    cu_seqlens_k: Optional[torch.Tensor] = None
    seqused_q: Optional[torch.Tensor] = None
    seqused_k: Optional[torch.Tensor] = None
    max_seqlen_q: Optional[int] = None
    max_seqlen_k: Optional[int] = None
    mask_mod: Optional[Callable] = None
    aux_tensors: Optional[list[torch.Tensor]] = None
    aux_scalars: Optional[tuple] = None
    mask_numbers: tuple[int, ...] = ()
    mask_tensors: tuple[torch.Tensor, ...] = ()
    diagonal: Optional[torch.Tensor] = None
    factor: Optional[float] = None
    sequence_factors: Optional[torch.Tensor] = None
    row_factors: Optional[torch.Tensor] = None
    sigmoid_biases: Optional[torch.Tensor] = None
    decay_slopes: Optional[torch.Tensor] = None

    def plans(self, *more: Any) -> Optional[dict]:
        """Return the dict of this call's plans, or None if the user passes functions or blocks."""
        return self.mods.plans if all(x is None for x in (self.mask_mod, self.aux_tensors, *more)) else None

    @property
    def hides(self) -> bool:
        """Whether there is a mask beside upstream's causal and window."""
        return hides(no_softmax_of(self.mods.score_mod))

    def result_type(self, q: torch.Tensor) -> torch.dtype:
        return result_type(no_softmax_of(self.mods.score_mod), q.dtype)

    def is_empty(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether there are no queries, keys or sequences: nothing is launched, and all results are 0."""
        no_sequence = self.cu_seqlens_q is not None and self.cu_seqlens_q.numel() < 2
        return q.numel() == 0 or k.numel() == 0 or no_sequence

    def given(self, packed: bool) -> list[torch.Tensor]:
        """Return the given factors, biases and slopes that are tensors. packed: whether the queries of the
        launch are."""
        rows = self.row_factors
        if rows is not None and packed:
            rows = rows.flatten()
        tensors = self.sequence_factors, rows, self.sigmoid_biases, self.decay_slopes
        return [_plain(x).contiguous() for x in tensors if x is not None]

    def masks(self, packed: bool) -> list[torch.Tensor]:
        """Return the diagonal, if given, and the tensors of the mask. packed: as in given."""
        diagonal = [] if self.diagonal is None else [self.diagonal.contiguous()]
        masks = [x.flatten(0, 1) if packed and x.dim() == 3 else x for x in self.mask_tensors]
        return diagonal + masks

    def arguments(
        self, masks: list[torch.Tensor], given: list[torch.Tensor], longest: int = 0
    ) -> dict[str, Any]:
        """masks, given: what the methods of these names return, in the order that masked.py, kernel.py and
        score_mods.py expect. The former come first, never beside tensors of the user, who counts from the
        front, and the latter last. longest: what _longest returns.
        """
        tensors = [*(self.aux_tensors or ()), *masks, *given]
        scalars = (
            *(self.aux_scalars or ()),
            *(Int32(x) for x in self.mask_numbers),
            *((Int32(longest),) if longest else ()),
            *(() if self.factor is None else (Float32(self.factor),)),
        )
        return dict(
            softmax_scale=self.softmax_scale * self.mods.unit,
            causal=self.causal,
            window_size_left=self.window[0],
            window_size_right=self.window[1],
            seqused_q=self.seqused_q,
            seqused_k=self.seqused_k,
            score_mod=with_grid(self.mods.score_mod) if longest else self.mods.score_mod,
            mask_mod=self.mask_mod,
            aux_tensors=tensors or None,
            aux_scalars=scalars or None,
        )


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Return x as a tensor that needs no gradient, which kernels refuse."""
    return x.detach() if x.requires_grad else x


def _exceeds_grid(x: torch.Tensor, cu_seqlens: Optional[torch.Tensor]) -> bool:
    return cu_seqlens is None and max(x.shape[0], x.shape[2]) > _MOST_BLOCKS


def _packed(pack: bool, cu_seqlens, max_seqlen, *tensors):
    """Return (cu_seqlens, max_seqlen, tensors). If `pack`, a batch (b, s, ...) becomes (b * s, ...)."""
    if cu_seqlens is not None or not pack:
        return cu_seqlens, max_seqlen, tensors
    batch, seqlen = tensors[0].shape[:2]
    cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=tensors[0].device)
    return cu_seqlens, seqlen, [t.flatten(0, 1) for t in tensors]


def _lengths(*lengths: Optional[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], tuple]:
    """Return the distinct tensors, and the place of each argument among them: q and k often share one."""
    distinct: list[torch.Tensor] = []
    places = []
    for x in lengths:
        place = None if x is None else next((i for i, y in enumerate(distinct) if y is x), len(distinct))
        if place == len(distinct):
            distinct.append(x)
        places.append(place)
    return tuple(distinct), tuple(places)


def _pack_gqa(call: Call, pack_gqa: Optional[bool], q: torch.Tensor, k: torch.Tensor) -> Optional[bool]:
    """Turn pack_gqa off where groups do not divide a tile: they load without TMA, which leaves the padding of
    the head size unwritten. And for a decay, whose tiles have one slope (kernel.decay), and a mask, whose
    tiles are of one head, and for results in float32, which no TMA scatters.
    """
    group = q.shape[-2] // k.shape[-2]
    unwritten = q.shape[-1] % 16 and 64 % group
    one_head = call.decay_slopes is not None or call.hides or wide(no_softmax_of(call.mods.score_mod))
    return False if unwritten or one_head else pack_gqa


def _tables(
    call: Call,
    masks: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: Sequence[Optional[torch.Tensor]],
    longest: tuple[Optional[int], ...],
    tile: tuple[int, int],
    ordered: Optional[bool] = None,
) -> list[torch.Tensor]:
    """Return the bounds of blocks under a mask of intervals (hulls.py), and nothing under another.

    masks, q, k: as launched. lengths: cu_seqlens_q, cu_seqlens_k, seqused_k. longest: max_seqlen_q and
    max_seqlen_k, where packed. ordered: given in the backward, which needs the blocks of keys too.
    """
    if not no_softmax_of(call.mods.score_mod).intervals:
        return []
    intervals = masks[-2], masks[-1]
    seqlens = tuple(
        x.shape[1] if offsets is None else x.shape[0] if most is None else most
        for x, offsets, most in zip((q, k), lengths, longest)
    )
    batch = q.shape[0] if lengths[0] is None else lengths[0].shape[0] - 1
    table = hulls(intervals, lengths, seqlens, batch, tile[0])
    if ordered is None:
        return [table]
    return [table, visits(table, lengths, seqlens, batch, k.shape[0], tile, ordered)]


def _tile(call: Call, q: torch.Tensor, v: torch.Tensor, most_keys: Optional[int]) -> dict[str, Any]:
    """Choose a small tile where rows see few keys, else upstream's: but by head_dim_v if that is larger,
    because O would not fit into the registers of a tile for head_dim, and with a mask that of causal, which
    upstream does not see there. most_keys: of a sequence, or None where a small tile does not serve.
    """
    size, size_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    found = None if most_keys is None else small(q.shape[-1], size_v, _keys_of_row(call, most_keys))
    if found is not None:
        return dict(tile_mn=found.tile, mma_pv_is_rs=True, intra_wg_overlap=True)
    causal, local, *_ = _resolve_causal_local_window(call.causal, *call.window, call.mask_mod)
    tile = _tile_size_fwd_sm90(size, size_v, causal or call.hides, local)
    return dict(
        tile_mn=(tile.m_block_size, tile.n_block_size),
        mma_pv_is_rs=tile.mma_pv_is_rs,
        intra_wg_overlap=tile.intra_wg_overlap,
    )


def _keys_of_row(call: Call, most: int) -> int:
    """Return about how many keys a row sees: half of them if the rows are causal, or what a window leaves."""
    if call.mask_mod is not None:
        return most
    mark = no_softmax_of(call.mods.score_mod)
    numbers, sides = iter(call.mask_numbers), call.window
    if call.hides and mark.hstu is not None:
        given = {
            name: next(numbers) for name, part in mark.hstu._asdict().items() if part in (True, BY_NUMBER)
        }
        sides = (None if mark.hstu.full else given.get("window")), 0
    elif call.hides and mark.window is not None:
        sides = tuple(next(numbers) if limited else None for limited in mark.window)
    left, right = sides[0], 0 if call.causal else sides[1]
    if left is not None and right is not None:
        return min(most, left + right)
    causal = right == 0 or call.hides and mark.intervals > 0
    return most if not causal or call.diagonal is not None else -(-most // 2)


def _longest(
    rows: int, heads: int, cu_seqlens: Optional[torch.Tensor], most: Optional[int], tile: int, group: int = 1
) -> int:
    """Return the length of the longest sequence if the grid of grid.py serves the packed tensor that is cut
    into tiles, else 0. group: rows of a tile for each of the tensor.
    """
    if cu_seqlens is None or most is None:
        return 0
    return most if grid.serves(rows * group, cu_seqlens.shape[0] - 1, heads, most * group, tile) else 0


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pack_gqa: Optional[bool] = None,
    page_table: Optional[torch.Tensor] = None,
    block_sparse_tensors: Any = None,
) -> torch.Tensor:
    """Return the output, (..., nheads, head_dim_v) in the dtype of q or float32, with 0 past seqused_q and in
    rows of no sequence.
    """
    q, k, v = _plain(q), _plain(k), _plain(v)
    shape, dtype = (*q.shape[:-1], v.shape[-1]), call.result_type(q)
    if call.is_empty(q, k):
        return q.new_zeros(shape, dtype=dtype)
    exceeds = _exceeds_grid(q, call.cu_seqlens_q)
    if exceeds and block_sparse_tensors is not None:
        raise ValueError(
            f"block_sparse_tensors serve up to {_MOST_BLOCKS} sequences and as many heads, "
            f"got {q.shape[0]} and {q.shape[2]}: split the batch"
        )
    out = (q.new_empty if call.seqused_q is None else q.new_zeros)(shape, dtype=dtype)
    packed_q = _packed(exceeds, call.cu_seqlens_q, call.max_seqlen_q, q, out)
    cu_seqlens_q, max_seqlen_q, (queries, outputs) = packed_q
    cu_seqlens_k, max_seqlen_k, keys, values = call.cu_seqlens_k, call.max_seqlen_k, k, v
    if page_table is None:
        pack = exceeds or call.seqused_k is not None
        cu_seqlens_k, max_seqlen_k, (keys, values) = _packed(pack, cu_seqlens_k, max_seqlen_k, k, v)
    given, masks = call.given(cu_seqlens_q is not None), call.masks(cu_seqlens_q is not None)

    def launch() -> None:
        most_keys = (keys.shape[1] if cu_seqlens_k is None else max_seqlen_k) if page_table is None else None
        tile = _tile(call, q, v, most_keys) if block_sparse_tensors is None else {}
        packs = _pack_gqa(call, pack_gqa, q, k)
        longest = 0
        if call.plans(block_sparse_tensors) is not None:  # functions of the user would see one more scalar
            group = 1 if packs is False else q.shape[-2] // k.shape[-2]
            tile_m = tile["tile_mn"][0]
            longest = _longest(queries.shape[0], q.shape[-2], cu_seqlens_q, max_seqlen_q, tile_m, group)
        bounds = [cu_seqlens_q, cu_seqlens_k, call.seqused_k], (max_seqlen_q, max_seqlen_k)
        tables = _tables(call, masks, queries, keys, *bounds, tile["tile_mn"]) if call.hides else []
        _flash_attn_fwd(
            queries,
            keys,
            values,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            page_table=page_table,
            pack_gqa=packs,
            block_sparse_tensors=block_sparse_tensors,
            out=outputs,
            **tile,
            **call.arguments([*masks, *tables], given, longest),
        )
        if call.cu_seqlens_q is not None and call.seqused_q is None:
            zero_slack(out, call.cu_seqlens_q)

    lengths, places = _lengths(cu_seqlens_q, cu_seqlens_k, call.seqused_q, call.seqused_k, page_table)
    options = (
        call.softmax_scale,
        call.causal,
        call.window,
        pack_gqa,
        max_seqlen_q,
        max_seqlen_k,
        exceeds,
        places,
        call.factor,
        call.mask_numbers,
    )
    plan.run(
        call.plans(block_sparse_tensors),
        ("forward", *options),
        (queries, keys, values, *lengths, *masks, *given),
        (outputs,),
        launch,
    )
    return out


def backward(
    call: Call,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    deterministic: bool = False,
    block_sparse_tensors: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dq, dk, dv), shaped as q, k, v. Rows past seqused and of no sequence are 0. Gradients do not
    saturate."""
    q, k, v, dout = _plain(q), _plain(k), _plain(v), _plain(dout).contiguous()
    as_result = dict(dtype=call.result_type(q), memory_format=torch.contiguous_format)
    if call.is_empty(q, k):
        return tuple(torch.zeros_like(x, **as_result) for x in (q, k, v))
    shapes = q.shape, k.shape, v.shape
    exceeds = _exceeds_grid(q, call.cu_seqlens_q) or _exceeds_grid(k, call.cu_seqlens_k)
    pack_q, pack_k = (exceeds or seqused is not None for seqused in (call.seqused_q, call.seqused_k))
    cu_seqlens_q, max_seqlen_q, (q, dout) = _packed(pack_q, call.cu_seqlens_q, call.max_seqlen_q, q, dout)
    cu_seqlens_k, max_seqlen_k, (k, v) = _packed(pack_k, call.cu_seqlens_k, call.max_seqlen_k, k, v)
    new_q = torch.empty_like if call.seqused_q is None else torch.zeros_like
    new_k = torch.empty_like if call.seqused_k is None else torch.zeros_like
    grads = tuple(new(x, **as_result) for new, x in ((new_q, q), (new_k, k), (new_k, v)))
    given, masks = call.given(cu_seqlens_q is not None), call.masks(cu_seqlens_q is not None)

    def launch() -> None:
        bounds = [cu_seqlens_q, cu_seqlens_k, call.seqused_k], (max_seqlen_q, max_seqlen_k)
        chosen = bwd_tile_with(no_softmax_of(call.mods.score_mod), _tile_size_bwd_sm90)(
            q.shape[-1], v.shape[-1], call.causal, False
        )
        tile = chosen.m_block_size, chosen.n_block_size
        tables = _tables(call, masks, q, k, *bounds, tile, deterministic) if call.hides else []
        longest = 0
        if call.plans(block_sparse_tensors) is not None and not deterministic and call.diagonal is None:
            # Long causal sequences are faster in upstream's order. With a diagonal more registers spill.
            if call.hides or max_seqlen_k is not None and max_seqlen_k <= _MOST_KEYS_OF_CAUSAL_GRID:
                longest = _longest(k.shape[0], q.shape[-2], cu_seqlens_k, max_seqlen_k, tile[1])
        # The kernels read neither O nor LSE, but the host code checks their shapes.
        lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
        more = given
        if call.row_factors is not None:
            rows, *by_head = given
            more = [rows, largest_factors(rows, cu_seqlens_q, call.seqused_q), *by_head]
        _flash_attn_bwd(
            q,
            k,
            v,
            dout,
            dout,
            plan.not_read(torch.empty(lse_shape, dtype=torch.float32, device=q.device)),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            deterministic=deterministic,
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            score_mod_bwd=call.mods.score_mod_bwd,
            block_sparse_tensors=block_sparse_tensors,
            **call.arguments([*masks, *tables], more, longest),
        )
        zero_slack(
            grads[0],
            call.cu_seqlens_q if call.seqused_q is None else None,
            *grads[1:],
            call.cu_seqlens_k if call.seqused_k is None else None,
        )

    lengths, places = _lengths(cu_seqlens_q, cu_seqlens_k, call.seqused_q, call.seqused_k)
    options = (
        call.softmax_scale,
        call.causal,
        call.window,
        deterministic,
        max_seqlen_q,
        max_seqlen_k,
        exceeds,
        places,
        call.factor,
        call.mask_numbers,
    )
    tensors = q, k, v, dout, *lengths, *masks, *given
    plan.run(call.plans(block_sparse_tensors), ("backward", *options), tensors, grads, launch)
    repacked = exceeds or pack_q or pack_k
    return tuple(grad.view(shape) for grad, shape in zip(grads, shapes)) if repacked else grads
