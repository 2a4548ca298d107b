"""Functions that run in every rank of a group (ranks.py), and the cases that they go through."""

from __future__ import annotations

import gc
import os
import weakref
from functools import cache
from itertools import accumulate, product
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from flash_attn import (
    explain,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.distributed import ContextParallel, agreement, attention, cuts, exchange
from flash_attn.distributed.methods import allgather
from flash_attn.distributed.problem import Problem
from flash_attn.masks import HSTU, Intervals
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

F64 = torch.float64
TOKENS, LENGTHS = 45, (6, 0, 1, 23, 15)  # not multiples of the ranks; sequences begin and end anywhere
HEADS, HEADS_K, DIM, DIM_V = 8, 4, 6, 5
METHODS, LAYOUTS = ("state", "ulysses", "allgather", "ring"), ("contiguous", "zigzag")
TAKE_MASKS = "ulysses", "allgather"
MASKS = {
    "causal": (False, dict(causal=True)),
    "full": (False, dict()),
    "packed": (True, dict(causal=True)),
    "packed full": (True, dict()),
}
# Masks of recommenders: counts as numbers and of each sequence, a window, rows that see all, groups.
HSTUS = {
    "hstu": (False, dict(mask=HSTU(20, 3, 9, target_group_size=3))),
    "hstu of each": (False, dict(mask=HSTU(torch.tensor([30, 0]), torch.tensor([0, 9]), 8, 5))),
    "packed hstu": (True, dict(mask=HSTU(num_targets=1))),
    "packed hstu of each": (
        True, dict(mask=HSTU(torch.tensor([2, 0, 1, 7, 3]), torch.tensor([1, 0, 0, 4, 5]), 6, 2, 2)),
    ),
}  # fmt: skip
LISTED = {"intervals": (False, dict(mask="intervals")), "packed intervals": (True, dict(mask="intervals"))}
_SLOPES = torch.linspace(0.0, 1.0, HEADS) ** 2
SCORES = {
    "identity": dict(),
    "decay": dict(decay_slopes=_SLOPES),
    "silu": dict(activation="silu", normalization="1/n"),
    "sigmoid": dict(activation="sigmoid", sigmoid_bias="-log n"),
    "1/visible": dict(normalization="1/visible"),
    "alibi": dict(alibi_slopes=_SLOPES, activation="softplus"),
    "window": dict(window_size=(9, 3)),
    # Tensors with the batch as an axis, and factors of rows.
    "by sequence": dict(decay_slopes="batch, heads", normalization="rows"),
}
LINEAR = "identity", "decay", "1/visible", "by sequence"
UNDER_MASKS = {
    "silu": SCORES["silu"],
    "n of each": dict(activation="silu", normalization="batch"),
    "all counted": dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/visible"),
}
CASES = [(mask, score) for mask in MASKS for score in SCORES]
MASKED = [
    *((mask, score) for mask in HSTUS for score in UNDER_MASKS),
    *((mask, score) for mask in LISTED for score in (*UNDER_MASKS, "alibi", "by sequence")),
]


def cases_of(method: str) -> list:
    return CASES + MASKED if method in TAKE_MASKS else CASES


@cache
def problem(mask: str, score: str) -> tuple:
    """Return (packed, offsets, [q, k, v], dout, options, [out, dq, dk, dv]) of the whole batch. Rank 0
    computes the results on one device."""
    packed, options = {**MASKS, **HSTUS, **LISTED}[mask]
    options = {"use_softmax": False, **options, **{**SCORES, **UNDER_MASKS}[score]}
    torch.manual_seed(len(mask) + len(score))
    tokens = (sum(LENGTHS),) if packed else (2, TOKENS)
    batch = len(LENGTHS) if packed else 2
    shapes = (HEADS, DIM), (HEADS_K, DIM), (HEADS_K, DIM_V), (HEADS, DIM_V)
    *qkv, dout = (torch.randn(*tokens, *shape, dtype=F64) for shape in shapes)
    if score == "by sequence":
        options |= dict(decay_slopes=torch.rand(batch, HEADS), normalization=torch.rand(tokens))
    elif score == "n of each":
        options |= dict(normalization=1 / torch.arange(40.0, 40.0 + batch))
    if mask in LISTED:
        options |= dict(mask=intervals(packed))
    expected = [torch.empty_like(x) for x in (dout, *qkv)]
    if dist.get_rank() == 0:
        expected = results(qkv, dout, packed, options)
    for x in expected:
        dist.broadcast(x, 0)
    return packed, qkv, dout, options, expected


def offsets() -> Tensor:
    return torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)


