"""Test the recurrent form: a prefill returns a state, the next piece continues from it, and a step adds one
token to it.
"""

from __future__ import annotations

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


def plainly(q, k, v, state, scale):
    """Compute one piece by its definition: (out, the state after it)."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys).tril()
    out = torch.einsum("bhqk,bkhe->bqhe", scores, values)
    out = out + torch.einsum("bqhd,bhde->bqhe", q, state.repeat_interleave(group, 1))
    return out * scale, state + torch.einsum("bthd,bthe->bhde", k, v)


def in_pieces(*cuts: int):
    def run(q, k, v, state, scale):
        outs = []
        for start, stop in zip((0, *cuts), (*cuts, q.shape[1])):
            out, state = linear_attention_prefill(*(x[:, start:stop] for x in (q, k, v)), state, scale)
            outs.append(out)
        return torch.cat(outs, 1), state

    return run


def by_steps(q, k, v, state, scale):
    outs = []
    for t in range(q.shape[1]):
        out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, scale)
        outs.append(out)
    return torch.stack(outs, 1), state


@pytest.mark.parametrize(
    "run", [in_pieces(), in_pieces(1), in_pieces(0, 7, 7, 12), by_steps], ids=["whole", "1", "4", "steps"]
)
@pytest.mark.parametrize("nheads_k", [1, 2, 4])
def test_gradients_of_pieces_are_those_of_the_whole(device, run, nheads_k):
    """Of q, k, v and the initial state, from the outputs and from the final state; and second derivatives."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    shapes = ((2, 19, 4, 8), (2, 19, nheads_k, 8), (2, 19, nheads_k, 6), (2, nheads_k, 8, 6))
    tensors = [randn(*shape, seed=i, dtype=torch.float32).to(device) for i, shape in enumerate(shapes)]
    douts = randn(2, 19, 4, 6, seed=7), randn(2, nheads_k, 8, 6, seed=8)

    def derivatives(function, dtype, wide):
        leaves = [x.detach().to(wide if i == 3 else dtype).requires_grad_() for i, x in enumerate(tensors)]
        results = function(*leaves, 0.3)
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
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"q": X, "k": X, "v": X, "state": STATE, **WRONG[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_attention_prefill(**arguments)
    token = {name: x if name == "state" or x.dim() < 4 else x[:, 0] for name, x in arguments.items()}
    token = {name: x[0] if name == "q" and message.startswith("q has") else x for name, x in token.items()}
    if message not in ("k has shape", "v has shape"):
        with pytest.raises((ValueError, TypeError), match=message):
            linear_attention_step(**token)


def test_a_step_needs_a_state():
    with pytest.raises(TypeError, match="pass zeros before the first token"):
        linear_attention_step(X[:, 0], X[:, 0], X[:, 0], None)
