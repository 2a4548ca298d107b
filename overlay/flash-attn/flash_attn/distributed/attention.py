"""Choose the method of a context-parallel call, and run it with its derivatives."""

from typing import Any, Callable, NamedTuple, Optional

import torch
from torch.autograd import forward_ad

from ..nosoftmax import checks, masking, ops
from ..nosoftmax.call import ARGUMENTS, Call, needs_grad
from ..nosoftmax.choice import Choice, choose, wanted
from . import decode
from .agreement import agree
from .methods import MODULES
from .plan import ContextParallel
from .problem import Problem, ambiguous_factors, refuse_unknown


class Method(NamedTuple):
    """The method that runs a context-parallel call. str() describes the choice.

    name: "state", "ulysses", "allgather" or "ring"; "alone" with one rank. forward_bytes, backward_bytes:
    what a rank receives from the others; backward_bytes is 0 if no gradient is asked for. passed_over: each
    other method, with the reason why it does not run the call. choice: the backend of this rank's blocks, and
    why it is not another; None for "state", which is linear time.
    """

    name: str
    world: int
    forward_bytes: int
    backward_bytes: int
    passed_over: dict
    choice: Optional[Choice]

    def __str__(self) -> str:
        if self.world == 1:
            return f"one rank, nothing moves\n{self.choice}"
        first = (
            f"{self.name} over {self.world} ranks: a rank receives {self.forward_bytes:,} bytes in the "
            f"forward pass and {self.backward_bytes:,} in the backward pass"
        )
        lines = [first, *(f"  not {name}: {reason}" for name, reason in self.passed_over.items())]
        return "\n".join([*lines, *([] if self.choice is None else str(self.choice).split("\n"))])


class _Known(NamedTuple):
    """The remembered result of checking a call. places: see Repeats.places. problem: without its tensors, and
    without the plan, which keeps this.
    """

    places: tuple
    problem: Problem
    method: Method
    facts: dict

    def of(self, cp: ContextParallel, values: tuple) -> tuple:
        """Return what `_prepared` does for a call with other tensors that look the same."""
        tensors = {
            field: values[place] for field, place in zip(Call._fields, self.places) if place is not None
        }
        problem = self.problem.replaced(**tensors)
        problem.cp = cp
        return (problem, self.method), self.facts


# The tensors that enter a problem as they were given, whatever they hold. On the CPU lengths and slopes are
# checked.
_PASSED_ON = {
    "cpu": frozenset("qkv"),
    "cuda": frozenset(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "decay_slopes")),
}
_MOST_LOOKS = 64  # of one plan


def _prepared_once(make: Callable, cp: ContextParallel, algorithm: str, backend: str, repeats: Any) -> tuple:
    """Return what `_prepared` does. The plan remembers it for calls that look the same: it takes about 1 ms,
    in which a GPU walks through 100,000 tokens of 16 heads in linear time.
    """
    known = None if repeats is None else cp.known.get(repeats.looks)
    if known is not None:
        return known.of(cp, repeats.values)
    call = make()
    result, facts = _prepared(call, cp, algorithm, backend)
    problem, method = result
    if repeats is None or repeats.reads or method is None or len(cp.known) >= _MOST_LOOKS:
        return result, facts
    given = {field for field, x in zip(Call._fields, call.tensors) if x is not None}
    places = repeats.places(call)
    if places is not None and given <= _PASSED_ON.get(call.q.device.type, set()):
        bare = problem.replaced(**dict.fromkeys(given))
        bare.cp = None
        cp.known[repeats.looks] = _Known(places, bare, method, facts)
    return result, facts


@torch.compiler.disable
def attend(make: Callable, cp: Any, algorithm: str, backend: str, repeats: Any = None) -> torch.Tensor:
    """Run the call that make() returns. Its tensors hold this rank's tokens, and its options are those of the
    whole sequences. repeats: a Repeats of the interface, if the call may be remembered.
    """
    _is_plan(cp)
    if cp.world > 1 and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        raise RuntimeError(
            "torch.func and forward derivatives of attention with context_parallel: they are there on one "
            "device alone"
        )
    problem, method = agree(cp.group, cp.check, lambda: _prepared_once(make, cp, algorithm, backend, repeats))
    if method is None:
        return decode.attend(problem, cp)
    call = problem.whole
    if cp.world == 1:
        return ops.attend(call, choose(call, problem.among).backend).out
    if needs_grad(call):
        return _Attention.apply(*call.tensors[:3], problem.replaced(q=None, k=None, v=None), method.name)
    with torch.no_grad():
        return MODULES[method.name].forward(problem)[0]


