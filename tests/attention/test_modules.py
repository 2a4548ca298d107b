"""Test modules and models: every path to attention gives the same result with the same options, in training
and generation.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.modules import mha
from flash_attn.utils.generation import InferenceParams
from torch import nn

from stand_ins import Config, models

DIM, NHEADS, SEQLEN = 64, 4, 9
SCORES = {
    "softmax": {},
    "identity": dict(use_softmax=False),
    "relu": dict(use_softmax=False, activation="relu", normalization="1/n"),
    "relu2": dict(use_softmax=False, activation="relu2", normalization="1/sqrt(n)"),
    "sigmoid": dict(use_softmax=False, activation="sigmoid", sigmoid_bias="-log n"),
    "silu": dict(use_softmax=False, activation="silu", normalization="1/visible"),
    "gelu": dict(use_softmax=False, activation="gelu"),
    "softplus": dict(use_softmax=False, activation="softplus", normalization="1/n"),
}
scores = pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
# "1/n" and "-log n" count the keys so far, so only the other options decode as the full pass computes.
DECODABLE = ("softmax", "identity", "silu", "gelu")
decodable = pytest.mark.parametrize("options", [SCORES[name] for name in DECODABLE], ids=DECODABLE)


def exact(device: str) -> dict:
    """The device and dtype of modules."""
    return {"device": device, "dtype": torch.float32 if device == "cpu" else torch.float16}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-4 if actual.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(**exact(device))


def twins(cls, device: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """Make a module on its flash path and on its fallback, with the same weights."""
    torch.manual_seed(3)
    flash, fallback = (
        cls(DIM, NHEADS, use_flash_attn=flash, **exact(device), **arguments) for flash in (True, False)
    )
    fallback.load_state_dict(flash.state_dict())
    return flash, fallback


def with_gradient(module: nn.Module, x: torch.Tensor, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf, **arguments)
    return out, torch.autograd.grad(out, leaf, randn(str(out.device), *out.shape))[0]


@scores
@pytest.mark.parametrize(
    "arguments",
    [
        dict(causal=True),
        dict(causal=False),
        dict(causal=True, num_heads_kv=2),
        dict(causal=True, rotary_emb_dim=16),
        dict(causal=True, num_heads_kv=1, rotary_emb_dim=16, rotary_emb_interleaved=True),
        dict(causal=False, softmax_scale=0.5),
    ],
    ids=["causal", "full", "gqa", "rotary", "mqa-rotary", "scale"],
)
def test_flash_path_equals_fallback(arguments, options, device):
    """MHA gives the same output and gradient with and without use_flash_attn."""
    flash, fallback = twins(mha.MHA, device, **arguments, **options)
    x = randn(device, 2, SEQLEN, DIM)
    for actual, expected in zip(with_gradient(flash, x), with_gradient(fallback, x), strict=True):
        close(actual, expected)
    if options:
        softmax = twins(mha.MHA, device, **arguments)[0]
        assert not torch.allclose(flash(x), softmax(x), atol=1e-2), "the options did not reach attention"


@scores
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_cross_attention(causal, options, device):
    flash, fallback = twins(mha.MHA, device, cross_attn=True, causal=causal, **options)
    x, x_kv = randn(device, 2, 4, DIM), randn(device, 2, SEQLEN, DIM)
    for actual, expected in zip(*(with_gradient(m, x, x_kv=x_kv) for m in (flash, fallback)), strict=True):
        close(actual, expected)


@scores
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding_is_not_counted(causal, options, device):
    """A padding mask (fallback) and packed sequences (flash) agree on all tokens that are not padding, also
    in n.
    """
    flash, fallback = (cls(causal=causal, **options) for cls in (mha.FlashSelfAttention, mha.SelfAttention))
    qkv = randn(device, 2, SEQLEN, 3, NHEADS, 16)
    keep = torch.arange(SEQLEN, device=device) < torch.tensor([[5], [SEQLEN]], device=device)
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, keep)
    actual = pad_input(flash(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), indices, 2, SEQLEN)
    close(actual[keep], fallback(qkv, key_padding_mask=keep)[keep])


@scores
def test_cross_attention_aligns_the_last_keys(options, device):
    flash, fallback = (cls(causal=True, **options) for cls in (mha.FlashCrossAttention, mha.CrossAttention))
    q, kv = randn(device, 2, 4, NHEADS, 16), randn(device, 2, SEQLEN, 2, NHEADS, 16)
    keep = torch.arange(SEQLEN, device=device) < torch.tensor([[6], [SEQLEN]], device=device)
    packed, _, cu_seqlens_k, max_seqlen_k, _ = unpad_input(kv, keep)
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    actual = flash(q.flatten(0, 1), packed, cu_seqlens=cu_seqlens, max_seqlen=4, cu_seqlens_k=cu_seqlens_k,
                   max_seqlen_k=max_seqlen_k)  # fmt: skip
    close(actual.unflatten(0, (2, 4)), fallback(q, kv, key_padding_mask=keep))


def test_fallback_weights_stay_finite_in_float16(device):
    """relu2 of a score beyond 256 does not fit into float16 and saturates, as in the kernels."""
    qkv = torch.ones(1, 2, 3, 1, 64, dtype=torch.float16, device=device) * 10.0  # scores of 800
    qkv[:, :, 2] = 1e-3
    out = mha.SelfAttention(use_softmax=False, activation="relu2")(qkv)
    close(out, torch.full_like(out, 2 * 65504 * 1e-3))


def decode(module: nn.Module, x: torch.Tensor, prefill: int = 4) -> torch.Tensor:
    """Return the module's output for x as in generation: the first tokens at once, the rest one after the
    other.
    """
    params = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    out = []
    for piece in (x[:, :prefill], *x[:, prefill:].split(1, dim=1)):
        out.append(module(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    return torch.cat(out, dim=1)


PATHS = {
    "plain": {},
    "gqa": dict(num_heads_kv=2),
    "rotary": dict(rotary_emb_dim=16),
    "gqa-rotary": dict(num_heads_kv=2, rotary_emb_dim=16),
    "alibi": dict(use_alibi=True),
}
paths = pytest.mark.parametrize("arguments", PATHS.values(), ids=PATHS)


@decodable
@paths
def test_decoding_equals_the_full_pass(arguments, options, device):
    """If a KV-cache call forgot an option, the model would train without softmax and generate with it."""
    torch.manual_seed(3)
    arguments = dict(causal=True, layer_idx=0, use_flash_attn=True, **arguments, **options)
    module = mha.MHA(DIM, NHEADS, **arguments, **exact(device))
    x = randn(device, 2, SEQLEN, DIM)
    with torch.no_grad():
        close(decode(module, x), module(x))


@decodable
def test_fallback_decodes_too(options, device):
    _, module = twins(mha.MHA, device, causal=True, layer_idx=0, rotary_emb_dim=16, **options)
    x = randn(device, 2, SEQLEN, DIM)
    with torch.no_grad():
        close(decode(module, x), module(x))


@decodable
@paths
def test_kvcache_keeps_the_window(arguments, options, device):
    """With a window of 2 keys to the left, each decoded token sees 3 keys, as it did in training."""
    torch.manual_seed(3)
    arguments = dict(causal=True, layer_idx=0, use_flash_attn=True, **arguments, **options, **exact(device))
    windowed, wide = (mha.MHA(DIM, NHEADS, window_size=window, **arguments) for window in ((2, 0), (-1, -1)))
    wide.load_state_dict(windowed.state_dict())
    x = randn(device, 2, SEQLEN, DIM)
    with torch.no_grad():
        close(decode(windowed, x), windowed(x))
        assert not torch.allclose(windowed(x), wide(x), atol=1e-2), "the window makes no difference here"


class Linear(nn.Linear):
    """A tensor-parallel linear layer of one process. Upstream's layer needs another compiled extension."""

    def __init__(
        self, in_features, out_features, process_group, sequence_parallel=True, multiple_of=1, **arguments
    ):
        super().__init__(in_features, out_features, **arguments)


