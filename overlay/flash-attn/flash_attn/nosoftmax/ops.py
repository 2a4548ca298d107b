"""A call with its derivatives: one autograd.Function, and one pair of operators for whatever follows
operators.

A call in eager mode goes without an operator, which would cost the host as much as all the rest.
torch.compile, torch.export, fake and meta tensors, dispatch modes and tensors with a dispatch of their own
meet the operators, whose backend is chosen when they run: a choice made while tracing would be a guard on
lengths.

With the identity attention is linear in each of q (in dS), k and v, and its three gradients are attention
again. So second derivatives are sums of forward and backward calls with other tensors in these places, of any
order, on every backend. ALiBi adds to the scores a constant, which belongs to P alone: to what contains v's
place, and to no other term.
"""

from typing import Any, Optional

import torch
from torch.autograd import forward_ad

from . import checks
from .backends import Result
from .call import TENSORS, Cache, Call, Options, declared, needs_grad
from .choice import MODULES, choose, wanted

_NAMESPACE = "flash_attn_nosoftmax"
_CAN_DEFINE = hasattr(torch.library, "register_autograd")  # torch 2.4
# A tensor of another type has a dispatch of its own. A number that is not known yet comes with a compiler or
# a mode.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


# ---- Without derivatives ----


def _module(call: Call, backend: str) -> Any:
    """The backend of that name; "auto" and "quadratic" are chosen now."""
    return MODULES.get(backend) or MODULES[choose(call, wanted(backend, "auto")).backend]


def run(call: Call, backend: str) -> Result:
    """The forward pass, of which no graph is recorded."""
    if call.q.is_cpu:
        checks.values(call)
    return _module(call, backend).forward(call)


