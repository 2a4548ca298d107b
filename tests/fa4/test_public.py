"""Test the functions of flash_attn.cute with use_softmax, on fake tensors: signatures, errors, and upstream's
path with softmax.
"""

import inspect

import pytest
from mods import causal_with_gaps, even_distance, square, square_bwd

pytestmark = pytest.mark.source
BEGIN = """
import inspect, json
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import flash_attn.cute
from flash_attn.cute import interface, flash_attn_func, flash_attn_varlen_func
from flash_attn.cute.nosoftmax import ops, public
def tensors(**options):
    return [torch.empty(2, 100, 4, 64, dtype=torch.bfloat16, device="cuda", **options) for _ in range(3)]
def error(*args, function=flash_attn_func, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as e:
        return str(e)
"""


@pytest.fixture
def run(forked):
    return lambda program: forked.run(BEGIN + program)


def test_signatures_are_upstreams_and_more(run):
    more = run("""
print(json.dumps([
    [list(inspect.signature(f).parameters)[: len(inspect.signature(u).parameters)]
        == list(inspect.signature(u).parameters),
     {n: p.default for n,
         p in list(inspect.signature(f).parameters.items())[len(inspect.signature(u).parameters):]}]
    for f, u in ((flash_attn_func, interface.flash_attn_func), (flash_attn_varlen_func,
        interface.flash_attn_varlen_func))]))
""")
    ours = {
        "use_softmax": True,
        "activation": "identity",
        "sigmoid_bias": 0.0,
        "normalization": None,
        "decay_slopes": None,
    }
    assert more == [[True, ours]] * 2


def test_with_softmax_the_call_goes_to_upstream_as_it_is(run):
    assert run("""
seen = []
def upstream(*args, **kwargs):
    seen.append([args, kwargs])
    return "result"
upstream.__signature__ = inspect.signature(interface.flash_attn_func)
function = public._with_use_softmax(upstream)
print(json.dumps([function(1, 2, 3, softcap=2.0), function(1, use_softmax=True), seen]))
""") == ["result", "result", [[[1, 2, 3], {"softcap": 2.0}], [[1], {}]]]


def test_errors_name_the_argument(run):
    found = run("""
def mod(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors): return score
off = dict(use_softmax=False)
with FakeTensorMode():
    q, k, v = tensors()
    wide = [t.float() for t in tensors()]
    grads = tensors(requires_grad=True)
    print(json.dumps({
        "activation": error(q, k, v, activation="relu"),
        "unknown": error(q, k, v, **off, activation="tanh"),
        "twice": error(q, k, v, **off, activation="relu", score_mod=mod),
        "score_mod_bwd": error(*grads, **off, score_mod=mod),
        "alone": error(q, k, v, **off, score_mod_bwd=mod),
        "mask_mod": error(q, k, v, **off, mask_mod=mod, causal=True),
        "num_splits": error(q, k, v, **off, num_splits=4),
        "return_lse": error(q, k, v, **off, return_lse=True),
        "gather_bwd_recompute_p": error(q, k, v, **off, gather_bwd_recompute_p=True),
        "float32": error(*wide, **off),
        "page_table": error(q, k, v, **off, function=flash_attn_varlen_func, page_table=q, cu_seqlens_k=q),
    }))
""")
    for name, text in found.items():
        assert text is not None, name
    assert (
        "'tanh'" in found["unknown"]
        and "score_mod" in found["twice"]
        and "use_softmax=False" in found["activation"]
    )
    for name in (
        "score_mod_bwd",
        "mask_mod",
        "num_splits",
        "return_lse",
        "gather_bwd_recompute_p",
        "float32",
        "page_table",
    ):
        assert name in found[name]


def test_shapes_and_the_empty_lse(run):
    out, lse, kind, compiled = run("""
with FakeTensorMode():
    out, lse = flash_attn_func(*tensors(), use_softmax=False, activation="silu", causal=True)
print(json.dumps([list(out.shape), list(lse.shape), str(lse.dtype),
    len(interface._flash_attn_fwd.compile_cache.cache)]))
""")
    assert (out, lse, kind, compiled) == ([2, 100, 4, 64], [0], "torch.float32", 1)


