"""Add use_softmax to upstream's public functions, and provide `explain`, `forward` and `backward`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, Optional

import torch

from .. import extension
from . import checks, masking, ops
from .call import ARGUMENTS, Cache, Call, Frame, needs_grad
from .choice import Choice, Wanted, choice_of_environment, choose, wanted

_DOC = """\
        use_softmax: bool. False: O = norm * dropout(mask * f(softmax_scale * Q K^T)) V, masked entries 0, no
            row maximum, no normalisation by the row; the docstring of flash_attn.nosoftmax.score says it in
            full. The arguments below are for use_softmax=False.
        activation: f: "identity", "relu", "relu2", "sigmoid", "silu", "gelu" or "softplus".
        sigmoid_bias: a float, or "-log n" with n the keys of the sequence, or a float32 tensor (nheads,) or
            (batch, nheads): added to the scores for activation="sigmoid".
        normalization: None, "1/n", "1/visible" or "1/sqrt(n)": the factor on each row of the output. Or the
            factor itself: a positive number, or a float32 tensor (batch,) or (batch, seqlen_q), packed
            (batch,) or (total_q,).
        decay_slopes: float32, not negative, (nheads,) or (batch, nheads), or None: each weight is multiplied
            by exp(-slope * |i + seqlen_k - seqlen_q - j|).
        mask: flash_attn.masks.HSTU or flash_attn.masks.Intervals, in place of causal and window_size: the
            keys that each query sees, in closed form. Not for flash_attn_with_kvcache.
        algorithm: "auto" takes linear time where that is exact and predicted faster; "quadratic" and "linear"
            choose.
        backend: "auto" takes the first of "linear" (linear time), "fa4" (flash-attn-4 of this patch set, on
            Hopper; not for little work that "fa2" can do), "fa2" (this package's CUDA extension) and "cpu"
            that can run the call; a name forces that one, and so does the environment variable
            FLASH_ATTENTION_NOSOFTMAX_BACKEND where this is "auto". A KV cache is for "fa2" and "cpu" alone.
            flash_attn.explain says which would run, and why.
        context_parallel: None, or a flash_attn.distributed.ContextParallel. q, k and v then hold this rank's
            tokens of sequences that are cut over the ranks of a group, and so does the output. All options
            are those of the whole sequences, and so are cu_seqlens and max_seqlen; but a tensor with an entry
            for each query, of normalization or of Intervals, is cut as q is.
            Without softmax softmax_lse is empty, and S_dmask is 1 where dropout kept and -1 where it dropped.
            head_dim_v may differ from head_dim. q, k and v may be nested tensors of the jagged layout where
            the function is not a packed one.
            Raises TypeError or ValueError for arguments that are wrong or do not fit together, and for a
            forced backend that can't run the call, NotImplementedError if none can.
"""
_KEYWORDS = {
    "activation": "identity",
    "sigmoid_bias": 0.0,
    "normalization": None,
    "decay_slopes": None,
    "mask": None,
    "algorithm": "auto",
    "backend": "auto",
    "context_parallel": None,
}
_ABSENT: Any = inspect.Parameter.empty  # use_softmax may be given by position, too
_SOFTMAX_BACKENDS = {"cpu": "cpu", "cuda": "fa2"}
# Calls that look the same are checked, and their backend is chosen, only once.
_MOST_LOOKS = 4096
_HAS_AUTOCAST = hasattr(torch, "get_autocast_dtype")  # torch 2.4: of any device


def softmax_optional(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add use_softmax as the last positional argument, and the keyword arguments of _KEYWORDS, to a public
    function of upstream.

    With use_softmax=True, the default, upstream's function is called unchanged.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    names = [p.name for p in parameters]
    has_cache = "k_cache" in names
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    known = frozenset(names)

    def bind(args: tuple, kwargs: dict) -> dict:
        """Do inspect.Signature.bind with defaults in code that torch.compile can trace."""
        given = dict(zip(names, args))
        given.update(kwargs)
        arguments = {**defaults, **given}
        # An argument is surplus, given twice, unknown or missing.
        if len(given) < len(args) + len(kwargs) or arguments.keys() != known:
            _raise_of_binding(function, signature, args, kwargs)
        return arguments

    def split(args: tuple) -> tuple:
        """Return (use_softmax, args) if no keyword gave it, with args as upstream's function takes them."""
        return (args[-1], args[:-1]) if len(args) == len(names) + 1 else (True, args)

    @functools.wraps(function)
    def run(
        *args, use_softmax=_ABSENT, activation="identity", sigmoid_bias=0.0, normalization=None,
        decay_slopes=None, mask=None, algorithm="auto", backend="auto", context_parallel=None, **kwargs
    ):  # fmt: skip
        if use_softmax is _ABSENT:
            use_softmax, args = split(args)
        if use_softmax is True:
            given = (
                activation, sigmoid_bias, normalization, decay_slopes, mask, algorithm, backend,
                context_parallel,
            )  # fmt: skip
            if not _is_plain(*given):
                _check_softmax(bind(args, kwargs), **dict(zip(_KEYWORDS, given)))
            return function(*args, **kwargs)
        score = use_softmax, activation, sigmoid_bias, normalization, decay_slopes
        values = (*args, *kwargs.values(), *score)
        if context_parallel is not None:
            make = functools.partial(_parallel_call, bind, args, kwargs, score, mask)
            looks = _looks((function, len(args), *kwargs), values, algorithm, backend, has_cache)
            named = (*names[: len(args)], *kwargs, *_SCORE)
            repeats = None if looks is None or mask is not None else Repeats(looks, named, values)
            return _distributed().attend(make, context_parallel, algorithm, backend, repeats)
        if mask is not None:
            values += masking.parts_of(mask)
        looks, known = _recall(
            (function, len(args), *kwargs, type(mask)), values, algorithm, backend, has_cache
        )
        if known is not None and known.places is not None:
            if known.repeated is not None and ops.runs_alone():
                return known.repeated(*known.tensors(values))
            return _returned(known.call(values), known.backend, False, derives=known.derives)
        arguments, rebuild = bind(args, kwargs), None
        if getattr(arguments.get("q", arguments.get("qkv")), "is_nested", False):
            arguments, rebuild = _packed(arguments)
        call = _call_of(arguments, score, mask)
        if known is not None:
            return _returned(call, known.backend, False, rebuild)
        named = (*names[: len(args)], *kwargs, *_SCORE, *masking.names_of(mask))
        repeats = None if looks is None else Repeats(looks, named, values)
        return _returned(call, *_settle(call, algorithm, backend, repeats), rebuild)

    def question(args: tuple, kwargs: dict) -> Choice:
        """Return the Choice for flash_attn.explain."""
        chosen = {name: kwargs.pop(name, default) for name, default in _KEYWORDS.items()}
        use_softmax = kwargs.pop("use_softmax", _ABSENT)
        if use_softmax is _ABSENT:
            use_softmax, args = split(args)
        arguments = bind(args, kwargs)
        if use_softmax is True:
            choice = _check_softmax(arguments, **chosen)
            if choice.backend == "fa2":
                extension.load()  # raises ImportError, as the call does
            return choice
        mask, algorithm, backend, context_parallel = (
            chosen.pop(name) for name in ("mask", "algorithm", "backend", "context_parallel")
        )
        score = use_softmax, *chosen.values()
        if context_parallel is not None:
            make = functools.partial(_parallel_call, bind, args, kwargs, score, mask)
            return _distributed().explain(make, context_parallel, algorithm, backend)
        if getattr(arguments.get("q", arguments.get("qkv")), "is_nested", False):
            arguments, _ = _packed(arguments)
        call, among = _call_of(arguments, score, mask), wanted(algorithm, backend)
        _check(call)
        choice = choose(call, among)
        if call.q.device.type == "cpu":
            ops.check_values(call)
        return choice

    run.question = question
    run.__doc__ = (function.__doc__ or "").replace("\n    Return:\n", f"\n{_DOC}    Return:\n", 1)
    more = [inspect.Parameter("use_softmax", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=True)]
    more += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
        for name, value in _KEYWORDS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*parameters, *more])
    return run