def run_backward(call: Call, backend: str, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    """dq, dk and dv, of which no graph is recorded."""
    return _module(call, backend).backward(call, dout, rng_state)


# ---- With derivatives ----


def followed(call: Call) -> bool:
    """Whether a compiler, a dispatch mode or a tensor's own type is to see which operators are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, call.tensors))
        or call.q.is_meta
        or torch._C._get_tracing_state() is not None
    ) and _CAN_DEFINE


def attend(call: Call, backend: str, as_operator: Optional[bool] = None) -> Result:
    """The forward pass with its derivatives. backend: a name, or "auto" or "quadratic". as_operator:
    `followed`, if known.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and (followed(call) if as_operator is None else as_operator):
        out, rng_state, s_dmask = _OPERATORS.forward(*call.tensors, *call.options, backend)
        return Result(out, *_or_none(call, rng_state, s_dmask))
    if transformed or needs_grad(call) or forward_ad._current_level >= 0:
        apply = Attention.apply if transformed else Attention.apply_now
        result = apply(*call.tensors, call.options, backend)
        return Result(*result) if isinstance(result, tuple) else Result(result)
    return run(call, backend)


def _or_none(call: Call, rng_state: torch.Tensor, s_dmask: torch.Tensor) -> tuple:
    dropped = call.options.dropout_p > 0.0
    return rng_state if dropped else None, s_dmask if dropped and call.options.return_attn_probs else None


def gradients(call: Call, backend: str, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    """dq, dk and dv with their derivatives. Raises RuntimeError for pages, which no backend has
    gradients of.
    """
    if call.block_table is not None:
        raise RuntimeError(
            "block_table has no backward: call this under torch.no_grad(), or pack the keys and values"
        )
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and followed(call):
        return _OPERATORS.backward(dout, *call.tensors, rng_state, *call.options, backend)
    if transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        apply = Gradients.apply if transformed else Gradients.apply_now
        return apply(dout, *call.tensors, rng_state, call.options, backend)
    return run_backward(call, backend, dout, rng_state)


def _saved(ctx) -> tuple:
    """ctx.saved_tensors. What torch.func.vjp returns may be called when its transform is over: its wrappers
    are dead then.
    """
    tensors = ctx.saved_tensors
    if torch._C._are_functorch_transforms_active() or not any(map(_is_wrapped, filter(_is_there, tensors))):
        return tensors
    return torch._functorch.utils.unwrap_dead_wrappers(tensors)


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _is_there(x: Optional[torch.Tensor]) -> bool:
    return x is not None


class _Function(torch.autograd.Function):
    @classmethod
    def apply_now(cls, *inputs):
        """apply where no transform of torch.func is active: without the search for default values, which
        costs the host as much at each call as everything else here."""
        return super(torch.autograd.Function, cls).apply(*inputs)


class Attention(_Function):
    """(*tensors of a Call, options, backend) -> out, or with dropout a Result."""

    @staticmethod
    def forward(*inputs):
        *tensors, options, backend = inputs
        result = run(Call(*tensors, options), backend)
        return result.out if options.dropout_p == 0.0 else tuple(result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.backend = inputs
        rng_state = None
        if isinstance(output, tuple):
            _, rng_state, s_dmask = output
            ctx.mark_non_differentiable(*[x for x in (rng_state, s_dmask) if x is not None])
        ctx.set_materialize_grads(False)
        # Lengths and slopes too: a change of theirs before the backward is noticed.
        ctx.save_for_backward(*tensors, rng_state)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors, rng_state)

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * (TENSORS + 2)
        *tensors, rng_state = _saved(ctx)
        grads = gradients(Call(*tensors, ctx.options), ctx.backend, dout, rng_state)
        return *grads, *(None,) * (TENSORS - 1)

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, _ = ctx.saved_tensors
        call = Call(*tensors, ctx.options)
        _linear_only(call, "a forward derivative")
        out = _in_each_place(call, ctx.backend, *tangents[:3])  # attention is linear in each of the three
        if out is None:
            out = call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1])
        return out if call.options.dropout_p == 0.0 else (out, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, options, backend = inputs
        call = _folded(info.batch_size, in_dims, tensors, options)
        return attend(call, backend).out.unflatten(0, (info.batch_size, -1)), 0


class Gradients(_Function):
    """(dout, *tensors of a Call, rng_state, options, backend) -> dq, dk, dv."""

    @staticmethod
    def forward(dout, *inputs):
        *tensors, rng_state, options, backend = inputs
        return tuple(run_backward(Call(*tensors, options), backend, dout, rng_state))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, *tensors, rng_state, ctx.options, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, *tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(dout, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        dout, *tensors = _saved(ctx)
        return *_second(Call(*tensors, ctx.options), ctx.backend, dout, cotangents), *(None,) * TENSORS

    @staticmethod
    def jvp(ctx, *tangents):
        dout, *tensors = ctx.saved_tensors
        call = Call(*tensors, ctx.options)
        _linear_only(call, "a second derivative")
        return _tangents_of_gradients(call, ctx.backend, dout, *tangents[:4])

    @staticmethod
    def vmap(info, in_dims, dout, *inputs):
        *tensors, _, options, backend = inputs
        call = _folded(info.batch_size, in_dims[1:], tensors, options)
        grads = gradients(call, backend, _fold(info.batch_size, in_dims[0], dout), None)
        return tuple(grad.unflatten(0, (info.batch_size, -1)) for grad in grads), (0, 0, 0)


def _linear_only(call: Call, what: str) -> None:
    """Raises RuntimeError if the derivative would need more than forward and backward calls."""
    o = call.options
    if o.activation != "identity":
        reason = f"activation={o.activation!r}"
    elif o.softcap > 0.0:
        reason = f"softcap={o.softcap}"
    elif o.dropout_p > 0.0:
        reason = f"dropout_p={o.dropout_p}"
    else:
        return
    raise RuntimeError(
        f'{what} of attention without softmax with {reason}: it is there for activation="identity" without '
        "softcap and dropout"
    )


def _sum(*terms: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    given = [x for x in terms if x is not None]
    if not given:
        return None
    total = given[0]
    for x in given[1:]:
        total = total + x
    return total


def _forward_of(call: Call, backend: str, **places: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Attention with other tensors as q, k or v; None if one of them is. ALiBi is for what stands in v's
    place alone.
    """
    if any(x is None for x in places.values()):
        return None
    call = call._replace(**places) if "v" in places else call._replace(alibi_slopes=None, **places)
    return attend(call, backend).out


def _backward_of(
    call: Call, backend: str, dout: Optional[torch.Tensor], **places: Optional[torch.Tensor]
) -> tuple:
    """The same for the gradients."""
    if dout is None or any(x is None for x in places.values()):
        return None, None, None
    call = (
        call._replace(**places) if not places or "v" in places else call._replace(alibi_slopes=None, **places)
    )
    return gradients(call, backend, dout, None)


def _in_each_place(call: Call, backend: str, q, k, v) -> Optional[torch.Tensor]:
    """Attention with q in q's place, plus that with k in k's and that with v in v's; None if all
    three are.
    """
    return _sum(
        _forward_of(call, backend, q=q), _forward_of(call, backend, k=k), _forward_of(call, backend, v=v)
    )


def _second(call: Call, backend: str, dout: torch.Tensor, cotangents: tuple) -> tuple:
    """The gradients of <gq, dq> + <gk, dk> + <gv, dv> by dout, q, k and v, with (gq, gk, gv) the cotangents.

    Each of the three products is the sum over all visible i, j of scale (dO_i . v_j) (q_i . k_j), with gq in
    q's place, gk in k's or gv in v's: so each of the others is the attention, or the gradient of one, with
    that tensor in that place.
    """
    _linear_only(call, "a second derivative")
    gq, gk, gv = cotangents
    ddout = _in_each_place(call, backend, gq, gk, gv)
    _, k_by_q, v_by_q = _backward_of(call, backend, dout, q=gq)
    q_by_k, _, v_by_k = _backward_of(call, backend, dout, k=gk)
    q_by_v, k_by_v, _ = _backward_of(call, backend, dout, v=gv)
    return ddout, _sum(q_by_k, q_by_v), _sum(k_by_q, k_by_v), _sum(v_by_q, v_by_k)


def _tangents_of_gradients(
    call: Call, backend: str, dout, tangent_dout, tangent_q, tangent_k, tangent_v
) -> tuple:
    """The changes of dq, dk and dv, each of which is linear in dout and in the two tensors that it is not the
    gradient of.
    """
    q0, k0, v0 = _backward_of(call, backend, tangent_dout)
    _, k1, v1 = _backward_of(call, backend, dout, q=tangent_q)
    q2, _, v2 = _backward_of(call, backend, dout, k=tangent_k)
    q3, k3, _ = _backward_of(call, backend, dout, v=tangent_v)
    totals = _sum(q0, q2, q3), _sum(k0, k1, k3), _sum(v0, v1, v2)
    return tuple(torch.zeros_like(x) if total is None else total for x, total in zip(call.tensors, totals))


def _fold(count: int, dim: Optional[int], x: torch.Tensor) -> torch.Tensor:
    """x with the axis `dim` of vmap joined to the batch, its first axis."""
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _folded(count: int, in_dims: tuple, tensors: list, options: Options) -> Call:
    """The call of all entries of a vmap over a dense call."""
    call = Call(*tensors, options)
    if options.dropout_p > 0.0:
        raise RuntimeError(
            f"vmap of attention with dropout_p={options.dropout_p}: its mask can't be drawn for each entry, "
            "leave it out"
        )
    if call.varlen:
        raise RuntimeError("vmap of a packed call: pack the entries into one call, with cu_seqlens of all")
    q, k, v = (_fold(count, dim, x) for dim, x in zip(in_dims, call.tensors[:3]))
    batch = q.shape[0] // count
    more = {
        name: _fold_constants(count, in_dims[Call._fields.index(name)], getattr(call, name), batch, dims)
        for name, dims in (("alibi_slopes", 1), ("sigmoid_biases", 1), ("row_factors", 0))
    }
    return call._replace(q=q, k=k, v=v, **more)


def _fold_constants(
    count: int, dim: Optional[int], x: Optional[torch.Tensor], batch: int, shared_dims: int
) -> Optional[torch.Tensor]:
    """A tensor with the batch as its first axis, or without it where it has shared_dims axes: (batch,
    nheads), (nheads,).
    """
    if x is None or (dim is None and x.dim() == shared_dims):
        return x
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.dim() == 1 + shared_dims:
        x = x.unsqueeze(1).expand(count, batch, *x.shape[1:])
    return x.flatten(0, 1)


# ---- As operators ----


class _Operators:
    """forward, backward and kvcache as torch.ops.flash_attn_nosoftmax has them; set below."""

    forward: Any
    backward: Any
    kvcache: Any


_OPERATORS = _Operators()
_TENSORS, _OPTIONS = declared(Call, Call._fields[:TENSORS]), declared(Options)
_CACHE_TENSORS = Cache._fields[:6]


def _operator(name: str, schema: str) -> Any:
    """Defines an operator. torch.library.custom_op would do the same, and at each call things that are not
    needed here.
    """

    def define(function):
        if _CAN_DEFINE:
            qualified = f"{_NAMESPACE}::{name}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.impl(qualified, ("cpu", "cuda"), function)
            setattr(_Operators, name, getattr(getattr(torch.ops, _NAMESPACE), name).default)
        return function

    return define


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{_NAMESPACE}::{name}") if _CAN_DEFINE else lambda function: function


def _split(arguments: tuple) -> tuple[Call, str]:
    """The call and the backend in the arguments of the operator forward."""
    *tensors, backend = arguments
    return Call(*tensors[:TENSORS], Options(*tensors[TENSORS:])), backend


@_operator("forward", f"({_TENSORS}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)")
def _forward(*arguments):
    """Out, rng_state and S_dmask of a Result; what it does not have is empty."""
    call, backend = _split(arguments)
    out, rng_state, s_dmask = run(call, backend)
    rng_state = call.q.new_empty(0, dtype=torch.int64) if rng_state is None else rng_state.to(call.q.device)
    return out.contiguous(), rng_state, call.q.new_empty(0) if s_dmask is None else s_dmask


def _round128(length: int) -> int:
    return (length + 127) // 128 * 128


@_fake("forward")
def _(*arguments):
    call, _ = _split(arguments)
    q, o = call.q, call.options
    rng_state = q.new_empty(2 if o.dropout_p > 0.0 else 0, dtype=torch.int64)
    s_dmask = q.new_empty(0)
    if o.return_attn_probs and o.dropout_p > 0.0:
        s_dmask = q.new_empty(call.batch, q.shape[-2], _round128(o.max_seqlen_q), _round128(o.max_seqlen_k))
    return q.new_empty(*q.shape[:-1], call.v.shape[-1]), rng_state, s_dmask


@_operator(
    "backward",
    f"(Tensor dout, {_TENSORS}, Tensor? rng_state, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
)
def _backward(dout, *arguments):
    call, backend = _split((*arguments[:TENSORS], *arguments[TENSORS + 1 :]))
    return tuple(grad.contiguous() for grad in run_backward(call, backend, dout, arguments[TENSORS]))


@_fake("backward")
def _(dout, q, k, v, *options):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep_for_backward(ctx, inputs, output):
    call, ctx.backend = _split(inputs)
    ctx.options, ctx.count = call.options, len(inputs)
    ctx.save_for_backward(*call.tensors, output[1])


def _derive(ctx, dout, *_):
    *tensors, rng_state = ctx.saved_tensors
    call = Call(*tensors, ctx.options)
    grads = gradients(call, ctx.backend, dout, rng_state if call.options.dropout_p > 0.0 else None)
    return *grads, *(None,) * (ctx.count - 3)


def _keep_for_second(ctx, inputs, output):
    dout, *tensors = inputs[: 1 + TENSORS]
    ctx.options, ctx.backend, ctx.count = Options(*inputs[2 + TENSORS : -1]), inputs[-1], len(inputs)
    ctx.save_for_backward(dout, *tensors)


def _derive_again(ctx, *cotangents):
    dout, *tensors = ctx.saved_tensors
    return *_second(Call(*tensors, ctx.options), ctx.backend, dout, cotangents), *(None,) * (ctx.count - 4)


if _CAN_DEFINE:
    torch.library.register_autograd(f"{_NAMESPACE}::forward", _derive, setup_context=_keep_for_backward)
    torch.library.register_autograd(f"{_NAMESPACE}::backward", _derive_again, setup_context=_keep_for_second)


# ---- A cache ----


class _WithoutBackward(torch.autograd.Function):
    """The output of a cache, whose gradient nobody computes: asking for it is an error and no silent None."""

    @staticmethod
    def forward(ctx, out, *inputs):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        raise RuntimeError(
            "flash_attn_with_kvcache has no backward: call it under torch.no_grad(), or use flash_attn_func "
            "for training"
        )


def attend_cached(call: Call, backend: str) -> torch.Tensor:
    """The output of a call with a cache, to which new keys and values have been appended in place."""
    given = call.cache
    if followed(call) or not _PLAIN.issuperset(map(type, given[:6])):
        return _OPERATORS.kvcache(
            call.q, call.k, call.v, *given[:6], *call.tensors[6:], *given[6:], *call.options, backend
        )
    inputs = (call.q, given.k, given.v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        with torch.no_grad():
            out = run(call, backend).out
        return _WithoutBackward.apply(out, *inputs)
    return run(call, backend).out


_KEPT = declared(Call, Call._fields[6:TENSORS])  # leftpad_k and what follows it


@_operator(
    "kvcache",
    f"(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {declared(Cache, _CACHE_TENSORS)}, {_KEPT}, "
    f"{declared(Cache, Cache._fields[6:])}, {_OPTIONS}, str backend) -> Tensor",
)
def _kvcache(q, k_cache, v_cache, *arguments):
    given, arguments = arguments[:6], arguments[6:]
    tensors, arguments = arguments[: TENSORS - 6], arguments[TENSORS - 6 :]
    numbers, options, backend = arguments[:3], arguments[3:-1], arguments[-1]
    cache = Cache(*given, *numbers)
    call = Call(q, k_cache, v_cache, None, None, None, *tensors, Options(*options), cache)
    return run(call, backend).out.contiguous()


@_fake("kvcache")
def _(q, k_cache, v_cache, *arguments):
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])
