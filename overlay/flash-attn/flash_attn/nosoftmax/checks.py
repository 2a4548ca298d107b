"""Check the arguments of all public functions, with one rule and one wording for every backend.

`options` checks the arguments that are not tensors, `tensors` the shapes, dtypes and devices of tensors, and
`values` the contents of tensors on the CPU. Contents on other devices are never read: a NaN there propagates,
and a wrong length or index is the caller's responsibility. Errors name the public argument, its value and the
remedy. A wrong type or dtype raises TypeError, a wrong value ValueError.

Both wheels have a copy of this module, so it imports only torch and its sibling modules.
"""

from functools import lru_cache
from typing import Any, Optional, Sequence

import torch

from .call import Call, Options, compute_dtype
from .score import ACTIVATIONS, resolve

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
# Beyond these limits a product with finite 16-bit numbers may leave the range of float32.
_LARGEST_SCALE = 1e9
_SOFTCAPS = (1e-9, 1e9)
_LARGEST = torch.finfo(torch.float64).max
_LARGEST_DIAGONAL = 2**30  # so that positions stay in int32

DENSE = (
    "batch, seqlen_q, nheads, head_dim",
    "batch, seqlen_k, nheads_k, head_dim",
    "batch, seqlen_k, nheads_k, head_dim_v",
)
PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim", "total_k, nheads_k, head_dim_v")
PAGED = ("", "num_pages, page_size, nheads_k, head_dim", "num_pages, page_size, nheads_k, head_dim_v")
CACHED = (
    "",
    "batch_cache, seqlen_cache, nheads_k, head_dim",
    "batch_cache, seqlen_cache, nheads_k, head_dim_v",
)
NEW = ("", "batch, seqlen_new, nheads_k, head_dim", "batch, seqlen_new, nheads_k, head_dim_v")


# ---- Arguments that are not tensors ----


def number(name: str, x: Any) -> float:
    """Return x as a float or SymFloat, reading a 0-d tensor. Raises TypeError for anything else."""
    if type(x) is float:
        return x
    if isinstance(x, torch.Tensor):
        if x.requires_grad:
            raise ValueError(
                f"{name} is a tensor that requires a gradient, and gets none: pass float({name}), or "
                "multiply q by it"
            )
        if x.dim() == 0:
            return float(x)
    elif isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        return x if isinstance(x, torch.SymFloat) else float(x)
    elif hasattr(x, "__float__") and not hasattr(x, "__len__"):  # such as a NumPy number
        return float(x)
    raise TypeError(f"{name}={x!r}: give a number")