@pytest.fixture
def parallel_mha(monkeypatch):
    monkeypatch.setattr(mha, "ColumnParallelLinear", Linear)
    monkeypatch.setattr(mha, "RowParallelLinear", Linear)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)

    def make(*arguments, **options):
        return mha.ParallelMHA(*arguments, process_group=SimpleNamespace(size=lambda: 1), **options)

    return make


@decodable
@paths
@pytest.mark.parametrize("window", [(-1, -1), (2, 0)], ids=["wide", "window"])
def test_parallel_mha_is_mha(parallel_mha, window, arguments, options, device):
    arguments = dict(
        causal=True, layer_idx=0, use_flash_attn=True, window_size=window, **arguments, **options
    )
    module, parallel = (make(DIM, NHEADS, **arguments, **exact(device)) for make in (mha.MHA, parallel_mha))
    parallel.load_state_dict(module.state_dict())
    x = randn(device, 2, SEQLEN, DIM)
    with torch.no_grad():
        close(parallel(x), module(x))
        close(decode(parallel, x), module(x))


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "fallback"])
def test_wrong_options_fail_at_construction(flash):
    with pytest.raises(ValueError, match="activation='tanh'"):
        mha.MHA(DIM, NHEADS, use_flash_attn=flash, use_softmax=False, activation="tanh")
    with pytest.raises(TypeError, match="use_sofmax"):
        mha.MHA(DIM, NHEADS, use_flash_attn=flash, use_sofmax=False)


