"""One call of a public attention function, whatever the packing of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional, Union

import torch


@dataclass  # not frozen: to set the fields would then take a sixth of the time of a dispatch
class Call:
    """The arguments of a public function under one set of names. Nobody changes them.

    q: (batch, seqlen_q, nheads, head_dim); k, v: (batch, seqlen_k, nheads_k, head_dim). With cu_seqlens_q and cu_seqlens_k,
    int32 (batch + 1,): (total_q, nheads, head_dim) and (total_k, nheads_k, head_dim), or with block_table pages of k and v.
    Of qkv and kv they are views, through which gradients go. cached: k and v are the caches of flash_attn_with_kvcache.
    The other arguments are those of the public functions, with their defaults.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: Optional[torch.Tensor] = None
    cu_seqlens_k: Optional[torch.Tensor] = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    block_table: Optional[torch.Tensor] = None
    dropout_p: float = 0.0
    softmax_scale: Optional[float] = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Optional[torch.Tensor] = None
    deterministic: bool = False
    return_attn_probs: bool = False
    use_softmax: bool = True
    activation: str = "identity"
    sigmoid_bias: Union[float, str] = 0.0
    normalization: Optional[str] = None
    cached: bool = False

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    def result(self, out: torch.Tensor) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What the public function returns for `out`: with return_attn_probs also an empty log-sum-exp and S_dmask."""
        if not self.return_attn_probs:
            return out
        return out, self.q.new_empty(0, dtype=torch.float32), self.q.new_empty(0)


_FIELDS = tuple(field.name for field in fields(Call))


def call_of(arguments: Mapping[str, Any]) -> Call:
    """The call with these arguments, by the names that the public function gives them. Raises ValueError if qkv or kv is
    not packed along its third axis from the end."""
    own = {name: value for name, value in arguments.items() if name in _FIELDS}
    if "qkv" in arguments:
        own["q"], own["k"], own["v"] = _parts("qkv", arguments["qkv"], 3)
    if "kv" in arguments:
        own["k"], own["v"] = _parts("kv", arguments["kv"], 2)
    if "k_cache" in arguments:
        own["k"], own["v"], own["cached"] = arguments["k_cache"], arguments["v_cache"], True
    if "cu_seqlens" in arguments:
        own["cu_seqlens_q"] = own["cu_seqlens_k"] = arguments["cu_seqlens"]
        own["max_seqlen_q"] = own["max_seqlen_k"] = arguments["max_seqlen"]
    return Call(**own)


def _parts(name: str, packed: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(packed.shape)}, expected {count} as its third axis from the end")
    return packed.unbind(-3)
