"""Give the keys that each query of a sequence sees under flash_attn.masks.HSTU, as half-open intervals.

The closed form of the masks that generative-recommenders and FBGEMM define by comparing positions; the
docstring of flash_attn.masks says what they mean.
"""

import torch


def of_hstu(
    seqlen_q: int,
    seqlen_k: int,
    num_targets: int,
    num_contexts: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    target_group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (starts, ends), int32 (seqlen_q, 2) on the CPU. The queries are the last of the keys.

    The first interval holds contextual keys and history, the second candidates. An unused one is [0, 0).
    """
    row = torch.arange(seqlen_k - seqlen_q, seqlen_k, dtype=torch.int32, device="cpu")
    history_end = seqlen_k - num_targets
    is_contextual, is_target = row < num_contexts, row >= history_end
    # From here on a candidate stands where the history ends.
    at = row.clamp(max=history_end)
    start = _window(at, history_end, num_contexts, max_attn_len, min_full_attn_seq_len)
    end = torch.where(is_contextual | is_target, history_end, row + 1)
    group = history_end + (row - history_end) // target_group_size * target_group_size
    exists = row >= 0
    starts = torch.stack([start.masked_fill(is_contextual, 0), group * is_target], dim=1)
    ends = torch.stack([end * exists, (row + 1) * is_target], dim=1)
    return starts * exists[:, None], ends * exists[:, None]


def _window(
    at: torch.Tensor, history_end: int, num_contexts: int, max_attn_len: int, min_full_attn_seq_len: int
) -> torch.Tensor:
    """Return the first key that rows at these positions see, rows after the contextual ones."""
    if max_attn_len == 0:
        return torch.zeros_like(at)
    # Compressed positions count all contextual keys as one.
    shift = num_contexts - 1 if num_contexts else 0
    start = (at - max_attn_len).clamp(min=0)
    if num_contexts:
        # A window that reaches the contextual keys sees all of them or none.
        sees_contexts = at - shift <= max_attn_len
        start = start.clamp(min=num_contexts).masked_fill(sees_contexts, 0)
    if min_full_attn_seq_len:
        start = start.masked_fill(at >= history_end - min_full_attn_seq_len, 0)
    return start