def integer(name: str, x: Any) -> int:
    """Return x as an int or SymInt, reading a 0-d integer tensor. Raises TypeError for anything else."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return x
    if isinstance(x, torch.Tensor):
        if x.dim() == 0 and not x.dtype.is_floating_point:
            return int(x)
    elif hasattr(x, "__index__"):
        return x.__index__()
    raise TypeError(f"{name}={x!r}: give an integer")


def flag(name: str, x: Any) -> bool:
    if x is True or x is False:
        return x
    # Take 0 and 1, and NumPy's bools.
    if isinstance(x, (int, torch.SymBool)) or type(x).__name__ in ("bool_", "bool"):
        return bool(x)
    raise TypeError(f"{name}={x!r}: give True or False")


def options(
    head_dim: int,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    deterministic: Any,
    return_attn_probs: Any,
    activation: Any,
    sigmoid_bias: Any,
    normalization: Any,
    use_softmax: bool = False,
) -> Options:
    """Check the options of a call, each alone and against the others."""
    try:
        # Upstream's own tests pass a tensor.
        left, right = () if isinstance(window_size, str) else window_size
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size={window_size!r}: give a pair (left, right) of integers, -1 for no limit"
        ) from None
    given = (
        head_dim, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, left, right, softcap,
        deterministic, return_attn_probs, activation, sigmoid_bias, normalization, use_softmax,
    )  # fmt: skip
    # Cache plain values only: a tensor may change, and torch.compile does not use caches.
    plain = PLAIN.issuperset(map(type, given)) and not torch.compiler.is_compiling()
    return (_options_again if plain else _options)(*given)


def nothing_beside_softmax(activation: Any, sigmoid_bias: Any, normalization: Any, decay_slopes: Any) -> None:
    """Raise ValueError for an option of a call with softmax that would replace it."""
    given = {"sigmoid_bias": sigmoid_bias, "normalization": normalization, "decay_slopes": decay_slopes}
    for name, x in given.items():
        if isinstance(x, torch.Tensor) or (name == "decay_slopes" and x is not None):
            raise ValueError(
                f"{name} replaces the softmax: pass use_softmax=False, or leave it at its default"
            )
    resolve(True, activation, sigmoid_bias, normalization)


def _options(
    head_dim, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, left, right, softcap,
    deterministic, return_attn_probs, activation, sigmoid_bias, normalization, use_softmax,
) -> Options:  # fmt: skip
    dropout_p, softcap = number("dropout_p", dropout_p), number("softcap", softcap)
    scale = head_dim**-0.5 if softmax_scale is None else number("softmax_scale", softmax_scale)
    max_seqlen_q, max_seqlen_k = integer("max_seqlen_q", max_seqlen_q), integer("max_seqlen_k", max_seqlen_k)
    causal = flag("causal", causal)
    left, right = (-1 if side is None else max(integer("window_size", side), -1) for side in (left, right))
    score = resolve(use_softmax, activation, sigmoid_bias, normalization)
    # These comparisons reject NaN, and torch.compile can trace them, unlike math.isfinite.
    if not abs(scale) <= (_LARGEST if use_softmax else _LARGEST_SCALE):
        raise ValueError(
            f"softmax_scale={softmax_scale}: give a number of at most {_LARGEST_SCALE:g} in size, or None "
            "for 1/sqrt(head_dim)"
        )
    low, high = (0.0, _LARGEST) if use_softmax else _SOFTCAPS
    if not (softcap == 0.0 or low <= softcap <= high):
        raise ValueError(f"softcap={softcap}: give a number from {low:g} to {high:g}, or 0 for none")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: give a probability in [0, 1)")
    if softcap > 0.0 and dropout_p > 0.0:
        raise ValueError(
            f"softcap={softcap} with dropout_p={dropout_p} is not supported: leave one of them out"
        )
    if softcap > 0.0 and scale <= 0.0:
        raise ValueError(
            f"softmax_scale={softmax_scale} with softcap={softcap}: softcap needs a positive scale"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        # While compiling, the length may be unknown, and can't be compared.
        if not torch.compiler.is_compiling() and longest < 0:
            raise ValueError(f"{name}={longest}: give the length of the longest sequence")
    return Options(
        max_seqlen_q, max_seqlen_k, dropout_p, scale, left, 0 if causal else right, softcap,
        flag("deterministic", deterministic), flag("return_attn_probs", return_attn_probs), *score,
    )  # fmt: skip


PLAIN = frozenset((int, float, bool, str, type(None)))
_options_again = lru_cache(4096, typed=True)(_options)


def wide(out_dtype: Any, q: torch.Tensor) -> bool:
    """Return whether results stay in the dtype of the computation. out_dtype: None, q's dtype or that one."""
    compute = compute_dtype(q.dtype)
    if out_dtype is None or out_dtype == q.dtype != compute:
        return False
    if out_dtype != compute:
        raise ValueError(f"out_dtype={out_dtype}: with q in {q.dtype} give None or {compute}")
    return True


def diagonal(x: Any, batch: int, device: torch.device) -> Optional[torch.Tensor]:
    """Return the diagonal of a call, given as a number or as a tensor, as a tensor."""
    if x is None or (isinstance(x, torch.Tensor) and x.dim() > 0):
        return x
    x = integer("diagonal", x)
    if abs(x) > _LARGEST_DIAGONAL:
        raise ValueError(f"diagonal={x}: give the key that query 0 is aligned with, at most 2^30 away")
    return torch.full((batch,), x, dtype=torch.int32, device=device)


