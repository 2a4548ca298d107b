"""Turn the masks of transformers into the sequences that they describe.

A model asks the mask interface for its mask once in each forward pass, and hands the answer to the attention
function of every layer. `describe` answers with None or with a tensor (batch, keys): 0 where a key is absent
or padding, else the number of the sequence that the key belongs to. bool tensors have one sequence in each
row. The last columns are the queries: keys of a static cache that are not filled yet are cut off.

`layout` finds what a packed call needs from such a tensor, or from a padding mask (batch, keys) that a model
made itself.
"""

from typing import Any, Callable, NamedTuple, Optional

import torch

_PROBED_ROWS = 16
_FAR = 2**62


def describe(
    batch_size: int,
    kv_length: int,
    mask_function: Callable,
    q_length: Optional[int] = None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Optional[torch.Tensor] = None,
    cache_position: Optional[torch.Tensor] = None,
    config: Any = None,
    device: Any = None,
    **more: Any,
) -> Optional[torch.Tensor]:
    """Answer a model that asks for its mask. The arguments are those of transformers' AttentionMaskInterface,
    where mask_function(batch, head, query, key) says who sees whom, at absolute positions.

    attention_mask: (batch, positions) bool, False is padding. Raises NotImplementedError for a mask that is
    neither causal, bidirectional, a window, packed sequences nor padding.
    """
    if cache_position is not None:  # transformers 4
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    from transformers import masking_utils

    plain = masking_utils.causal_mask_function
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)  # transformers 5
    # If every key is one of a query, they begin together: don't read a tensor for it, which a compiler can't.
    q_offset = kv_offset if q_length == kv_length else int(q_offset)
    device = attention_mask.device if attention_mask is not None else device
    sequences = None
    if mask_function is not plain and mask_function is not bidirectional:
        whole = attention_mask is None and q_length == kv_length and q_offset == kv_offset == 0
        if whole and not torch.compiler.is_compiling():
            sequences = _sequences(mask_function, batch_size, q_length, device)
        place = batch_size, q_length, kv_length, q_offset, kv_offset
        # Only the functions for bidirectional masks give this argument.
        causal = "allow_is_bidirectional_skip" not in more
        _check_band(mask_function, place, sequences, causal, device, config)
    if sequences is not None:
        return sequences
    end = kv_length
    if mask_function is not bidirectional:
        end = min(kv_length, q_offset + q_length - kv_offset)
    if attention_mask is None:
        return None if end == kv_length else torch.ones(batch_size, end, dtype=torch.bool, device=device)
    # generate makes the mask for a static cache itself, and the model asks again with the answer: without
    # kv_offset.
    first = 0 if kv_offset and attention_mask.shape[1] == end else kv_offset
    kept = attention_mask[:, first : first + end]
    if kept.shape[1] < end:
        kept = torch.nn.functional.pad(kept, (0, end - kept.shape[1]))
    if end == kv_length and not torch.compiler.is_compiling() and kept.all():
        return None
    return kept


def _sequences(mask_function: Callable, batch: int, length: int, device: Any) -> Optional[torch.Tensor]:
    """Number the packed sequences of each row from 1, int32 (batch, length): one starts where a query does
    not see the key before its own. None if each row is one sequence.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(1, length, device=device)[None]
    seen = _visible(mask_function, rows, tokens, tokens - 1)
    if seen is None or seen.all():
        return None
    starts = torch.nn.functional.pad(~seen.expand(batch, length - 1), (1, 0), value=True)
    return starts.cumsum(1, dtype=torch.int32)


def _visible(mask_function: Callable, rows, queries, keys) -> Optional[torch.Tensor]:
    try:
        seen = mask_function(rows, torch.zeros_like(rows), queries, keys)
    except (RuntimeError, TypeError, IndexError):  # a function for one index at a time
        return None
    return seen if isinstance(seen, torch.Tensor) else None


def _check_band(
    mask_function: Callable,
    place: tuple,
    sequences: Optional[torch.Tensor],
    causal: bool,
    device: Any,
    config: Any,
) -> None:
    """Check on some queries that each sees a band of keys around its own, within its sequence, and if causal
    none after its own: what causal, bidirectional and windowed attention have in common.

    place: (batch, q_length, kv_length, q_offset, kv_offset). A compiled program checks the same when it runs.
    """
    batch, q_length, kv_length, q_offset, kv_offset = place
    step = max(1, (q_length - 1) // (_PROBED_ROWS - 1))
    chosen = torch.arange(q_length - 1, -1, -step, device=device)
    rows = torch.arange(batch, device=device)[:, None, None]
    queries = (chosen + q_offset)[None, :, None]
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None]
    seen = _visible(mask_function, rows, queries, keys)
    message = (
        f"{getattr(config, 'model_type', 'this model')} lays its own mask over attention (a prefix, blocks, "
        "chunks), which attention without softmax does not have: use another attn_implementation for it"
    )
    if seen is None:
        raise NotImplementedError(message)
    seen = seen.expand(batch, len(chosen), kv_length)
    distance = (queries - keys).expand_as(seen)
    nearest = torch.where(seen, distance, _FAR).amin()
    furthest = torch.where(seen, distance, -_FAR).amax()
    expected = (distance >= nearest) & (distance <= furthest)
    if sequences is not None:
        expected = expected & (sequences[:, chosen, None] == sequences[:, None])
    fits = (seen == expected).all()
    if causal:
        fits = fits & (nearest >= 0)
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
    elif not fits:
        raise NotImplementedError(message)


class Layout(NamedTuple):
    """Where the tokens of a packed call come from.

    queries, keys: the places of the tokens in (batch * seqlen_q) and (batch * keys). cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in flash_attn_varlen_func. leftpad: int32 (batch,), the keys
    to skip, if every row is one sequence with padding before it alone, else None. has_holes: whether padding
    lies within a sequence, so that a distance in it is not one in the row.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    leftpad: Optional[torch.Tensor]
    has_holes: bool


