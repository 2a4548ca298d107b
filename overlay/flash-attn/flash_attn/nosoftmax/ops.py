"""Run a call with its derivatives: as an autograd.Function in eager mode, as PyTorch operators elsewhere.

Eager calls avoid the operators, which would cost the host as much as everything else. torch.compile,
torch.export, fake and meta tensors, dispatch modes and tensor subclasses use the operators. An operator
chooses its backend when it runs, because a choice made while tracing would add a guard on lengths.

With the identity, attention is linear in each of q, k and v, and its three gradients are attention again.
Derivatives of any order are therefore sums of forward and backward calls with other tensors in the places of
q, k and v, on every backend. ALiBi adds a constant to the scores, which vanishes in derivatives by q or k:
calls with another tensor in these places omit alibi_slopes. decay_slopes multiply, and stay.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.autograd import forward_ad

from . import checks, flops, masking
from .backends import Result
from .call import TENSORS, Cache, Call, Frame, Options, declared, needs_grad
from .choice import MODULES, choose, wanted

_NAMESPACE = "flash_attn_nosoftmax"
CAN_DEFINE = hasattr(torch.library, "register_autograd")  # torch 2.4
# Tensors of other types have their own dispatch. Symbolic numbers occur only with a compiler or a mode.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


# ---- Without derivatives ----


def _chosen(call: Call, algorithm: str) -> Any:
    """Return the backend for "auto" or "quadratic", which operators leave open."""
    return MODULES[choose(call, wanted(algorithm, "auto")).backend]


def check_values(call: Call) -> None:
    """Check the contents of a call's tensors, which are on the CPU."""
    checks.values(call)
    masking.values(call)


def run(call: Call, backend: str) -> Result:
    """Run the forward pass without recording a graph."""
    if call.q.is_cpu:
        check_values(call)
    module = MODULES.get(backend) or _chosen(call, backend)
    if torch.autograd._profiler_enabled():
        with _record("forward", module):
            return module.forward(call)
    return module.forward(call)


def repeated(call: Call, backend: str, derives: bool) -> Optional[Callable[..., torch.Tensor]]:
    """Return what runs calls like this one, without a cache, with other tensors, where runs_alone(): a
    function of the tensors that are there, which returns the output. None if only `attend` can run them, or
    if they return more. derives: see needs_grad.
    """
    if call.options.dropout_p > 0.0 or call.options.return_attn_probs:
        return None
    given, frame = call.apart()
    if derives:
        return lambda *tensors: Attention.apply_now(*tensors, frame, backend)
    prepared = getattr(MODULES[backend], "prepared", None)
    return None if prepared is None or len(given) > 3 else prepared(call)


def runs_alone() -> bool:
    """Whether nothing around a call follows what it computes, but for reverse-mode autograd."""
    return not (_are_transforms_active() or forward_ad._current_level >= 0 or _is_profiled())


_are_transforms_active = torch._C._are_functorch_transforms_active
_is_profiled = torch.autograd._profiler_enabled