def explain(make: Callable, cp: Any, algorithm: str, backend: str) -> Method:
    """Say which method would run the call that make() returns. Communicates nothing."""
    _is_plan(cp)
    method = _prepared(make(), cp, algorithm, backend)[0][1]
    if method is None:
        raise TypeError(
            "with a cache there is one method: each rank attends to its keys, and the sums are added"
        )
    return method


def _is_plan(cp: Any) -> None:
    if not isinstance(cp, ContextParallel):
        raise TypeError(
            f"context_parallel is a {type(cp).__module__}.{type(cp).__name__}: give a "
            "flash_attn.distributed.ContextParallel"
        )


def _prepared(call: Call, cp: ContextParallel, algorithm: str, backend: str) -> tuple:
    """Check the call, and return ((problem, method), facts); with a cache, the call and None for these."""
    wanted(algorithm, backend)
    if call.cache is not None:
        return decode.prepared(call, cp, algorithm, backend)
    _check(call, cp)
    call = _of_whole(call, cp)
    _check_mask(call, cp)
    problem = Problem(call, cp, algorithm, backend)
    method = _chosen(problem)
    return (problem, method), _facts(problem, method.name)


def _check(call: Call, cp: ContextParallel) -> None:
    refuse_unknown(call)
    for name, x in zip("qkv", call.tensors[:3]):
        if hasattr(x, "to_local"):
            raise ValueError(f"{name} is a DTensor with context_parallel: give {name}.to_local()")
    if call.varlen != cp.packed:
        given, made = ("packed", "dense") if call.varlen else ("dense", "packed")
        raise ValueError(
            f"the tensors are {given}, but context_parallel is a plan for {made} ones: "
            + ("give ContextParallel cu_seqlens" if call.varlen else "leave its cu_seqlens out")
        )
    dim = 0 if call.varlen else 1
    for name, x in zip("qkv", call.tensors[:3]):
        if x.dim() > dim and x.shape[dim] != cp.tokens:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, with {x.shape[dim]} tokens, but the plan gives rank "
                f"{cp.rank} of {cp.world} {cp.tokens} of {cp.plan.total}: cut it with context_parallel.shard"
            )
    checks.tensors(call)
    kinds = {device.type for device in cp.group._device_types}
    if call.q.device.type not in kinds:
        raise ValueError(
            f"q is on {call.q.device}, but the group moves tensors on {', '.join(sorted(kinds))}: move it, "
            "or make the plan on a group for it, such as gloo for the CPU and NCCL for CUDA"
        )
    if cp.world > 1 and ambiguous_factors(call):
        raise ValueError(
            f"normalization has shape {tuple(call.row_factors.shape)}, and this rank has as many rows as "
            "there are sequences, so that the factors may be of either: multiply the output by them"
        )
    if call.varlen:
        _check_offsets(call, cp)
    if call.q.is_cpu:
        checks.not_negative("normalization", call.row_factors, "factors")
        checks.not_negative("decay_slopes", call.decay_slopes, "slopes")
        for name, x in (("alibi_slopes", call.alibi_slopes), ("sigmoid_bias", call.sigmoid_biases)):
            if x is not None and not torch.isfinite(x).all():
                raise ValueError(f"{name}={x.tolist()}: give finite numbers")


def _check_offsets(call: Call, cp: ContextParallel) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        offsets = getattr(call, name)
        if offsets.shape[0] != len(cp.plan.offsets):
            raise ValueError(
                f"{name} has {offsets.shape[0]} entries, but the plan has {len(cp.plan.offsets)}: give the "
                "cu_seqlens of the whole batch, with which the plan was made"
            )
        if offsets.is_cpu and tuple(offsets.tolist()) != cp.plan.offsets:
            raise ValueError(
                f"{name}={offsets.tolist()}, but the plan was made with {list(cp.plan.offsets)}: give the "
                "cu_seqlens of the whole batch"
            )
    longest, o = max(cp.plan.lengths, default=0), call.options
    for name, given in (("max_seqlen_q", o.max_seqlen_q), ("max_seqlen_k", o.max_seqlen_k)):
        if given < longest:
            raise ValueError(f"{name}={given}, but a sequence of the whole batch has {longest} tokens")