def apart(sigmoid_bias: Any, normalization: Any) -> tuple:
    """Return (sigmoid_bias, normalization, row_factors, sigmoid_biases). An argument given as a tensor moves
    to the last two, and its default takes its place.
    """
    factors = biases = None
    if isinstance(normalization, torch.Tensor):
        normalization, factors = None, normalization
    if isinstance(sigmoid_bias, torch.Tensor):
        sigmoid_bias, biases = 0.0, sigmoid_bias
    return sigmoid_bias, normalization, factors, biases


# ---- Shapes, dtypes and devices of tensors ----


def is_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__name__}: give a torch.Tensor")


def rank(name: str, x: torch.Tensor, axes: str) -> None:
    expected = axes.count(",") + 1
    if x.dim() != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected} axes: ({axes})")


def shape(name: str, x: Optional[torch.Tensor], *expected: int, axes: str) -> None:
    """Check the shape of x, unless x is None. axes: the names of its axes, for the message."""
    if x is not None and x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(expected)} = ({axes})")


def one_device(**given: Optional[torch.Tensor]) -> None:
    """Check that all tensors are on one device. A 0-d tensor counts as a number, and may be on any device."""
    devices = {name: x.device for name, x in given.items() if x is not None and x.dim() > 0}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(
            f"the tensors of one attention call must be on one device, got {listed}: move them with .to()"
        )


def one_dtype(q: torch.Tensor, **others: Optional[torch.Tensor]) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}: attention takes float16, bfloat16, float32 and float64")
    for name, x in others.items():
        if x is not None and x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert one of them")


def heads(nheads: int, nheads_k: int, head_dim: int, head_dim_v: int) -> None:
    if nheads_k < 1 or nheads < 1 or nheads % nheads_k != 0:
        raise ValueError(f"{nheads} heads in q, {nheads_k} in k and v: the latter must divide the former")
    if head_dim < 1 or head_dim_v < 1:
        name, size = ("head_dim", head_dim) if head_dim < 1 else ("head_dim_v", head_dim_v)
        raise ValueError(f"{name}={size}: q, k and v need at least one channel")


def qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axes: tuple, names: tuple = ("q", "k", "v")
) -> None:
    """Check ranks and shapes. axes: those of q, k and v. The caller checks that their batches are equal."""
    for name, x, of_x in zip(names, (q, k, v), axes):
        rank(name, x, of_x)
    expected = (*k.shape[:-1], q.shape[-1])
    shape(names[1], k, *expected, axes=axes[1])
    shape(names[2], v, *expected[:-1], v.shape[-1], axes=axes[2])
    heads(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])


def integers(name: str, x: Optional[torch.Tensor], *expected: int, axes: str) -> None:
    """Check that x, unless None, is an integer tensor of the expected shape."""
    if x is None:
        return
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {x.dtype}, expected torch.int32 or torch.int64")
    shape(name, x, *expected, axes=axes)


def constants(name: str, x: Optional[torch.Tensor], *shapes: tuple) -> None:
    """Check that x, unless None, is a float32 tensor of one of the shapes and requires no gradient."""
    if x is None:
        return
    if x.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {x.dtype}, expected torch.float32")
    if x.shape not in shapes:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {' or '.join(map(str, shapes))}")
    if x.requires_grad:
        raise ValueError(f"{name} requires a gradient, and gets none: pass {name}.detach()")