def intervals(packed: bool) -> Intervals:
    """Two intervals of any keys for each row; every fourth row sees nothing."""
    keys = torch.cat([torch.full((n,), n) for n in LENGTHS]) if packed else torch.full((2, TOKENS), TOKENS)
    cuts = torch.rand(*keys.shape, 4).mul(keys[..., None] + 1).int().sort(-1).values
    starts, ends = cuts[..., ::2], cuts[..., 1::2].clone()
    ends[..., ::4, :] = starts[..., ::4, :]
    return Intervals(starts, ends)


def call(q, k, v, packed: bool, options: dict) -> Tensor:
    if packed:
        return flash_attn_varlen_func(q, k, v, offsets(), offsets(), max(LENGTHS), max(LENGTHS), **options)
    return flash_attn_func(q, k, v, **options)


def results(qkv: list, dout: Tensor, packed: bool, options: dict) -> list:
    """Return out, dq, dk and dv."""
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = call(*qkv, packed, options)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def plan(method: str, layout: str, packed: bool = False, **more) -> ContextParallel:
    lengths = dict(cu_seqlens=offsets()) if packed else dict(seqlen=TOKENS)
    return ContextParallel(None, layout, method=method, **{**lengths, **more})


def cut(cp: ContextParallel, packed: bool, tensors: list) -> list:
    return [cp.shard(x, 0 if packed else 1) for x in tensors]


def parallel(method: str, layout: str, mask: str, score: str) -> tuple:
    """Return (found, expected): out, dq, dk and dv of this rank's tokens; (None, the reason) where the method
    does not apply."""
    packed, qkv, dout, options, expected = problem(mask, score)
    cp = plan(method, layout, packed)
    options = dict(options)
    if score == "by sequence":
        (options["normalization"],) = cut(cp, packed, [options["normalization"]])
    if mask in LISTED:
        options["mask"] = Intervals(*cut(cp, packed, options["mask"]))
    try:
        found = results(
            cut(cp, packed, qkv), *cut(cp, packed, [dout]), packed, {**options, "context_parallel": cp}
        )
    except ValueError as error:
        if not str(error).startswith(f'method="{method}" is not possible'):
            raise
        return None, str(error)
    return found, cut(cp, packed, expected)


def largest_errors(rank: int, world: int, method: str, layout: str) -> dict:
    """Return (mask, score) -> the largest error of out, dq, dk and dv; the reason where it does not apply.
    Zigzag, the heads go in shares, as those of long sequences do.
    """
    found, shortest = {}, 1 if layout == "zigzag" else allgather._SHORTEST_MESSAGE
    with mock.patch.object(allgather, "_SHORTEST_MESSAGE", shortest):
        for mask, score in cases_of(method):
            got, expected = parallel(method, layout, mask, score)
            found[mask, score] = expected if got is None else [difference(*x) for x in zip(got, expected)]
    return found