def _of_whole(call: Call, cp: ContextParallel) -> Call:
    """The call with the lengths of the whole sequences as options."""
    longest = max(cp.plan.lengths, default=0)
    return call._replace(options=call.options._replace(max_seqlen_q=longest, max_seqlen_k=longest))


def _check_mask(call: Call, cp: ContextParallel) -> None:
    """Check a mask against the whole sequences: counts are of these, and intervals of this rank's rows."""
    masking.check(call)
    if not call.q.is_cpu:
        return
    if call.options.mask == "hstu":
        masking.counts(call, cp.plan.lengths if call.varlen else cp.plan.lengths * call.batch)
    elif call.options.mask == "intervals":
        keys = cp.on(call.q.device, "numbers", cp.plan.lengths)
        keys = keys[cp.on(call.q.device, "sequences")] if call.varlen else keys
        masking.intervals(call.interval_starts, call.interval_ends, keys)


def _chosen(problem: Problem) -> Method:
    cp, grad = problem.cp, needs_grad(problem.call)
    if cp.world == 1:
        return Method("alone", 1, 0, 0, {}, choose(problem.whole, problem.among))
    cost, reasons = {}, {}
    for name, module in MODULES.items():
        reason = module.obstacle(problem)
        if reason is None:
            cost[name] = module.moved(problem, False), module.moved(problem, True) if grad else 0
        else:
            reasons[name] = reason
    name = cp.method
    if name == "auto":
        name = min(cost, key=lambda x: sum(cost[x]))  # the first of those that move as much
    elif name not in cost:
        raise ValueError(f'method="{name}" is not possible: {reasons[name]}')
    for other in cost:
        if other != name:
            reasons[other] = (
                f"it moves {sum(cost[other]):,} bytes" if cp.method == "auto" else f'method="{name}" is given'
            )
    choice = None
    for block in MODULES[name].blocks(problem):
        choice = choose(block, problem.among)  # raises if no backend runs it
    return Method(name, cp.world, *cost[name], {x: reasons[x] for x in MODULES if x in reasons}, choice)


def _facts(problem: Problem, method: str) -> dict:
    """What all ranks must have in common. Contents of tensors count on the CPU alone."""
    call, cp = problem.whole, problem.cp
    o = call.options
    facts = {
        "layout": cp.plan.kind,
        "the lengths of the sequences": cp.plan.offsets,
        "method": method,
        "algorithm": problem.algorithm,
        "backend": problem.backend,
        "whether q, k or v needs a gradient": needs_grad(call),
        **{name: getattr(o, name) for name in o._fields},
    }
    of_rows = {"q", "k", "v", "interval_starts", "interval_ends"}
    if call.row_factors is not None and call.row_factors.shape != (call.batch,):
        of_rows.add("row_factors")
    for field, x in zip(call._fields, call.tensors):
        if x is None:
            continue
        shape, name = tuple(x.shape), ARGUMENTS.get(field, field)
        if field in of_rows:
            shape = shape[1:] if call.varlen else (shape[0], *shape[2:])
            facts[f"shape of {name} but for the tokens"] = shape
        else:
            facts[f"shape of {name}"] = shape
            if x.is_cpu:
                facts[name] = x.tolist()
        facts[f"dtype of {name}"] = x.dtype
    return facts


class _Attention(torch.autograd.Function):
    """(q, k, v, problem, method) -> out, on this rank's tokens."""

    @staticmethod
    def forward(ctx, q, k, v, problem, method):
        ctx.problem, ctx.method = problem, method
        out, kept = MODULES[method].forward(problem.replaced(q=q, k=k, v=v))
        ctx.there = [x is not None for x in kept]
        ctx.save_for_backward(q, k, v, *(x for x in kept if x is not None))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, *saved = ctx.saved_tensors
        saved = iter(saved)
        kept = tuple(next(saved) if there else None for there in ctx.there)
        with torch.no_grad():
            problem = ctx.problem.replaced(q=q, k=k, v=v)
            grads = MODULES[ctx.method].backward(problem, dout.detach(), kept)
        if torch.is_grad_enabled():
            grads = _Once.apply(*grads, dout, q, k, v)
        return *grads, None, None


class _Once(torch.autograd.Function):
    """Makes a second derivative an error, not a silent None."""

    @staticmethod
    def forward(ctx, *inputs):
        return tuple(x.view_as(x) for x in inputs[:3])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "a second derivative of attention with context_parallel: it is there on one device alone"
        )
