"""Test the recurrent form: a prefill returns a state, the next piece continues from it, and a step adds one
token to it.
"""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn import flash_attn_func
from flash_attn.linear import linear_attention_prefill, linear_attention_step

import linear_checks as checks
from measure import qkv, randn
from package import Package


@pytest.fixture
def linear(device: str) -> Package:
    return Package(device, "linear")


@pytest.mark.parametrize("nheads_k", [1, 2, 4])
def test_pieces_give_the_whole(linear, nheads_k, dtype):
    """Pieces give the result of the whole. The state is float32, so pieces in float64 are no more exact."""
    if dtype == torch.float64:
        pytest.skip("float64 pieces with a float32 state don't have float64's precision")
    checks.check_pieces(linear_attention_prefill, linear, nheads_k, dtype)


def without_state(q, k, v, state=None):
    return linear_attention_prefill(q, k, v, None)


def state_twice(q, k, v, state=None):
    out, state = linear_attention_prefill(q, k, v, state)
    return out, 2 * state


def rounded_state(q, k, v, state=None):
    out, state = linear_attention_prefill(q, k, v, state)
    return out, state.bfloat16().float()


@pytest.mark.parametrize("wrong", [without_state, state_twice, rounded_state], ids=lambda f: f.__name__)
def test_wrong_states_are_noticed(wrong):
    with pytest.raises(AssertionError):
        checks.check_pieces(wrong, Package("cpu", "linear"), 2, torch.float32)


def test_the_state_is_per_key_head_and_float32(linear, device):
    q, k, v = (x.half() for x in qkv(linear, 2, 40, 40, nheads=6, nheads_k=3, head_dim=16))
    v = v[..., :8]
    out, state = linear_attention_prefill(q, k, v)
    assert state.shape == (2, 3, 16, 8) and state.dtype == torch.float32 and out.shape == (2, 40, 6, 8)
    step, same = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    assert step.shape == (2, 6, 8) and same is state


def test_prefill_leaves_its_state_alone(linear):
    q, k, v = (x.half() for x in qkv(linear, 1, 20, 20, head_dim=16))
    _, state = linear_attention_prefill(q, k, v)
    before = state.clone()
    linear_attention_prefill(q, k, v, state)
    assert torch.equal(state, before)


def test_scale(linear):
    q, k, v = (x.half() for x in qkv(linear, 1, 20, 20, head_dim=16))
    (twice, state), (once, same) = (linear_attention_prefill(q, k, v, softmax_scale=s) for s in (0.5, 0.25))
    assert torch.equal(state, same)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)
def test_largest_inputs(linear, dtype, largest):
    q, k, v = (
        randn(1, 300, 1, 64, seed=i, like=linear, dtype=dtype).sign().abs() * largest for i in range(3)
    )
    out, state = linear_attention_prefill(q, k, v)
    step, state = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    assert all(torch.isfinite(x).all() for x in (out, step, state))
    if dtype == torch.float16:
        assert (out == largest).all() and (step == largest).all()


