"""Test nosoftmax/launch.py, with stand-ins for upstream's host code: plans of packed calls, slack rows, small
grids.
"""

import pytest

pytestmark = pytest.mark.source
BEGIN = """
import json
import torch
from flash_attn.cute.nosoftmax import launch, plan
from flash_attn.cute.nosoftmax.marker import HSTUKind, NoSoftmax, WindowKind, marked, no_softmax_of
from flash_attn.cute.nosoftmax.score_mods import ScoreMods

runs, slack = [], []

def attention(out, rows, scale, *lengths):  # each query gets the length of its sequence
    offsets = next((x for x in lengths if x is not None), None)
    ends = [0, rows.shape[0]] if offsets is None else offsets.tolist()
    for begin, end in zip(ends, ends[1:]):
        out[begin:end] = rows[begin:end] * scale * (end - begin)

def note(name, q, k, max_seqlen_q, cu_seqlens_q):
    offsets = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    runs.append([name, q.dim(), k.dim(), max_seqlen_q, offsets])

def forward(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, **options):
    note("forward", q, k, options["max_seqlen_q"], cu_seqlens_q)
    def kernel(q, k, v, out, scale, *lengths):
        attention(out, q, scale, *lengths)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table
    plan.recorded(kernel)(q, k, v, out.detach(), options["softmax_scale"], *lengths)

def backward(
    q, k, v, dout, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, **options
):
    note("backward", q, k, options["max_seqlen_q"], cu_seqlens_q)
    def kernel(q, k, v, dout, dq, dk, dv, sums, *lengths):
        assert not sums.any()
        sums += 1.0
        attention(dq, dout, 1.0, *lengths)
        dk.copy_(k)
        dv.copy_(v)
    memory = torch.zeros(3)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    plan.recorded(kernel)(q, k, v, dout, dq, dk, dv, memory, *lengths)

def zero_slack(*tensors):
    def kernel(x, offsets, y=None, z=None, more=None):
        slack.append([t is not None for t in (x, offsets, y, z, more)])
        for rows, ends in ((x, offsets), (y, more), (z, more)):
            if ends is not None:
                rows[: ends[0]], rows[ends[-1] :] = 0.0, 0.0
    plan.recorded(kernel)(*tensors)

launch._flash_attn_fwd, launch._flash_attn_bwd, launch.zero_slack = forward, backward, zero_slack
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)  # new memory is NaN
mods = ScoreMods(marked(lambda score: score, NoSoftmax()), None, 1.0, plans={})

def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)

def call(cu_seqlens_q=None, cu_seqlens_k=None, causal=False, window=(None, None), mods=mods, **options):
    return launch.Call(mods, 1.0, causal, window, cu_seqlens_q, cu_seqlens_k, **options)

def numbers(*shape, seed=0):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(4)]
"""


@pytest.fixture
def run(forked):
    return lambda program: forked.run(BEGIN + program)


def test_packed_calls_run_the_host_code_once_and_use_their_own_lengths(run):
    """q and k may share one tensor of offsets. Its values may change between calls, its length may not."""
    right, names, plans = run("""
right = []
for shared in (True, False):
    for seed, ends in enumerate(((0, 4, 10), (0, 7, 10), (2, 3, 9))):
        q, k, v, dout = numbers(10, 2, 8, seed=seed)
        cu = offsets(*ends)
        c = call(cu, cu if shared else cu.clone(), max_seqlen_q=7, max_seqlen_k=7)
        out, (dq, dk, dv) = launch.forward(c, q, k, v), launch.backward(c, dout, q, k, v)
        want, want_dq = torch.zeros(2, 10, 2, 8)
        attention(want, q, 1.0, cu)
        attention(want_dq, dout, 1.0, cu)
        inside = torch.zeros(10, 1, 1)
        inside[ends[0]:ends[-1]] = 1.0
        right += [torch.equal(out, want), torch.equal(dq, want_dq)]
        right += [torch.equal(dk, k * inside), torch.equal(dv, v * inside)]
print(json.dumps([all(right), [r[0] for r in runs], len(mods.plans)]))
""")
    assert right
    assert names == ["forward", "backward"] * 2 and plans == 4


