"""Test which calls the Hopper kernels refuse, and the messages, without GPU and compiler."""

import pytest
import torch
from overlay_package import module

call, checks, serves = (module(name) for name in ("call", "checks", "serves"))


def refusal(q, k, v, **options):
    """Return the message that refuses a call, from the checks of all backends or of these kernels; None if
    the call is served.
    """
    given = dict(
        max_seqlen_q=0, max_seqlen_k=0, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(None,
        None), softcap=0.0, deterministic=False, return_attn_probs=False, activation="identity",
        sigmoid_bias=0.0, normalization=None,
    )  # fmt: skip
    given.update((name, options.pop(name)) for name in list(options) if name in given)
    more = [options.pop(name, None) for name in call.Call._fields[3 : call.TENSORS]]
    try:
        asked = call.Call(q, k, v, *more, checks.options(q.shape[-1], **given))
        checks.tensors(asked)
    except (TypeError, ValueError) as error:
        return str(error)
    return serves.obstacle(asked, **options)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(serves, "_capability", lambda device: (9, 0))


def tensors(head_dim=64, head_dim_v=None, dtype=torch.bfloat16, nheads=4, nheads_k=4, device="meta", batch=2):
    """Make q, k and v as on a GPU. The check reads only the type of the device, and `meta` stands for it."""
    shapes = [
        (batch, 100, nheads, head_dim),
        (batch, 90, nheads_k, head_dim),
        (batch, 90, nheads_k, head_dim_v or head_dim),
    ]
    return [torch.empty(s, dtype=dtype, device=device) for s in shapes]


@pytest.fixture(autouse=True)
def meta_is_a_gpu(monkeypatch):
    real = serves._device_reason

    def reason(device):
        return real(torch.device("cuda") if device.type == "meta" else device)

    monkeypatch.setattr(serves, "_device_reason", reason)


@pytest.mark.parametrize("mask", ["hstu", "intervals"])
@pytest.mark.parametrize("fields", [
    {}, {"normalization": "1/visible", "deterministic": True}, {"normalization": "1/n", "activation": "silu"},
], ids=str)  # fmt: skip
def test_masks_are_served(mask, fields):
    """Every score function, in every order; what the kernels lack is refused beside them too."""
    q, k, v = (x.requires_grad_() for x in tensors())
    options = checks.options(
        64, 0, 0, 0.0, None, False, (None, None), 0.0, fields.get("deterministic", False), False,
        fields.get("activation", "identity"), 0.0, fields.get("normalization"),
    )._replace(mask=mask)  # fmt: skip
    assert serves.obstacle(call.Call.of(options, q=q, k=k, v=v)) is None
    dropping = call.Call.of(options._replace(dropout_p=0.1), q=q, k=k, v=v)
    assert "dropout_p" in serves.obstacle(dropping)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"head_dim": 8},
        {"head_dim": 256},
        {"head_dim": 192, "head_dim_v": 128},
        {"dtype": torch.float16},
        {"nheads": 8, "nheads_k": 2},
    ],
)
def test_served(shape):
    assert refusal(*tensors(**shape)) is None


def factors(*shape):
    return torch.ones(shape, device="meta")


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": 0.25},
        {"row_factors": factors(2)},
        {"row_factors": factors(2, 100)},
        {"activation": "sigmoid", "sigmoid_biases": factors(4)},
        {"activation": "sigmoid", "sigmoid_biases": factors(2, 4), "row_factors": factors(2, 100)},
    ],
    ids=str,
)
def test_given_factors_and_biases_are_served(options):
    assert refusal(*tensors(), **options) is None


@pytest.mark.parametrize(
    "shape, options, words",
    [
        ({"head_dim": 20}, {}, "head_dim must be a multiple of 8 from 8 to 256, got 20"),
        ({"head_dim": 264}, {}, "got 264"),
        ({"head_dim_v": 12}, {}, "head_dim_v"),
        ({"dtype": torch.float32}, {}, "float32"),
        ({"dtype": torch.float8_e4m3fn}, {}, "float8"),
        ({"nheads": 5, "nheads_k": 2}, {}, "5 heads in q, 2 in k and v"),
        ({"device": "cpu"}, {}, "on cpu"),
        ({}, {"dropout_p": 0.1}, "dropout_p"),
        ({}, {"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes"),
        ({}, {"leftpad_k": torch.ones(2, dtype=torch.int32, device="meta")}, "leftpad_k"),
        ({}, {"learnable_sink": torch.ones(4)}, "learnable_sink"),
        ({}, {"qv": torch.ones(4)}, "qv"),
        ({}, {"num_splits": 2}, "num_splits must be 1, got 2"),
        ({}, {"return_lse": True}, "return_lse"),
        ({}, {"activation": "tanh"}, "tanh"),
        ({}, {"softcap": -1.0}, "softcap"),
        ({}, {"softcap": 5.0, "softmax_scale": -1.0}, "softmax_scale"),
        ({}, {"softmax_scale": float("nan")}, "softmax_scale=nan"),
        ({}, {"softmax_scale": float("inf")}, "softmax_scale=inf"),
        ({}, {"window_size": (1.5, 0)}, "window_size"),
        ({}, {"normalization": "1/visible", "mask_mod": len}, "mask_mod"),
        ({}, {"normalization": "1/visible", "block_sparse_tensors": ()}, "sparse blocks"),
        (
            {"head_dim": 24},
            {"block_table": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
            "multiple of 16 with pages",
        ),
        (
            {},
            {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32, device="meta")},
            "q has shape .*expected 3 axes",
        ),
    ],
)
def test_refused(shape, options, words):
    import re

    reason = refusal(*tensors(**shape), **options)
    assert reason is not None and re.search(words, reason), reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_another_gpu_is_named_with_the_way_out(monkeypatch, capability):
    monkeypatch.setattr(serves, "_capability", lambda device: capability)
    reason = refusal(*tensors())
    assert f"{capability[0]}.{capability[1]}" in reason and "FA2" in reason


def test_backward_with_grouped_heads_needs_one_head_size():
    q, k, v = tensors(nheads=8, nheads_k=2, head_dim=64, head_dim_v=32)
    assert refusal(q, k, v) is None
    q.requires_grad_()
    assert "head_dim == head_dim_v" in refusal(q, k, v)
    with torch.no_grad():
        assert refusal(q, k, v) is None


@pytest.mark.parametrize(
    "sizes, differentiable",
    [
        ((64, 256), False),
        ((64, 136), False),
        ((128, 136), False),
        ((64, 128), True),
        ((40, 72), True),
        ((256, 64), True),
        ((256, 256), True),
    ],
)
def test_backward_with_larger_values_ends_at_128(sizes, differentiable):
    q, k, v = tensors(head_dim=sizes[0], head_dim_v=sizes[1])
    assert refusal(q, k, v) is None
    v.requires_grad_()
    reason = refusal(q, k, v)
    assert reason is None if differentiable else f"head_dim_v <= 128, got {sizes[1]} and {sizes[0]}" in reason
    with torch.no_grad():
        assert refusal(q, k, v) is None


def test_no_backward_with_pages():
    q, k, v = tensors()
    q.requires_grad_()
    assert "pages have no backward" in refusal(
        q, k, v, block_table=torch.zeros(2, 3, dtype=torch.int32, device="meta")
    )


def test_upstreams_variable_names_the_architecture(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90a")
    assert serves._capability(torch.device("cuda")) == (9, 0)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(serves, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="nvidia-cutlass-dsl"):
        serves.require_dsl()