def test_torch_compile_keeps_the_call_as_one_operator(run):
    """Forward and backward are traced whole. The tensors are fake, so that nothing is launched, and on the
    CPU, because torch asks the driver for the device of a gradient.
    """
    forward, backward = run("""
from torch._dynamo.backends.common import aot_autograd
from flash_attn.cute.nosoftmax import serves
serves._device_reason = lambda device: None
graphs = []
def keep(graph, inputs):
    graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
    return graph.forward
def step(q, k, v):
    return flash_attn_func(q, k, v, causal=True, use_softmax=False, activation="silu",
        normalization="1/n")[0].sin()
with FakeTensorMode(allow_non_fake_inputs=True):
    q, k, v = (torch.empty(2, 100, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(q, k,
        v).sum().backward()
print(json.dumps([sum("nosoftmax.forward" in n for n in graphs[0]),
    sum("nosoftmax.backward" in n for n in graphs[1])]))
""")
    assert (forward, backward) == (1, 1)


def test_flops_are_those_of_torchs_attention(run):
    """FlopCounterMode counts the public functions, dense, packed and paged, whichever queries and keys count.

    The tensors are fake, so that nothing is launched; those of lengths have contents to read.
    """
    found = run("""
import torch.utils.flop_counter as counting
from flash_attn.cute.nosoftmax import flops, ops, serves
serves._device_reason = lambda device: None
def counted(q, k, v, function=flash_attn_func, backward=False, **options):
    counter = counting.FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, counter:
        q, k, v = (torch.empty(*shape, dtype=torch.bfloat16, requires_grad=backward) for shape in (q, k, v))
        options = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        out = function(q, k, v, use_softmax=False, activation="silu", **options)[0]
        if backward:
            out.sum().backward()
    return {str(op).partition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
def packed(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
def of_call(shapes, seqused_q=None, **options):
    # The formula by itself, on lengths that have memory.
    from flash_attn.cute.nosoftmax import hopper
    calls = []
    def keep(call, extras):
        calls.append((call, extras))
        return call.q
    hopper.forward, before = keep, hopper.forward
    flash_attn_varlen_func(*(torch.zeros(*x, dtype=torch.bfloat16) for x in shapes), use_softmax=False,
        seqused_q=seqused_q, **options)
    hopper.forward = before
    (call, extras), = calls
    return flops.of_forward(call, extras.seqused_q)
heads, three = (2, 4, 64), (30, 4, 64)
shape = (2, 4, 100, 64)
lengths = packed(10, 20)
used = torch.tensor([3, 7], dtype=torch.int32)
table = torch.zeros(2, 3, dtype=torch.int32)
pages = (6, 128, 4, 64)
print(json.dumps({
    "dense": [counted(*[(2, 100, 4, 64)] * 3, backward=True, causal=True),
        counting.sdpa_flop_count(*[shape] * 3), counting.sdpa_backward_flop_count(*[shape] * 4)],
    "packed, unknown": counted(*[three] * 3, function=flash_attn_varlen_func, cu_seqlens_q=lengths,
        cu_seqlens_k=lengths, max_seqlen_q=20, max_seqlen_k=20),
    "no longest": counted(*[three] * 3, function=flash_attn_varlen_func, cu_seqlens_q=lengths,
        cu_seqlens_k=lengths),
    "packed": of_call([three] * 3, cu_seqlens_q=lengths, cu_seqlens_k=lengths),
    "used": of_call([(2, 10, 4, 64), (2, 20, 4, 64), (2, 20, 4, 64)], seqused_q=used, seqused_k=used),
    "pages": of_call([(2, 10, 4, 64), pages, pages], page_table=table, seqused_k=used),
    "capacity": counted((2, 10, 4, 64), pages, pages, function=flash_attn_varlen_func, page_table=table,
        seqused_k=used),
}))
""")
    counts, forward, backward = found["dense"]
    assert counts == {"forward": forward, "backward": backward}
    of_pair = 2 * 4 * 128
    assert found["packed, unknown"] == {"forward": of_pair * 2 * 20 * 20}
    assert found["no longest"] == {"forward": of_pair * 2 * 30 * 30}
    assert found["packed"] == of_pair * (10 * 10 + 20 * 20)
    assert found["used"] == of_pair * (3 * 3 + 7 * 7)
    assert found["pages"] == of_pair * 10 * (3 + 7)
    assert found["capacity"] == {"forward": of_pair * 2 * 10 * 3 * 128}