@pytest.mark.slow
@pytest.mark.parametrize("other", [
    "dict(max_seqlen_q=8)", "dict(max_seqlen_k=9)", "dict(lengths=offsets(0, 4, 6, 10))", "dict(rows=12)",
    "dict(seqused_q=offsets(1, 2))", "dict(seqused_k=offsets(1, 2))",
])  # fmt: skip
def test_what_a_launch_depends_on_is_part_of_the_key(run, other):
    assert run(f"""
def step(rows=10, lengths=offsets(0, 4, 10), **options):
    q, k, v, dout = numbers(rows, 2, 8)
    c = call(lengths, lengths.clone(), **dict(dict(max_seqlen_q=7, max_seqlen_k=7), **options))
    launch.forward(c, q, k, v)
    launch.backward(c, dout, q, k, v)
for options in (dict(), {other}) * 2:
    step(**options)
print(json.dumps([len(runs), len(mods.plans)]))
""") == [4, 4]


def test_pages_are_part_of_a_plan(run):
    assert (
        run("""
q, k, v, _ = numbers(5, 16, 2, 8)
for table in ([[0, 1], [2, 3]], [[3, 2], [1, 0]]):
    table = torch.tensor(table, dtype=torch.int32)
    launch.forward(call(seqused_k=offsets(20, 30)), q[:2], k, v, page_table=table)
print(json.dumps(len(runs)))
""")
        == 1
    )


def test_rows_of_no_sequence_are_zero(run):
    """Rows are zeroed only for the caller's own offsets. With seqused, tensors are zeros from the start."""
    zero, seen = run("""
q, k, v, dout = numbers(12, 2, 8)
zero = []
for ends in ((0, 4, 10), (3, 4, 9)):
    c = call(offsets(*ends), offsets(*ends), max_seqlen_q=7, max_seqlen_k=7)
    results = launch.forward(c, q, k, v), *launch.backward(c, dout, q, k, v)
    for x in results:
        zero.append(not x[: ends[0]].any() and not x[ends[-1] :].any() and bool(x[ends[0] : ends[-1]].any()))
del slack[:-1]
launch.forward(call(seqused_q=offsets(1, 2)), *(x.view(2, 6, 2, 8) for x in (q, k, v)))
launch.backward(call(seqused_k=offsets(1, 2)), *(x.view(2, 6, 2, 8) for x in (dout, q, k, v)))
c = call(offsets(0, 4, 10), offsets(0, 4, 10), seqused_q=offsets(1, 2))
launch.forward(c, q, k, v)
launch.backward(c, dout, q, k, v)
print(json.dumps([zero, slack]))
""")
    assert all(zero)
    assert seen == [[True] * 5, [True, False, True, True, False], [True, False, True, True, True]]


def test_a_batch_beyond_the_grid_is_handed_on_as_a_packed_one(run):
    """The limit of 65,535 for sequences and for heads is 3 here."""
    right, seen = run("""
launch._MOST_BLOCKS = 3
right = []
def step(batch, heads, **options):
    q, k, v, dout = numbers(batch, 5, heads, 8)
    out, grads = launch.forward(call(**options), q, k, v), launch.backward(call(**options), dout, q, k, v)
    right.append(out.shape == q.shape and bool(out.isfinite().all()))
    right.append(all(x.shape == y.shape for x, y in zip(grads, (q, k, v))))
    return out, q
step(3, 2)
out, q = step(4, 2)
right.append(torch.equal(out, q * 5.0))
step(2, 4)
step(4, 2, seqused_k=offsets(1, 2, 3, 4))
print(json.dumps([right, runs]))
""")
    assert all(right)
    offsets = [0, 5, 10, 15, 20]
    assert seen[:2] == [["forward", 4, 4, None, None], ["backward", 4, 4, None, None]]
    assert seen[2:4] == [["forward", 3, 3, 5, offsets], ["backward", 3, 3, 5, offsets]]
    assert seen[4:6] == [["forward", 3, 3, 5, offsets[:3]], ["backward", 3, 3, 5, offsets[:3]]]
    assert seen[6:] == [["forward", 3, 3, 5, offsets], ["backward", 3, 3, 5, offsets]]


