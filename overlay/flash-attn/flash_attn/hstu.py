"""Call HSTU attention by the signatures of generative-recommenders and FBGEMM.

Each function names its arguments as its origin does and passes them to flash_attn_varlen_func with
activation="silu" and a mask of flash_attn.masks, whose docstring says what a row sees. Arguments that are not
served raise by name; nothing is ignored that would change a result. docs/hstu.md compares the two.
"""

from typing import Any, Optional, Union

import torch

from .flash_attn_interface import flash_attn_varlen_func
from .masks import HSTU, Intervals
from .nosoftmax import checks

__all__ = ["delta_hstu_mha", "hstu_attn_varlen_func", "hstu_mha"]


def hstu_mha(
    max_seq_len: int,
    alpha: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_offsets: torch.Tensor,
    causal: bool = True,
    dropout_pr: float = 0.0,
    training: bool = True,
    num_targets: Optional[torch.Tensor] = None,
    attn_scale: Union[None, float, torch.Tensor] = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
    sort_by_length: bool = False,
    kernel: Any = None,
    enable_tma: bool = False,
) -> torch.Tensor:
    """Compute dropout(V * silu(alpha q k^T)) v * attn_scale for a jagged batch, as
    generative_recommenders.ops.hstu_attention.hstu_mha does.

    q, k: (total, nheads, head_dim); v: (total, nheads, head_dim_v); k and v may have fewer heads that divide
    those of q. seq_offsets: int32 or int64 (batch + 1,), on the device of q. max_seq_len: at least the
    longest length. num_targets: integers (batch,). attn_scale: a number, or a float tensor () or (total,), a
    factor for each query; None is 1 / max_seq_len. max_attn_len, contextual_seq_len, min_full_attn_seq_len:
    as in flash_attn.masks.HSTU. Returns (total, nheads, head_dim_v).

    sort_by_length, kernel and enable_tma choose among the origin's kernels and change no result: they are
    taken and have no effect. Raises ValueError for causal=False, and the errors of flash_attn_varlen_func.
    """
    if not causal:
        raise ValueError("causal=False: hstu_mha is causal; call flash_attn_varlen_func for another mask")
    return flash_attn_varlen_func(
        q, k, v, seq_offsets, seq_offsets, max_seq_len, max_seq_len,
        dropout_p=dropout_pr if training else 0.0, softmax_scale=alpha, use_softmax=False, activation="silu",
        normalization=_factors(attn_scale, max_seq_len, seq_offsets),
        mask=HSTU(_or_0(num_targets), contextual_seq_len, max_attn_len, min_full_attn_seq_len),
    )  # fmt: skip


def delta_hstu_mha(
    max_seq_len: int,
    alpha: float,
    delta_q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_offsets: torch.Tensor,
    num_targets: Optional[torch.Tensor] = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    kernel: Any = None,
    enable_tma: bool = False,
) -> torch.Tensor:
    """Compute the last rows of hstu_mha, as generative_recommenders.ops.hstu_attention.delta_hstu_mha does.

    delta_q: (batch * rows, nheads, head_dim), as many rows for each sequence. The other arguments are those
    of hstu_mha. Returns (batch * rows, nheads, head_dim_v). Raises ValueError if the batch does not divide
    the rows.
    """
    checks.is_tensor("delta_q", delta_q)
    checks.is_tensor("seq_offsets", seq_offsets)
    batch = seq_offsets.shape[0] - 1
    rows = delta_q.shape[0] // max(batch, 1)
    if rows * batch != delta_q.shape[0]:
        raise ValueError(
            f"delta_q has {delta_q.shape[0]} rows for {batch} sequences: give each as many rows, padded in "
            "front"
        )
    starts = torch.arange(batch + 1, dtype=torch.int32, device=delta_q.device) * rows
    return flash_attn_varlen_func(
        delta_q, k, v, starts, seq_offsets, rows, max_seq_len, softmax_scale=alpha, use_softmax=False,
        activation="silu", normalization=_inverse("max_seq_len", max_seq_len),
        mask=HSTU(_or_0(num_targets), contextual_seq_len, max_attn_len),
    )  # fmt: skip