def run_backward(call: Call, backend: str, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    """Compute dq, dk and dv without recording a graph."""
    module = MODULES.get(backend) or _chosen(call, backend)
    if torch.autograd._profiler_enabled():
        with _record("backward", module):
            return module.backward(call, dout, rng_state)
    return module.backward(call, dout, rng_state)


def _record(name: str, module: Any) -> Any:
    """Name a pass and its backend in a profile, such as flash_attn_nosoftmax::forward[fa2]."""
    backend = module.__name__.rpartition(".")[2]
    return torch.profiler.record_function(f"{_NAMESPACE}::{name}[{backend}]")


# ---- With derivatives ----


def followed(call: Call) -> bool:
    """Whether a compiler, a dispatch mode or a tensor subclass must see the call as an operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, call.tensors))
        or call.q.is_meta
        or torch._C._get_tracing_state() is not None
    ) and CAN_DEFINE


def attend(
    call: Call, backend: str, as_operator: Optional[bool] = None, derives: Optional[bool] = None
) -> Result:
    """Run the forward pass with its derivatives. backend: a name, "auto" or "quadratic". as_operator and
    derives: the results of `followed` and of `needs_grad`, if known.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and (followed(call) if as_operator is None else as_operator):
        out, rng_state, s_dmask = _OPERATORS.forward(*call.tensors, *call.options, backend)
        return Result(out, *_or_none(call, rng_state, s_dmask))
    derives = needs_grad(call) if derives is None else derives
    if transformed or derives or forward_ad._current_level >= 0:
        apply = Attention.apply if transformed else Attention.apply_now
        given, frame = call.apart()
        result = apply(*given, frame, backend)
        return Result(*result) if isinstance(result, tuple) else Result(result)
    return run(call, backend)


def _or_none(call: Call, rng_state: torch.Tensor, s_dmask: torch.Tensor) -> tuple:
    dropped = call.options.dropout_p > 0.0
    return rng_state if dropped else None, s_dmask if dropped and call.options.return_attn_probs else None


def gradients(call: Call, backend: str, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    """Compute dq, dk and dv with their derivatives. Raises RuntimeError for block_table, which has no
    backward.
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
        given, frame = call.apart()
        return apply(dout, *given, rng_state, frame, backend)
    return run_backward(call, backend, dout, rng_state)


def _saved(ctx) -> tuple:
    """Return ctx.saved_tensors, unwrapped if the wrappers are dead: the function that torch.func.vjp returns
    may be called after its transform has ended.
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
        """Call apply where no torch.func transform is active, without its search for default values, which
        costs the host as much per call as everything else here."""
        return super(torch.autograd.Function, cls).apply(*inputs)


class Attention(_Function):
    """(*tensors of a Call, Frame, backend) -> out, or with dropout a Result."""

    @staticmethod
    def forward(*inputs):
        *tensors, frame, backend = inputs
        result = run(frame.call(tensors), backend)
        return result.out if frame.options.dropout_p == 0.0 else tuple(result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.frame, ctx.backend = inputs
        rng_state = None
        if isinstance(output, tuple):
            _, rng_state, s_dmask = output
            ctx.mark_non_differentiable(*[x for x in (rng_state, s_dmask) if x is not None])
        ctx.set_materialize_grads(False)
        # Save lengths and slopes too, so that autograd notices if they change before the backward.
        ctx.save_for_backward(*tensors, rng_state)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors, rng_state)

    @staticmethod
    def backward(ctx, dout, *_):
        constants = (None,) * (len(ctx.frame.places) - 1)  # the tensors after v, the frame and the backend
        if dout is None:
            return None, None, None, *constants
        *tensors, rng_state = _saved(ctx)
        return *gradients(ctx.frame.call(tensors), ctx.backend, dout, rng_state), *constants

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, _ = ctx.saved_tensors
        call = ctx.frame.call(tensors)
        _linear_only(call, "a forward derivative")
        out = _in_each_place(call, ctx.backend, *tangents[:3])  # attention is linear in each of the three
        if out is None:
            out = call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1], dtype=call.out_dtype)
        return out if call.options.dropout_p == 0.0 else (out, None, None)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, frame, backend = inputs
        call = _folded(info.batch_size, in_dims, tensors, frame)
        return attend(call, backend).out.unflatten(0, (info.batch_size, -1)), 0


