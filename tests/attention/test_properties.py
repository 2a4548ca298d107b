"""Test any shape with any compatible options against the oracle, with Hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropping import compare_dropped
from measure import compare, compare_output, integers, packed, qkv, randn, single, slopes
from oracle import ROW_FACTORS
from package import Package

pytestmark = pytest.mark.slow

# The implementation holds no state, so one instance can serve all examples.
reuse = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

lengths = st.integers(0, 70)
functions = st.one_of(
    st.just({}),
    st.sampled_from(["relu", "relu2", "silu", "gelu", "softplus"]).map(lambda name: dict(activation=name)),
    st.one_of(st.just("-log n"), st.floats(-3, 3)).map(
        lambda bias: dict(activation="sigmoid", sigmoid_bias=bias)
    ),
)


@st.composite
def masks(draw, seqlen_q: int, seqlen_k: int) -> dict:
    """Draw causal or not, and any window."""
    left, right = (draw(st.integers(-1, max(seqlen_q, seqlen_k) + 2)) for _ in range(2))
    return dict(causal=draw(st.booleans()), window_size=(left, right))


@st.composite
def masks_with_softmax(draw, seqlen_q: int, seqlen_k: int) -> dict:
    """Draw windows that mean the same in every release of upstream.

    Upstream's host code treats a side of seqlen_k or more as open. It treats an open right side beside a
    closed left side as seqlen_k, which cuts off keys if there are more than seqlen_k + 1 queries.
    """
    left, right = (draw(st.integers(-1, max(seqlen_k - 1, -1))) for _ in range(2))
    return dict(
        causal=draw(st.booleans()), window_size=(left, max(right, 0) if seqlen_q > seqlen_k + 1 else right)
    )


@st.composite
def options(draw, seqlen_q: int, seqlen_k: int) -> dict:
    chosen = draw(masks(seqlen_q, seqlen_k)) | draw(functions)
    chosen["normalization"] = draw(st.sampled_from(list(ROW_FACTORS)))
    chosen["softcap"] = draw(st.sampled_from([0.0, 0.0, 1.0, 20.0]))
    signs = (0.05, 2.0) if chosen["softcap"] else (-1.0, 2.0)
    # Products with a smaller scale may be subnormal and keep few bits, for which no tolerance allows.
    scales = st.floats(*signs).filter(lambda scale: scale == 0 or abs(scale) > 1e-30)
    chosen["softmax_scale"] = draw(st.one_of(st.none(), scales))
    return chosen


def built(attention, chosen: dict) -> dict:
    """Return the part of ``chosen`` that the device's kernels have. Only the CPU backend has other score
    functions.
    """
    absent = () if attention.device == "cpu" else ("activation", "sigmoid_bias", "normalization")
    return {name: value for name, value in chosen.items() if name not in absent}


@st.composite
def heads(draw) -> dict:
    nheads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return dict(nheads=nheads_k * group, nheads_k=nheads_k, head_dim=draw(st.sampled_from([8, 16, 5, 24])))


@reuse
@given(data=st.data())
def test_dense(attention, data):
    seqlen_q, seqlen_k = data.draw(lengths, "seqlen_q"), data.draw(lengths, "seqlen_k")
    batch, sizes, chosen = (
        data.draw(st.integers(1, 3)),
        data.draw(heads()),
        data.draw(options(seqlen_q, seqlen_k)),
    )
    if data.draw(st.booleans(), "alibi") and chosen["softmax_scale"] != 0:
        chosen["alibi_slopes"] = slopes(
            attention, *data.draw(st.sampled_from([(), (batch,)])), sizes["nheads"], size=0.1
        )
    compare(attention, *qkv(attention, batch, seqlen_q, seqlen_k, **sizes), **built(attention, chosen))


@reuse
@given(data=st.data())
def test_dropout(attention, data):
    seqlen_q, seqlen_k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    chosen = (
        data.draw(functions)
        | data.draw(masks(seqlen_q, seqlen_k))
        | dict(normalization=data.draw(st.sampled_from(list(ROW_FACTORS))))
    )
    tensors = qkv(attention, 2, seqlen_q, seqlen_k, **data.draw(heads()))
    dropout_p, seed = data.draw(st.floats(0.05, 0.95)), data.draw(st.integers(0, 2**31))
    compare_dropped(attention, *tensors, dropout_p, seed, **built(attention, chosen))


@reuse
@given(data=st.data())
def test_varlen(attention, data):
    batch = data.draw(st.integers(1, 4))
    lists = [data.draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)) for _ in range(2)]
    each = dict(zip(("lengths_q", "lengths_k"), lists))
    chosen = built(attention, data.draw(options(*map(max, lists))))
    compare(attention, *packed(attention, **each, **data.draw(heads())), method="varlen", **each, **chosen)


@reuse
@given(data=st.data())
def test_linear_algorithm(device, data):
    """Linear time is right for any lengths, dense and packed, over several chunks, with every option that it
    takes.
    """
    attention = Package(device, "linear")
    chosen = dict(
        causal=data.draw(st.booleans()), normalization=data.draw(st.sampled_from(list(ROW_FACTORS)))
    )
    sizes, batch, seqlens = data.draw(heads()), data.draw(st.integers(1, 3)), st.integers(0, 300)
    if data.draw(st.booleans(), "packed"):
        lists = [data.draw(st.lists(seqlens, min_size=batch, max_size=batch)) for _ in range(2)]
        each = dict(zip(("lengths_q", "lengths_k"), lists))
        compare(attention, *packed(attention, **each, **sizes), method="varlen", **each, **chosen)
    else:
        compare(attention, *qkv(attention, batch, data.draw(seqlens), data.draw(seqlens), **sizes), **chosen)


@reuse
@given(data=st.data())
def test_kvcache(attention, data):
    batch, capacity, sizes = data.draw(st.integers(1, 3)), data.draw(st.integers(8, 70)), data.draw(heads())
    seqlen, nheads_k = data.draw(st.integers(1, 6)), sizes["nheads_k"]
    cached = data.draw(st.lists(st.integers(0, capacity - seqlen), min_size=batch, max_size=batch))
    chosen = data.draw(options(seqlen, capacity)) | dict(
        cache_seqlens=integers(attention, *cached), num_splits=data.draw(st.integers(0, 4))
    )
    if data.draw(st.booleans(), "leftpad"):
        chosen["cache_leftpad"] = integers(attention, *(data.draw(st.integers(0, n)) for n in cached))
    slots = batch
    if data.draw(st.booleans(), "slots"):
        slots = batch + 2
        chosen["cache_batch_idx"] = integers(attention, *data.draw(st.permutations(range(slots)))[:batch])
    q = randn(batch, seqlen, sizes["nheads"], sizes["head_dim"], seed=0, like=attention)
    caches = [randn(slots, capacity, nheads_k, sizes["head_dim"], seed=i, like=attention) for i in (1, 2)]
    new = [randn(batch, seqlen, nheads_k, sizes["head_dim"], seed=i, like=attention) for i in (3, 4)]
    new = new if data.draw(st.booleans(), "append") else ()
    compare_output(attention, q, *caches, *new, method="kvcache", **built(attention, chosen))


@reuse
@given(data=st.data())
def test_softmax(attention, data):
    # Upstream's CUDA kernels with softmax fail to launch, forward without queries and backward without keys.
    drawn = lengths.filter(bool) if attention.device == "cuda" else lengths
    seqlen_q, seqlen_k = data.draw(drawn, "seqlen_q"), data.draw(drawn, "seqlen_k")
    tensors = qkv(attention, 2, seqlen_q, seqlen_k, **data.draw(heads()), dtype=single(attention))
    compare(attention, *tensors, use_softmax=True, **data.draw(masks_with_softmax(seqlen_q, seqlen_k)))