@pytest.mark.parametrize("size", [60.0, 1000.0, 65504.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("derived", [False, True])
def test_a_sum_beyond_float16_is_its_largest_number(size, sign, derived):
    """However far beyond it is, with gradients and without."""
    q, k, v = (torch.full((1, 4, 1, 64), x * size, dtype=torch.float16) for x in (1.0, 1.0, sign))
    state = torch.full((1, 1, 64, 64), sign * 1e9, requires_grad=derived)
    out, _ = linear_attention_prefill(q, k, v, state)
    step, _ = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    assert (out == sign * 65504.0).all() and (step == sign * 65504.0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("derived", [False, True])
def test_a_state_that_is_not_finite_shows(value, derived):
    x = torch.ones(1, 4, 1, 8, dtype=torch.float16)
    state = torch.full((1, 1, 8, 8), value, requires_grad=derived)
    out, _ = linear_attention_prefill(x, x, x, state)
    step, _ = linear_attention_step(x[:, 0], x[:, 0], x[:, 0], state)
    assert not torch.isfinite(out).any() and not torch.isfinite(step).any()


def test_steps_equal_causal_attention():
    """Steps from a zero state, without a prefill, equal causal attention."""
    q, k, v = (randn(1, 9, n, 8, seed=n) for n in (4, 2, 2))
    state = torch.zeros(1, 2, 8, 8)
    steps = [linear_attention_step(*(x[:, t].float() for x in (q, k, v)), state)[0] for t in range(9)]
    expected = flash_attn_func(q, k, v, causal=True, use_softmax=False, algorithm="quadratic")
    torch.testing.assert_close(torch.stack(steps, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_agrees_with_flash_linear_attention():
    """A second oracle, the plain recurrence of fla (package fla-core), gives the same result and state, if
    installed.
    """
    naive = pytest.importorskip("fla.ops.linear_attn.naive", exc_type=ImportError)
    q, k, v = (randn(2, 150, 3, 16, seed=i).float() for i in range(3))
    _, state = linear_attention_prefill(k, v, q)
    expected, expected_state = naive.naive_recurrent_linear_attn(
        q, k, v, initial_state=state, output_final_state=True
    )
    out, new_state = linear_attention_prefill(q, k, v, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(new_state, expected_state, rtol=1e-4, atol=1e-3)


def plainly(q, k, v, state, scale, decay_slopes=None, normalization=1.0):
    """Go through one piece token by token, by the definition: (out, the state after it)."""
    outs, group = [], q.shape[2] // k.shape[2]
    kept = 1.0 if decay_slopes is None else torch.exp(-decay_slopes.to(state))[..., None, None]
    for t in range(q.shape[1]):
        state = state * kept + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state.repeat_interleave(group, 1)))
    norm = normalization
    if isinstance(norm, torch.Tensor):
        norm = norm.to(state).reshape(*norm.shape, *[1] * (4 - norm.dim()))
    return torch.stack(outs, 1) * scale * norm, state


def in_pieces(*cuts: int):
    def run(q, k, v, state, scale, **options):
        outs = []
        for start, stop in zip((0, *cuts), (*cuts, q.shape[1])):
            own = [x[:, start:stop] for x in (q, k, v)]
            out, state = linear_attention_prefill(
                *own, state, scale, **of_tokens(options, slice(start, stop))
            )
            outs.append(out)
        return torch.cat(outs, 1), state

    return run


def by_steps(q, k, v, state, scale, **options):
    outs = []
    for t in range(q.shape[1]):
        out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, scale, **of_tokens(options, t))
        outs.append(out)
    return torch.stack(outs, 1), state


def of_tokens(options: dict, tokens) -> dict:
    """Cut factors for each token to those of the tokens."""
    given = options.get("normalization")
    if not isinstance(given, torch.Tensor) or given.dim() == 1:
        return options
    return {**options, "normalization": given[:, tokens].contiguous()}


def packed_pieces(q, k, v, state, scale, **options):
    """Run the same sequences packed, in two pieces."""
    outs, factors = [], options.pop("normalization", None)
    for tokens in (slice(0, 8), slice(8, q.shape[1])):
        own = [x[:, tokens] for x in (q, k, v)]
        batch, length = own[0].shape[:2]
        cut = factors
        if isinstance(factors, torch.Tensor) and factors.dim() == 2:
            cut = factors[:, tokens].flatten()
        out, state = linear_attention_prefill(
            *(x.flatten(0, 1) for x in own), state, scale, normalization=cut,
            cu_seqlens=torch.arange(batch + 1, device=q.device) * length, **options,
        )  # fmt: skip
        outs.append(out.unflatten(0, (batch, length)))
    return torch.cat(outs, 1), state


OPTIONS = {
    "plain": dict(),
    "decay": dict(decay_slopes=(1,)),
    "decay and factor of sequences": dict(decay_slopes=(2,), normalization=(2,)),
    "decay and factor of tokens": dict(decay_slopes=(1,), normalization=(2, 19)),
    "a number": dict(normalization=0.3),
}


def given(options: dict, nheads_k: int, device: str) -> dict:
    """Make the tensors of the options. A decay of 1 axis or 2 ends with the key heads."""
    made = dict(options)
    if "decay_slopes" in options:
        shape = (2, nheads_k)[-options["decay_slopes"][0] :]
        made["decay_slopes"] = torch.linspace(0.02, 1.5, math.prod(shape)).reshape(shape).to(device)
    if isinstance(options.get("normalization"), tuple):
        shape = options["normalization"]
        made["normalization"] = torch.linspace(0.0, 2.0, math.prod(shape)).reshape(shape).to(device)
    return made


RUNS = {
    "whole": in_pieces(), "1": in_pieces(1), "4": in_pieces(0, 7, 7, 12), "steps": by_steps,
    "packed": packed_pieces,
}  # fmt: skip


def whole(device, nheads_k, options):
    """Return the dtype of a call, q, k, v and the initial state in float32, and the options as arguments."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    shapes = ((2, 19, 4, 8), (2, 19, nheads_k, 8), (2, 19, nheads_k, 6), (2, nheads_k, 8, 6))
    tensors = [randn(*shape, seed=i, dtype=torch.float32).to(device) for i, shape in enumerate(shapes)]
    options = given(options, nheads_k, device)
    return dtype, tensors, options


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("nheads_k", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_pieces_are_those_of_the_whole(device, run, nheads_k, options):
    """Of q, k, v and the initial state, from the outputs and from the final state; and second derivatives."""
    dtype, tensors, options = whole(device, nheads_k, options)
    douts = randn(2, 19, 4, 6, seed=7), randn(2, nheads_k, 8, 6, seed=8)

    def derivatives(function, dtype, wide):
        leaves = [x.detach().to(wide if i == 3 else dtype).requires_grad_() for i, x in enumerate(tensors)]
        results = function(*leaves, 0.3, **options)
        grads = torch.autograd.grad(
            results, leaves, [d.to(r) for d, r in zip(douts, results)], create_graph=True
        )
        second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves)
        return [*(x.detach() for x in (*results, *grads)), *second]

    actual = derivatives(run, dtype, torch.float32)
    expected = derivatives(plainly, torch.float64, torch.float64)
    for a, e in zip(actual, expected):
        tolerance = (1e-5 if device == "cpu" else 2e-2) * e.abs().max().item()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance, check_device=False)


def test_a_step_with_gradients_leaves_its_state_alone():
    state = torch.zeros(1, 1, 4, 4, requires_grad=True)
    x = torch.ones(1, 1, 4)
    _, after = linear_attention_step(x, x, x, state)
    assert not state.any() and after.requires_grad
    with torch.no_grad():
        assert linear_attention_step(x, x, x, state)[1] is state and state.all()


def test_an_output_that_saturates_has_the_gradient_of_one_that_does_not():
    q, k, v = (torch.full((1, 2, 1, 4), 60.0, dtype=torch.float16, requires_grad=True) for _ in range(3))
    state = torch.full((1, 1, 4, 4), 1e4, requires_grad=True)
    out, _ = linear_attention_prefill(q, k, v, state, 1.0)
    assert (out == 65504.0).all()
    (grad,) = torch.autograd.grad(out.float().sum(), state)
    torch.testing.assert_close(grad, torch.full_like(grad, 120.0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("nheads_k", [1, 2, 4])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_pieces_without_gradients(device, run, nheads_k, options):
    """Without gradients the state runs through the pieces inside the backend. A step writes it in place."""
    dtype, tensors, options = whole(device, nheads_k, options)
    expected = plainly(*(x.double() for x in tensors), 0.3, **options)
    q, k, v = (x.to(dtype) for x in tensors[:3])
    actual = run(q, k, v, tensors[3].clone(), 0.3, **options)
    for a, e in zip(actual, expected):
        tolerance = (1e-6 if device == "cpu" else 2e-3) * e.abs().max().item()
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance)


@pytest.mark.parametrize("derived", [False, True])
def test_packed_pieces_equal_those_alone(device, derived):
    """Pieces of unequal lengths, one of them empty, one longer than a chunk, and rows of no sequence."""
    lengths, dtype = [130, 0, 5, 64], torch.float32 if device == "cpu" else torch.float16
    starts = torch.tensor([2, 132, 132, 137, 201], device=device)
    q, k, v = (randn(205, n, 8, seed=n, dtype=dtype).to(device) for n in (4, 2, 2))
    q.requires_grad_(derived)
    state = randn(4, 2, 8, 8, seed=7, dtype=torch.float32).to(device)
    options = dict(decay_slopes=given(dict(decay_slopes=(2,)), 2, device)["decay_slopes"].repeat(2, 1))
    factors = torch.rand(205, generator=torch.Generator().manual_seed(1)).to(device)
    out, after = linear_attention_prefill(q, k, v, state, cu_seqlens=starts, normalization=factors, **options)
    assert not out[:2].any() and not out[201:].any()
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths)):
        own = slice(start, start + length)
        alone, its_state = linear_attention_prefill(
            *(x[None, own] for x in (q, k, v)), state[b : b + 1], normalization=factors[None, own],
            decay_slopes=options["decay_slopes"][b : b + 1],
        )  # fmt: skip
        torch.testing.assert_close(out[own], alone[0], rtol=1e-3, atol=1e-3 if device == "cuda" else 1e-5)
        torch.testing.assert_close(after[b], its_state[0], rtol=1e-3, atol=1e-3 if device == "cuda" else 1e-5)
    assert torch.equal(after[1], state[1])


@pytest.mark.slow
def test_a_gentle_decay_does_not_round_the_same_way_each_step(device):
    """Tokens of 0 leave a state to its decay, over 20,000 steps."""
    slopes = torch.tensor([2e-5, 3e-5, 5e-5, 1e-4], device=device)
    dtype = torch.float32 if device == "cpu" else torch.float16
    x, state = torch.zeros(1, 4, 1, dtype=dtype, device=device), torch.ones(1, 4, 1, 1, device=device)
    for _ in range(20_000):
        linear_attention_step(x, x, x, state, decay_slopes=slopes)
    expected = torch.exp(-slopes.double() * 20_000)[None, :, None, None]
    torch.testing.assert_close(state.double(), expected, rtol=3e-5, atol=0)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_states_by_slot(device, ids):
    """Sequences write the states that they name in place, and no other."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (randn(3, 20, n, 8, seed=n, dtype=dtype).to(device) for n in (4, 2, 2))
    slots = randn(6, 2, 8, 8, seed=7, dtype=torch.float32).to(device)
    at, options = (
        torch.tensor([4, 0, 3], device=device),
        dict(decay_slopes=torch.tensor([0.1, 1.0], device=device)),
    )
    before, own = slots.clone(), slots[at]
    out, same = linear_attention_prefill(q, k, v, slots, state_indices=at.to(ids), **options)
    alone, after = linear_attention_prefill(q, k, v, own, **options)
    assert same is slots and torch.equal(out, alone) and torch.equal(slots[at], after)
    token = [x[:, 0] for x in (q, k, v)]
    out, same = linear_attention_step(*token, slots, state_indices=at.to(ids), **options)
    alone, after = linear_attention_step(*token, after, **options)
    assert same is slots and torch.equal(out, alone) and torch.equal(slots[at], after)
    others = [1, 2, 5]
    assert torch.equal(slots[others], before[others]) and not torch.equal(slots[at], before[at])


def test_gradients_with_slots_are_refused():
    q = torch.ones(1, 4, 1, 4, requires_grad=True)
    slots, at = torch.zeros(3, 1, 4, 4), torch.tensor([1])
    for run, x in ((linear_attention_prefill, q), (linear_attention_step, q[:, 0])):
        with pytest.raises(ValueError, match="state_indices: .* have no gradient"):
            run(x, x, x, slots, state_indices=at)
        with torch.no_grad():
            run(x, x, x, slots, state_indices=at)


def without_last(q, k, v, state, scale, **options):
    """Leave the last token out of the final state."""
    out, _ = linear_attention_prefill(q, k, v, state, scale, **options)
    _, state = linear_attention_prefill(*(x[:, :-1] for x in (q, k, v)), state, scale, **options)
    return out, state


def decayed_twice(q, k, v, state, scale, **options):
    """Decay the final state by one position too many."""
    out, state = linear_attention_prefill(q, k, v, state, scale, **options)
    return out, state * torch.exp(-options["decay_slopes"])[..., None, None]


@pytest.mark.parametrize("wrong", [without_last, decayed_twice], ids=lambda f: f.__name__)
def test_wrong_final_states_are_noticed(wrong):
    with pytest.raises(AssertionError):
        test_pieces_without_gradients("cpu", wrong, 2, OPTIONS["decay"])


X, STATE = torch.zeros(1, 8, 2, 8), torch.zeros(1, 2, 8, 8)
WRONG = {
    "state has shape": dict(state=torch.zeros(1, 2, 8, 9)),
    "state has dtype": dict(state=STATE.double()),
    "must be on one device, got q on cpu, k on cpu, v on cpu, state on meta": dict(state=STATE.to("meta")),
    "k has shape": dict(k=torch.zeros(1, 9, 2, 8), v=torch.zeros(1, 9, 2, 8)),
    "v has shape": dict(v=torch.zeros(1, 9, 2, 8)),
    "q has shape": dict(q=torch.zeros(8, 2, 8)),
    "heads in q": dict(k=torch.zeros(1, 8, 3, 8), v=torch.zeros(1, 8, 3, 8)),
    "v has dtype": dict(v=X.half()),
    r"decay_slopes has shape \(3,\), expected \(2,\)": dict(decay_slopes=torch.ones(3)),
    r"decay_slopes has shape \(4,\), a slope for each query head": dict(
        q=torch.zeros(1, 8, 4, 8), decay_slopes=torch.ones(4)
    ),
    "decay_slopes has dtype": dict(decay_slopes=torch.ones(2).double()),
    r"decay_slopes\[1\]=-1": dict(decay_slopes=torch.tensor([1.0, -1.0])),
    r"decay_slopes\[0\]=nan": dict(decay_slopes=torch.tensor([torch.nan, 1.0])),
    "decay_slopes requires a gradient": dict(decay_slopes=torch.ones(2, requires_grad=True)),
    "decay_slopes is a builtins.float": dict(decay_slopes=0.5),
    "normalization='1/n' counts": dict(normalization="1/n"),
    "normalization=0": dict(normalization=0),
    r"normalization has shape \(3,\)": dict(normalization=torch.ones(3)),
    r"normalization\[0\]=-1": dict(normalization=-torch.ones(1)),
    r"state_indices\[0\]=2, but there are 2": dict(
        state=torch.zeros(2, 2, 8, 8), state_indices=torch.tensor([2])
    ),
    r"state_indices\[0\]=-1": dict(state_indices=torch.tensor([-1])),
    "state_indices has dtype": dict(state_indices=torch.tensor([0.0])),
    r"state_indices has shape \(2,\)": dict(state_indices=torch.tensor([0, 1])),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"q": X, "k": X, "v": X, "state": STATE, **WRONG[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_attention_prefill(**arguments)
    token = {name: x[:, 0] if name in "qkv" and x.dim() == 4 else x for name, x in arguments.items()}
    token = {name: x[0] if name == "q" and message.startswith("q has") else x for name, x in token.items()}
    if message not in ("k has shape", "v has shape"):
        with pytest.raises((ValueError, TypeError), match=message):
            linear_attention_step(**token)


def test_a_step_needs_a_state():
    with pytest.raises(TypeError, match="pass zeros before the first token"):
        linear_attention_step(X[:, 0], X[:, 0], X[:, 0], None)


@pytest.mark.parametrize("starts, message", [
    (torch.tensor([0, 5, 3]), "cu_seqlens descends"), (torch.tensor([0, 9]), "cu_seqlens ends at 9"),
    (torch.tensor([0.0, 8.0]), "cu_seqlens has dtype"), (torch.zeros(2, 2).int(), "cu_seqlens has shape"),
], ids=str)  # fmt: skip
def test_wrong_offsets_of_pieces(starts, message):
    x = torch.zeros(8, 2, 8)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_attention_prefill(x, x, x, cu_seqlens=starts)


def test_a_slot_can_be_named_once():
    x, slots = torch.zeros(2, 2, 8), torch.zeros(4, 2, 8, 8)
    with pytest.raises(ValueError, match=r"state_indices=\[1, 1\]"):
        linear_attention_step(x, x, x, slots, state_indices=torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="state_indices without state"):
        linear_attention_prefill(X, X, X, state_indices=torch.tensor([0]))
