"""One forward and one backward without softmax, through the functions with which upstream compiles and launches.

Both work on tensors outside of autograd. Shapes are those of the public functions; `window` is (left, right), None for
no limit. With seqused and no cu_seqlens, the batch is handed on as a packed one: tiles then end at the used length, so
that nothing behind it is read (kernel.ends_at_seqlen).
"""

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd, _tile_size_fwd_sm90
from flash_attn.cute.nosoftmax import plan
from flash_attn.cute.nosoftmax.score_mods import ScoreMods


@dataclass(frozen=True)
class Call:
    """What forward and backward share."""

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

    def plans(self, *more: Any) -> Optional[dict]:
        """Where the plans of this call are kept; None with sequences, functions or blocks of the user's, which get none."""
        sequences = (self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k, self.mask_mod, self.aux_tensors)
        return self.mods.plans if all(x is None for x in (*sequences, *more)) else None

    def arguments(self) -> dict[str, Any]:
        return dict(
            softmax_scale=self.softmax_scale * self.mods.unit,
            causal=self.causal,
            window_size_left=self.window[0],
            window_size_right=self.window[1],
            seqused_q=self.seqused_q,
            seqused_k=self.seqused_k,
            score_mod=self.mods.score_mod,
            mask_mod=self.mask_mod,
            aux_tensors=self.aux_tensors,
            aux_scalars=self.aux_scalars,
        )


def _packed(cu_seqlens, seqused, max_seqlen, *tensors):
    """(cu_seqlens, max_seqlen, tensors): a batch (b, s, ...) of which only a part is used becomes (b * s, ...)."""
    if cu_seqlens is not None or seqused is None or tensors[0].numel() == 0:
        return cu_seqlens, max_seqlen, tensors
    batch, seqlen = tensors[0].shape[:2]
    cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=tensors[0].device)
    return cu_seqlens, seqlen, [t.flatten(0, 1) for t in tensors]


def _pack_gqa(pack_gqa: Optional[bool], q: torch.Tensor, k: torch.Tensor) -> Optional[bool]:
    """Groups that do not divide a tile are loaded without TMA, which leaves the padding of the head size unwritten."""
    group = q.shape[-2] // k.shape[-2]
    return False if q.shape[-1] % 16 and 64 % group else pack_gqa


def _tile(call: Call, q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Upstream chooses the tile by head_dim. Where head_dim_v is larger, O would not fit into the registers of that one."""
    if v.shape[-1] <= q.shape[-1]:
        return {}
    local = call.window != (None, None) and call.window != (None, 0)
    tile = _tile_size_fwd_sm90(v.shape[-1], v.shape[-1], call.causal, local)
    return dict(
        tile_mn=(tile.m_block_size, tile.n_block_size),
        mma_pv_is_rs=tile.mma_pv_is_rs,
        intra_wg_overlap=tile.intra_wg_overlap,
    )


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pack_gqa: Optional[bool] = None,
    page_table: Optional[torch.Tensor] = None,
    block_sparse_tensors: Any = None,
) -> torch.Tensor:
    """The output, (..., nheads, head_dim_v) in the dtype of q; rows past seqused_q are 0."""
    q, k, v = q.detach(), k.detach(), v.detach()
    new_out = q.new_empty if call.seqused_q is None else q.new_zeros
    out = new_out(*q.shape[:-1], v.shape[-1])

    def launch() -> None:
        cu_seqlens_k, max_seqlen_k, (keys, values) = (
            _packed(call.cu_seqlens_k, call.seqused_k, call.max_seqlen_k, k, v)
            if page_table is None
            else (None, call.max_seqlen_k, (k, v))
        )
        _flash_attn_fwd(
            q,
            keys,
            values,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            page_table=page_table,
            pack_gqa=_pack_gqa(pack_gqa, q, k),
            block_sparse_tensors=block_sparse_tensors,
            out=out,
            **(_tile(call, q, v) if block_sparse_tensors is None else {}),
            **call.arguments(),
        )

    options = "forward", call.softmax_scale, call.causal, call.window, pack_gqa
    plan.run(call.plans(page_table, block_sparse_tensors), options, (q, k, v, out), launch)
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
    """(dq, dk, dv), shaped as q, k, v; rows past seqused are 0."""
    q, k, v, dout = q.detach(), k.detach(), v.detach(), dout.detach().contiguous()
    shapes = q.shape, k.shape, v.shape
    cu_seqlens_q, max_seqlen_q, (q, dout) = _packed(call.cu_seqlens_q, call.seqused_q, call.max_seqlen_q, q, dout)
    cu_seqlens_k, max_seqlen_k, (k, v) = _packed(call.cu_seqlens_k, call.seqused_k, call.max_seqlen_k, k, v)
    new_q = torch.empty_like if call.seqused_q is None else torch.zeros_like
    new_k = torch.empty_like if call.seqused_k is None else torch.zeros_like
    grads = tuple(new(x, memory_format=torch.contiguous_format) for new, x in ((new_q, q), (new_k, k), (new_k, v)))

    def launch() -> None:
        # The kernels read neither O nor LSE, but the host code looks at their shapes.
        lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
        _flash_attn_bwd(
            q,
            k,
            v,
            dout,
            dout,
            torch.empty(lse_shape, dtype=torch.float32, device=q.device),
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
            **call.arguments(),
        )

    options = "backward", call.softmax_scale, call.causal, call.window, deterministic
    plan.run(call.plans(block_sparse_tensors), options, (q, k, v, dout, *grads), launch)
    if q.dtype is torch.float16:
        # Sums that upstream's postprocess kernel converts become Inf where they should saturate.
        largest = torch.finfo(torch.float16).max
        for grad in grads if q.shape[-2] != k.shape[-2] else grads[:1]:
            grad.clamp_(-largest, largest)
    return tuple(grad.view(shape) for grad, shape in zip(grads, shapes))