_PLAIN = tuple(_KEYWORDS.values())


def _is_plain(*given: Any) -> bool:
    return not any(isinstance(x, torch.Tensor) for x in given) and given == _PLAIN


def _raise_of_binding(
    function: Callable, signature: inspect.Signature, args: tuple, kwargs: dict
) -> NoReturn:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None
    raise AssertionError("the arguments fit")


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Say which backend would run function(*args, **kwargs), and why the preferred ones would not.

    function: an attention function of flash_attn, such as flash_attn_func. The other arguments are those of
    the call. Computes nothing. Returns a Choice: print it, or read its attributes. With context_parallel it
    returns a flash_attn.distributed.attention.Method, which also has the bytes that the ranks exchange.
    Raises TypeError for another function, and any error of the call itself.

        >>> print(flash_attn.explain(flash_attn_func, q, k, v, use_softmax=False, activation="silu"))
        cpu, quadratic algorithm
          not linear: activation='silu' has no exact algorithm in linear time
          not fa4: q is on cpu, it takes CUDA tensors
          not fa2: q is on cpu, it takes CUDA tensors
    """
    question = getattr(function, "question", None)
    if question is None:
        raise TypeError(
            f"{function!r} is none of the attention functions of flash_attn, such as "
            "flash_attn.flash_attn_func"
        )
    return question(args, kwargs)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Compute attention without softmax outside autograd, for ring attention and custom autograd.Functions.

    q: (batch, seqlen_q, nheads, head_dim); k: (batch, seqlen_k, nheads_k, head_dim); v: (batch, seqlen_k,
    nheads_k, head_dim_v). options, by keyword: those of flash_attn_func. With cu_seqlens_q: the shapes and
    options of flash_attn_varlen_func, and also seqused_k and leftpad_k, int32 (batch,), where the keys that
    count in each sequence end and begin. return_attn_probs is not an option.

    Two options are for parts of a sequence. diagonal: the key that query 0 of a sequence is aligned with, an
    int or int32 (batch,), counted from key 0 of the call, which may lie before or behind all keys; None is
    seqlen_k - seqlen_q. Causal masks, windows, ALiBi, decay and "1/visible" count from there. Under mask=HSTU
    query r has position r + diagonal, and the call has all keys of the sequence: a query behind them raises
    on the CPU. Intervals are those of the queries given, wherever these lie. out_dtype: None for q's dtype,
    or torch.float32 (torch.float64 for float64 tensors) for results that are neither rounded to 16 bit nor
    saturated, and can be added up.

    Returns out, shaped as q with head_dim_v, and rng_state, int64 (2,), with which `backward` drops the same
    entries again; None without dropout. Raises the errors of the public functions.
    """
    with torch.no_grad():
        call, backend = _prepared(q, k, v, options)
        result = ops.attend(call, backend)
    return result.out, result.rng_state


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rng_state: Optional[torch.Tensor] = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of `forward` outside autograd: (dq, dk, dv), shaped as q, k and v.

    dout: has the shape of the output and the dtype of q. rng_state: the state that `forward` returned,
    required with dropout. The other arguments are those of `forward`, except seqused_k, leftpad_k and
    block_table, which have no backward and raise ValueError. The gradients have the dtype out_dtype. Neither
    the output nor a log-sum-exp is needed.
    """
    for name in ("seqused_k", "leftpad_k", "block_table"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} has no backward: give packed keys and values, with cu_seqlens_k of those that count"
            )
    with torch.no_grad():
        call, backend = _prepared(q, k, v, options)
        checks.dout(dout, call)
        checks.rng_state(rng_state, call)
        if call.q.device.type == "cpu" and not ops.followed(call):
            ops.check_values(call)
        return ops.gradients(call, backend, dout, rng_state)


_PAIR = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False, "activation": "identity", "sigmoid_bias": 0.0, "normalization": None,
    "decay_slopes": None, "mask": None, "algorithm": "auto",
    "backend": "auto", "diagonal": None, "out_dtype": None,
}  # fmt: skip
_PAIR_PACKED = {
    "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": None, "max_seqlen_k": None,
    "block_table": None,
    "seqused_k": None, "leftpad_k": None,
}  # fmt: skip


def _prepared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> tuple[Call, str]:
    algorithm, backend = options.get("algorithm", "auto"), options.get("backend", "auto")
    mask = options.pop("mask", None)
    values = (q, k, v, *options.values(), *masking.parts_of(mask))
    looks, known = _recall((_prepared, *options, type(mask)), values, algorithm, backend, strides=False)
    if known is not None and known.places is not None:
        return known.call(values), known.backend
    defaults = {**_PAIR, **_PAIR_PACKED} if "cu_seqlens_q" in options else _PAIR
    if unknown := sorted(options.keys() - defaults.keys()):
        raise TypeError(f"{unknown[0]} is no argument here: give {', '.join(defaults)}, by keyword")
    given = {**defaults, **options, "q": q, "k": k, "v": v, "return_attn_probs": False}
    for name in (
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k") if "cu_seqlens_q" in options else ()
    ):
        if given[name] is None:
            raise TypeError(f"{name} is missing: packed sequences need it beside cu_seqlens_q")
    call = _call_of(given, (False, *[given[name] for name in _SCORE[1:]]), mask)
    if known is not None:
        return call, known.backend
    repeats = (
        None if looks is None else Repeats(looks, ("q", "k", "v", *options, *masking.names_of(mask)), values)
    )
    return call, _settle(call, algorithm, backend, repeats)[0]


# ---- From the arguments of a function to a call ----


class _Known(NamedTuple):
    """The remembered result of checking a call and choosing its backend.

    places: the index of each tensor of the call among the argument values; None if a tensor is made from an
    argument, for example by a conversion, and for a call with a cache. frame: the rest of the call, if there
    are places. derives: whether autograd may ask for gradients. repeated: see ops.repeated.
    """

    backend: str
    places: Optional[tuple]
    frame: Optional[Frame]
    derives: bool
    repeated: Optional[Callable]

    def tensors(self, values: tuple) -> Sequence[torch.Tensor]:
        """Return the tensors of a call that looks the same."""
        tensors = [values[place] for place in self.places]
        if len(tensors) == 3:
            return tensors
        # Each backend takes any strides of q, k and v.
        return [*tensors[:3], *(x.contiguous() for x in tensors[3:])]

    def call(self, values: tuple) -> Call:
        return self.frame.call(self.tensors(values))


_known: dict[tuple, _Known] = {}
_SCORE = ("use_softmax", "activation", "sigmoid_bias", "normalization", "decay_slopes")
# The arguments that a call keeps as tensors, in whatever form, and not as numbers.
_OF_TENSORS = frozenset((
    *Call._fields, *Cache._fields, *ARGUMENTS.values(), "qkv", "kv", "k_cache", "v_cache", "cu_seqlens",
    "cache_leftpad",
))  # fmt: skip
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_REMEMBERED = checks.PLAIN | {torch.dtype}


# By names of this module, which take half as long to look up at each call.
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_modes_of_dispatch, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state


def _recall(of: tuple, values: tuple, algorithm: str, backend: str, strides: bool) -> tuple:
    """Return (looks, known): see `_looks`, and what is remembered of a call that looks so, if anything."""
    looks = _looks(of, values, algorithm, backend, strides)
    return looks, None if looks is None else _known.get(looks)


def _looks(of: tuple, values: tuple, algorithm: str, backend: str, strides: bool) -> Optional[tuple]:
    """Return a key of all that a check or a choice may depend on, except for tensor contents.

    None if the call may not be remembered: under a compiler or a dispatch mode, or with an argument that may
    change, such as a list. strides: whether the key includes the strides of the tensors.
    """
    if (
        _is_compiling()
        or _modes_of_dispatch() > 0
        or _tracing_state() is not None
        or type(algorithm) is not str
        or type(backend) is not str
    ):
        return None
    named = choice_of_environment() if backend == "auto" else None
    looks = [of, _is_grad_enabled(), algorithm, backend, named]
    if _is_autocast_enabled():
        looks += [_autocast_dtype(kind) for kind in _SOFTMAX_BACKENDS]
    try:
        for x in values:
            kind = type(x)
            if kind in _TENSORS:
                looks += x.shape, x.dtype, x.device, x.requires_grad
                if strides:
                    looks.append(x.stride())
            elif kind in _REMEMBERED:
                looks += kind, x
            elif kind is tuple and _REMEMBERED.issuperset(map(type, x)):
                looks += x, *map(type, x)
            else:
                return None
    except RuntimeError:  # a nested tensor of the strided layout has no shape
        return None
    return tuple(looks)


class Repeats(NamedTuple):
    """What tells that a call repeats an earlier one: how it looks, and its arguments by name."""

    looks: tuple
    names: tuple
    values: tuple

    @property
    def reads(self) -> bool:
        """Whether a tensor is in the place of a number: it is read, and its number may change."""
        return any(
            type(x) in _TENSORS and name not in _OF_TENSORS for name, x in zip(self.names, self.values)
        )

    def places(self, call: Call) -> Optional[tuple]:
        """The index of each tensor of the call among the values, None for one that is absent; None if a
        tensor is made from an argument, for example by a conversion.
        """
        found: list = []
        for field, x in zip(Call._fields, call.tensors):
            name = ARGUMENTS.get(field, field)
            at = self.names.index(name) if x is not None and name in self.names else None
            if x is not None and (at is None or self.values[at] is not x):
                return None
            found.append(at)
        return tuple(found)


def _remember(repeats: Repeats, call: Call, backend: str) -> None:
    """Remember the checked call and its backend."""
    if repeats.reads:
        return
    if len(_known) >= _MOST_LOOKS:
        _known.clear()
    places, derives = None if call.cache is not None else repeats.places(call), needs_grad(call)
    if places is None:
        _known[repeats.looks] = _Known(backend, None, None, derives, None)
        return
    places, (_, frame) = tuple(place for place in places if place is not None), call.apart()
    _known[repeats.looks] = _Known(backend, places, frame, derives, ops.repeated(call, backend, derives))


def _returned(
    call: Call,
    backend: str,
    as_operator: bool,
    rebuild: Optional[Callable] = None,
    derives: Optional[bool] = None,
) -> Any:
    """Run the call and return what the public function returns."""
    if call.cache is not None:
        return ops.attend_cached(call, backend)
    result = ops.attend(call, backend, as_operator, derives)
    out = result.out if rebuild is None else rebuild(result.out)
    if not call.options.return_attn_probs:
        return out
    lse = call.q.new_empty(0, dtype=torch.float32)
    return out, lse, call.q.new_empty(0) if result.s_dmask is None else result.s_dmask


def _settle(call: Call, algorithm: str, backend: str, repeats: Optional[Repeats]) -> tuple[str, bool]:
    """Check the call, and return its backend and whether it runs as an operator. An operator gets the
    requested name, and chooses when it runs. Remembers the answer, where the call may be remembered.
    """
    among = wanted(algorithm, backend)
    _check(call)
    if (repeats is None or call.q.is_meta) and ops.followed(call):
        return backend if backend != "auto" else algorithm, True
    name = choose(call, among).backend
    if repeats is not None:
        _remember(repeats, call, name)
    return name, False


def _check(call: Call) -> None:
    checks.tensors(call) if call.cache is None else checks.cache(call)
    masking.check(call)


def _check_softmax(
    arguments: dict, *, activation, sigmoid_bias, normalization, decay_slopes, mask, algorithm, backend,
    context_parallel,
) -> Choice:  # fmt: skip
    """Return the Choice for softmax, which depends on the device alone. Raises ValueError for an argument
    that contradicts it."""
    checks.nothing_beside_softmax(activation, sigmoid_bias, normalization, decay_slopes)
    if mask is not None:
        raise ValueError("mask is for attention without softmax: pass use_softmax=False, or leave it out")
    if context_parallel is not None:
        raise ValueError(
            "context_parallel with use_softmax=True: partial results of softmax do not add, pass "
            "use_softmax=False"
        )
    asked = (algorithm, backend) != ("auto", "auto")  # the environment applies only without softmax
    among = wanted(algorithm, backend) if asked else Wanted([])
    q = arguments.get("q", arguments.get("qkv"))
    checks.is_tensor("q", q)
    name = _SOFTMAX_BACKENDS.get(q.device.type)
    if asked and name not in among.names:
        raise ValueError(
            f"{among.forced or f'algorithm={algorithm!r}'} is not possible with use_softmax=True: tensors on "
            f"{q.device} have "
            + (f'backend="{name}" and algorithm="quadratic"' if name else "no backend")
            + "; leave it out, or pass use_softmax=False"
        )
    return Choice(name, "quadratic", {}, among.forced)


def _distributed() -> ModuleType:
    """Return the module that runs calls over several ranks, which imports torch.distributed."""
    from ..distributed import attention

    return attention


def _parallel_call(bind: Callable, args: tuple, kwargs: dict, score: tuple, mask: Any) -> Call:
    """Make a Call of this rank's tensors from the arguments of a public function."""
    arguments = bind(args, kwargs)
    if getattr(arguments.get("q", arguments.get("qkv")), "is_nested", False):
        raise ValueError("nested tensors with context_parallel: pack them, and give cu_seqlens")
    return _call_of(arguments, score, mask)