def _of_the_score(call: Call) -> None:
    """Check the tensors with a value for each head, sequence or row."""
    batch, nheads = call.batch, call.q.shape[-2]
    constants("alibi_slopes", call.alibi_slopes, (nheads,), (batch, nheads))
    if call.alibi_slopes is not None and call.options.softmax_scale == 0.0:
        raise ValueError(
            "softmax_scale=0 with alibi_slopes: give another softmax_scale, or leave the slopes out"
        )
    constants("sigmoid_bias", call.sigmoid_biases, (nheads,), (batch, nheads))
    constants("decay_slopes", call.decay_slopes, (nheads,), (batch, nheads))
    if call.sigmoid_biases is not None and not ACTIVATIONS[call.options.activation].takes_bias:
        raise ValueError(
            f'sigmoid_bias as a tensor needs activation="sigmoid", got activation={call.options.activation!r}'
        )
    of_rows = (call.q.shape[0],) if call.varlen else (batch, call.q.shape[1])
    constants("normalization", call.row_factors, (batch,), of_rows)


def tensors(call: Call, **more: Optional[torch.Tensor]) -> None:
    """Check that the tensors of a call without a cache fit together. more: other sequence lengths, int32
    (batch,).
    """
    q, k, v = call.q, call.k, call.v
    packed_q, packed_k, paged = (
        call.cu_seqlens_q is not None,
        call.cu_seqlens_k is not None,
        call.block_table is not None,
    )
    one_device(
        q=q, k=k, v=v, cu_seqlens_q=call.cu_seqlens_q, cu_seqlens_k=call.cu_seqlens_k,
        seqused_k=call.seqused_k, leftpad_k=call.leftpad_k, block_table=call.block_table,
        alibi_slopes=call.alibi_slopes, normalization=call.row_factors, sigmoid_bias=call.sigmoid_biases,
        decay_slopes=call.decay_slopes, diagonal=call.diagonal, **more,
    )  # fmt: skip
    one_dtype(q, k=k, v=v)
    qkv(
        q,
        k,
        v,
        ((PACKED if packed_q else DENSE)[0], *(PAGED if paged else PACKED if packed_k else DENSE)[1:]),
    )
    if not (packed_q or packed_k or paged) and k.shape[0] != q.shape[0]:
        shape("k", k, q.shape[0], *k.shape[1:], axes=DENSE[1])
    given = [
        (name, x)
        for name, x in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k))
        if x is not None
    ]
    for name, x in given:
        rank(name, x, "batch + 1")
        if x.shape[0] == 0:
            raise ValueError(f"{name} is empty: it has batch + 1 entries, the first of them 0")
    batch = call.batch
    for name, x in given:
        integers(name, x, batch + 1, axes="batch + 1")
    for name, x in more.items():
        integers(name, x, batch, axes="batch")
    integers("diagonal", call.diagonal, batch, axes="batch")
    _keys(call, batch)
    _of_the_score(call)


def _keys(call: Call, batch: int) -> None:
    """Check seqused_k, leftpad_k and block_table."""
    integers("seqused_k", call.seqused_k, batch, axes="batch")
    integers("leftpad_k" if call.cache is None else "cache_leftpad", call.leftpad_k, batch, axes="batch")
    if call.block_table is None:
        return
    if call.leftpad_k is not None:
        name = "leftpad_k" if call.cache is None else "cache_leftpad"
        raise ValueError(f"{name} with block_table: paged keys cannot be left-padded, pass one of them")
    rank("block_table", call.block_table, "batch, pages")
    integers("block_table", call.block_table, batch, call.block_table.shape[1], axes="batch, pages")
    if call.k.shape[1] < 1:
        raise ValueError(
            f"{'k' if call.cache is None else 'k_cache'} has shape {tuple(call.k.shape)}: a page holds at "
            "least one key"
        )


