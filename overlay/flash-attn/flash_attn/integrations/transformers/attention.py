"""Compute the attention of a layer of a transformers model without softmax.

This is the function that transformers' AttentionInterface calls. It takes the sequences from the mask
(masks.py), from cu_seq_lens, or from position_ids, in this order.
"""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

from . import masks
from .score import ScoreFunction

# What models hand to their attention beside what is computed here. To leave one out would change the result.
_REFUSED = (
    "position_bias", "attention_bias", "alibi", "s_aux", "sinks", "learnable_sink", "head_mask",
    "layer_head_mask", "cross_attn_layer_head_mask", "indices", "block_indices", "block_mask", "block_table",
    "score_mod", "mask_mod",
)  # fmt: skip
_OF_REGISTER = ("activation", "sigmoid_bias", "normalization", "decay_slopes", "n")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def attend(
    score: ScoreFunction,
    call_options: Mapping[str, Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention. query: (batch, nheads, seqlen_q, head_dim); key, value: (batch, nheads_k, seqlen_k,
    …).

    attention_mask: None, or (batch, keys) as masks.py says. sliding_window: a query sees that many keys, its
    own included, on each side that the mask leaves. kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q,
    max_length_k and position_ids are used, those in _REFUSED raise, and tensors of floats that are not known
    too. Returns (batch, seqlen_q, nheads, head_dim_v), None.
    """
    _refuse(module, kwargs)
    # Rotary embeddings and norms may leave queries and keys in float32.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    causal = _causal(module, is_causal)
    window = -1 if sliding_window is None else sliding_window - 1
    options = {
        "dropout_p": dropout, "softmax_scale": scaling, "causal": causal, "softcap": softcap or 0.0,
        "window_size": (window, 0 if causal else window), **score.options(q.device), **call_options,
    }  # fmt: skip
    lengths = [kwargs.get(name) for name in _LENGTHS]
    if any(x is not None for x in lengths[:2]):
        return _packed(score, q, k, v, lengths, causal, options), None
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    mask = attention_mask
    if mask is None and seqlen_q == seqlen_k:
        mask = masks.of_positions(kwargs.get("position_ids"), q.shape[0], seqlen_q)
    if mask is not None:
        return _masked(score, q, k, v, _two_axes(module, mask, q, seqlen_k), causal, options), None
    _check_n(score, causal and seqlen_q != seqlen_k, seqlen_k)
    return flash_attn_func(q, k, v, **options), None


def _refuse(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise for an argument that would be left out."""
    for name, x in kwargs.items():
        if x is None:
            continue
        if name in _REFUSED:
            raise NotImplementedError(
                f"{type(module).__name__} gives {name} to its attention, which attention without softmax "
                "does not have: use another attn_implementation for this model"
            )
        if name == "output_attentions" and x:
            raise ValueError(
                "output_attentions=True: the weights are never formed, leave it out, or use "
                'attn_implementation="eager"'
            )
        if name in _OF_REGISTER or (name == "use_softmax" and x is not False):
            raise ValueError(
                f"{name}={x!r} in a call of the model: the score function belongs to the name that was "
                f"registered, give it to flash_attn.integrations.transformers.register"
            )
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name not in _LENGTHS:
            raise NotImplementedError(
                f"{type(module).__name__} gives the tensor {name} to its attention, which would be left out: "
                "use another attn_implementation for this model"
            )


def _causal(module: torch.nn.Module, is_causal: Optional[bool]) -> bool:
    if is_causal is not None:
        return bool(is_causal)
    if getattr(getattr(module, "config", None), "is_causal", None) is False:  # a decoder used as an encoder
        return False
    causal = getattr(module, "is_causal", None)
    if causal is None:
        raise NotImplementedError(
            f"{type(module).__name__} has no is_causal, so that its mask is not known: use another "
            "attn_implementation for this model"
        )
    return causal


def _two_axes(module: torch.nn.Module, mask: torch.Tensor, q: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """Check that a mask is (batch, keys), and drop columns before the keys, which a cache has dropped too."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[0] not in (1, q.shape[0]):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask of {type(module).__name__} is {shape}, expected (batch, keys), 0 for padding: a "
            "mask with an entry for each pair of tokens has no kernels without softmax; pack the sequences, "
            "or use another attn_implementation"
        )
    mask = mask if mask.shape[0] == q.shape[0] else mask.expand(q.shape[0], -1)
    return mask if mask.shape[1] <= seqlen_k else mask[:, -seqlen_k:]


def _check_n(score: ScoreFunction, decoding: bool, keys: int) -> None:
    """Raise if n would be the keys until now, where one pass over the sequence counts all of them."""
    if decoding and score.counts_keys:
        raise ValueError(
            f"{score.counts_keys} counts the keys of a call, {keys} with this cache, so that decoding would "
            "differ from one pass over the sequence: register a given number, such as n=1024, or "
            'normalization="1/visible", or call generate(use_cache=False)'
        )


def _packed(score: ScoreFunction, q, k, v, lengths: list, causal: bool, options: dict) -> torch.Tensor:
    """Attend within the sequences of cu_seq_lens, all in one row."""
    for name, x in zip(_LENGTHS, lengths):
        if x is None:
            raise ValueError(f"{name} is missing: packed sequences need {', '.join(_LENGTHS)}")
    of_q, of_k, longest_q, longest_k = lengths
    if causal and score.counts_keys:  # only then, because this waits for a GPU
        _check_n(score, of_q is not of_k and not torch.equal(of_q.long(), of_k.long()), int(longest_k))
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), of_q, of_k, longest_q, longest_k, **options
    )
    return out.unflatten(0, (q.shape[0], q.shape[1]))


def _masked(score: ScoreFunction, q, k, v, mask: torch.Tensor, causal: bool, options: dict) -> torch.Tensor:
    """Attend within the sequences of a mask (batch, keys)."""
    (batch, seqlen_q), seqlen_k = q.shape[:2], mask.shape[1]
    if seqlen_k < seqlen_q and causal:
        raise ValueError(
            f"attention_mask has {seqlen_k} columns for {seqlen_q} queries: give it a column for each token"
        )
    k, v = k[:, :seqlen_k], v[:, :seqlen_k]  # the rest of a static cache is empty
    _check_n(score, causal and seqlen_q != seqlen_k, seqlen_k)
    found = masks.layout(mask, seqlen_q, causal)
    if found.has_holes and (options["window_size"][0] >= 0 or options["decay_slopes"] is not None):
        raise ValueError(
            "attention_mask has padding within a sequence, and a window or a decay would count it: pad on "
            "the left or on the right"
        )
    decoding = causal and seqlen_q < seqlen_k and options["dropout_p"] == 0.0 and not _needs_grad(q, k, v)
    if decoding and found.leftpad is not None:
        try:
            return _cached(q, k, v, found.leftpad, options)
        except NotImplementedError:  # these kernels have no cache: pack the keys
            pass
    packed = (x.flatten(0, 1)[at] for x, at in ((q, found.queries), (k, found.keys), (v, found.keys)))
    out = flash_attn_varlen_func(*packed, *found[2:6], **options)
    whole = out.new_zeros(batch * seqlen_q, *out.shape[1:])
    return whole.index_copy(0, found.queries, out).unflatten(0, (batch, seqlen_q))


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _cached(q, k, v, leftpad: torch.Tensor, options: dict) -> torch.Tensor:
    """Attend to left-padded keys where they lie."""
    options = {name: x for name, x in options.items() if name != "dropout_p"}
    lengths = torch.full_like(leftpad, k.shape[1])
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, cache_leftpad=leftpad, **options)