def layout(mask: torch.Tensor, seqlen_q: int, causal: bool) -> Layout:
    """Find the sequences of a mask (batch, keys), once for all layers.

    The last seqlen_q columns are the queries. If the attention is not causal and each row is one sequence,
    the queries are those of another tensor or padding, and all of them count.
    """
    return _once(mask, (seqlen_q, causal), lambda: _layout(mask, seqlen_q, causal))


def _once(of: torch.Tensor, key: tuple, make: Callable) -> Any:
    """Return make(), and keep the result with the tensor that it is made from. All layers have the same
    one.
    """
    if torch.compiler.is_compiling() or of.is_inference():  # the latter has no version that tells of a change
        return make()
    known, key = of.__dict__.setdefault("_flash_attn_layouts", {}), (*key, of._version)
    if key not in known:
        known[key] = make()
    return known[key]


def _layout(mask: torch.Tensor, seqlen_q: int, causal: bool) -> Layout:
    batch, length = mask.shape
    numbers = mask if mask.dtype == torch.int32 else (mask != 0).to(torch.int32)
    keys = numbers.flatten().nonzero().flatten()
    row, column = keys // length, keys % length
    name = torch.stack([row, numbers.flatten()[keys].long()])
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = (name[:, 1:] != name[:, :-1]).any(0)
    gap = (column.diff() != 1) & ~first[1:]
    if not causal and mask.dtype != torch.int32:
        of_keys = numbers.sum(1, dtype=torch.int32)
        of_queries = torch.full_like(of_keys, seqlen_q)
        queries = torch.arange(batch * seqlen_q, device=mask.device)
    else:
        sequence = first.cumsum(0) - 1
        count = int(sequence[-1]) + 1 if keys.numel() else 0
        of_keys = torch.bincount(sequence, minlength=count)
        is_query = column >= length - seqlen_q
        of_queries = torch.bincount(sequence[is_query], minlength=count)
        queries = (row * seqlen_q + column - (length - seqlen_q))[is_query]
    leftpad = (numbers != 0).to(torch.int32).argmax(1).to(torch.int32)
    padded_left = bool(((numbers != 0).sum(1) == length - leftpad).all()) and mask.dtype != torch.int32
    return Layout(
        queries, keys, _offsets(of_queries), _offsets(of_keys), _longest(of_queries), _longest(of_keys),
        leftpad if padded_left else None, bool(gap.any()),
    )  # fmt: skip


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: torch.Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def of_positions(position_ids: Optional[torch.Tensor], batch: int, length: int) -> Optional[torch.Tensor]:
    """Number the sequences that positions (batch or 1, length) pack into each row, as transformers does: a
    new one starts where a position does not follow the one before it. None if each row is one sequence.

    A compiler can't branch on positions; the compiled program raises if sequences are packed.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length or length < 2:
        return None
    if position_ids.shape[0] not in (1, batch):
        return None
    if torch.compiler.is_compiling():
        torch._assert_async((position_ids.diff() == 1).all(), _PACKED)
        return None
    return _once(position_ids, (batch,), lambda: _numbered(position_ids, batch, length))


def _numbered(position_ids: torch.Tensor, batch: int, length: int) -> Optional[torch.Tensor]:
    starts = torch.nn.functional.pad(position_ids.diff() != 1, (1, 0), value=True)
    numbers = starts.cumsum(1, dtype=torch.int32).expand(batch, length)
    return None if bool((numbers[:, -1] == 1).all()) else numbers


_PACKED = (
    "position_ids pack several sequences into a row, which torch.compile can't see: give cu_seq_lens_q, "
    "cu_seq_lens_k, max_length_q and max_length_k, as "
    "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
)
