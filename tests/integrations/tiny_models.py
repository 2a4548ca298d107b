"""Make tiny random models, and run them without softmax by a formula that forms every score.

The reference is an attention function of its own, registered beside those under test, with transformers'
eager masks: (batch, 1, seqlen_q, seqlen_k), 0 where a query sees a key.
"""

from __future__ import annotations

import torch
import transformers
from flash_attn.integrations.transformers import register
from transformers import AttentionInterface, AttentionMaskInterface

NEW = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY = 64
SCORES = {
    "relu": dict(activation="relu", normalization="1/visible"),
    "sigmoid": dict(activation="sigmoid", sigmoid_bias="-log n", n=16),
    "silu": dict(activation="silu", normalization="1/n", n=8),
    "identity": dict(),
    "retention": dict(decay_slopes=[0.5, 0.25, 0.125, 0.0625]),
}
FUNCTIONS = {
    "relu": lambda s: s.clamp(min=0),
    "sigmoid": lambda s: 1 / (1 + torch.exp(-(s - torch.tensor(16.0, dtype=s.dtype).log()))),
    "silu": lambda s: s / (1 + torch.exp(-s)),
    "identity": lambda s: s,
    "retention": lambda s: s,
}
FACTORS = {"silu": 1 / 8}


def name_of(score: str) -> str:
    return f"flash_{score}_tested"


def eager(score: str):
    """Return the reference attention function of a score function."""

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        s = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        visible = torch.ones_like(s, dtype=torch.bool)
        if attention_mask is not None:
            visible = (attention_mask[..., : s.shape[-1]] == 0).expand(s.shape)
        weights = torch.where(visible, FUNCTIONS[score](s), 0.0) * FACTORS.get(score, 1.0)
        if score == "relu":
            weights = weights / visible.sum(-1, keepdim=True).clamp(min=1)
        if score == "retention":
            slopes = torch.tensor(SCORES[score]["decay_slopes"], dtype=s.dtype)[:, None, None]
            c = torch.arange(s.shape[2])[:, None] + s.shape[3] - s.shape[2]
            weights = weights * torch.exp(-slopes * (c - torch.arange(s.shape[3])).abs())
        return (weights @ value).transpose(1, 2), None

    return attention


for _score, _options in SCORES.items():
    register(name_of(_score), **_options)
    AttentionInterface.register(f"reference_{_score}", eager(_score))
    AttentionMaskInterface.register(f"reference_{_score}", AttentionMaskInterface()["eager"])

_SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.4, pad_token_id=0,
    bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SMALL, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=3.0
    ),
}
# Every model with another score function.
PAIRS = {"llama": "relu", "qwen3": "sigmoid", "mistral": "silu", "gemma2": "identity"}


def decoder(kind: str, score: str, **changes) -> tuple:
    """Return (the model under test, the reference model), with equal float64 weights."""
    config = DECODERS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    return pair(transformers.AutoModelForCausalLM, config, score)


def pair(auto: type, config, score: str) -> tuple:
    tested = auto.from_config(config, attn_implementation=name_of(score)).double().eval()
    plain = type(config).from_dict(config.to_dict(), attn_implementation=f"reference_{score}")
    del plain.no_softmax
    reference = auto.from_config(plain, attn_implementation=f"reference_{score}").double().eval()
    reference.load_state_dict(tested.state_dict())
    return tested, reference


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


def padding(lengths: list[int], longest: int, left: bool) -> torch.Tensor:
    """Return the attention_mask (batch, longest) of sequences with these lengths."""
    columns = torch.arange(longest)
    rows = torch.tensor(lengths)[:, None]
    return ((columns >= longest - rows) if left else (columns < rows)).long()


def assert_equal(tested: torch.Tensor, reference: torch.Tensor, kept: torch.Tensor | None = None) -> None:
    """Compare in float64, at the places (batch, seqlen) that `kept` names."""
    if kept is not None:
        tested, reference = tested[kept.bool()], reference[kept.bool()]
    assert reference.abs().max() > 1e-3
    torch.testing.assert_close(tested, reference, rtol=1e-8, atol=1e-8)