def cache(call: Call) -> None:
    """Check that the tensors of a flash_attn_with_kvcache call fit together."""
    q, k, v, given = call.q, call.k, call.v, call.cache
    paged = call.block_table is not None
    one_device(
        q=q, k_cache=k, v_cache=v, k=given.k, v=given.v, cache_seqlens=given.cache_seqlens,
        rotary_cos=given.rotary_cos, rotary_sin=given.rotary_sin, cache_batch_idx=given.cache_batch_idx,
        cache_leftpad=call.leftpad_k, block_table=call.block_table, alibi_slopes=call.alibi_slopes,
        normalization=call.row_factors, sigmoid_bias=call.sigmoid_biases, decay_slopes=call.decay_slopes,
    )  # fmt: skip
    one_dtype(
        q, k_cache=k, v_cache=v, k=given.k, v=given.v, rotary_cos=given.rotary_cos,
        rotary_sin=given.rotary_sin
    )  # fmt: skip
    names = ("q", "k_cache", "v_cache")
    qkv(q, k, v, (DENSE[0], *(PAGED if paged else CACHED)[1:]), names)
    for name, x in zip(names[1:], (k, v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has strides {x.stride()}: its last dimension must be contiguous")
    batch = q.shape[0]
    integers("cache_seqlens", given.cache_seqlens, batch, axes="batch")
    integers("cache_batch_idx", given.cache_batch_idx, batch, axes="batch")
    _keys(call, batch)
    if paged and given.cache_batch_idx is not None:
        raise ValueError(
            "cache_batch_idx with block_table: the table already says where each sequence is, pass one"
        )
    if not paged and given.cache_batch_idx is None and batch > k.shape[0]:
        raise ValueError(f"{batch} sequences in q, but only {k.shape[0]} in k_cache")
    _of_the_score(call)
    _appended(call, names)
    _rotary(call)


def _appended(call: Call, names: tuple) -> None:
    q, given = call.q, call.cache
    if (given.k is None) != (given.v is None):
        raise ValueError("only one of k and v is given: to append to the cache pass both, else neither")
    if given.k is None:
        return
    if given.cache_seqlens is None:
        raise ValueError(
            "k and v are given without cache_seqlens: pass the lengths at which they are appended"
        )
    rank("k", given.k, NEW[1])
    nheads_k, seqlen_new = call.k.shape[2], given.k.shape[1]
    shape("k", given.k, q.shape[0], seqlen_new, nheads_k, q.shape[3], axes=NEW[1])
    shape("v", given.v, q.shape[0], seqlen_new, nheads_k, call.v.shape[3], axes=NEW[2])
    for name, x in zip(names[1:], (call.k, call.v)):
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(
                f"{name} is an expanded tensor (strides {x.stride()}): several of its rows are one, give its "
                ".clone()"
            )


def _rotary(call: Call) -> None:
    given, head_dim = call.cache, call.q.shape[3]
    cos, sin = given.rotary_cos, given.rotary_sin
    if (cos is None) != (sin is None):
        raise ValueError("only one of rotary_cos and rotary_sin is given: pass both or neither")
    if cos is None:
        return
    if given.k is None:
        raise ValueError(
            "rotary_cos and rotary_sin without new k and v: pass the keys and values to append as well"
        )
    rank("rotary_cos", cos, "seqlen_ro, rotary_dim / 2")
    shape("rotary_sin", sin, *cos.shape, axes="seqlen_ro, rotary_dim / 2")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"rotary_dim={2 * cos.shape[1]} (twice the columns of rotary_cos) exceeds head_dim={head_dim}"
        )
    if cos.shape[0] < call.options.max_seqlen_k:
        raise ValueError(
            f"rotary_cos has {cos.shape[0]} rows, but positions up to {call.options.max_seqlen_k - 1} may be "
            "used"
        )


def dout(x: torch.Tensor, call: Call) -> None:
    """Check a gradient of the output that the caller passes."""
    is_tensor("dout", x)
    one_device(q=call.q, dout=x)
    one_dtype(call.q, dout=x)
    shape("dout", x, *call.q.shape[:-1], call.v.shape[-1], axes=(PACKED if call.varlen else DENSE)[0] + "_v")


def rng_state(x: Optional[torch.Tensor], call: Call) -> None:
    """Check the rng_state of the forward pass, which dropout needs."""
    if call.options.dropout_p == 0.0:
        return
    if x is None:
        raise ValueError(
            f"dropout_p={call.options.dropout_p} without rng_state: pass the rng_state that the forward pass "
            "returned"
        )
    is_tensor("rng_state", x)
    if x.dtype != torch.int64 or x.numel() != 2:
        raise TypeError(
            f"rng_state has dtype {x.dtype} and shape {tuple(x.shape)}, expected torch.int64 and (2,)"
        )


def state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    given: Optional[torch.Tensor],
    axes: tuple,
    softmax_scale: Any,
    decay_slopes: Optional[torch.Tensor],
    normalization: Any,
    state_indices: Optional[torch.Tensor],
    cu_seqlens: Optional[torch.Tensor] = None,
) -> Call:
    """Check the arguments of a recurrent function, and return them as a causal call, in which decay_slopes
    belong to key heads. axes: those of q, k and v; all have as many tokens.
    """
    tensors_given = (("q", q), ("k", k), ("v", v), ("state", given), ("decay_slopes", decay_slopes),
                     ("state_indices", state_indices), ("cu_seqlens", cu_seqlens))  # fmt: skip
    for name, x in tensors_given:
        if x is not None or name in "qkv":
            is_tensor(name, x)
    for name, x, of_x in zip("qkv", (q, k, v), axes):
        rank(name, x, of_x)
    shape("k", k, *q.shape[:-2], *k.shape[-2:], axes=axes[1])
    qkv(q, k, v, axes)
    one_dtype(q, k=k, v=v)
    _, normalization, factors, _ = apart(0.0, normalization)
    one_device(**dict(tensors_given), normalization=factors)
    longest = q.shape[-3] if len(axes[0].split(",")) == 4 or cu_seqlens is not None else 1
    chosen = options(
        q.shape[-1], longest, longest, 0.0, softmax_scale, True, (-1, -1), 0.0, False, False, "identity", 0.0,
        normalization,
    )  # fmt: skip
    if chosen.normalization is not None:
        raise ValueError(
            f"normalization={normalization!r} counts the keys of a sequence, which a piece of it does not "
            "know: give None, the factor as a number, or a float32 tensor of factors"
        )
    if cu_seqlens is not None:
        rank("cu_seqlens", cu_seqlens, "batch + 1")
        integers("cu_seqlens", cu_seqlens, max(cu_seqlens.shape[0], 1), axes="batch + 1")
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    call = Call.of(
        chosen, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, row_factors=factors,
        decay_slopes=decay_slopes,
    )  # fmt: skip
    _of_states(call, given, state_indices)
    return call


