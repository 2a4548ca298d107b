"""Read the score options of a model config, and compute the attention weights of the modules' non-flash
paths.

The modules pass the options on as one dict of keyword arguments of the public functions: use_softmax,
activation, sigmoid_bias and normalization. A missing option has the default of these functions.
flash_attn/nosoftmax/score.py defines the options.
"""

from typing import Any, Optional, Union

import torch
from flash_attn.nosoftmax.score import attention_weights, resolve


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """Check the options and fill in use_softmax. Raises ValueError or TypeError, so that a typo fails at
    construction.
    """
    options = {"use_softmax": True, **options}
    resolve(**options)
    return options


def from_config(config: Any) -> dict[str, Any]:
    """Read config.use_softmax, .attn_activation, .attn_sigmoid_bias and .attn_normalization.

    A config without these attributes means softmax.
    """
    return {
        "use_softmax": getattr(config, "use_softmax", True),
        "activation": getattr(config, "attn_activation", "identity"),
        "sigmoid_bias": getattr(config, "attn_sigmoid_bias", 0.0),
        "normalization": getattr(config, "attn_normalization", None),
    }


def dense_weights(
    scores: torch.Tensor,
    dtype: torch.dtype,
    causal: bool,
    key_padding_mask: Optional[torch.Tensor],
    align_last_key: bool,
    **options: Any,
) -> torch.Tensor:
    """Compute the attention weights of the non-flash paths, (batch, nheads, seqlen_q, seqlen_k) in `dtype`.

    scores: (batch, nheads, seqlen_q, seqlen_k), scaled, with -10000 already added where softmax must not see.
    key_padding_mask: (batch, seqlen_k) bool, True means to keep. align_last_key: causal aligns the last query
    with the last kept key (cross-attention) instead of query i with key i (self-attention). options: see the
    module.
    """
    resolve(**options)
    if options.pop("use_softmax"):
        return torch.softmax(scores, dim=-1, dtype=dtype)
    seqlen_q, seqlen_k = scores.shape[-2:]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=scores.device)
    n: Union[int, torch.Tensor] = seqlen_k
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
        n = key_padding_mask.sum(-1)[:, None, None, None]
    if causal:
        rows = torch.arange(seqlen_q, device=scores.device)[:, None]
        last_key = rows + (n - seqlen_q if align_last_key else 0)
        visible = visible & (torch.arange(seqlen_k, device=scores.device) <= last_key)
    # In float32: without softmax a weight can be too large for float16, where it saturates as in the kernels.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = attention_weights(wide, visible, n=n, **options)
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        weights = torch.where(weights.isfinite(), weights.clamp(-limit, limit), weights)
    return weights.to(dtype)
