"""Replace the packages that upstream's models import, so that the models run without them.

gpt.py, bert.py and vit.py need transformers, timm, torchvision, safetensors and sentencepiece for configs,
checkpoints and stochastic depth. Attention needs none of that, and torchvision's wheel does not load beside a
CPU torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace
from unittest import mock

from torch import nn

PACKAGES = (
    "transformers", "transformers.models.bert.modeling_bert", "transformers.utils", "transformers.utils.hub",
    "timm.models.helpers", "torchvision.ops", "safetensors.torch", "sentencepiece",
)  # fmt: skip


class Config:
    """A config like those of transformers: a set of attributes."""

    def __init__(self, **values) -> None:
        vars(self).update(values)


@contextmanager
def models() -> Iterator[SimpleNamespace]:
    """Import upstream's modules ``gpt``, ``bert`` and ``vit`` with the stand-ins, and drop them
    afterwards.
    """
    fakes = {name: mock.MagicMock() for package in PACKAGES for name in _with_parents(package)}
    transformers = fakes["transformers"]
    transformers.GPT2Config = transformers.BertConfig = transformers.PretrainedConfig = Config
    fakes[
        "transformers.models.bert.modeling_bert"
    ].BaseModelOutputWithPoolingAndCrossAttentions = SimpleNamespace
    fakes["torchvision.ops"].StochasticDepth = lambda p, mode: nn.Dropout(p)
    with mock.patch.dict(sys.modules, fakes):  # this also removes the models from sys.modules at the end
        yield SimpleNamespace(**{name: _model(name) for name in ("gpt", "bert", "vit")})


def _with_parents(package: str) -> list[str]:
    parts = package.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _model(name: str) -> ModuleType:
    return import_module(f"flash_attn.models.{name}")