def _of_states(call: Call, given: Optional[torch.Tensor], state_indices: Optional[torch.Tensor]) -> None:
    """Check the tensors of a recurrent function beside q, k and v."""
    q, nheads, nheads_k, slopes = call.q, call.q.shape[-2], call.k.shape[-2], call.decay_slopes
    if slopes is not None and slopes.dim() and slopes.shape[-1] == nheads != nheads_k:
        raise ValueError(
            f"decay_slopes has shape {tuple(slopes.shape)}, a slope for each query head, but a state and its "
            f"decay belong to a key head: give ({nheads_k},) or ({call.batch}, {nheads_k})"
        )
    constants("decay_slopes", slopes, (nheads_k,), (call.batch, nheads_k))
    by_row = (q.shape[0],) if q.dim() == 3 else (q.shape[0], q.shape[1])
    constants("normalization", call.row_factors, (call.batch,), by_row)
    integers("state_indices", state_indices, call.batch, axes="batch")
    if given is not None:
        slots = call.batch if state_indices is None else given.shape[0] if given.dim() else 0
        expected = (slots, nheads_k, q.shape[-1], call.v.shape[-1])
        shape("state", given, *expected, axes="batch, nheads_k, head_dim, head_dim_v")
        if given.dtype != torch.float32:
            raise TypeError(f"state has dtype {given.dtype}, expected torch.float32")
    elif state_indices is not None:
        raise TypeError("state_indices without state: give the states that they name")
    if q.is_cpu:
        _state_values(call, given, state_indices)


