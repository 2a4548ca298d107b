"""Test that a sequence over several ranks gives what one device gives, and that no rank waits for an error on
another.

Processes with gloo on the CPU (ranks.py) go through the cases of parallel_cases.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flash_attn.distributed.layout import Layout

import parallel_cases as cases
from ranks import Ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = 5.0  # of the groups in which a rank is lost, in seconds


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    made = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("method", cases.METHODS)
def test_as_on_one_device(ranks, method, layout):
    """Out, dq, dk and dv, for every mask and score."""
    found = ranks.run(cases.largest_errors, method, layout)
    compared = set()
    for errors in found:
        for case, error in errors.items():
            if not isinstance(error, str):  # the reason why the method does not apply
                assert max(error) < 1e-10, (case, error)
                compared.add(case)
    takes = [case for case in cases.cases_of(method) if method != "state" or case[1] in cases.LINEAR]
    assert compared == set(takes)


def test_same_bits(ranks):
    assert ranks.run(cases.same_bits) == [[]] * ranks.world


def test_sums_in_float32(ranks):
    """Partial sums beyond the range of float16, whose total is within it."""
    for found in ranks.run(cases.half_precision):
        for method, pair in found.items():
            for x, y in zip(*pair):
                assert (x - y).abs().max() <= 2**-9 * y.abs().max(), method


def test_sums_are_rounded_once(ranks):
    """In bfloat16, where the last block is added as the sum is rounded: as close as one call would be."""
    for found in ranks.run(cases.rounded_once):
        for name, pair in found.items():
            for x, y in zip(*pair):
                assert (x - y).abs().max() <= 2**-8 * y.abs().max(), name


def test_only_blocks_on_the_diagonal_are_masked(ranks):
    """A rank's queries see all of the earlier keys, and such a block is full attention without a diagonal.
    Zigzag, its two parts are one block.
    """
    for rank, found in enumerate(ranks.run(cases.blocks_of_a_ring)):
        masked, open_block = ((-1, 0), False), ((-1, -1), False)
        assert found["contiguous"] == [masked, *[open_block] * rank]
        assert found["zigzag"] == [masked, *[open_block] * (ranks.world - 1)]


@pytest.mark.parametrize(
    "kind, offsets, tokens",
    [
        ("contiguous", (0, 8), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("contiguous", (0, 3, 3, 7), [[0, 1, 2], [3, 4, 5, 6]]),
        ("zigzag", (0, 8), [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("zigzag", (0, 4, 8), [[0, 4, 3, 7], [1, 5, 2, 6]]),
        ("zigzag", (0, 1, 6), [[1, 0, 4, 5], [2, 3]]),
    ],
)
def test_layouts(kind, offsets, tokens):
    layout = Layout(2, kind, offsets)
    assert [[i for span in layout.tokens(rank) for i in span] for rank in range(2)] == tokens
    assert layout.sizes == [len(x) for x in tokens]


def test_shard_and_unshard(ranks):
    ranks.run(cases.gathered_again)


def test_a_plan_after_inference(ranks):
    ranks.run(cases.shard_after_inference)


def test_packed_arguments(ranks):
    ranks.run(cases.packed_forms)


def test_repeated_calls(ranks):
    ranks.run(cases.repeated)


def test_a_group_of_one(ranks):
    ranks.run(cases.alone)


def test_a_mesh(ranks):
    errors = ranks.errors(cases.of_a_mesh)
    assert errors == [errors[0]] * ranks.world
    assert errors[0][0] is ValueError and errors[0][1].startswith("the mesh has 2 dimensions")


@pytest.mark.slow
@pytest.mark.parametrize("method, again", [("allgather", False), ("ring", True)])
def test_a_model_under_fsdp(ranks, method, again):
    """FSDP2, with and without activation checkpoints."""
    if ranks.world > 2:
        pytest.skip("two ranks show it")
    assert max(ranks.run(cases.trained, method, again)) < 1e-10


@pytest.mark.slow
def test_compiled(ranks):
    if ranks.world > 2:
        pytest.skip("two ranks show it")
    ranks.run(cases.compiled)


def test_dtensors(ranks):
    ranks.run(cases.of_dtensors)


def test_auto_takes_the_fewest_bytes(ranks):
    """The formulas of docs/distributed.md, float32."""
    world, tokens = ranks.world, 64 // ranks.world
    state = (world - 1) * cases.HEADS_K * 16 * 16 * 4
    ulysses = tokens * 2 * (cases.HEADS + cases.HEADS_K) * 16 * 4 * (world - 1) // world
    keys = (world - 1) * tokens * 2 * 16 * 4
    for found in ranks.run(cases.methods_of_auto):
        assert found["identity"][:3] == ("state", state, state)
        if world == 2:
            assert found["silu"][:3] == ("ulysses", ulysses, ulysses)
        assert found["one head"][:3] == ("allgather", keys, 2 * keys)
        assert "not ulysses: 1 heads of k do not divide by" in found["one head"][3]
        assert 'not state: algorithm="quadratic" excludes linear time' in found["quadratic"][3]
        assert found["mask"][:3] == ("allgather", keys, 2 * keys)
        assert "not state: mask has no exact algorithm in linear time" in found["mask"][3]
        assert "not ring: mask names keys of the whole sequence" in found["mask"][3]


def test_the_bytes_are_those_of_the_formulas(ranks):
    """A rank gets fewer gradients by allgather if others' queries see few of its keys: the formula is for the
    one that gets most."""
    runs = ranks.run(cases.bytes_received)
    for case, (_, told) in runs[0].items():
        counted = [found[case][0] for found in runs]
        assert {found[case][1] for found in runs} == {told} and min(told) > 0, case
        if case[:2] == ("allgather", None):
            counted = [tuple(max(found) for found in zip(*counted))]
        assert set(counted) == {told}, case


# Fault -> class and words of the error on the rank that is at fault, the last one, and on the others.
DIFFERENT = r"the ranks of a context-parallel call differ: "
WRONG = {
    "causal": (ValueError, DIFFERENT + "window_right is -1 on rank 0"),
    "decay_slopes": (ValueError, DIFFERENT + r"decay_slopes is \[0.25"),
    "layout": (ValueError, DIFFERENT + "layout is 'contiguous' on rank 0"),
    "method": (ValueError, DIFFERENT + "method is 'allgather' on rank 0"),
    "lengths": (ValueError, DIFFERENT + ".*the lengths of the sequences is "),
    "dtype": (ValueError, DIFFERENT + "dtype of k is torch.float32 on rank 0"),
    "mask": (ValueError, DIFFERENT + "mask is 'hstu' on rank 0.*None"),
    "window of the mask": (ValueError, DIFFERENT + "max_attn_len is 8 on rank 0"),
    "counts of the mask": (ValueError, DIFFERENT + r"num_targets is \[3, 0\] on rank 0"),
    "mask beyond the length": (ValueError, "num_targets=40 and num_contexts=6, but the longest .* 45 keys"),
    "mask in a ring": (ValueError, 'method="ring" is not possible: mask names keys of the whole sequence'),
    "mask in linear time": (ValueError, 'method="state" is not possible: mask has no exact algorithm'),
    "gradient": (ValueError, DIFFERENT + "whether q, k or v needs a gradient is True on rank 0"),
    "dropout": (ValueError, "dropout_p=0.1 is not there with context_parallel"),
    "return_attn_probs": (ValueError, "return_attn_probs=True is not there with context_parallel"),
    "softmax": (ValueError, "context_parallel with use_softmax=True"),
    "no CPU": (ValueError, "q is on cpu, but the group moves tensors on cuda"),
    "forward derivative": (RuntimeError, "torch.func and forward derivatives .* with context_parallel"),
    "DTensor": (ValueError, r"q is a DTensor with context_parallel: give q.to_local\(\)"),
    "not a plan": (TypeError, "context_parallel is a .*: give a flash_attn.distributed.ContextParallel"),
    "packed tensors": (ValueError, "the tensors are packed, but context_parallel is a plan for dense ones"),
    "dense tensors": (ValueError, "the tensors are dense, but context_parallel is a plan for packed ones"),
    "impossible method": (ValueError, "method=\"state\" is not possible: activation='silu'"),
    "forced backend": (ValueError, 'backend="fa2" is not possible'),
    "other offsets": (ValueError, r"cu_seqlens_q=.* but the plan was made with \[0, 10"),
    "second derivative": (RuntimeError, "a second derivative of attention with context_parallel"),
}
WRONG_ON_ONE = {
    "not sharded": (ValueError, "q has shape .*, with 45 tokens, but the plan gives rank"),
    "targets beyond the length": (ValueError, r"num_targets\[1\]=46 .* sequence 1 has 45 keys"),
    "intervals not sharded": (ValueError, r"starts has shape \(2, 45, 2\), expected \(2, "),
    "intervals beyond the keys": (ValueError, r"starts\[1, 2, 1\]=.*, ends\[1, 2, 1\]=46: its sequence has"),
    "ambiguous factors": (ValueError, r"normalization has shape \(2,\), and this rank has as many rows"),
    "wrong options": (TypeError, r"window_size=\(1, 2, 3\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_raises_on_every_rank(ranks, name):
    kind, words = WRONG[name]
    for error in ranks.errors(cases.differing, name):
        assert error is not None and error[0] is kind
        with pytest.raises(kind, match=words):
            raise kind(error[1])


@pytest.mark.parametrize("name", WRONG_ON_ONE)
def test_the_others_hear_of_an_error(ranks, name):
    kind, words = WRONG_ON_ONE[name]
    *others, last = ranks.errors(cases.differing, name)
    assert last[0] is kind
    with pytest.raises(kind, match=words):
        raise kind(last[1])
    for error in others:
        assert error[0] is RuntimeError
        assert error[1].startswith(f"no rank has begun: rank {ranks.world - 1} raised {kind.__name__}: ")


def test_an_error_keeps_no_plan(ranks):
    """A group that lives until the process ends has threads then, which gloo may not survive."""
    assert ranks.run(cases.let_go_after_an_error) == [True] * ranks.world


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_cache_over_the_ranks(ranks, layout):
    ranks.run(cases.decoded, layout)


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("whole cache", ValueError, r"k_cache has shape \(2, 20, 2, 4\), but the plan gives rank"),
        ("too long", ValueError, r"cache_seqlens\[1\]=20 and 1 to append, but the cache holds 20 keys"),
        ("pages", ValueError, "block_table is not there with context_parallel"),
        (
            "lengths",
            ValueError,
            r"ranks of a context-parallel call differ: cache_seqlens is \[3, 5\] on rank 0",
        ),
        ("gradient", RuntimeError, "flash_attn_with_kvcache has no backward"),
    ],
)
def test_a_wrong_cache(ranks, name, kind, words):
    for error in ranks.errors(cases.wrong_cache, name):
        assert error is not None and error[0] is kind
        with pytest.raises(kind, match=words):
            raise kind(error[1])


def test_the_comparison_can_be_switched_off(ranks):
    assert ranks.run(cases.unchecked) == [[1, 0]] * ranks.world


@pytest.mark.parametrize("how", ["raises", "killed", "in the middle"])
def test_a_lost_rank_is_an_error_in_time(tmp_path, how):
    """Twice the group's timeout is enough for the forward and the backward pass."""
    made = Ranks(2, tmp_path, TIMEOUT)
    try:
        made.start(cases.die, how)
        begun = time.monotonic()
        if how == "raises":
            assert made.result(1)[1][0] is KeyError
        else:
            with pytest.raises(EOFError):
                made.result(1)
        _, error = made.result(0, 3 * TIMEOUT)
        assert issubclass(error[0], (RuntimeError, torch.distributed.DistBackendError))
        assert time.monotonic() - begun < 2 * TIMEOUT + 2
    finally:
        made.close()


def test_the_table_in_the_docs():
    command = [sys.executable, "benchmarks/distributed_tables.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"<!-- written by benchmarks/distributed_tables.py -->\n{table}<!-- end -->" in page


@pytest.mark.slow
def test_nothing_keeps_the_plan_of_the_first_call(tmp_path):
    """A group that lives until the process ends has threads then, which gloo may not survive."""
    program = f"""
import gc, weakref, torch, torch.distributed as dist
from flash_attn import explain, flash_attn_func
from flash_attn.distributed import ContextParallel
gc.disable()
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)

def first_call():
    cp = ContextParallel(dist.group.WORLD, seqlen=8)
    q = torch.zeros(1, 8, 1, 8, requires_grad=True)
    options = dict(causal=True, use_softmax=False, context_parallel=cp)
    explain(flash_attn_func, q, q, q, **options)
    flash_attn_func(q, q, q, **options).sum().backward()
    return weakref.ref(cp)

assert first_call()() is None
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