def test_blocks_of_the_users_do_not_go_beyond_the_grid(run):
    assert "block_sparse_tensors" in run("""
launch._MOST_BLOCKS = 3
q, k, v, _ = numbers(4, 5, 2, 8)
try:
    launch.forward(call(), q, k, v, block_sparse_tensors=())
except ValueError as e:
    print(json.dumps(str(e)))
""")


GIVEN = """
from flash_attn.cute.utils import AuxData

def note_given(run):  # records the factors and biases that a launch gets, repeated or not
    def upstream(*tensors, aux_tensors, aux_scalars, **options):
        def kernel(*args):
            aux = args[-1]
            given.append([run, [t.tolist() for t in aux.tensors or ()],
                [getattr(x, "value", x) for x in aux.scalars or ()]])
        runs.append(run)
        results = [options["out"]] if run == "forward" else [options[name] for name in ("dq", "dk", "dv")]
        plan.recorded(kernel)(*tensors[:4], *(x.detach() for x in results), AuxData(aux_tensors, aux_scalars))
    return upstream

given = []
launch._flash_attn_fwd, launch._flash_attn_bwd = map(note_given, ("forward", "backward"))
launch.zero_slack = lambda *tensors: None

def largest_factors(factors, cu_seqlens, seqused):
    def kernel(factors, cu_seqlens, seqused, largest):
        ends = [] if cu_seqlens is None else cu_seqlens.tolist()
        rows = list(factors) if cu_seqlens is None else [factors[a:b] for a, b in zip(ends, ends[1:])]
        if seqused is not None:
            rows = [x[:n] for x, n in zip(rows, seqused.tolist())]
        largest.copy_(torch.stack([x.amax() for x in rows]))
    count = factors.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    largest = plan.not_read(factors.new_empty(count))
    plan.recorded(kernel)(factors, cu_seqlens, seqused, largest)
    return largest
launch.largest_factors = largest_factors

def step(q_shape, lengths=None, **options):
    given.clear()
    q, k, v, dout = numbers(*q_shape)
    c = call(lengths, lengths, **options)
    launch.forward(c, q, k, v)
    launch.backward(c, dout, q, k, v)
    return [[run, [torch.tensor(x).tolist() for x in tensors], scalars] for run, tensors, scalars in given]

def linspace(*shape, to=1.0):
    return torch.linspace(0.0, to, torch.Size(shape).numel()).reshape(shape)
"""