def _call_of(a: dict, score: tuple, mask: Any) -> Call:
    """Make a Call from the named arguments of a public function, and check its options."""
    if "k_cache" in a:
        return _cached_call(a, score, mask)
    q, k, v = _autocast(*_qkv(a))
    if "max_seqlen_q" in a or "max_seqlen" in a:
        longest, lengths = _lengths(a)
    else:
        longest, lengths = (q.shape[1], k.shape[1]) if q.dim() == k.dim() == 4 else (0, 0), (None,) * 5
    use_softmax, activation, *rest, decay_slopes = score
    *rest, factors, biases = checks.apart(*rest)
    if q.dim() == 0 or q.shape[-1] == 0:
        checks.rank("q", q, (checks.DENSE if lengths[0] is None else checks.PACKED)[0])
        checks.heads(1, 1, 0, 1)
    options = checks.options(
        q.shape[-1], *longest, a["dropout_p"], a["softmax_scale"], a["causal"], a["window_size"],
        a["softcap"], a["deterministic"], a["return_attn_probs"], activation, *rest, use_softmax=use_softmax,
    )  # fmt: skip
    of_mask, options = masking.taken(mask, options, a, decay_slopes)
    call = Call.of(
        options, q=q, k=k, v=v, **dict(zip(_LENGTHS, lengths)),
        alibi_slopes=_slopes("alibi_slopes", a["alibi_slopes"]), row_factors=factors, sigmoid_biases=biases,
        decay_slopes=_slopes("decay_slopes", decay_slopes), **of_mask._asdict(),
    )  # fmt: skip
    return _of_a_part(call, a["diagonal"], a["out_dtype"]) if "diagonal" in a else call


