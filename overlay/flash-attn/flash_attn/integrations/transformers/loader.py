"""Let transformers load an implementation whose name contains "flash".

transformers 5 loads the functions behind such a name when a model is made, and takes any name but its own for
a package on its hub. AttentionInterface.register does not tell its loader, and no public function does. This
module replaces that loader, `_lazy_imports`, by one that knows the registered names and leaves all others to
it. A model that calls the loaded functions itself gets ours.
"""

import inspect
from functools import partial, wraps
from typing import Any, Callable

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func

from .score import ScoreFunction

_known: dict[str, ScoreFunction] = {}
_LOADER = "_lazy_imports"


def tell(name: str, score: ScoreFunction) -> None:
    """Make a name loadable. Raises ImportError if transformers has another loader than the one that is
    known.
    """
    if "flash" not in name:
        return
    import transformers
    from transformers import modeling_flash_attention_utils as utils

    loader = getattr(utils, _LOADER, None)
    if loader is None or next(iter(inspect.signature(loader).parameters), None) != "implementation":
        raise ImportError(
            f"transformers {transformers.__version__} loads FlashAttention in a way that is not known here: "
            f'register a name without "flash" in place of {name!r}'
        )
    _known[name] = score
    if not hasattr(loader, "_of_flash_attn"):
        setattr(utils, _LOADER, _knowing(loader, utils))


def _knowing(loader: Callable, utils: Any) -> Callable:
    @wraps(loader)
    def load(implementation: Any, *args: Any, **kwargs: Any) -> tuple:
        score = _known.get(implementation) if isinstance(implementation, str) else None
        if score is None:
            return loader(implementation, *args, **kwargs)
        functions = [partial(_run, f, score) for f in (flash_attn_func, flash_attn_varlen_func)]
        for function, of in zip(functions, (flash_attn_func, flash_attn_varlen_func)):
            function.__signature__ = _signature(of)
        # Some versions also want the function for a paged cache. None makes them do without.
        cache = [None] if hasattr(utils, "_flash_with_kvcache_fn") else []
        return (*functions, *cache, utils._pad_input, utils._unpad_input)

    load._of_flash_attn = True
    return load


def _run(
    function: Callable, score: ScoreFunction, q: torch.Tensor, *args: Any, s_aux: Any = None, **kwargs: Any
) -> Any:
    if s_aux is not None:
        raise NotImplementedError(
            "s_aux: attention without softmax has no sinks, use another attn_implementation"
        )
    return function(q, *args, **{**kwargs, **score.options(q.device)})


def _signature(function: Callable) -> inspect.Signature:
    """Return the signature from which transformers reads which arguments it may give: with s_aux, so that it
    does not leave it out.
    """
    signature = inspect.signature(function)
    more = inspect.Parameter("s_aux", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*signature.parameters.values(), more])
