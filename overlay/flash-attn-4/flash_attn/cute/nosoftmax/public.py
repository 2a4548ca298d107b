"""flash_attn_func and flash_attn_varlen_func with use_softmax; score_function.py states what False means."""

import functools
import inspect
from typing import Any, Callable, Optional, Union

import torch
import torch.nn.functional as F
from flash_attn.cute import interface
from flash_attn.cute.nosoftmax import ops
from flash_attn.cute.nosoftmax.checks import unsupported
from flash_attn.cute.nosoftmax.launch import Call
from flash_attn.cute.nosoftmax.score_function import resolve
from flash_attn.cute.nosoftmax.score_mods import ScoreMods, of_activation, of_user

# What upstream's functions take for softmax or for other GPUs alone: a value that is not the default is an error.
_SOFTMAX_ONLY = (
    "min_seqlen_k",
    "scheduler_metadata",
    "seqlen_k_per_split",
    "disable_scheduler_metadata",
    "gather_bwd_recompute_p",
    "gather_bwd_token_chunk",
)


def _mods(
    score_mod: Optional[Callable],
    score_mod_bwd: Optional[Callable],
    softcap: float,
    activation: str,
    bias: Optional[float],
    normalization: Optional[str],
    needs_grad: bool,
) -> ScoreMods:
    if score_mod is None:
        if score_mod_bwd is not None:
            raise ValueError("score_mod_bwd without score_mod: give both, or neither")
        return of_activation(activation, bias, softcap, normalization)
    if activation != "identity":
        raise ValueError(f"activation={activation!r} and score_mod both choose f: give one of them")
    if softcap:
        raise ValueError(f"softcap={softcap} and score_mod cannot be used together: cap the score in the score_mod")
    if needs_grad and score_mod_bwd is None:
        raise ValueError(
            "score_mod needs score_mod_bwd for the gradients that q, k or v ask for: give the derivative, or call this "
            "under torch.no_grad()"
        )
    return of_user(score_mod, score_mod_bwd, normalization)


def first_seen(seqlen_q: int, seqlen_k: int, left: Optional[int]) -> int:
    """The first key that a window of `left` keys lets any query see. Query i is aligned with key i + seqlen_k - seqlen_q."""
    return 0 if left is None else max(seqlen_k - seqlen_q - left, 0)


def first_seeing(seqlen_q: int, seqlen_k: int, right: Optional[int]) -> int:
    """The first query that a window of `right` keys, 0 if causal, lets see any key."""
    return 0 if right is None else max(seqlen_q - seqlen_k - right, 0)


def _without_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    activation: str,
    sigmoid_bias: Union[float, str],
    normalization: Optional[str],
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
    _, activation, bias, normalization = resolve(False, activation, sigmoid_bias, normalization)
    reason = unsupported(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        softcap=softcap,
        activation=activation,
        normalization=normalization,
        window_size=window_size,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        **refused,
    )
    if reason is not None:
        raise ValueError(f"use_softmax=False: {reason}")
    left, right = (None if side is None or side < 0 else side for side in window_size)
    if causal:
        right = 0
    if mask_mod is not None and (left, right) != (None, None):
        raise ValueError("mask_mod with causal or window_size: put the limit into the mask_mod")
    if normalization == "1/visible" and (left, right) == (None, None):
        normalization = "1/n"  # every query sees every key
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    mods = _mods(score_mod, score_mod_bwd, softcap, activation, bias, normalization, needs_grad)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    # A longest sequence that is known on the GPU alone, which upstream allows, is a bound that can be left out.
    longest = (None if isinstance(n, torch.Tensor) else n for n in (max_seqlen_q, max_seqlen_k))
    indexed = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, score_mod, block_sparse_tensors)
    counts_keys = bias is None or normalization in ("1/n", "1/sqrt(n)")
    # Keys before the windows share a tile with seen ones, and queries before the first key one with queries that see keys. They
    # are left out, for a NaN there would come through: of keys to all results, of queries and their dout to dk and dv.
    blind = 0
    if all(x is None for x in indexed):
        if not counts_keys and (first := first_seen(q.shape[1], k.shape[1], left)) > 0:
            k, v = k[:, first:], v[:, first:]
        if needs_grad and (blind := first_seeing(q.shape[1], k.shape[1], right)) > 0:
            q = q[:, blind:]
    sequences = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *longest)
    of_user = score_mod is not None or mask_mod is not None or block_sparse_tensors is not None
    if torch.compiler.is_compiling() and not of_user:
        out = ops.forward(
            q, k, v, softmax_scale, causal, left, right, softcap, activation, bias, normalization, *sequences,
            page_table, pack_gqa, deterministic,
        )  # fmt: skip
    else:
        call = Call(mods, softmax_scale, causal, (left, right), *sequences, mask_mod, aux_tensors, aux_scalars)
        out = ops.Attention.apply(
            q, k, v, call, pack_gqa, page_table, deterministic, block_sparse_tensors, block_sparse_tensors_bwd
        )  # fmt: skip
    if blind > 0:
        out = F.pad(out, (0, 0, 0, 0, blind, 0))
    return out, torch.empty(0, dtype=torch.float32, device=q.device)


_DOC = """
    use_softmax: bool. False: O = norm * f(mask(scale * Q K^T)) V, as the docstring of
        flash_attn.cute.nosoftmax.score_function states, on Hopper GPUs.
    activation: f, "identity", "relu", "relu2", "sigmoid" or "silu"; without softmax only, as the next two.
    sigmoid_bias: a float, or "-log n" with n the number of keys of the sequence; with activation="sigmoid".
    normalization: None, "1/n", "1/visible" or "1/sqrt(n)".

    Without softmax a score_mod may take the place of an activation: its value is the weight itself, and the mask writes
    0 after it. It needs score_mod_bwd where gradients are asked for. Returns (out, lse) as with softmax; lse is an empty
    float32 tensor. Raises ValueError before anything is launched if these kernels do not serve the call.
"""


def _with_use_softmax(upstream: Callable) -> Callable:
    """Upstream's function with four keywords more; with use_softmax=True the call goes on to it as it is."""
    signature = inspect.signature(upstream)
    defaults = {name: p.default for name, p in signature.parameters.items()}

    @functools.wraps(upstream)
    def function(*args, use_softmax=True, activation="identity", sigmoid_bias=0.0, normalization=None, **kwargs):
        if use_softmax:
            resolve(True, activation, sigmoid_bias, normalization)
            return upstream(*args, **kwargs)
        given = dict(zip(defaults, args), **kwargs)
        for name in _SOFTMAX_ONLY:
            if name in given and given.pop(name) != defaults.get(name):
                raise ValueError(f"{name} has no meaning with use_softmax=False: leave it at its default")
        return _without_softmax(
            given.pop("q"), given.pop("k"), given.pop("v"),
            activation=activation, sigmoid_bias=sigmoid_bias, normalization=normalization, **given,
        )  # fmt: skip

    function.__doc__ = (upstream.__doc__ or "") + _DOC
    more = inspect.signature(
        lambda *, use_softmax=True, activation="identity", sigmoid_bias=0.0, normalization=None: None
    ).parameters
    function.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more.values()])
    return function


flash_attn_func = _with_use_softmax(interface.flash_attn_func)
flash_attn_varlen_func = _with_use_softmax(interface.flash_attn_varlen_func)