class Gradients(_Function):
    """(dout, *tensors of a Call, rng_state, Frame, backend) -> dq, dk, dv."""

    @staticmethod
    def forward(dout, *inputs):
        *tensors, rng_state, frame, backend = inputs
        return tuple(run_backward(frame.call(tensors), backend, dout, rng_state))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, *tensors, _, ctx.frame, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dout, *tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(dout, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        dout, *tensors = _saved(ctx)
        grads = _second(ctx.frame.call(tensors), ctx.backend, dout, cotangents)
        return *grads, *(None,) * len(tensors)  # the tensors after v, rng_state, the frame and the backend

    @staticmethod
    def jvp(ctx, *tangents):
        dout, *tensors = ctx.saved_tensors
        call = ctx.frame.call(tensors)
        _linear_only(call, "a second derivative")
        return _tangents_of_gradients(call, ctx.backend, dout, *tangents[:4])

    @staticmethod
    def vmap(info, in_dims, dout, *inputs):
        *tensors, _, frame, backend = inputs
        call = _folded(info.batch_size, in_dims[1:], tensors, frame)
        grads = gradients(call, backend, _fold(info.batch_size, in_dims[0], dout), None)
        return tuple(grad.unflatten(0, (info.batch_size, -1)) for grad in grads), (0, 0, 0)


def _linear_only(call: Call, what: str) -> None:
    """Raise RuntimeError if the derivative would need more than forward and backward calls."""
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
    """Run attention with other tensors as q, k or v; None if one of them is None. ALiBi stays only if v is
    replaced.
    """
    if any(x is None for x in places.values()):
        return None
    call = call._replace(**places) if "v" in places else call._replace(alibi_slopes=None, **places)
    return attend(call, backend).out


def _backward_of(
    call: Call, backend: str, dout: Optional[torch.Tensor], **places: Optional[torch.Tensor]
) -> tuple:
    """Run the backward pass in the same way. ALiBi stays if nothing is replaced, too."""
    if dout is None or any(x is None for x in places.values()):
        return None, None, None
    call = (
        call._replace(**places) if not places or "v" in places else call._replace(alibi_slopes=None, **places)
    )
    return gradients(call, backend, dout, None)


def _in_each_place(call: Call, backend: str, q, k, v) -> Optional[torch.Tensor]:
    """Sum the attention with q replaced, with k replaced and with v replaced; None if all three are None."""
    return _sum(
        _forward_of(call, backend, q=q), _forward_of(call, backend, k=k), _forward_of(call, backend, v=v)
    )


def _second(call: Call, backend: str, dout: torch.Tensor, cotangents: tuple) -> tuple:
    """Compute the gradients of <gq, dq> + <gk, dk> + <gv, dv> by dout, q, k and v; (gq, gk, gv): the
    cotangents.

    Each of the three products is the sum over all visible i, j of scale (dO_i . v_j) (q_i . k_j), with gq in
    place of q, gk of k or gv of v. Its gradients by the other tensors are therefore attention, or gradients
    of attention, with that replacement.
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
    """Compute the tangents of dq, dk and dv. Each gradient is linear in dout and in the other two of q, k and
    v.
    """
    q0, k0, v0 = _backward_of(call, backend, tangent_dout)
    _, k1, v1 = _backward_of(call, backend, dout, q=tangent_q)
    q2, _, v2 = _backward_of(call, backend, dout, k=tangent_k)
    q3, k3, _ = _backward_of(call, backend, dout, v=tangent_v)
    totals = _sum(q0, q2, q3), _sum(k0, k1, k3), _sum(v0, v1, v2)
    return tuple(
        torch.zeros_like(x, dtype=call.out_dtype) if total is None else total
        for x, total in zip(call.tensors, totals)
    )


def _fold(count: int, dim: Optional[int], x: torch.Tensor) -> torch.Tensor:
    """Merge the vmap axis `dim` of x into its first axis, the batch."""
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _folded(count: int, in_dims: tuple, tensors: list, frame: Frame) -> Call:
    """Make one dense call of all entries of a vmap."""
    call, options = frame.call(tensors), frame.options
    dims_of = dict(zip(frame.places, in_dims))
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
        name: _fold_constants(count, dims_of.get(Call._fields.index(name)), getattr(call, name), batch, dims)
        for name, dims in (
            ("alibi_slopes", 1),
            ("sigmoid_biases", 1),
            ("decay_slopes", 1),
            ("row_factors", 0),
            ("diagonal", 0),
            ("target_counts", 0),
            ("context_counts", 0),
            ("interval_starts", 0),
            ("interval_ends", 0),
        )
    }
    return call._replace(q=q, k=k, v=v, **more)


def _fold_constants(
    count: int, dim: Optional[int], x: Optional[torch.Tensor], batch: int, shared_dims: int
) -> Optional[torch.Tensor]:
    """Fold a tensor with the batch as its first axis, such as (batch, nheads), or with shared_dims axes and
    no batch, such as (nheads,).
    """
    if x is None or (dim is None and x.dim() == shared_dims):
        return x
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    if x.dim() == 1 + shared_dims:
        x = x.unsqueeze(1).expand(count, batch, *x.shape[1:])
    return x.flatten(0, 1)


# ---- As operators ----


class _Operators:
    """The operators of torch.ops.flash_attn_nosoftmax, set below."""

    forward: Any
    backward: Any
    kvcache: Any


_OPERATORS = _Operators()
_TENSORS, _OPTIONS = declared(Call, Call._fields[:TENSORS]), declared(Options)
_CACHE_TENSORS = Cache._fields[:6]


def operator(name: str, schema: str) -> Any:
    """Define an operator, if this PyTorch can, and return it in place of the function.
    torch.library.custom_op would do the same, but add unneeded work to each call.
    """

    def define(function):
        if not CAN_DEFINE:
            return function
        qualified = f"{_NAMESPACE}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        setattr(_Operators, name, getattr(getattr(torch.ops, _NAMESPACE), name).default)
        return getattr(_Operators, name)

    return define


def fake(name: str) -> Any:
    """Register the function that runs the operator of that name on fake and meta tensors."""
    return torch.library.register_fake(f"{_NAMESPACE}::{name}") if CAN_DEFINE else lambda function: function


def _split(arguments: tuple) -> tuple[Call, str]:
    """Return the call and the backend in the arguments of the operator forward."""
    *tensors, backend = arguments
    return Call(*tensors[:TENSORS], Options(*tensors[TENSORS:])), backend


def _after_dout(arguments: tuple) -> tuple[Call, str]:
    """Return the same of the arguments after dout of the operator backward."""
    return _split((*arguments[:TENSORS], *arguments[TENSORS + 1 :]))


@operator("forward", f"({_TENSORS}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)")
def _forward(*arguments):
    """Return out, rng_state and S_dmask of a Result, as empty tensors where absent."""
    call, backend = _split(arguments)
    out, rng_state, s_dmask = run(call, backend)
    rng_state = call.q.new_empty(0, dtype=torch.int64) if rng_state is None else rng_state.to(call.q.device)
    return out.contiguous(), rng_state, call.q.new_empty(0) if s_dmask is None else s_dmask


def _round128(length: int) -> int:
    return (length + 127) // 128 * 128


@fake("forward")
def _(*arguments):
    call, _ = _split(arguments)
    q, o = call.q, call.options
    rng_state = q.new_empty(2 if o.dropout_p > 0.0 else 0, dtype=torch.int64)
    s_dmask = q.new_empty(0)
    if o.return_attn_probs and o.dropout_p > 0.0:
        s_dmask = q.new_empty(call.batch, q.shape[-2], _round128(o.max_seqlen_q), _round128(o.max_seqlen_k))
    return q.new_empty(*q.shape[:-1], call.v.shape[-1], dtype=call.out_dtype), rng_state, s_dmask


@operator(
    "backward",
    f"(Tensor dout, {_TENSORS}, Tensor? rng_state, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
)
def _backward(dout, *arguments):
    call, backend = _after_dout(arguments)
    return tuple(grad.contiguous() for grad in run_backward(call, backend, dout, arguments[TENSORS]))


@fake("backward")
def _(dout, *arguments):
    call, _ = _split((*arguments[:TENSORS], *arguments[TENSORS + 1 :]))
    return tuple(x.new_empty(x.shape, dtype=call.out_dtype) for x in call.tensors[:3])


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


if CAN_DEFINE:
    torch.library.register_autograd(f"{_NAMESPACE}::forward", _derive, setup_context=_keep_for_backward)
    torch.library.register_autograd(f"{_NAMESPACE}::backward", _derive_again, setup_context=_keep_for_second)


def forward_operator() -> Any:
    """Return the operator of the forward pass, for rules of other packages, such as DTensor's."""
    return _OPERATORS.forward


def backward_operator() -> Any:
    return _OPERATORS.backward


# ---- A cache ----


class WithoutBackward(torch.autograd.Function):
    """Makes the backward of a call with a cache an error, not a silent None."""

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
    """Append new keys and values to the cache in place, and return the output."""
    given = call.cache
    if followed(call) or not _PLAIN.issuperset(map(type, given[:6])):
        return _OPERATORS.kvcache(
            call.q, call.k, call.v, *given[:6], *call.tensors[6:], *given[6:], *call.options, backend
        )
    inputs = (call.q, given.k, given.v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        with torch.no_grad():
            out = run(call, backend).out
        return WithoutBackward.apply(out, *inputs)
    return run(call, backend).out


_KEPT = declared(Call, Call._fields[6:TENSORS])  # leftpad_k and the tensors after it


@operator(
    "kvcache",
    f"(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {declared(Cache, _CACHE_TENSORS)}, {_KEPT}, "
    f"{declared(Cache, Cache._fields[6:])}, {_OPTIONS}, str backend) -> Tensor",
)
def _kvcache(q, k_cache, v_cache, *arguments):
    return run(_call_with_cache(q, k_cache, v_cache, *arguments), arguments[-1]).out.contiguous()


@fake("kvcache")
def _(q, k_cache, v_cache, *arguments):
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


def _call_with_cache(q, k_cache, v_cache, *arguments) -> Call:
    """Return the call in the arguments of the operator kvcache, without the backend."""
    given, arguments = arguments[:6], arguments[6:]
    tensors, arguments = arguments[: TENSORS - 6], arguments[TENSORS - 6 :]
    numbers, options = arguments[:3], arguments[3:-1]
    return Call(q, k_cache, v_cache, None, None, None, *tensors, Options(*options), Cache(*given, *numbers))


if CAN_DEFINE:
    flops.register(
        {
            _OPERATORS.forward: lambda *arguments: flops.of_forward(_split(arguments)[0]),
            _OPERATORS.backward: lambda dout, *arguments: flops.of_backward(_after_dout(arguments)[0]),
            _OPERATORS.kvcache: lambda *arguments: flops.of_forward(_call_with_cache(*arguments)),
        }
    )