def _state_values(call: Call, given: Optional[torch.Tensor], state_indices: Optional[torch.Tensor]) -> None:
    not_negative("normalization", call.row_factors, "factors")
    not_negative("decay_slopes", call.decay_slopes, "slopes")
    if call.varlen:
        _offsets("cu_seqlens", call.cu_seqlens_q.tolist(), call.q.shape[0], "", None)
    if state_indices is not None:
        entries = state_indices.tolist()
        for i, entry in enumerate(entries):
            if not 0 <= entry < given.shape[0]:
                raise ValueError(f"state_indices[{i}]={entry}, but there are {given.shape[0]} states")
        if len(set(entries)) < len(entries):
            raise ValueError(f"state_indices={entries}: two sequences cannot have the same state")


# ---- Contents of tensors on the CPU ----


def values(call: Call) -> None:
    """Check offsets, lengths, indices, slopes and factors on the CPU before any memory access uses them."""
    for name, x in (("alibi_slopes", call.alibi_slopes), ("sigmoid_bias", call.sigmoid_biases)):
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"{name}={x.tolist()}: give finite numbers")
    not_negative("normalization", call.row_factors, "factors")
    not_negative("decay_slopes", call.decay_slopes, "slopes")
    if call.diagonal is not None:
        for i, key in enumerate(call.diagonal.tolist()):
            if abs(key) > _LARGEST_DIAGONAL:
                raise ValueError(f"diagonal[{i}]={key}: give a key that is at most 2^30 away from key 0")
    if call.cache is not None:
        _cache_values(call)
    elif call.varlen:
        _packed_values(call)


def not_negative(name: str, x: Optional[torch.Tensor], what: str) -> None:
    """Check that the numbers of x, unless None, are finite and not below 0."""
    if x is None:
        return
    wrong = ~((x >= 0.0) & torch.isfinite(x))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{at}={x[tuple(at)].item()}: give finite {what} that are not negative")


def _packed_values(call: Call) -> None:
    paged, o = call.block_table is not None, call.options
    starts_k = call.cu_seqlens_k.tolist()
    _offsets("cu_seqlens_q", call.cu_seqlens_q.tolist(), call.q.shape[0], "max_seqlen_q", o.max_seqlen_q)
    selected = call.seqused_k is not None or call.leftpad_k is not None
    longest = None if paged or selected else o.max_seqlen_k
    _offsets("cu_seqlens_k", starts_k, None if paged else call.k.shape[0], "max_seqlen_k", longest)
    lengths = [stop - start for start, stop in zip(starts_k, starts_k[1:])]
    used = lengths if call.seqused_k is None else call.seqused_k.tolist()
    for i, (count, length) in enumerate(zip(used, lengths)):
        if count < 0 or (count > length and not paged):
            raise ValueError(f"seqused_k[{i}]={count}, but sequence {i} has {length} keys in cu_seqlens_k")
    skipped = _leftpad("leftpad_k", call.leftpad_k, used)
    for i, (start, stop) in enumerate(zip(skipped, used)):
        if stop - start > o.max_seqlen_k:
            raise ValueError(f"max_seqlen_k={o.max_seqlen_k}, but sequence {i} has {stop - start} keys")
    if paged:
        _pages(call.block_table, used, call.k.shape[1], call.k.shape[0])


def _offsets(
    name: str, offsets: Sequence[int], total: Optional[int], longest_name: str, longest: Optional[int]
) -> None:
    """Check that offsets start at 0 or later, do not descend, end within `total` rows, and that no sequence
    exceeds `longest`.
    """
    if offsets[0] < 0:
        raise ValueError(f"{name}[0]={offsets[0]}: offsets start at 0")
    for i, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        if stop < start:
            raise ValueError(
                f"{name} descends from {start} to {stop} at entry {i + 1}: give cumulative lengths"
            )
        if longest is not None and stop - start > longest:
            raise ValueError(
                f"{name}: sequence {i} has length {stop - start}, more than {longest_name}={longest}"
            )
    if total is not None and offsets[-1] > total:
        raise ValueError(f"{name} ends at {offsets[-1]}, but the tensor has only {total} rows")