def test_given_factors_and_biases_reach_the_kernels_in_order(run):
    """Factors come first, biases last, and the backward gets the largest factor of each sequence between."""
    found = run(
        GIVEN
        + """
bias, used = linspace(2, 2, to=3.0), offsets(1, 2)
print(json.dumps([
    step((2, 5, 2, 8), factor=0.25),
    step((2, 5, 2, 8), sequence_factors=linspace(2), sigmoid_biases=bias),
    step((2, 5, 2, 8), row_factors=linspace(2, 5, to=9.0), sigmoid_biases=bias),
    step((10, 2, 8), offsets(0, 4, 10), row_factors=linspace(10, to=9.0)),
    step((10, 2, 8), offsets(0, 4, 10), row_factors=linspace(10, to=9.0), seqused_q=used),
    step((2, 5, 2, 8), row_factors=linspace(2, 5, to=9.0), seqused_q=used),
    step((2, 5, 2, 8), row_factors=linspace(5, 2, to=9.0).t()),
]))
"""
    )
    bias, rows, flat = [[0, 1], [2, 3]], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], list(range(10))
    transposed = [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert found == [
        [["forward", [], [0.25]], ["backward", [], [0.25]]],
        [[name, [[0, 1], bias], []] for name in ("forward", "backward")],
        [["forward", [rows, bias], []], ["backward", [rows, [4, 9], bias], []]],
        [["forward", [flat], []], ["backward", [flat, [3, 9]], []]],
        [["forward", [flat], []], ["backward", [flat, [0, 5]], []]],
        [["forward", [rows], []], ["backward", [flat, [0, 6]], []]],
        [["forward", [transposed], []], ["backward", [transposed, [8, 9]], []]],
    ]


def test_factors_of_rows_are_packed_with_a_batch_beyond_the_grid(run):
    """The factors of sequences stay as they are, also where there are as many rows as sequences."""
    rows, sequences = run(
        GIVEN
        + """
launch._MOST_BLOCKS = 3
print(json.dumps([
    step((4, 2, 2, 8), row_factors=linspace(4, 2, to=7.0)), step((4, 1, 2, 8), sequence_factors=linspace(4,
        to=3.0)),
]))
"""
    )
    flat = list(range(8))
    assert rows == [["forward", [flat], [2]], ["backward", [flat, [1, 3, 5, 7]], [2]]]  # of the longest
    assert sequences == [[name, [[0, 1, 2, 3]], [1]] for name in ("forward", "backward")]


def test_repeated_launches_use_their_own_factors(run):
    """A number is part of the key of a plan, tensors are not."""
    found, count = run(
        GIVEN
        + """
found = []
for top in (9.0, 18.0):
    found.append(step((2, 5, 2, 8), row_factors=linspace(2, 5, to=top), sigmoid_biases=linspace(2, to=top)))
before = len(runs)
for factor in (0.5, 0.25, 0.5):
    found.append(step((2, 5, 2, 8), factor=factor))
print(json.dumps([found, [before, len(runs)]]))
"""
    )
    for i, times in enumerate((1, 2)):
        rows = [[times * x for x in row] for row in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
        assert found[i] == [
            ["forward", [rows, [0, 9 * times]], []],
            ["backward", [rows, [4 * times, 9 * times], [0, 9 * times]], []],
        ]
    assert [x[0][2] for x in found[2:]] == [x[1][2] for x in found[2:]] == [[0.5], [0.25], [0.5]]
    assert count == [2, 6]


def test_the_users_tensors_come_before_the_given_ones(run):
    """Functions of the user count from the front."""
    assert run(
        GIVEN
        + """
print(json.dumps(step((2, 5, 2, 8), sequence_factors=linspace(2), aux_tensors=[linspace(3, to=2.0)],
    aux_scalars=(4.0,), factor=0.5)))
"""
    ) == [[name, [[0, 1, 2], [0, 1]], [4.0, 0.5]] for name in ("forward", "backward")]


def test_masks_reach_the_kernels_first(run):
    """A diagonal comes before the parts of a mask, and these before factors; numbers are part of the key of a
    plan, tensors are not."""
    found, count = run(
        GIVEN
        + """
found = []
for parts, top in (((3, 7), 4), ((3, 7), 5), ((3, 8), 5)):
    counts = offsets(1, top)
    found.append(step((2, 5, 2, 8), mask_numbers=parts, mask_tensors=(counts,), row_factors=linspace(2, 5,
        to=9.0), factor=None, diagonal=offsets(-top, top)))
print(json.dumps([found, len(runs)]))
"""
    )
    rows = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for steps, numbers, top in zip(found, ([3, 7], [3, 7], [3, 8]), (4, 5, 5)):
        assert steps == [
            ["forward", [[-top, top], [1, top], rows], numbers],
            ["backward", [[-top, top], [1, top], rows, [4, 9]], numbers],
        ]  # fmt: skip
    assert count == 4


WITH_MASK = """
def masks(**parts):
    return ScoreMods(marked(lambda score: score, NoSoftmax(**parts)), None, 1.0, plans={})
def hstu(*parts):
    return masks(hstu=HSTUKind(*parts))
"""


def test_where_rows_see_few_keys_tiles_are_small(run):
    """Half of the keys if causal, and no more than a window leaves, if all rows have it."""
    small = run(
        WITH_MASK
        + """
def tile(keys, head_dim=128, head_dim_v=None, **options):
    q, v = (torch.empty(10, 2, d, device="meta") for d in (head_dim, head_dim_v or head_dim))
    return launch._tile(call(**options), q, v, keys)["tile_mn"]
def small(*given, **options):
    return tile(*given, **options) == (64, 64)
print(json.dumps([
    [small(n, causal=True) for n in (4096, 4097)],
    [small(n) for n in (2048, 2049)],
    [small(4096, d, causal=True) for d in (8, 64, 65, 96, 128, 136, 256)],
    [small(4096, 64, 128, causal=True), small(4096, 128, 256, causal=True), small(None, causal=True)],
    [small(9000, window=w) for w in ((1600, 448), (1600, 449), (2048, 0), (None, 0), (0, None), (100, None))],
    [small(9000, causal=True, window=w) for w in ((2048, None), (2049, 0))],
    [small(n, mods=hstu("sequence", "number"), mask_numbers=(8,)) for n in (4096, 4097)],
    [small(9000, mods=hstu("number", None, True, *more), mask_numbers=(3, n, 7)) for n, *more in
        ((2048,), (2049,), (2048, True), (2048, False, True))],
    [small(9000, mods=hstu("sequence", "number", True), mask_numbers=(8, n)) for n in (2048, 2049)],
    [small(n, mods=masks(intervals=2)) for n in (4096, 4097)],
    [small(n, mods=masks(has_diagonal=True, window=WindowKind(True, True)), mask_numbers=m,
        diagonal=offsets(1)) for n, m in ((9000, (2000, 48)), (9000, (2000, 49)))],
    [small(n, mods=masks(has_diagonal=True, window=WindowKind(False, True)), mask_numbers=(0,),
        diagonal=offsets(1)) for n in (2048, 2049)],
    [small(n, mask_mod=print, causal=True) for n in (2048, 2049)],
    [tile(n, d, causal=True) for d in (192, 200, 256) for n in (8192, 8193)],
]))
"""
    )
    assert small == [
        [True, False],
        [True, False],
        [True, True, True, True, True, False, False],
        [True, False, False],
        [True, False, True, False, False, False],
        [True, False],
        [True, False],
        [True, False, False, True],
        [True, False],
        [True, False],
        [True, False],
        [True, False],
        [True, False],
        [[128, 112], [128, 112], [128, 64], [128, 80], [128, 64], [128, 80]],
    ]


def test_which_launches_have_the_grid(run):
    """Packed ones, of formulas and not of the user's functions, whose lengths differ little; backward with a
    mask, or up to 2048 keys, unless deterministic or with a diagonal. The longest sequence is a scalar before
    the factor then.
    """
    assert run(
        WITH_MASK
        + """
seen = []
def note(run):
    def upstream(*tensors, score_mod, aux_scalars, **options):
        scalars = [getattr(x, "value", x) for x in aux_scalars or ()]
        seen.append(scalars if no_softmax_of(score_mod).grid else [None, *scalars])
    return upstream
launch._flash_attn_fwd, launch._flash_attn_bwd = map(note, ("forward", "backward"))
launch.zero_slack = lambda *tensors: None

def step(lengths, most, heads=2, kv=2, deterministic=False, **options):
    seen.clear()
    cu = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    q, dout = torch.zeros(2, int(cu[-1]), heads, 8, dtype=torch.bfloat16)
    k, v = torch.zeros(2, int(cu[-1]), kv, 8, dtype=torch.bfloat16)
    c = call(cu, cu, max_seqlen_q=most, max_seqlen_k=most, **options)
    launch.forward(c, q, k, v)
    launch.backward(c, dout, q, k, v, deterministic)
    return list(seen)

mask = dict(mods=hstu("number"), mask_numbers=(3,))
print(json.dumps([
    step([500] * 4, 500),
    step([500] * 4, 500, factor=0.5, mods=masks(normalization="number")),
    step([2048] * 2, 2048, causal=True), step([2049] * 2, 2049, causal=True),
    step([2049] * 2, 2049, **mask),
    step([500] * 4, 500, deterministic=True), step([500] * 4, 500, diagonal=offsets(1, 2, 3, 4)),
    step([2000, 10, 10, 10], 2000), step([500] * 4, None),
    step([500] * 4, 500, heads=4, kv=2),
    step([500] * 4, 500, aux_scalars=(4.0,), aux_tensors=[offsets(1)]),
    step([500] * 4, 500, mods=mods._replace(plans=None)),
    step([1] * 70000, 1, heads=1, kv=1),
]))
"""
    ) == [
        [[500], [500]],
        [[500, 0.5], [500, 0.5]],
        [[2048], [2048]],
        [[2049], [None]],
        [[3, 2049], [3, 2049]],
        [[500], [None]],
        [[500], [None]],
        [[None], [None]],
        [[None], [None]],
        [[500], [500]],
        [[None, 4.0], [None, 4.0]],
        [[None], [None]],
        [[None], [None]],
    ]


@pytest.mark.slow
def test_the_kernels_that_find_the_bounds_of_intervals_compile(run):
    """And their tables have room for the blocks of every layout."""
    assert run("""
import importlib
from torch._subclasses.fake_tensor import FakeTensorMode
hulls = importlib.import_module("flash_attn.cute.nosoftmax.hulls")
shapes = []
with FakeTensorMode():
    dense, packed = (torch.empty(*x, 2, dtype=torch.int32, device="cuda") for x in ((3, 150), (450,)))
    cu, used = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (4, 3))
    for rows, lengths in (
        (dense, (None, None, None)), (dense, (None, None, used)), (packed, (cu, cu, None)),
        (packed, (cu, cu, used)), (packed, (cu, None, used)),
    ):
        table = hulls.hulls((rows, rows), lengths, (150, 200), 3, 64)
        found = [
            hulls.visits(table, lengths, (150, 200), 3, 600, (64, 128), ordered) for ordered in (True, False)
        ]
        shapes.append([list(table.shape), *(list(x.shape) for x in found)])
print(json.dumps([shapes, len(hulls.hulls.compile_cache.cache), len(hulls.visits.compile_cache.cache)]))
""") == [
        [[[9, 2, 4], *[[6, 2]] * 2]] * 2
        + [[[11, 2, 4], *[[8, 2]] * 2]] * 2
        + [[[11, 2, 4], *[[6, 2]] * 2]],
        5, 10,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_kernel_that_finds_the_largest_factors_compiles(run):
    assert run("""
import importlib
from torch._subclasses.fake_tensor import FakeTensorMode
largest = importlib.import_module("flash_attn.cute.nosoftmax.largest")
with FakeTensorMode():
    dense, packed = (torch.empty(shape, device="cuda") for shape in ((2, 6), (12,)))
    cu, used = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (3, 2))
    shapes = [x.shape for x in (
        largest.largest_factors(dense, None, None), largest.largest_factors(packed, cu, None),
        largest.largest_factors(packed, cu, used),
    )]
print(json.dumps([shapes, len(largest.largest_factors.compile_cache.cache)]))
""") == [[[2]] * 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("shapes, lengths", [
    ("(0, 5, 2, 8), (0, 5, 2, 8)", "()"), ("(2, 0, 2, 8), (2, 5, 2, 8)", "()"),
    ("(2, 5, 2, 8), (2, 0, 2, 8)", "()"), ("(0, 2, 8), (0, 2, 8)", "(offsets(0), offsets(0))"),
    ("(3, 2, 8), (3, 2, 8)", "(offsets(0), offsets(0))"),
    ("(0, 2, 8), (4, 2, 8)", "(offsets(0, 0), offsets(0, 4))"),
])  # fmt: skip
def test_nothing_to_do_launches_nothing_and_gives_zeros(run, shapes, lengths):
    assert run(f"""
shape_q, shape_k = {shapes}
q, dout, k, v = torch.ones(shape_q), torch.ones(shape_q), torch.ones(shape_k), torch.ones(shape_k)
c = call(*{lengths})
results = launch.forward(c, q, k, v), *launch.backward(c, dout, q, k, v)
print(json.dumps([[x.shape == y.shape and not x.any().item() for x, y in zip(results, (q, q, k, v))], runs]))
""") == [[True] * 4, []]


def test_the_kernel_that_zeroes_slack_rows_compiles(run):
    """The kernel compiles for Hopper, with the offsets of queries alone and with those of keys."""
    assert (
        run("""
import importlib
from torch._subclasses.fake_tensor import FakeTensorMode
slack = importlib.import_module("flash_attn.cute.nosoftmax.slack")
with FakeTensorMode():
    x = torch.empty(12, 2, 8, dtype=torch.float16, device="cuda")
    cu = torch.empty(3, dtype=torch.int32, device="cuda")
    slack.zero_slack(x, cu)
    slack.zero_slack(x, cu, x, x, cu)
    slack.zero_slack(x, None, x, x, cu)
    slack.zero_slack(x, None, x, x, None)
print(json.dumps(len(slack.zero_slack.compile_cache.cache)))
""")
        == 2
    )