def test_eager_calls_need_no_operator(run):
    """An operator costs the host several times as much as the call. Its guarantees hold without it: no second
    derivative is silently zero, and no backward uses other lengths than the forward.
    """
    operators, twice, changed = run("""
from flash_attn.cute.nosoftmax import launch, serves
serves._device_reason = lambda device: None
launch.forward = lambda call, q, *rest, **options: q * 2.0
launch.backward = lambda call, dout, q, k, v, **options: (dout * q, k * 1.0, v * 1.0)
seen = []
ops.forward, ops.backward = (lambda *given, name=name: seen.append(name) for name in ("forward", "backward"))
def message(action):
    try:
        action()
    except RuntimeError as e:
        return str(e)
off = dict(use_softmax=False, activation="silu")
q, k, v = (torch.ones(2, 3, 4, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
out = flash_attn_func(q, k, v, **off)[0]
(grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
lengths = torch.tensor([0, 3, 6], dtype=torch.int32)
packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=lengths,
    cu_seqlens_k=lengths, **off)[0]
lengths += 1
print(json.dumps([seen, message(grad.sum().backward), message(packed.sum().backward)]))
""")
    assert operators == []
    assert "once_differentiable" in twice and "modified by an inplace operation" in changed


def test_calls_go_through_upstreams_host_code_once(run):
    """Calls with the user's functions go through it every time. The kernels are stand-ins."""
    seen, right = run("""
from flash_attn.cute.nosoftmax import launch, plan
public.obstacle = lambda *args, **options: None
seen = []
def forward(q, k, v, out, **options):
    seen.append("forward")
    lengths = options["cu_seqlens_q"], options["cu_seqlens_k"]
    plan.recorded(lambda q, k, v, out, scale, *_: out.copy_(q * scale))(q, k, v, out.detach(),
        options["softmax_scale"], *lengths)
def backward(q, k, v, dout, *_, dq, dk, dv, **options):
    seen.append("backward")
    lengths = options["cu_seqlens_q"], options["cu_seqlens_k"]
    def kernel(*x): [grad.copy_(y * z) for grad, y, z in zip(x[4:], x[:3], (x[3], x[1], x[2]))]
    plan.recorded(kernel)(q, k, v, dout, dq, dk, dv, *lengths)
launch._flash_attn_fwd, launch._flash_attn_bwd, launch.zero_slack = forward, backward, lambda *tensors: None
def step(seed, **options):
    shape = (40, 2, 8) if "cu_seqlens_q" in options else (2, 20, 2, 8)
    q, k, v, dout = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    function = flash_attn_varlen_func if "cu_seqlens_q" in options else flash_attn_func
    out = function(q, k, v, use_softmax=False, softmax_scale=0.5, **options)[0]
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return all(map(torch.equal, (out, *grads), (q * 0.5, q * dout, k * k, v * v)))
def mod(score, *rest): return score
lengths = torch.tensor([0, 15, 40], dtype=torch.int32)
right = [step(seed, **options) for options in (
    dict(causal=True), dict(score_mod=mod, score_mod_bwd=mod), dict(mask_mod=mod), dict(cu_seqlens_q=lengths,
        cu_seqlens_k=lengths),
) for seed in range(3)]
print(json.dumps([seen, all(right)]))
""")
    assert right
    assert seen == ["forward", "backward"] * 8


