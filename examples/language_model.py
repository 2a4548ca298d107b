"""Define a small character-level language model whose attention is one of several forms, and its text.

The model is the same for every form but for what the form needs: a norm of queries and keys, a norm after
attention, a gate. FORMS is the list that docs/recipes.md explains.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_func
from torch import Tensor, nn

VOCABULARY = 128  # ASCII


@dataclass(frozen=True)
class Form:
    """One form of attention. options: of flash_attn_func, from the number of tokens. decay: decay_slopes of
    retention. qk_norm: RMSNorm on queries and keys. out_norm: RMSNorm of each head's output. gate: a gate on
    the output, as in retention.
    """

    options: Callable[[int], dict] = field(default=lambda tokens: {})
    decay: bool = False
    qk_norm: bool = False
    out_norm: bool = False
    gate: bool = False


def retention_slopes(heads: int) -> Tensor:
    """Return -log(gamma) of each head, with gamma = 1 - 2^(-5 - head): arXiv 2307.08621."""
    return -torch.log(1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float32)))


FORMS = {
    "softmax": Form(),
    "relu, 1/n": Form(lambda tokens: dict(activation="relu", normalization="1/n")),
    "sigmoid, -log n, qk-norm": Form(
        lambda tokens: dict(activation="sigmoid", sigmoid_bias="-log n"), qk_norm=True
    ),
    "silu, given n": Form(lambda tokens: dict(activation="silu", normalization=1 / tokens)),
    "relu2, 1/n": Form(lambda tokens: dict(activation="relu2", normalization="1/n")),
    "identity, norm after": Form(out_norm=True),
    "retention": Form(decay=True, out_norm=True, gate=True),
}


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention with softmax: this package's, or on a GPU whose kernels it lacks, PyTorch's."""
    return flash_attn_func(q, k, v, causal=True) if has_softmax(q) else causal_sdpa(q, k, v)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def has_softmax(q: Tensor) -> bool:
    """Whether the installed flash_attn can train q's head size and dtype with softmax where q is."""
    return not q.is_cuda or _has_kernels(q.shape[-1], q.dtype)


@cache
def _has_kernels(head_dim: int, dtype: torch.dtype) -> bool:
    x = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device="cuda", requires_grad=True)
    try:
        with torch.enable_grad():
            flash_attn_func(x, x, x, causal=True).sum().backward()
    except (ImportError, RuntimeError):  # there is no extension, or it was built without these kernels
        return False
    return True


def rotated(x: Tensor) -> Tensor:
    """Apply rotary position embeddings to (batch, seqlen, nheads, head_dim)."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Norm(nn.RMSNorm):
    """RMSNorm whose weight takes the dtype of x, so that one kernel runs it under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """softmax: the attention of the form "softmax", of q, k and v (batch, seqlen, nheads, head_dim)."""

    def __init__(self, name: str, width: int, heads: int, softmax: Callable = causal_softmax) -> None:
        super().__init__()
        self.form, self.heads = FORMS[name], heads
        self.softmax = softmax if name == "softmax" else None
        head_dim = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList([Norm(head_dim) for _ in "qk"]) if self.form.qk_norm else None
        self.out_norm = Norm(head_dim) if self.form.out_norm else nn.Identity()
        self.gate = nn.Linear(width, width, bias=False) if self.form.gate else None
        slopes = retention_slopes(heads) if self.form.decay else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k = rotated(q).to(v.dtype), rotated(k).to(v.dtype)
        y = self.out_norm(self.attend(q, k, v)).flatten(2)
        return self.out(y if self.gate is None else y * F.silu(self.gate(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the result: (batch, seqlen, nheads, head_dim)."""
        if self.softmax is not None:
            return self.softmax(q, k, v)
        return flash_attn_func(q, k, v, **self.options(q.shape[1]))

    def options(self, tokens: int) -> dict:
        """Return the arguments of flash_attn_func beside q, k and v of this length."""
        form = self.form.options(tokens)
        return dict(causal=True, use_softmax=False, decay_slopes=self.slopes, **form)


class Block(nn.Module):
    def __init__(self, form: str, width: int, heads: int, softmax: Callable = causal_softmax) -> None:
        super().__init__()
        self.attention = Attention(form, width, heads, softmax)
        self.norms = nn.ModuleList([Norm(width) for _ in "ab"])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Maps tokens (batch, seqlen), or (batch, seqlen, parts) whose parts are added, to logits (batch, seqlen,
    vocabulary).
    """

    def __init__(
        self, form: str, layers: int, width: int, heads: int, vocabulary: int = VOCABULARY,
        softmax: Callable = causal_softmax,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[Block(form, width, heads, softmax) for _ in range(layers)])
        self.norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = (
                    0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "mlp.2.weight")) else 0.02
                )
                nn.init.normal_(p, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(self.blocks(x if tokens.dim() == 2 else x.sum(2))))


@lru_cache(1)
def text(megabytes: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return characters for training and for validation (the last tenth): the sources of Python's standard
    library.

    They are sorted by a hash of their names, so that the last tenth is of the same kind.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        p for p in folder.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(p.parts)
    ]
    files.sort(key=lambda p: (hash_of(str(p.relative_to(folder))), p))
    found = bytearray()
    for path in files:
        found += bytes(b for b in path.read_bytes() if b < VOCABULARY)
        if len(found) >= megabytes * 1e6:
            break
    tokens = torch.frombuffer(found, dtype=torch.uint8).long()
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]


def source_of(training: Tensor, validation: Tensor) -> str:
    """Say which text this is: the library differs between versions of Python."""
    digest = hashlib.sha256(bytes(training.tolist())).hexdigest()[:8]
    count = len(training) + len(validation)
    return f"standard library of Python {platform.python_version()}, {count} characters, {digest}"


def hash_of(name: str) -> int:
    """Return a number that is the same in every process."""
    value = 0
    for character in name.encode():
        value = (value * 31 + character) % 2**32
    return value


def batches(tokens: Tensor, count: int, length: int, seed: int, device: str):
    """Yield (inputs, targets), int64 (count, length), for ever. Text and places are copied to the device
    ahead, so that a step waits for no copy.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens, following = tokens.to(device), torch.arange(length + 1, device=device)
    while True:
        for starts in torch.randint(len(tokens) - length - 1, (1000, count, 1), generator=draw).to(device):
            rows = tokens[starts + following]
            yield rows[:, :-1], rows[:, 1:]