def _of_a_part(call: Call, diagonal: Any, out_dtype: Any) -> Call:
    """Add the options of `forward` and `backward` that are for a part of a sequence."""
    diagonal = _int32("diagonal", checks.diagonal(diagonal, call.batch, call.q.device))
    options = call.options._replace(wide=checks.wide(out_dtype, call.q))
    return call._replace(diagonal=diagonal, options=options)


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k", "block_table")


def _lengths(a: dict) -> tuple[tuple, tuple]:
    """Return (max_seqlen_q, max_seqlen_k) and the five tensors that locate the sequences of a packed call."""
    if "max_seqlen" in a:
        of_q, of_k, longest = a["cu_seqlens"], None, (a["max_seqlen"], a["max_seqlen"])
        checks.is_tensor("cu_seqlens", of_q)
    else:
        of_q, of_k, longest = a["cu_seqlens_q"], a["cu_seqlens_k"], (a["max_seqlen_q"], a["max_seqlen_k"])
        checks.is_tensor("cu_seqlens_q", of_q)
        checks.is_tensor("cu_seqlens_k", of_k)
    converted = _int32("cu_seqlens_q", of_q)
    return longest, (
        converted,
        # Keep one tensor if both are the same.
        converted if of_k is None or of_k is of_q else _int32("cu_seqlens_k", of_k),
        _int32("seqused_k", a.get("seqused_k")), _int32("leftpad_k", a.get("leftpad_k")),
        _int32("block_table", a.get("block_table")),
    )  # fmt: skip


