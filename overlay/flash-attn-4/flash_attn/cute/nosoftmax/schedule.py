"""Which tile a CTA of the Hopper kernels works on in a batch of packed sequences, and how many CTAs share a
multiprocessor.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass.cute import FastDivmodDivisorV2
from flash_attn.cute.nosoftmax.grid import place
from flash_attn.cute.nosoftmax.marker import BY_NUMBER, NoSoftmax
from flash_attn.cute.nosoftmax.registers import Registers
from flash_attn.cute.tile_scheduler import SingleTileVarlenScheduler, TileSchedulerArguments, WorkTileInfo
from quack.cute_dsl_utils import ParamsBase

_L2_BYTES = 50 * 2**20
_MOST_ROWS = 2**20  # that are counted, so that the bytes of a head stay in 32 bits


class Small(NamedTuple):
    """A tile for rows that see few keys, and what CTAs with it take of a multiprocessor."""

    head_dims: range  # of the larger of head_dim and head_dim_v
    most_keys: int  # of a row: with more, upstream's tile is faster
    tile: tuple[int, int]
    ctas: int
    registers: tuple[int, int]  # of the threads that multiply and of those that load


_SMALL = (
    Small(range(1, 65), 2048, (64, 64), 3, (136, 24)),
    Small(range(65, 129), 2048, (64, 64), 2, (208, 40)),
    Small(range(193, 257), 4096, (128, 64), 1, (240, 24)),
)


def small(head_dim: int, head_dim_v: int, keys_of_row: int) -> Optional[Small]:
    """Return the small tile for rows that see about so many keys; None where upstream's serves better."""
    size = max(head_dim, head_dim_v)
    return next((x for x in _SMALL if size in x.head_dims and keys_of_row <= x.most_keys), None)


def _none_left() -> WorkTileInfo:
    return WorkTileInfo((Int32(0), Int32(0), Int32(0), Int32(0)), Boolean(False))


class Once(SingleTileVarlenScheduler):
    """Upstream's scheduler, without the two searches behind the tile, which find that there is no other."""

    @staticmethod
    def create(params, ctx=None, *, loc=None, ip=None) -> "Once":
        tile_idx, split_idx, _ = cute.arch.block_idx()
        return Once(params, tile_idx, split_idx, loc=loc, ip=ip)

    def get_current_work(self, *, loc=None, ip=None) -> WorkTileInfo:
        return _none_left()

    def advance_to_next_work(self, *, loc=None, ip=None) -> None:
        pass