def test_keys_before_every_window_are_left_out(run):
    """A NaN in such keys would reach the result through a tile that they share with visible keys."""
    assert run("""
from flash_attn.cute.nosoftmax import launch
seen = []
public.obstacle = lambda *args, **options: None
launch.forward = lambda call, q, k, v, **options: seen.append([k.shape[1], v.shape[1]]) or q
q, k, v = torch.empty(2, 30, 4, 64), *torch.empty(2, 2, 100, 4, 64)
for options in (
    {"window_size": (10, 0)}, {"window_size": (10, None), "normalization": "1/visible"}, {"window_size": (80,
        0)}, {"causal": True},
    {"window_size": (10, 0), "normalization": "1/n"}, {"window_size": (10, 0), "activation": "sigmoid",
        "sigmoid_bias": "-log n"},
):
    flash_attn_func(q, k, v, use_softmax=False, **options)
print(json.dumps(seen))
""") == [[40, 40], [40, 40], [100, 100], [100, 100], [100, 100], [100, 100]]


def test_queries_that_see_no_key_are_left_out_of_the_backward(run):
    """A NaN in such queries or their dout would reach dk and dv through a tile that they share with queries
    that see keys.
    """
    found = run("""
from flash_attn.cute.nosoftmax import launch
public.obstacle = lambda *args, **options: None
seen = []
def forward(call, q, *rest, **options):  # the mask ends a NaN in rows that see no key
    return q.nan_to_num() * 2.0
def backward(call, dout, q, k, v, **options):  # any NaN that it gets reaches all of dk and dv
    seen.append(q.shape[1])
    return dout * q, k * q.sum(), v * dout.sum()
launch.forward, launch.backward = forward, backward
def unseen(queries, **options):
    q, k, v = torch.ones(1, 100, 2, 8), *torch.ones(2, 1, 30, 2, 8)
    q[:, :queries] = float("nan")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = flash_attn_func(q, k, v, use_softmax=False, **options)[0]
    grads = torch.autograd.grad(out, (q, k, v), torch.where(q.isnan(), q, 1.0))
    zero = not grads[0][:, :queries].any()
    return list(out.shape) == list(q.shape) and zero and all(bool(x.isfinite().all()) for x in grads)
print(json.dumps([
    unseen(70, causal=True), unseen(70, causal=True, normalization="1/n"), unseen(60, window_size=(None, 10)),
    unseen(0, window_size=(10, None)), unseen(0, window_size=(10, 70)), unseen(0), seen,
]))
""")
    assert found == [True] * 6 + [[30, 30, 40, 100, 100, 100]]


def test_given_factors_biases_and_slopes_reach_the_launch(run):
    """Packed factors that fit both readings are those of the rows. Functions of the user get a number as a
    tensor, because they may take no scalars.
    """
    found = run("""
from flash_attn.cute.nosoftmax import launch
from flash_attn.cute.nosoftmax.marker import no_softmax_of
public.obstacle = lambda *args, **options: None
seen = []
def forward(call, q, *rest, **options):
    mark = no_softmax_of(call.mods.score_mod)
    given = call.sequence_factors, call.row_factors, call.sigmoid_biases, call.decay_slopes
    seen.append([mark.normalization, mark.by_head, call.factor, *(x if x is None else x.tolist()
        for x in given)])
    return q
launch.forward = forward
def mod(score, *rest): return score
dense = torch.empty(3, 2, 3, 4, 8).unbind()
packed = torch.empty(3, 3, 4, 8).unbind()
def of(*ends):
    ends = torch.tensor(ends, dtype=torch.int32)
    return dict(cu_seqlens_q=ends, cu_seqlens_k=ends, function=flash_attn_varlen_func)
def step(tensors, function=flash_attn_func, **options):
    function(*tensors, use_softmax=False, **options)
step(dense, normalization=0.5)
step(dense, normalization=0.5, score_mod=mod)
step(dense, normalization=0.5, mask_mod=mod)
step(dense, normalization=torch.ones(2))
step(dense, normalization=torch.ones(2, 3), activation="sigmoid", sigmoid_bias=torch.zeros(4))
step(packed, normalization=torch.ones(2), **of(0, 1, 3))
step(packed, normalization=torch.ones(3), **of(0, 1, 3))
step(packed, normalization=torch.ones(3), **of(0, 1, 1, 3))
step(packed, normalization="1/visible", **of(0, 1, 3))
step(dense, decay_slopes=torch.ones(4))
step(dense, decay_slopes=torch.ones(4), score_mod=mod)
step(packed, decay_slopes=torch.ones(2, 4), activation="sigmoid", sigmoid_bias=torch.zeros(4), **of(0, 1, 3))
print(json.dumps(seen))
""")
    assert found == [
        ["number", 0, 0.5, None, None, None, None],
        ["sequence", 0, None, [0.5] * 2, None, None, None],
        ["sequence", 0, None, [0.5] * 2, None, None, None],
        ["sequence", 0, None, [1.0] * 2, None, None, None],
        ["row", 1, None, None, [[1.0] * 3] * 2, [0.0] * 4, None],
        ["sequence", 0, None, [1.0] * 2, None, None, None],
        ["row", 0, None, None, [1.0] * 3, None, None],
        ["row", 0, None, None, [1.0] * 3, None, None],
        ["1/n", 0, None, None, None, None, None],
        [None, 1, None, None, None, None, [1.0] * 4],
        [None, 1, None, None, None, None, [1.0] * 4],
        [None, 2, None, None, None, [0.0] * 4, [[1.0] * 4] * 2],
    ]