def _leftpad(name: str, leftpad: Optional[torch.Tensor], used: list) -> list:
    """Return the number of leading keys that each sequence skips, at most its length."""
    skipped = [0] * len(used) if leftpad is None else leftpad.tolist()
    for i, (count, length) in enumerate(zip(skipped, used)):
        if not 0 <= count <= length:
            raise ValueError(f"{name}[{i}]={count}, but sequence {i} has {length} keys")
    return skipped


def _pages(block_table: torch.Tensor, used: Sequence[int], page_size: int, num_pages: int) -> None:
    """Check that the table and the cache have the pages that the used lengths need. Further entries are
    ignored.
    """
    for i, length in enumerate(used):
        needed = -(-length // page_size)
        if needed > block_table.shape[1]:
            raise ValueError(
                f"sequence {i} has {length} keys, but its {block_table.shape[1]} pages hold only "
                f"{block_table.shape[1] * page_size}: widen block_table"
            )
        for page in block_table[i, :needed].tolist():
            if not 0 <= page < num_pages:
                raise ValueError(f"block_table[{i}] names page {page}, but there are only {num_pages} pages")


def _cache_values(call: Call) -> None:
    given, capacity = call.cache, call.options.max_seqlen_k
    batch, seqlen_new = call.q.shape[0], 0 if given.k is None else given.k.shape[1]
    filled = [capacity] * batch if given.cache_seqlens is None else given.cache_seqlens.tolist()
    for i, length in enumerate(filled):
        if length < 0 or length + seqlen_new > capacity:
            appended = f" and {seqlen_new} to append" if seqlen_new else ""
            raise ValueError(f"cache_seqlens[{i}]={length}{appended}, but the cache holds {capacity} keys")
    _leftpad("cache_leftpad", call.leftpad_k, filled)
    if given.cache_batch_idx is not None:
        _cache_rows(given.cache_batch_idx.tolist(), call.k.shape[0], seqlen_new)
    if call.block_table is not None:
        used = [length + seqlen_new for length in filled]
        _pages(call.block_table, used, call.k.shape[1], call.k.shape[0])
        if seqlen_new > 0:
            _written_once(call.block_table, filled, seqlen_new, call.k.shape[1])
    if given.rotary_cos is not None:
        needed = max([0, *(length + (call.q.shape[1] if given.steps else 1) for length in filled)])
        if given.rotary_cos.shape[0] < needed:
            raise ValueError(
                f"rotary_cos has {given.rotary_cos.shape[0]} rows, but positions up to {needed - 1} may be "
                "used"
            )


def _cache_rows(entries: list, rows: int, seqlen_new: int) -> None:
    for i, entry in enumerate(entries):
        if not 0 <= entry < rows:
            raise ValueError(f"cache_batch_idx[{i}]={entry}, but the cache has {rows} rows")
    if seqlen_new > 0 and len(set(entries)) < len(entries):
        raise ValueError(f"cache_batch_idx={entries}: two sequences cannot append to the same cache row")


def _written_once(block_table: torch.Tensor, filled: list, seqlen_new: int, page_size: int) -> None:
    """Check that a page that is appended to occurs only once. Sequences may share pages that are only
    read."""
    writer: dict = {}
    for i, length in enumerate(filled):
        pages = block_table[i, : -(-(length + seqlen_new) // page_size)].tolist()
        for page in pages[length // page_size :]:
            if pages.count(page) > 1:
                raise ValueError(f"block_table[{i}] names page {page} twice, and the sequence appends to it")
            if writer.setdefault(page, i) != i:
                raise ValueError(f"block_table: sequences {writer[page]} and {i} both append to page {page}")