class Grid:
    """Upstream's interface of a scheduler, over the grid of grid.py."""

    longest: Int32  # rows of a sequence; set on a subclass
    contexts_first = False

    @dataclass
    class Params(ParamsBase):
        blocks: Int32
        heads: Int32
        batch: Int32
        section: Int32
        sections: Int32
        divisor: FastDivmodDivisorV2  # of sections
        cu_seqlens: Optional[cute.Tensor]
        seqused: Optional[cute.Tensor]
        tile: cutlass.Constexpr[int]
        rows_of_query: cutlass.Constexpr[int]
        last_first: cutlass.Constexpr[bool]
        contexts_first: cutlass.Constexpr[bool]

    def __init__(self, params: Params, block: Int32, head: Int32, batch: Int32) -> None:
        self.params, self._block, self._head, self._batch = params, block, head, batch

    @classmethod
    def to_underlying_arguments(cls, args: TileSchedulerArguments) -> Params:
        tile, rows_of_query = args.tile_shape_mn[0], args.qhead_per_kvhead_packgqa
        heads = Int32(args.num_head)
        row_bytes = (args.headdim + args.headdim_v) * args.element_size
        head_bytes = cutlass.min(cls.longest, _MOST_ROWS) * row_bytes
        at_once = cutlass.max(cutlass.min(Int32(_L2_BYTES) // cutlass.max(head_bytes, 1), heads), 1)
        sections = cute.ceil_div(heads, at_once)
        return cls.Params(
            Int32(cute.ceil_div(cls.longest * rows_of_query, tile)), heads, Int32(args.num_batch),
            Int32(cute.ceil_div(heads, sections)), Int32(sections), FastDivmodDivisorV2(sections),
            args.mCuSeqlensQ, args.mSeqUsedQ,
            tile, rows_of_query, args.lpt, cls.contexts_first,
        )  # fmt: skip

    @staticmethod
    def get_grid_shape(params: Params, *, loc=None, ip=None) -> tuple:
        return params.section, params.blocks, params.batch * params.sections

    @staticmethod
    def create(params: Params, ctx=None, *, loc=None, ip=None) -> "Grid":
        p = params
        block, head, batch = place(
            Registers.where, *cute.arch.block_idx(), p.section, p.divisor, p.blocks, p.last_first,
            p.contexts_first,
        )  # fmt: skip
        return Grid(params, Int32(block), Int32(head), Int32(batch))

    def initial_work_tile_info(self, *, loc=None, ip=None) -> WorkTileInfo:
        p, batch = self.params, self._batch
        seqlen = p.cu_seqlens[batch + 1] - p.cu_seqlens[batch] if p.seqused is None else p.seqused[batch]
        valid = (self._block * p.tile < seqlen * p.rows_of_query) & (self._head < p.heads)
        return WorkTileInfo((self._block, self._head, batch, Int32(0)), Boolean(valid))

    def get_current_work(self, *, loc=None, ip=None) -> WorkTileInfo:
        return _none_left()

    def prefetch_next_work(self, *, loc=None, ip=None) -> None:
        pass

    def advance_to_next_work(self, *, loc=None, ip=None) -> None:
        pass

    def producer_tail(self, *, loc=None, ip=None) -> None:
        pass

    def __extract_mlir_values__(self) -> list:
        parts = [cutlass.extract_mlir_values(x) for x in (self.params, self._block, self._head, self._batch)]
        self._counts = [len(part) for part in parts]
        return [x for part in parts for x in part]

    def __new_from_mlir_values__(self, values: list) -> "Grid":
        made = []
        for x, count in zip((self.params, self._block, self._head, self._batch), self._counts):
            made.append(cutlass.new_from_mlir_values(x, values[:count]))
            values = values[count:]
        return Grid(*made)


def of_forward(mark: Optional[NoSoftmax], upstreams: type, aux_data: Any) -> type:
    """Return the scheduler of packed sequences."""
    if mark is None:
        return upstreams
    return _grid(mark, aux_data, mark.hstu is not None and bool(mark.hstu.contexts)) if mark.grid else Once


def of_backward(mark: Optional[NoSoftmax], upstreams: type, aux_data: Any) -> type:
    return _grid(mark, aux_data) if mark is not None and mark.grid else upstreams


def _grid(mark: NoSoftmax, aux_data: Any, contexts: bool = False) -> type:
    # launch.Call.arguments has the order of the scalars.
    number = aux_data.scalars[-1 - (mark.normalization == BY_NUMBER)]

    class Of(Grid):
        longest = Int32(number)
        contexts_first = contexts

    return Of


def residency(kernel: Any) -> dict[str, Any]:
    """Return the options of the forward's launch. Small tiles leave room for other CTAs, whose products run
    while this one waits for its first keys or stores its rows; the registers are shared between them.
    """
    found = small(kernel.tile_hdim, kernel.tile_hdimv, 0)
    is_small = found is not None and found.ctas > 1 and found.tile == (kernel.tile_m, kernel.tile_n)
    if kernel.no_softmax is None or kernel.use_block_sparsity or not is_small:
        return dict(min_blocks_per_mp=1)
    kernel.num_mma_regs, kernel.num_producer_regs = found.registers
    # Without a carveout the compiler asks the device for one.
    return dict(min_blocks_per_mp=found.ctas, preferred_smem_carveout=100)