def test_factors_of_queries_that_see_no_key_are_left_out_of_the_backward(run):
    """Otherwise the others would belong to wrong queries, and the largest might be one that no query has."""
    assert run("""
from flash_attn.cute.nosoftmax import launch
public.obstacle = lambda *args, **options: None
seen = []
def note(call): seen.append([x if x is None else x.tolist() for x in (call.sequence_factors,
    call.row_factors)])
launch.forward = lambda call, q, *rest, **options: note(call) or q * 2.0
launch.backward = lambda call, dout, q, k, v, **options: note(call) or (q * 1.0, k * 1.0, v * 1.0)
q, k, v = (torch.ones(2, n, 2, 8, requires_grad=True) for n in (5, 3, 3))
for factors in (torch.arange(10.0).view(2, 5), torch.arange(2.0)):
    flash_attn_func(q, k, v, causal=True, use_softmax=False, normalization=factors)[0].sum().backward()
print(json.dumps(seen))
""") == [
        [None, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]],
        [None, [[2, 3, 4], [7, 8, 9]]],
        [[0, 1], None],
        [[0, 1], None],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "score_mod=square, score_mod_bwd=square_bwd, causal=True",
        "activation='sigmoid', mask_mod=even_distance",
        "activation='sigmoid', mask_mod=even_distance, normalization=0.25, sigmoid_bias=torch.empty(4, "
        "device='cuda')",
        "score_mod=square, score_mod_bwd=square_bwd, normalization=torch.empty(2, 512, device='cuda')",
        "activation='sigmoid', mask_mod=causal_with_gaps, block_sparse_tensors=blocks, "
        "block_sparse_tensors_bwd=blocks",
    ],
)
def test_the_users_functions_and_blocks_compile(run, options):
    """The functions and blocks of test_hopper.py compile, forward and backward. The test calls backward
    directly, because autograd asks the driver for the device.
    """
    functions = "".join(map(inspect.getsource, (square, square_bwd, even_distance, causal_with_gaps)))
    assert run(f"""
from types import SimpleNamespace
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
{functions}
class Context(SimpleNamespace):
    def save_for_backward(self, *tensors): self.saved_tensors = tensors
context = Context()
ops.Attention = SimpleNamespace(apply=lambda *args: real.forward(context,
    *args)) if (real := ops.Attention) else None
with FakeTensorMode():
    q, k, v = (torch.empty(2, 512, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    lists = [torch.empty(1, 1, 4, *more, dtype=torch.int32, device="cuda") for more in ((), (4,)) * 2]
    blocks = BlockSparseTensorsTorch(*lists, block_size=(128, 128))
    out, _ = flash_attn_func(q, k, v, use_softmax=False, {options})
    grads = real.backward(context, out)
caches = interface._flash_attn_fwd.compile_cache.cache, interface._flash_attn_bwd.compile_cache.cache
print(json.dumps([*(list(x.shape) == [2, 512, 4, 64] for x in (out, *grads[:3])), *map(len, caches)]))
""") == [True] * 4 + [1, 1]