@pytest.mark.parametrize("interleaved", [True, False], ids=["gptj", "neox"])
@pytest.mark.parametrize("offsets", [0, 3, "each"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batch"])
def test_rotary_turns_each_position(packed, offsets, interleaved, device):
    """Rotary multiplies channel pairs, as complex numbers, by exp(i * position * frequency); backward rotates
    back.
    """
    lengths, nheads, head_dim, half, seqlen_ro = (5, 2), 2, 12, 4, 16
    each = torch.tensor([3, 6], dtype=torch.int32, device=device) if offsets == "each" else offsets
    frequency = torch.rand(half, generator=torch.Generator().manual_seed(1))
    angle = torch.outer(torch.arange(seqlen_ro), frequency).to(device)
    x = randn(device, 7, nheads, head_dim) if packed else randn(device, 2, 5, nheads, head_dim)
    cu_seqlens = torch.tensor([0, 5, 7], dtype=torch.int32, device=device) if packed else None
    start = each.tolist() if offsets == "each" else [offsets] * 2
    rows = [torch.arange(n) + s for n, s in zip(lengths if packed else (5, 5), start, strict=True)]
    position = (torch.cat(rows) if packed else torch.stack(rows)).to(device)

    def turn(x: torch.Tensor, sign: int) -> torch.Tensor:
        pairs = x[..., : 2 * half].double()
        pairs = (
            pairs.unflatten(-1, (half, 2))
            if interleaved
            else pairs.unflatten(-1, (2, half)).transpose(-1, -2)
        )
        phase = torch.polar(torch.ones_like(angle), sign * angle)[position].unsqueeze(-2).to(torch.complex128)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
        turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)

    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    arguments = dict(interleaved=interleaved, seqlen_offsets=each, cu_seqlens=cu_seqlens, max_seqlen=5)
    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, **arguments)
    close(out, turn(x, 1))
    dout = randn(device, *out.shape)
    close(torch.autograd.grad(out, leaf, dout)[0], turn(dout, -1))
    inplace = x.clone()
    assert apply_rotary_emb(inplace, cos, sin, inplace=True, **arguments).data_ptr() == inplace.data_ptr()
    assert torch.equal(inplace, out)


@pytest.fixture(scope="module")
def upstream():
    with models() as modules:
        yield modules


def in_config(options: dict) -> dict:
    """Rename the options of a public function to their names in a model's config."""
    return {name if name == "use_softmax" else f"attn_{name}": value for name, value in options.items()}


def gpt_config(**values) -> Config:
    return Config(**{
        **dict(hidden_size=DIM, n_embd=DIM, num_attention_heads=NHEADS, num_hidden_layers=2, n_inner=DIM,
               vocab_size=50, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, max_position_embeddings=32,
               scale_attn_weights=True, layer_norm_epsilon=1e-5, scale_attn_by_inverse_layer_idx=False,
               activation_function="gelu", initializer_range=0.5),
        **values,
    })  # fmt: skip


def bert_config(**values) -> Config:
    return Config(**{
        **dict(hidden_size=DIM, num_attention_heads=NHEADS, num_hidden_layers=2, intermediate_size=DIM,
        vocab_size=50,
               hidden_act="gelu", max_position_embeddings=32, type_vocab_size=2, pad_token_id=0,
               layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
               initializer_range=0.5, position_embedding_type="absolute"),
        **values,
    })  # fmt: skip


def tokens(device: str) -> torch.Tensor:
    return torch.randint(1, 50, (2, SEQLEN), generator=torch.Generator().manual_seed(5)).to(device)