def hstu_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_q: Optional[torch.Tensor] = None,
    seqused_k: Optional[torch.Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    scaling_seqlen: int = -1,
    num_contexts: Optional[torch.Tensor] = None,
    num_targets: Optional[torch.Tensor] = None,
    target_group_size: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    alpha: float = 1.0,
    rab: Optional[torch.Tensor] = None,
    has_drab: bool = False,
    kv_cache: Optional[torch.Tensor] = None,
    page_offsets: Optional[torch.Tensor] = None,
    page_ids: Optional[torch.Tensor] = None,
    last_page_lens: Optional[torch.Tensor] = None,
    func: Optional[torch.Tensor] = None,
    quant_mode: int = -1,
) -> torch.Tensor:
    """Compute V * silu(alpha q k^T) v / scaling_seqlen for packed sequences, as FBGEMM's
    fbgemm_gpu.experimental.hstu.hstu_attn_varlen_func does.

    q: (total_q, nheads, head_dim); k, v: (total_k, nheads_k, head_dim); cu_seqlens_q, cu_seqlens_k: int32 or
    int64 (batch + 1,). With fewer queries than keys, the queries are the last rows. scaling_seqlen: a number
    above 0; -1 is max_seqlen_q. num_contexts, num_targets: integers (batch,), with window_size=(-1, 0) alone.
    target_group_size: as in flash_attn.masks.HSTU. window_size: (-1, -1) is no mask, (-1, 0) causal. func:
    int32 (1, n_func, at least total_q), n_func 1, 3 or 5: row i sees [0, func[0, 0, i]) and [func[0, 1, i],
    func[0, 2, i]) and so on, which may not overlap; in place of the counts and the window. Returns (total_q,
    nheads, head_dim).

    Pass the arguments after cu_seqlens_k by keyword, since FBGEMM's releases order them differently. rab,
    has_drab, seqused_q, seqused_k, kv_cache with its pages, and quant_mode other than -1 raise
    NotImplementedError. Raises the errors of flash_attn_varlen_func.
    """
    if any(isinstance(x, int) for x in (seqused_q, seqused_k)):
        raise TypeError(
            "seqused_q and seqused_k are numbers: pass max_seqlen_q and all after it by keyword, since "
            "FBGEMM's releases order them differently"
        )
    _refuse(
        rab=rab, has_drab=has_drab or None, seqused_q=seqused_q, seqused_k=seqused_k, kv_cache=kv_cache,
        page_offsets=page_offsets, page_ids=page_ids, last_page_lens=last_page_lens,
        quant_mode=None if quant_mode in (-1, None) else quant_mode,
    )  # fmt: skip
    for name, x in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if x is None:
            raise TypeError(f"{name} is missing: give the length of the longest sequence")
    counted = [
        name for name, x in (("num_contexts", num_contexts), ("num_targets", num_targets)) if x is not None
    ]
    mask, window = None, tuple(window_size)
    if func is not None:
        if counted or window != (-1, -1):
            raise ValueError(
                f"func with {' and '.join(counted) or f'window_size={window}'}: func says what a row sees, "
                "leave the others out"
            )
        mask = _intervals(func, q.shape[0])
    elif counted:
        if window != (-1, 0):
            raise ValueError(
                f"{counted[0]} with window_size={window}: FBGEMM defines it for (-1, 0) alone; give "
                "flash_attn_varlen_func a flash_attn.masks.HSTU with max_attn_len"
            )
        mask = HSTU(_or_0(num_targets), _or_0(num_contexts), target_group_size=target_group_size)
        window = -1, -1
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=alpha,
        window_size=window, use_softmax=False, activation="silu",
        normalization=_inverse("max_seqlen_q", max_seqlen_q)
        if scaling_seqlen in (-1, None)
        else _inverse("scaling_seqlen", scaling_seqlen),
        mask=mask,
    )  # fmt: skip


_INSTEAD = {
    "rab": "there is no relative bias yet (docs/hstu.md)",
    "has_drab": "there is no relative bias yet (docs/hstu.md)",
    "seqused_q": "pack the rows that count, with cu_seqlens_q of them",
    "seqused_k": "pack the keys that count, or call flash_attn.nosoftmax.forward with seqused_k",
    "quant_mode": "there is no fp8: pass float16 or bfloat16",
}


def _refuse(**given: Any) -> None:
    for name, x in given.items():
        if x is not None:
            what = f"={x}" if isinstance(x, (bool, int)) else ""
            pages = "call flash_attn_varlen_func with block_table, and all keys in the pages"
            raise NotImplementedError(f"{name}{what} is not served: {_INSTEAD.get(name, pages)}")


def _or_0(count: Union[None, int, torch.Tensor]) -> Union[int, torch.Tensor]:
    return 0 if count is None else count


def _inverse(name: str, length: float) -> float:
    if not length > 0:
        raise ValueError(f"{name}={length}: give the length to divide by, above 0")
    return 1.0 / length


def _factors(
    attn_scale: Union[None, float, torch.Tensor], max_seq_len: int, seq_offsets: torch.Tensor
) -> Union[float, torch.Tensor]:
    """Return the normalization that an attn_scale means. A single number on a GPU is not read."""
    if attn_scale is None:
        return _inverse("max_seq_len", max_seq_len)
    checks.is_tensor("seq_offsets", seq_offsets)
    if not isinstance(attn_scale, torch.Tensor):
        return attn_scale
    if attn_scale.requires_grad:
        raise ValueError("attn_scale requires a gradient, and gets none: pass attn_scale.detach()")
    factors = attn_scale.to(torch.float32)
    return factors.repeat(seq_offsets.shape[0] - 1) if factors.dim() == 0 else factors


def _intervals(func: torch.Tensor, total_q: int) -> Intervals:
    checks.is_tensor("func", func)
    if func.dim() != 3 or func.shape[0] != 1 or func.shape[1] not in (1, 3, 5) or func.shape[2] < total_q:
        raise ValueError(
            f"func has shape {tuple(func.shape)}, expected (1, 1 or 3 or 5, at least {total_q}): up to three "
            "intervals of a row, the same for all heads"
        )
    rows = func[0, :, :total_q].mT
    starts, ends = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1::2]], dim=1), rows[:, ::2]
    return Intervals(starts, torch.maximum(starts, ends))  # FBGEMM sees nothing where a start exceeds its end
