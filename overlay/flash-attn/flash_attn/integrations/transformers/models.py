"""Watch models as they are made: keep the score function in their config, refuse those that can't have it,
warn of those that lose it.

PyTorch calls a public global hook when a module gets a child, which a model does first after its config is
complete. attention.py does the same at a forward pass, for set_attn_implementation.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from .score import CONFIG_KEY

_watched: list = []


def watch(registered: Mapping[str, dict]) -> None:
    """Check every model that is made from now on. registered: the saved form of each name's score
    function.
    """
    if not _watched:
        _watched.append(register_module_module_registration_hook(lambda *args: _check(args[0], registered)))


def _check(module: torch.nn.Module, registered: Mapping[str, dict]) -> None:
    config = module.__dict__.get("config")
    name = getattr(config, "_attn_implementation", None)
    if name is None or not hasattr(module, "_supports_flash_attn"):  # no model of transformers
        return
    saved = getattr(config, CONFIG_KEY, None)
    if name in registered:
        _refuse(module, name)
        keep(config, name, registered[name])
        # transformers 5 reads this from config.json when it loads the model.
        config.attn_implementation = name
    elif saved is not None and not isinstance(name, dict):
        warnings.warn(
            f"the config of {type(module).__name__} says no_softmax={saved}, but {name!r} as "
            "attn_implementation has softmax: register the score function and give its name as "
            "attn_implementation, or delete config.no_softmax",
            stacklevel=2,
        )


def _refuse(model: torch.nn.Module, name: str) -> None:
    """Raise for a model whose attention is not the one of AttentionInterface, or has more than it passes
    on.
    """
    of_interface = getattr(type(model), "_can_set_attn_implementation", lambda: True)()
    if not (model._supports_flash_attn and of_interface):
        raise NotImplementedError(
            f"{type(model).__name__} does not support FlashAttention in transformers, so that {name} can't "
            "replace its attention: it may have a position bias or kernels of its own"
        )


def keep(config: Any, name: str, given: dict) -> None:
    """Write the saved form of a score function into a config, or check the one that is there. Raises
    ValueError if they differ.
    """
    saved = getattr(config, CONFIG_KEY, None)
    if saved is None:
        setattr(config, CONFIG_KEY, dict(given))
        config.attn_implementation = name
    elif saved != given:
        _raise_of_another(name, saved, given)


def _raise_of_another(name: str, saved: Any, given: dict) -> None:
    raise ValueError(
        f"config.no_softmax={saved}, but {name} is registered with {given}: register the first under a name "
        "of its own and use that, or delete config.no_softmax to train the model with another score function"
    )