def difference(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and x.dtype == y.dtype
    return (x - y).abs().max().item() if x.numel() else 0.0


def same_bits(rank: int, world: int) -> list:
    """Return the methods whose second run has other bits."""
    wrong = []
    for method in METHODS:
        score = "decay" if method == "state" else "silu"
        first, second = (parallel(method, "zigzag", "causal", score)[0] for _ in range(2))
        wrong += [method] if not all(map(torch.equal, first, second)) else []
    return wrong


def half_precision(rank: int, world: int) -> dict:
    """Return method -> (out and gradients of this rank in float16, in float64). The sums over the first half
    of the tokens leave float16's range, and those over all tokens do not."""
    torch.manual_seed(0)
    shape = (1, 32, HEADS, 8)
    q, k = (torch.rand(shape, dtype=F64).add(1.0).repeat(1, 2, 1, 1) * 10 for _ in range(2))
    v, dout = (torch.rand(shape, dtype=F64).add(1.0).mul(x) for x in (1.1, 1.1))
    v, dout = (torch.cat([x, -0.6 * x], 1) for x in (v, dout))
    given = [x.half() for x in (q, k, v, dout)]
    options = dict(use_softmax=False, softmax_scale=1.0)
    *qkv, dout = (x.double() for x in given)
    first = results(
        [q[:, :32].double(), k[:, :32].double(), v[:, :32].double()], dout[:, :32], False, options
    )
    assert all(x.abs().max() > 65504 for x in (first[0], first[3]))
    expected = results(qkv, dout, False, options)
    assert all(x.abs().max() < 65504 for x in expected)
    found = {}
    for method in METHODS:
        cp = plan(method, "contiguous", seqlen=64)
        *own, own_dout = cut(cp, False, given)
        got = results(own, own_dout, False, {**options, "context_parallel": cp})
        found[method] = [x.double() for x in got], cut(cp, False, expected)
    return found


def rounded_once(rank: int, world: int) -> dict:
    """Return (method, causal) -> (outputs and gradients of this rank in bfloat16, in float64): blocks whose
    queries are all of the rank's, and some of them.
    """
    torch.manual_seed(0)
    given = [torch.randn(1, 64, HEADS, 8).bfloat16() for _ in range(4)]
    *qkv, dout = (x.double() for x in given)
    found = {}
    for method, causal in product(("allgather", "ring"), (False, True)):
        options = dict(use_softmax=False, activation="silu", causal=causal)
        cp = plan(method, "zigzag", seqlen=64)
        *own, own_dout = cut(cp, False, given)
        got = results(own, own_dout, False, {**options, "context_parallel": cp})
        expected = cut(cp, False, results(qkv, dout, False, options))
        found[method, causal] = [x.double() for x in got], expected
    return found


def gathered_again(rank: int, world: int) -> None:
    """shard and unshard are inverse, and each other's derivative up to the sum over the ranks."""
    for layout in LAYOUTS:
        for packed, dim in ((True, 0), (False, 1)):
            x = torch.arange(3.0 * TOKENS).view(TOKENS, 3) if packed else torch.randn(2, TOKENS, 3)
            dist.broadcast(x, 0)
            cp = plan("auto", layout, packed)
            own = cp.shard(x, dim).requires_grad_()
            assert torch.equal(cp.unshard(own, dim), x) and own.shape[dim] == cp.tokens
            assert torch.equal(cp.shard(positions(packed), 0), cp.positions)
            weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(rank))
            total = weights.clone()
            dist.all_reduce(total)
            (grad,) = torch.autograd.grad((cp.unshard(own, dim) * weights).sum(), own)
            torch.testing.assert_close(grad, cp.shard(total, dim))


def positions(packed: bool) -> Tensor:
    lengths = LENGTHS if packed else (TOKENS,)
    return torch.cat([torch.arange(n) for n in lengths])


def packed_forms(rank: int, world: int) -> None:
    """The packed arguments give what separate tensors give, gradients too."""
    for packed in (False, True):
        mask = "packed" if packed else "causal"
        _, qkv, dout, options, expected = problem(mask, "silu")
        cp = plan("allgather", "zigzag", packed)
        q, k, v = (x[..., :DIM_V].repeat_interleave(2, -2)[..., :HEADS_K, :] for x in qkv)
        q, k, v, own = cut(cp, packed, [q, k, v, dout[..., :HEADS_K, :]])
        options = {**options, "context_parallel": cp}
        expected = results([q, k, v], own, packed, options)
        lengths = (offsets(), max(LENGTHS)) if packed else ()
        both = (offsets(), offsets(), max(LENGTHS), max(LENGTHS)) if packed else ()
        qkv = torch.stack([q, k, v], -3).requires_grad_()
        run = flash_attn_varlen_qkvpacked_func if packed else flash_attn_qkvpacked_func
        out = run(qkv, *lengths, **options)
        assert torch.equal(out, expected[0])
        assert torch.equal(torch.autograd.grad(out, qkv, own)[0], torch.stack(expected[1:], -3))
        kv = torch.stack([k, v], -3).requires_grad_()
        run = flash_attn_varlen_kvpacked_func if packed else flash_attn_kvpacked_func
        out = run(q, kv, *both, **options)
        assert torch.equal(torch.autograd.grad(out, kv, own)[0], torch.stack(expected[2:], -3))