def _cached_call(a: dict, score: tuple, mask: Any) -> Call:
    if a["return_softmax_lse"]:
        raise ValueError(
            "return_softmax_lse=True, but there is no log-sum-exp with use_softmax=False: leave it out; "
            "outputs over disjoint keys are merged by adding them"
        )
    q, k_cache, v_cache, k, v = (a[name] for name in ("q", "k_cache", "v_cache", "k", "v"))
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.is_tensor(name, x)
    for name, x in (("k", k), ("v", v), ("rotary_cos", a["rotary_cos"]), ("rotary_sin", a["rotary_sin"])):
        if x is not None:
            checks.is_tensor(name, x)
    checks.rank("q", q, checks.DENSE[0])
    q, k, v = _autocast(q, k, v)
    block_table, lengths = _int32("block_table", a["block_table"]), a["cache_seqlens"]
    checks.rank("k_cache", k_cache, (checks.CACHED if block_table is None else checks.PAGED)[1])
    capacity = k_cache.shape[1] * (
        1 if block_table is None or block_table.dim() != 2 else block_table.shape[1]
    )
    use_softmax, activation, *rest, decay_slopes = score
    *rest, factors, biases = checks.apart(*rest)
    if q.shape[-1] == 0:
        checks.heads(1, 1, 0, 1)
    options = checks.options(
        q.shape[-1], q.shape[1], capacity, 0.0, a["softmax_scale"], a["causal"], a["window_size"],
        a["softcap"], False, False, activation, *rest, use_softmax=use_softmax,
    )  # fmt: skip
    of_mask, options = masking.taken(mask, options, a, decay_slopes)
    if lengths is not None and not (isinstance(lengths, torch.Tensor) and lengths.dim() > 0):
        lengths = torch.full(
            (q.shape[0],), checks.integer("cache_seqlens", lengths), dtype=torch.int32, device=q.device
        )
    cache = Cache(
        k, v, _int32("cache_seqlens", lengths), a["rotary_cos"], a["rotary_sin"], _int32("cache_batch_idx",
        a["cache_batch_idx"]), checks.flag("rotary_interleaved", a["rotary_interleaved"]),
        checks.integer("num_splits", a["num_splits"]),
        options.window_left >= 0 or options.window_right >= 0,
    )  # fmt: skip
    return Call.of(
        options, cache, q=q, k=k_cache, v=v_cache, leftpad_k=_int32("cache_leftpad", a["cache_leftpad"]),
        block_table=block_table, alibi_slopes=_slopes("alibi_slopes", a["alibi_slopes"]),
        row_factors=factors, sigmoid_biases=biases, decay_slopes=_slopes("decay_slopes", decay_slopes),
        **of_mask._asdict(),
    )  # fmt: skip


