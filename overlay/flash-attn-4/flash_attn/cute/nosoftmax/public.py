"""Add use_softmax to flash_attn_func and flash_attn_varlen_func. score.py defines use_softmax=False."""

import functools
import inspect
from typing import Any, Callable, Optional, Union

import torch
from flash_attn.cute import interface
from flash_attn.cute.nosoftmax import checks, hopper, ops
from flash_attn.cute.nosoftmax.call import Call, needs_grad
from flash_attn.cute.nosoftmax.hopper import Extras
from flash_attn.cute.nosoftmax.score_mods import ScoreMods, of_user
from flash_attn.cute.nosoftmax.serves import obstacle

# Arguments of upstream for softmax or for other GPUs only. A value other than the default is an error.
_SOFTMAX_ONLY = (
    "min_seqlen_k",
    "scheduler_metadata",
    "seqlen_k_per_split",
    "disable_scheduler_metadata",
    "gather_bwd_recompute_p",
    "gather_bwd_token_chunk",
)


def _mods(
    score_mod: Optional[Callable], score_mod_bwd: Optional[Callable], call: Call
) -> Optional[ScoreMods]:
    """Return the user's score_mod, which replaces the activation; None if there is none."""
    o = call.options
    if score_mod is None:
        if score_mod_bwd is not None:
            raise ValueError("score_mod_bwd without score_mod: give both, or neither")
        return None
    if o.activation != "identity":
        raise ValueError(f"activation={o.activation!r} and score_mod both choose f: give one of them")
    if o.softcap:
        raise ValueError(
            f"softcap={o.softcap} and score_mod cannot be used together: cap the score in the score_mod"
        )
    if needs_grad(call) and score_mod_bwd is None:
        raise ValueError(
            "score_mod needs score_mod_bwd for the gradients that q, k or v ask for: give the derivative, "
            "or call this under torch.no_grad()"
        )
    return of_user(
        score_mod,
        score_mod_bwd,
        hopper.normalization(call, of_user=True),
        has_decay=call.decay_slopes is not None,
    )


def _without_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    activation: str,
    sigmoid_bias: Union[float, str, torch.Tensor],
    normalization: Union[None, str, float, torch.Tensor],
    decay_slopes: Optional[torch.Tensor],
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[Optional[int], Optional[int]] = (None, None),
    softcap: float = 0.0,
    pack_gqa: Optional[bool] = None,
    deterministic: bool = False,
    score_mod: Optional[Callable] = None,
    score_mod_bwd: Optional[Callable] = None,
    mask_mod: Optional[Callable] = None,
    aux_tensors: Optional[list] = None,
    aux_scalars: Optional[tuple] = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    cu_seqlens_q: Optional[torch.Tensor] = None,
    cu_seqlens_k: Optional[torch.Tensor] = None,
    seqused_q: Optional[torch.Tensor] = None,
    seqused_k: Optional[torch.Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    page_table: Optional[torch.Tensor] = None,
    **refused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.is_tensor(name, x)
    if page_table is not None and cu_seqlens_k is not None:
        raise ValueError("page_table goes with seqused_k, not with cu_seqlens_k")
    # Upstream allows a maximum length on the GPU. It is only a bound, and is left out.
    longest = tuple(
        None if n is None or isinstance(n, torch.Tensor) else n for n in (max_seqlen_q, max_seqlen_k)
    )
    sigmoid_bias, normalization, factors, biases = checks.apart(sigmoid_bias, normalization)
    options = checks.options(
        q.shape[-1] if q.dim() else 1, *(0 if n is None else n for n in longest), 0.0, softmax_scale, causal,
        window_size, softcap, deterministic, False, activation, sigmoid_bias, normalization,
    )  # fmt: skip
    call = Call.of(
        options, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        block_table=page_table, row_factors=factors, sigmoid_biases=biases, decay_slopes=decay_slopes,
    )  # fmt: skip
    checks.tensors(call, seqused_q=seqused_q)
    reason = obstacle(call, mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors, **refused)
    if reason is not None:
        raise ValueError(f"use_softmax=False: {reason}")
    if mask_mod is not None and (options.window_left, options.window_right) != (-1, -1):
        raise ValueError("mask_mod with causal or window_size: put the limit into the mask_mod")
    extras = Extras(
        longest, _mods(score_mod, score_mod_bwd, call), seqused_q, pack_gqa, mask_mod, aux_tensors,
        aux_scalars, block_sparse_tensors, block_sparse_tensors_bwd,
    )  # fmt: skip
    if ops.followed(extras):
        out = ops.forward(*ops.arguments(call, extras))
    else:
        out = ops.Attention.apply(*call.tensors, options, extras)
    return out, torch.empty(0, dtype=torch.float32, device=q.device)


_DOC = """
    use_softmax: bool. False: O = norm * f(mask(scale * Q K^T)) V, as the docstring of
        flash_attn.cute.nosoftmax.score states, on Hopper GPUs.
    activation: f, one of the ACTIVATIONS of that module; without softmax only, as the next three.
    sigmoid_bias: a float, or "-log n" with n the number of keys of the sequence, or a float32 tensor
        (nheads,) or (batch, nheads); with activation="sigmoid".
    normalization: None, "1/n", "1/visible" or "1/sqrt(n)", or the factor itself: a positive number, or a
        float32 tensor (batch,) or (batch, seqlen_q), packed (batch,) or (total_q,).
    decay_slopes: float32, not negative, (nheads,) or (batch, nheads), or None: each weight is multiplied by
        exp(-slope * |i + seqlen_k - seqlen_q - j|).

    Without softmax a score_mod may take the place of an activation: its value is the weight itself, and the
    mask writes 0 after it. It needs score_mod_bwd where gradients are asked for. Returns (out, lse) as with
    softmax; lse is an empty float32 tensor. Raises ValueError before anything is launched if these kernels do
    not serve the call.
"""


def _with_use_softmax(upstream: Callable) -> Callable:
    """Add the arguments of _DOC to upstream's function. With use_softmax=True it gets the call unchanged."""
    signature = inspect.signature(upstream)
    defaults = {name: p.default for name, p in signature.parameters.items()}

    @functools.wraps(upstream)
    def function(
        *args, use_softmax=True, activation="identity", sigmoid_bias=0.0, normalization=None,
        decay_slopes=None, **kwargs
    ):  # fmt: skip
        if use_softmax:
            checks.nothing_beside_softmax(activation, sigmoid_bias, normalization, decay_slopes)
            return upstream(*args, **kwargs)
        given = dict(zip(defaults, args), **kwargs)
        for name in _SOFTMAX_ONLY:
            if name in given and given.pop(name) != defaults.get(name):
                raise ValueError(f"{name} has no meaning with use_softmax=False: leave it at its default")
        return _without_softmax(
            given.pop("q"), given.pop("k"), given.pop("v"),
            activation=activation, sigmoid_bias=sigmoid_bias, normalization=normalization,
            decay_slopes=decay_slopes, **given,
        )  # fmt: skip

    function.__doc__ = (upstream.__doc__ or "") + _DOC
    more = inspect.signature(
        lambda *, use_softmax=True, activation="identity", sigmoid_bias=0.0, normalization=None,
        decay_slopes=None: None
    ).parameters  # fmt: skip
    function.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more.values()])
    return function


flash_attn_func = _with_use_softmax(interface.flash_attn_func)
flash_attn_varlen_func = _with_use_softmax(interface.flash_attn_varlen_func)