def both_ways(make, device: str) -> list[nn.Module]:
    """Return [flash, fallback] with the same weights; make(use_flash_attn) builds a model."""
    torch.manual_seed(3)
    flash, fallback = (make(use_flash_attn).to(**exact(device)).eval() for use_flash_attn in (True, False))
    fallback.load_state_dict(flash.state_dict())
    return [flash, fallback]


@scores
@pytest.mark.parametrize("rotary", [0.0, 1.0], ids=["absolute", "rotary"])
def test_gpt(upstream, rotary, options, device):
    def make(flash: bool, **score) -> nn.Module:
        return upstream.gpt.GPTLMHeadModel(
            gpt_config(use_flash_attn=flash, rotary_emb_fraction=rotary, **score)
        )

    flash, fallback = both_ways(lambda f: make(f, **in_config(options)), device)
    with torch.no_grad():
        logits = flash(tokens(device)).logits
        close(logits, fallback(tokens(device)).logits)
        default = both_ways(make, device)[0](tokens(device)).logits
    assert torch.equal(logits, default) == (not options), (
        "softmax is the default of a config, and only the default"
    )


@decodable
@pytest.mark.parametrize(
    "values", [{}, dict(rotary_emb_fraction=1.0, window_size=(3, 0))], ids=["plain", "rotary-window"]
)
def test_gpt_generates_what_it_learnt(upstream, values, options, device):
    config = gpt_config(use_flash_attn=True, **values, **in_config(options))
    torch.manual_seed(3)
    model = upstream.gpt.GPTLMHeadModel(config).to(**exact(device)).eval()

    ids = tokens(device)
    with torch.no_grad():
        generated = model.generate(
            ids[:, :4],
            max_length=SEQLEN,
            teacher_outputs=ids,
            return_dict_in_generate=True,
            output_scores=True,
        )
        close(torch.stack(generated.scores, dim=1), model(ids).logits[:, 3:-1])
    assert torch.equal(generated.sequences, ids)


@scores
@pytest.mark.parametrize("subset", [False, True], ids=["whole", "masked tokens"])
def test_bert(upstream, subset, options, device):
    """BERT gives the same with unpadded sequences (flash path) and with a padding mask (fallback)."""
    keep = torch.arange(SEQLEN, device=device) < torch.tensor([[6], [SEQLEN]], device=device)
    masked = torch.zeros_like(keep)
    masked[:, 2:4] = True

    def make(flash: bool, **score) -> nn.Module:
        return upstream.bert.BertModel(
            bert_config(use_flash_attn=flash, last_layer_subset=subset and flash, **score)
        )

    def run(model: nn.Module) -> torch.Tensor:
        if model.config.last_layer_subset:
            return model(tokens(device), attention_mask=keep, masked_tokens_mask=masked).last_hidden_state
        out = model(tokens(device), attention_mask=keep).last_hidden_state
        return out[masked] if subset else out[keep]

    if subset:  # without the subset the last layer's projections are one matrix, with it two

        def share(flash: nn.Module, fallback: nn.Module) -> None:
            state = flash.state_dict()
            for kind in ("weight", "bias"):
                last = "encoder.layers.1.mixer."
                state[f"{last}Wqkv.{kind}"] = torch.cat(
                    [state.pop(f"{last}{w}.{kind}") for w in ("Wq", "Wkv")]
                )
            fallback.load_state_dict(state)
    else:

        def share(flash: nn.Module, fallback: nn.Module) -> None:
            fallback.load_state_dict(flash.state_dict())

    torch.manual_seed(3)
    flash, fallback = (make(f, **in_config(options)).to(**exact(device)).eval() for f in (True, False))
    share(flash, fallback)
    with torch.no_grad():
        close(run(flash), run(fallback))


@scores
def test_vit(upstream, options, device):
    def make(flash: bool, **score) -> nn.Module:
        return upstream.vit.VisionTransformer(
            img_size=16, patch_size=4, num_classes=5, embed_dim=DIM, depth=2, num_heads=NHEADS,
            use_flash_attn=flash, **score,
        )  # fmt: skip

    flash, fallback = both_ways(lambda f: make(f, **options), device)
    images = randn(device, 2, 3, 16, 16)
    with torch.no_grad():
        logits = flash(images)
        close(logits, fallback(images))
        assert torch.equal(logits, both_ways(make, device)[0](images)) == (not options)