def _qkv(a: dict) -> tuple:
    if "k" in a:
        q, k, v = three = a["q"], a["k"], a["v"]
        if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
            for name, x in zip("qkv", three):
                checks.is_tensor(name, x)
        return three
    if "qkv" in a:
        return _parts("qkv", a["qkv"], 3)
    checks.is_tensor("q", a["q"])
    return (a["q"], *_parts("kv", a["kv"], 2))


def _parts(name: str, packed: torch.Tensor, count: int) -> tuple:
    checks.is_tensor(name, packed)
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}, expected {count} as its third axis from the end"
        )
    return packed.unbind(-3)


def _autocast(*tensors: Optional[torch.Tensor]) -> tuple:
    """Under autocast, cast all but float64 to its dtype, as scaled_dot_product_attention does."""
    if not torch._C._is_any_autocast_enabled():  # one call in place of three
        return tensors
    dtype = _autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    casts = [x is not None and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    return tuple(x.to(dtype) if cast else x for x, cast in zip(tensors, casts))


def _autocast_dtype(kind: str) -> Optional[torch.dtype]:
    """Return the dtype to which autocast casts on devices of this type; None if it does not cast."""
    if kind not in _SOFTMAX_BACKENDS or not _HAS_AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _int32(name: str, x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Convert int64 to int32. Leave other dtypes for the checks to report."""
    if x is None:
        return None
    checks.is_tensor(name, x)
    if x.dtype == torch.int64:
        x = x.to(torch.int32)
    return x if x.is_contiguous() else x.contiguous()


def _slopes(name: str, x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    if x is None:
        return None
    checks.is_tensor(name, x)
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _packed(a: dict) -> tuple[dict, Callable]:
    """Turn a dense call with nested tensors (batch, ragged, nheads, head_dim) into a packed one. Returns its
    arguments, and a function that makes its output nested.
    """
    first = a.get("q", a.get("qkv"))
    if first.layout != torch.jagged or "cu_seqlens_q" in a or "cu_seqlens" in a or "k_cache" in a:
        raise ValueError("nested tensors: pass them in the jagged layout to a function that takes dense ones")
    packed, offsets = dict(a), {}
    for name in ("q", "k", "v", "qkv", "kv"):
        if name in a:
            x = a[name]
            if not isinstance(x, torch.Tensor) or not x.is_nested or x.lengths() is not None:
                raise ValueError(
                    f"{name}: if one tensor is nested all are, in the jagged layout without holes"
                )
            packed[name], offsets[name] = x.values(), x.offsets()
    of_q, of_k = offsets.get("q", offsets.get("qkv")), offsets.get("k", offsets.get("kv", offsets.get("qkv")))
    longest_q = int(of_q.diff().max()) if of_q.numel() > 1 else 0
    longest_k = longest_q if of_k is of_q else int(of_k.diff().max()) if of_k.numel() > 1 else 0
    packed.update(cu_seqlens_q=of_q, cu_seqlens_k=of_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k)
    return packed, lambda out: torch.nested.nested_tensor_from_jagged(out, of_q)