def alone(rank: int, world: int) -> None:
    """A group of one works, moves nothing, and has second derivatives."""
    groups = [dist.new_group([other]) for other in range(world)]
    if rank:  # nobody else is there
        return
    for packed, more in MASKS.values():
        qkv, dout = _small(packed)
        options = dict(use_softmax=False, **more)
        expected = results(qkv, dout, packed, options)
        for layout in LAYOUTS:
            cp = ContextParallel(groups[0], layout, cu_seqlens=offsets() if packed else None)
            own = cut(cp, packed, qkv)
            found = results(own, *cut(cp, packed, [dout]), packed, {**options, "context_parallel": cp})
            assert all(map(torch.equal, found, expected))
            if not packed:
                method = explain(flash_attn_func, *own, context_parallel=cp, **options)
                assert str(method).startswith("one rank, nothing moves\n") and method.forward_bytes == 0
            inputs = [x.clone().requires_grad_() for x in own]
            out = call(*inputs, packed, {**options, "context_parallel": cp})
            (dq,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
            assert torch.autograd.grad(dq.sum(), inputs[1])[0].abs().max() > 0


def _small(packed: bool) -> tuple:
    torch.manual_seed(0)
    tokens = (sum(LENGTHS),) if packed else (2, TOKENS)
    return [torch.randn(*tokens, 2, 4, dtype=F64) for _ in range(3)], torch.randn(*tokens, 2, 4, dtype=F64)


def attend(cp: ContextParallel, packed: bool = False, *, tokens: int | None = None, **options) -> Tensor:
    """A call with random tensors of this rank."""
    tokens = cp.tokens if tokens is None else tokens
    shape = (tokens,) if packed else (2, tokens)
    dtype = options.pop("dtype", torch.float32)
    qkv = [torch.randn(*shape, HEADS_K, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    return call(*qkv, packed, {"use_softmax": False, "context_parallel": cp, **options})


def differing(rank: int, world: int, name: str) -> None:
    """Wrong use of one rank, or of all: each raises."""
    odd = rank == world - 1
    if name == "causal":
        attend(plan("auto", "zigzag"), causal=odd)
    elif name == "decay_slopes":
        attend(plan("auto", "zigzag"), decay_slopes=torch.full((HEADS_K,), 0.5 if odd else 0.25))
    elif name == "layout":
        attend(plan("allgather", LAYOUTS[odd]))
    elif name == "method":
        attend(plan("ring" if odd else "allgather", "zigzag"))
    elif name == "lengths":
        cp = plan("auto", "zigzag", seqlen=TOKENS + 4 * world * odd)
        attend(cp)
    elif name == "dtype":
        attend(plan("auto", "zigzag"), dtype=F64 if odd else torch.float32)
    elif name == "gradient":
        with torch.set_grad_enabled(not odd):
            attend(plan("auto", "zigzag"))
    elif name == "mask":
        attend(plan("auto", "zigzag"), mask=None if odd else HSTU(3))
    elif name == "window of the mask":
        attend(plan("auto", "zigzag"), mask=HSTU(3, max_attn_len=9 if odd else 8))
    elif name == "counts of the mask":
        attend(plan("auto", "zigzag"), mask=HSTU(torch.tensor([3, 4 * odd])))
    elif name == "targets beyond the length":
        attend(plan("auto", "zigzag"), mask=HSTU(torch.tensor([45, 45 + odd])))
    elif name == "mask beyond the length":
        attend(plan("auto", "zigzag"), mask=HSTU(40, 6))
    elif name == "mask in a ring":
        attend(plan("ring", "zigzag"), mask=HSTU(3))
    elif name == "mask in linear time":
        attend(plan("state", "zigzag"), mask=HSTU(3))
    elif name in ("intervals not sharded", "intervals beyond the keys"):
        cp, whole = plan("auto", "zigzag"), intervals(False)
        if odd and name == "intervals beyond the keys":
            whole.ends[1, cp.indices[2], 1] = TOKENS + 1
        own = whole if odd and name == "intervals not sharded" else Intervals(*cut(cp, False, whole))
        attend(cp, mask=own)
    elif name == "not sharded":
        attend(plan("auto", "zigzag"), tokens=TOKENS if odd else None)
    elif name == "wrong options":
        attend(plan("auto", "zigzag"), window_size=(1, 2, 3) if odd else (-1, -1))
    elif name == "dropout":
        attend(plan("auto", "zigzag"), dropout_p=0.1)
    elif name == "return_attn_probs":
        attend(plan("auto", "zigzag"), return_attn_probs=True)
    elif name == "softmax":
        attend(plan("auto", "zigzag"), use_softmax=True)
    elif name == "no CPU":
        cp = plan("auto", "zigzag", check=False)
        cp.group = SimpleNamespace(_device_types=[torch.device("cuda")])  # as NCCL's
        attend(cp)
    elif name == "forward derivative":
        cp = plan("auto", "zigzag")
        x = torch.randn(1, cp.tokens, HEADS_K, 4)
        torch.func.jvp(
            lambda x: call(x, x, x, False, dict(use_softmax=False, context_parallel=cp)), (x,), (x,)
        )
    elif name == "DTensor":
        mesh = init_device_mesh("cpu", (world,))
        x = distribute_tensor(torch.zeros(1, TOKENS, HEADS_K, 4), mesh, [Shard(1)])
        call(x, x, x, False, dict(use_softmax=False, context_parallel=plan("auto", "zigzag")))
    elif name == "not a plan":
        attend(plan("auto", "zigzag"), context_parallel=dist.group.WORLD)
    elif name == "packed tensors":
        attend(plan("auto", "zigzag"), packed=True)
    elif name == "dense tensors":
        attend(plan("auto", "zigzag", packed=True))
    elif name == "impossible method":
        attend(plan("state", "zigzag"), activation="silu")
    elif name == "forced backend":
        attend(plan("auto", "zigzag"), backend="fa2")
    elif name == "other offsets":
        cp = plan("auto", "zigzag", packed=True, cu_seqlens=[0, 10, 20, 30, 40, 45])
        attend(cp, packed=True)
    elif name == "ambiguous factors":  # two sequences, and two rows on the last rank alone
        cp = plan("auto", "contiguous", packed=True, cu_seqlens=[0, 1, world + 1])
        x, cu = torch.randn(cp.tokens, 2, 4), torch.tensor(cp.plan.offsets, dtype=torch.int32)
        options = dict(use_softmax=False, context_parallel=cp, normalization=torch.ones(2))
        flash_attn_varlen_func(x, x, x, cu, cu, world, world, **options)
    elif name == "second derivative":
        x = torch.randn(1, plan("auto", "zigzag").tokens, HEADS_K, 4, requires_grad=True)
        out = flash_attn_func(x, x, x, use_softmax=False, context_parallel=plan("allgather", "zigzag"))
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        grad.sum().backward()


def let_go_after_an_error(rank: int, world: int) -> bool:
    """Whether an error that was caught lets go of the plan, and of its group, without garbage collection."""
    gc.disable()
    try:
        cp = plan("ring", "zigzag")
        seen = weakref.ref(cp)
        try:
            attend(cp, mask=HSTU(3))
        except ValueError:
            del cp
        return seen() is None
    finally:
        gc.enable()


def unchecked(rank: int, world: int) -> int:
    """Count the messages of a call with and without the comparison of the ranks."""
    counts = []
    right = agreement.gather
    for check in (True, False):
        counts.append(0)

        def counting(*given):
            counts[-1] += 1
            return right(*given)

        agreement.gather = counting
        try:
            attend(plan("ring", "zigzag", check=check))
        finally:
            agreement.gather = right
    return counts


def methods_of_auto(rank: int, world: int) -> dict:
    """Return what explain says, by call."""
    q = torch.randn(1, 64 // world, HEADS, 16, requires_grad=True)
    k = torch.randn(1, 64 // world, HEADS_K, 16)
    few = k[:, :, :1]
    long = ContextParallel(None, seqlen=64)
    found = {}
    silu, mask = dict(activation="silu"), dict(mask=HSTU(3, 2))
    for name, kv, options in (
        ("identity", k, dict()), ("silu", k, silu), ("one head", few, silu),
        ("quadratic", few, dict(algorithm="quadratic")), ("mask", few, mask),
    ):  # fmt: skip
        method = explain(flash_attn_func, q, kv, kv, use_softmax=False, context_parallel=long, **options)
        found[name] = method.name, method.forward_bytes, method.backward_bytes, str(method)
    return found


def bytes_received(rank: int, world: int) -> dict:
    """Return (method, mask, layout) -> the bytes that this rank received from others, forward and backward,
    and those that explain names."""
    counts: list[int] = []
    right = exchange._all_gather, dist.all_to_all_single, dist.batch_isend_irecv

    def all_gather(found, x, **more):
        counts[-1] += (world - 1) * x.numel() * x.element_size()
        return right[0](found, x, **more)

    def all_to_all(found, x, received, sent, **more):
        counts[-1] += (sum(received) - received[rank]) * x.element_size()
        return right[1](found, x, received, sent, **more)

    def in_ring(steps):
        counts[-1] += sum(x.tensor.numel() * x.tensor.element_size() for x in steps if x.op is dist.irecv)
        return right[2](steps)

    exchange._all_gather, dist.all_to_all_single, dist.batch_isend_irecv = all_gather, all_to_all, in_ring
    found = {}
    try:
        for method, mask in (*((method, None) for method in METHODS), *((x, "listed") for x in TAKE_MASKS)):
            for layout in LAYOUTS:
                cp = plan(method, layout, seqlen=16 * world, check=False)
                q, k, v = (
                    torch.randn(2, cp.tokens, heads, 8, dtype=torch.bfloat16, requires_grad=True)
                    for heads in (HEADS, HEADS_K, HEADS_K)
                )
                options = dict(use_softmax=False, causal=True, context_parallel=cp)
                if mask is not None:  # three intervals, and a factor of each row
                    zeros = torch.zeros(2, cp.tokens, 3, dtype=torch.int32)
                    rows = torch.ones(2, cp.tokens)
                    options |= dict(causal=False, mask=Intervals(zeros, zeros), normalization=rows)
                told = explain(flash_attn_func, q, k, v, **options)
                counts[:] = [0]
                out = flash_attn_func(q, k, v, **options)
                counts.append(0)
                out.sum().backward()
                found[method, mask, layout] = tuple(counts), (told.forward_bytes, told.backward_bytes)
    finally:
        exchange._all_gather, dist.all_to_all_single, dist.batch_isend_irecv = right
    return found


def die(rank: int, world: int, how: str) -> None:
    """The last rank leaves before or after a message, the others wait for it."""
    cp = plan("ring" if how == "in the middle" else "allgather", "zigzag")
    if rank == world - 1:
        if how == "raises":
            raise KeyError("out of data")
        if how == "killed":
            os._exit(1)
    if how == "in the middle" and rank == world - 1:
        cuts.saturate_ = lambda *x: os._exit(1)
        attend(cp)
    out = attend(cp)
    out.sum().backward()


def of_a_mesh(rank: int, world: int) -> None:
    """A dimension of a mesh is a group; the whole mesh is not."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "cp"))
    packed, qkv, dout, options, expected = problem("causal", "silu")
    for method in METHODS[1:]:
        cp = ContextParallel(mesh["cp"], "zigzag", seqlen=TOKENS, method=method)
        assert cp.world == world // 2
        own = [*cut(cp, False, qkv), *cut(cp, False, [dout])]
        found = results(own[:3], own[3], False, {**options, "context_parallel": cp})
        for x, y in zip(found, cut(cp, False, expected)):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    ContextParallel(mesh, seqlen=TOKENS)  # raises


# Options of a decoding step, for 3 sequences in slots of a cache of 21 keys.
CACHES = {
    "plain": dict(),
    "causal": dict(causal=True, normalization="1/n"),
    "window": dict(window_size=(5, 0), normalization="1/visible"),
    "sigmoid": dict(activation="sigmoid", sigmoid_bias="-log n"),
    "alibi": dict(causal=True, alibi_slopes=torch.rand(3, 4, generator=torch.Generator().manual_seed(1))),
    "decay": dict(causal=True, decay_slopes=torch.linspace(0.0, 1.0, 4), normalization="1/sqrt(n)"),
    "left padding": dict(cache_leftpad=torch.tensor([0, 4, 9], dtype=torch.int32), normalization="1/n"),
    "slots": dict(cache_batch_idx=torch.tensor([3, 0, 2], dtype=torch.int32), normalization=torch.rand(3)),
    "read only": dict(new=0, window_size=(6, 1)),
    "rotary": dict(causal=True, rotary=True),
}


def decoded(rank: int, world: int, layout: str) -> None:
    """Steps over a cache on several ranks equal those over a whole one, and write the same keys."""
    for name, options in CACHES.items():
        torch.manual_seed(7)
        options = {"use_softmax": False, **options}
        seqlen_new, rotary = options.pop("new", 2), options.pop("rotary", False)
        caches = [torch.randn(4, 21, 2, 6, dtype=F64) for _ in range(2)]
        if "normalization" in options and isinstance(options["normalization"], Tensor):
            options["normalization"] = torch.tensor([0.5, 0.25, 2.0])
        if rotary:
            options |= dict(rotary_cos=torch.rand(21, 2, dtype=F64), rotary_sin=torch.rand(21, 2, dtype=F64))
        cp = ContextParallel(None, layout, seqlen=21)
        own = [cp.shard(x) for x in caches]
        lengths = torch.tensor([0, 9, 17], dtype=torch.int32)  # the second appends on two ranks
        for step in range(2 if seqlen_new else 1):
            q = torch.randn(3, 2, 4, 6, dtype=F64)
            new = [torch.randn(3, seqlen_new, 2, 6, dtype=F64) for _ in range(2 if seqlen_new else 0)]
            more = {**options, "cache_seqlens": lengths + seqlen_new * step}
            expected = flash_attn_with_kvcache(q, *caches, *new, **more)
            found = flash_attn_with_kvcache(q, *own, *new, context_parallel=cp, **more)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=name)
        for x, y in zip(own, caches):
            torch.testing.assert_close(x, cp.shard(y), rtol=0, atol=1e-12, msg=name)


def wrong_cache(rank: int, world: int, name: str) -> None:
    cp = ContextParallel(None, seqlen=20)
    cache = torch.randn(2, cp.tokens, 2, 4)
    q = torch.randn(2, 1, 2, 4)
    options = dict(
        use_softmax=False, context_parallel=cp, cache_seqlens=torch.tensor([3, 5], dtype=torch.int32)
    )
    if name == "whole cache":
        cache = torch.randn(2, 20, 2, 4)
    elif name == "too long":
        options["cache_seqlens"] = torch.tensor([3, 20], dtype=torch.int32)
    elif name == "pages":
        options["block_table"] = torch.zeros(2, 1, dtype=torch.int32)
    elif name == "lengths":
        options["cache_seqlens"] = torch.tensor([3, 5 + (rank == world - 1)], dtype=torch.int32)
    elif name == "gradient":
        q.requires_grad_()
    new = torch.randn(2, 1, 2, 4)
    flash_attn_with_kvcache(q, cache, cache.clone(), new, new, **options).sum().backward()


def repeated(rank: int, world: int) -> None:
    """A call that looks like an earlier one is not checked again, and takes its own tensors and the values of
    what is checked on the CPU.
    """
    cp, checked = plan("allgather", "zigzag"), []
    prepare = attention._prepared
    attention._prepared = lambda *arguments: checked.append(1) or prepare(*arguments)
    slopes = torch.linspace(0.1, 0.5, 2, dtype=torch.float32)
    try:
        for seed, more, times in (
            (1, {}, 1),
            (2, {}, 1),
            (3, dict(activation="relu"), 2),
            (4, {}, 2),
            (5, dict(decay_slopes=slopes), 3),
            (6, dict(decay_slopes=2 * slopes), 4),
        ):
            generator = torch.Generator().manual_seed(seed)
            qkv = [torch.randn(1, TOKENS, 2, 8, dtype=F64, generator=generator) for _ in range(3)]
            options = {**dict(causal=True, use_softmax=False, activation="silu", normalization="1/n"), **more}
            found = flash_attn_func(*map(cp.shard, qkv), context_parallel=cp, **options)
            torch.testing.assert_close(found, cp.shard(flash_attn_func(*qkv, **options)), rtol=0, atol=1e-10)
            assert len(checked) == times, (seed, len(checked))
    finally:
        attention._prepared = prepare


class _Block(torch.nn.Module):
    """Attention of a small model. cp: a plan or None. again: whether its backward runs the forward again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.cp, self.again = None, False

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        options = dict(causal=True, use_softmax=False, activation="silu", normalization=1 / TOKENS)
        out = flash_attn_func(q, k, v, context_parallel=self.cp, **options)
        return x + self.out(out.flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False) if self.again else self.attend(x)


def _model(cp: ContextParallel | None = None, again: bool = False) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(_Block(), _Block()).double()
    for block in model:
        block.cp, block.again = cp, again
    return model


def _losses(model: torch.nn.Module, x: Tensor, ranks: bool) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(4):
        loss = model(x).square().sum() / TOKENS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if ranks:
            dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def trained(rank: int, world: int, method: str, again: bool) -> float:
    """Return how far the losses of a model under FSDP2 are from those of one device."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    x = torch.randn(1, TOKENS, 16, dtype=F64, generator=torch.Generator().manual_seed(1))
    cp = ContextParallel(mesh["cp"], "zigzag", seqlen=TOKENS, method=method)
    model = _model(cp, again)
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # the loss is a sum over the ranks
    pairs = zip(_losses(model, cp.shard(x), True), _losses(_model(), x, False))
    return max(abs(found - expected) for found, expected in pairs)


def compiled(rank: int, world: int) -> None:
    """torch.compile breaks its graph at the messages, and gives the same."""
    cp = plan("allgather", "zigzag")
    x = cp.shard(torch.randn(1, TOKENS, 16, dtype=F64, generator=torch.Generator().manual_seed(1)))
    grads = []
    for compile in (False, True):
        model = _model(cp)
        run = torch.compile(model, backend="aot_eager") if compile else model
        run(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def of_dtensors(rank: int, world: int) -> None:
    """Each sharding of q and of k and v keeps its place, and gives what one device gives."""
    mesh = init_device_mesh("cpu", (world,))

    def everywhere(x):
        return distribute_tensor(x, mesh, [whole]) if isinstance(x, Tensor) else x

    batch, tokens, heads, whole, part = Shard(0), Shard(1), Shard(2), Replicate(), Partial("sum")
    silu, slopes = dict(activation="silu"), dict(causal=True, alibi_slopes=torch.linspace(0.0, 1.0, 8))
    each = dict(decay_slopes=torch.rand(4, 8, generator=torch.Generator().manual_seed(2)), causal=True)
    rows = dict(normalization=torch.rand(4, 13, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(0)
    hstu = dict(mask=HSTU(torch.tensor([2, 0, 13, 5]), 0, 4), normalization="1/visible")
    keys = torch.randint(0, 13, (2, 4, 13, 1), dtype=torch.int32).sort(0).values
    for x in keys:
        dist.broadcast(x, 0)
    listed = dict(mask=Intervals(*keys), normalization="1/visible")
    shapes = (4, 13, 8, 6), (4, 13, 4, 6), (4, 13, 4, 6), (4, 13, 8, 6)
    for places, results_, options in (
        ((batch, batch), (batch, batch, batch), each),
        ((heads, heads), (heads, heads, heads), slopes),
        ((heads, heads), (heads, heads, heads), rows),
        ((whole, tokens), (part, part, tokens), silu),
        ((whole, tokens), (part, part, tokens), rows),
        ((tokens, whole), (tokens, tokens, part), {**silu, "normalization": "1/n"}),
        ((tokens, whole), (tokens, tokens, part), rows),
        ((whole, tokens), (whole, whole, whole), {**silu, "normalization": "1/n"}),  # n is the whole's
        ((tokens, tokens), (whole, whole, whole), dict(causal=True)),
        ((batch, batch), (batch, batch, batch), hstu),
        ((batch, batch), (batch, batch, batch), listed),
        ((heads, heads), (heads, heads, heads), listed),
        ((tokens, whole), (whole, whole, whole), hstu),
        ((whole, tokens), (whole, whole, whole), dict(mask=listed["mask"])),
    ):
        *qkv, dout = (torch.randn(shape, dtype=F64) for shape in shapes)
        for x in (*qkv, dout):
            dist.broadcast(x, 0)
        expected = results(qkv, dout, False, {"use_softmax": False, **options})
        own = {
            name: type(x)(*map(everywhere, x)) if isinstance(x, (HSTU, Intervals)) else everywhere(x)
            for name, x in options.items()
        }
        given = [distribute_tensor(x, mesh, [places[i > 0]]) for i, x in enumerate(qkv)]
        found = results(given, distribute_tensor(dout, mesh, [whole]), False, {"use_softmax": False, **own})
        assert [x.placements[0] for x in found[:3]] == list(results_), (places, options)
        for x, y in zip(found, expected):
            torch.testing.assert_close(x.full_tensor(), y, rtol=0, atol=1e-10)


def shard_after_inference(rank: int, world: int) -> None:
    """A plan that served inference serves training."""
    cp, x = plan("allgather", "zigzag"), torch.randn(1, TOKENS, HEADS, 4, requires_grad=True)
    options = dict(use_softmax=False, context_parallel=cp, causal=True)
    with torch.inference_mode():
        own = cp.shard(x)
        first = call(own, own, own, False, options)
    own = cp.shard(x)
    out = call(own, own, own, False, options)
    out.sum().backward()
    assert torch.equal(out, first) and x.grad.abs().max() > 0


def blocks_of_a_ring(rank: int, world: int) -> dict:
    """Return layout -> (window, whether it has a diagonal) of each block that this rank runs, causal."""
    found = {}
    for layout in LAYOUTS:
        ran: list = []

        def forward(self, block, ran=ran, right=Problem.forward):
            ran.append(((block.options.window_left, block.options.window_right), block.diagonal is not None))
            return right(self, block)

        qkv, _ = _small(False)
        cp = plan("ring", layout)
        with mock.patch.object(Problem, "forward", forward):
            call(*cut(cp, False, qkv), False, dict(use_softmax=False, causal=True, context_parallel=cp))
        found[layout] = ran
    return found
