"""Register score functions as attention implementations of transformers, and remember them."""

import re
from functools import partial
from typing import Any

from . import attention, loader, masks, models, versions
from .score import ScoreFunction, checked

# transformers reads these as hub kernels ("/", ":", "|"), as its own implementations, or as wishes for them.
_TAKEN = re.compile(r"[/:|]|^eager$|sdpa|flex_attention|^flash_attention_\d$")
_registered: dict[str, ScoreFunction] = {}
_saved: dict[str, dict] = {}


def register(
    name: str = "flash_no_softmax", *, algorithm: str = "auto", backend: str = "auto", **score: Any
) -> None:
    """Register a score function as an attention implementation of transformers.

    After it, from_pretrained(…, attn_implementation=name), from_config and set_attn_implementation run a
    model that supports FlashAttention-2 without softmax. Several names may be registered in one process.

    name: a str; with "flash" in it transformers treats it as FlashAttention, which continuous batching and
        some models need.
    score: activation, sigmoid_bias and normalization as in flash_attn_func, where a sigmoid_bias by head is a
        list of numbers; decay_slopes, a list with a number for each query head; and n, a given number of keys
        for "1/n", "1/sqrt(n)" and "-log n", which otherwise count the keys of a call and so can't decode with
        a cache. model.config.no_softmax keeps them, and so do save_pretrained and from_pretrained.
    algorithm, backend: as in flash_attn_func. They are not kept in the config.

    Raises ImportError if transformers is missing or too old, TypeError or ValueError if an argument is wrong,
    and ValueError if the name is taken.
    """
    transformers = versions.require()
    found = checked(score)
    taken = _TAKEN.search(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not name or taken:
        raise ValueError(
            f"name={name!r}: give a name of your own without / : |, such as flash_no_softmax; transformers "
            "reads this one as an implementation of its own"
        )
    if _registered.get(name, found) != found:
        raise ValueError(
            f"name={name!r} is registered with {_registered[name].saved}, and models may use it: register "
            f"{found.saved} under another name"
        )
    if name not in _registered and name in transformers.AttentionInterface().valid_keys():
        raise ValueError(f"name={name!r} is registered by another package: give another name")
    loader.tell(name, found)
    _registered[name], _saved[name] = found, found.saved
    models.watch(_saved)
    options = {"algorithm": algorithm, "backend": backend}
    transformers.AttentionInterface.register(name, partial(_attend, name, options))
    transformers.AttentionMaskInterface.register(name, masks.describe)


def registered() -> dict[str, ScoreFunction]:
    """Return the score function of each registered name."""
    return dict(_registered)


def _attend(name: str, options: dict, module: Any, *args: Any, **kwargs: Any) -> tuple:
    models.keep(module.config, name, _saved[name])
    return attention.attend(_registered[name], options, module, *args, **kwargs)
