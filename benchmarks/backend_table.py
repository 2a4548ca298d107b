"""Write the table of docs/backends.md that says which backend runs what: the package is asked about every
combination of activation, normalization, function and option, and nothing is computed.

Tensors on a GPU are fakes, and the GPU is not there: Hopper, with an extension of all kernels. It needs
flash-attn-4 of this patch set and its requirements beside flash_attn.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- written by benchmarks/backend_table.py -->\n", "<!-- end -->\n"
BATCH, SEQLEN, NHEADS = 2, 512, 4
BACKENDS = ("cpu", "fa2", "fa4", "linear")
ACTIVATIONS = ("identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus")
BIASES = (0.0, -3.0, "-log n", (NHEADS,), (BATCH, NHEADS))  # of the sigmoid; a shape stands for a tensor
FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_func, pages",
    "flash_attn_with_kvcache",
)
OPTIONS: dict[str, dict] = {
    "forward": {},
    "with gradients": {"grad": True},
    "causal": {"causal": True},
    "window": {"window_size": (64, 0)},
    "grouped heads": {"nheads_k": 2},
    "softcap": {"softcap": 20.0},
    "ALiBi": {"alibi_slopes": (NHEADS,)},
    "decay": {"decay_slopes": (NHEADS,)},
    "mask=HSTU": {"mask": "HSTU"},
    "mask=Intervals": {"mask": "Intervals"},
    "dropout": {"dropout_p": 0.1},
    "deterministic": {"deterministic": True, "grad": True},
    "float32": {"dtype": torch.float32},
    "head_dim 60": {"head_dim": 60},
    "head_dim_v ≠ head_dim": {"head_dim_v": 32},
}
WITHOUT = {  # options that a function does not have, or refuses whatever the backend
    "flash_attn_varlen_func, pages": ("with gradients", "deterministic"),
    "flash_attn_with_kvcache": (
        "with gradients",
        "deterministic",
        "dropout",
        "mask=HSTU",
        "mask=Intervals",
    ),  # fmt: skip
}


def normalizations(function: str) -> tuple:
    rows = (BATCH * SEQLEN,) if "varlen" in function else (BATCH, 1 if "kvcache" in function else SEQLEN)
    return None, "1/n", "1/visible", "1/sqrt(n)", 1 / 1024, (BATCH,), rows


def scores(function: str) -> Iterator[dict]:
    for activation, normalization in itertools.product(ACTIVATIONS, normalizations(function)):
        for bias in BIASES if activation == "sigmoid" else BIASES[:1]:
            yield {"activation": activation, "normalization": normalization, "sigmoid_bias": bias}


def call(
    function: str, device: str, *, dtype=torch.bfloat16, head_dim=64, head_dim_v=None, nheads_k=NHEADS,
    grad=False, **options,
) -> Callable:  # fmt: skip
    """Return explain() of a call, without its backend. Shapes among the options become tensors, and the name
    of a mask one of its class.
    """
    import flash_attn
    from flash_attn.masks import HSTU, Intervals

    new = partial(torch.zeros, dtype=dtype, device=device)
    lengths = partial(torch.zeros, dtype=torch.int32, device=device)
    name, paged = function.partition(",")[0], "pages" in function
    for key in ("normalization", "sigmoid_bias", "alibi_slopes", "decay_slopes"):
        if isinstance(options.get(key), tuple):
            options[key] = torch.zeros(options[key], device=device)
    cached = name == "flash_attn_with_kvcache"
    rows = (BATCH * SEQLEN,) if "varlen" in name else (BATCH, 1 if cached else SEQLEN)
    keys = (4, 256) if paged else (BATCH, SEQLEN) if cached else rows
    if options.get("mask") == "HSTU":
        options["mask"] = HSTU(num_targets=lengths(BATCH))
    elif options.get("mask") == "Intervals":
        options["mask"] = Intervals(lengths(*rows, 1), lengths(*rows, 1))
    q = new(*rows, NHEADS, head_dim, requires_grad=grad)
    k, v = (new(*keys, nheads_k, d) for d in (head_dim, head_dim_v or head_dim))
    more: tuple = ()
    if "varlen" in name:
        starts = torch.arange(0, (BATCH + 1) * SEQLEN, SEQLEN, dtype=torch.int32, device=device)
        more = (starts, starts, SEQLEN, SEQLEN)
        if paged:
            options["block_table"] = lengths(BATCH, 2)
    elif cached:
        options["cache_seqlens"] = lengths(BATCH)
    return partial(
        flash_attn.explain, getattr(flash_attn, name), q, k, v, *more, use_softmax=False, **options
    )


def with_extension() -> mock._patch_dict:
    """Put an extension with all kernels in place of what this machine has."""
    extension = ModuleType("flash_attn_2_cuda")
    extension.has_use_softmax = True
    extension.built_head_dims = (32, 64, 96, 128, 192, 256)
    extension.built_dtypes, extension.built_passes = ("fp16", "bf16"), ("fwd", "bwd", "splitkv")
    extension.built_archs = (90,)
    return mock.patch.dict(sys.modules, {"flash_attn_2_cuda": extension})


def obstacles(function: str, option: str, backend: str) -> list[tuple[dict, str]]:
    """Return each score function that the backend does not run, with the reason."""
    device = "cpu" if backend == "cpu" else "cuda"
    found = []
    for score in scores(function):
        try:
            with FakeTensorMode() if device == "cuda" else nullcontext():
                call(function, device, **OPTIONS[option], **score)(backend=backend)
        except (ValueError, NotImplementedError) as error:
            words = str(error)
            head, _, rest = words.partition(" is not possible: ")
            if not rest:  # not the backend's word, but a call that no backend takes
                raise
            found.append((score, rest.partition("; leave it out")[0]))
    return found


def cell(function: str, option: str, backend: str, notes: list[str]) -> str:
    refused = obstacles(function, option, backend)
    if not refused:
        return "all"
    if {score["activation"] for score, _ in refused} == set(ACTIVATIONS[1:]):
        return "identity"
    reason = refused[0][1]
    if reason not in notes:
        notes.append(reason)
    count = sum(1 for _ in scores(function))
    mark = f"[{notes.index(reason) + 1}]"
    return f"– {mark}" if len(refused) == count else f"{count - len(refused)} of {count} {mark}"


def table() -> str:
    """Return the table in markdown, with the reasons below it."""
    notes: list[str] = []
    text = f"| function, option | {' | '.join(f'`{name}`' for name in BACKENDS)} |\n" + "|---" * 5 + "|\n"
    hopper = mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with with_extension(), hopper:
        for function, option in itertools.product(FUNCTIONS, OPTIONS):
            if option not in WITHOUT.get(function, ()):
                cells = [cell(function, option, backend, notes) for backend in BACKENDS]
                text += f"| `{function.partition(',')[0]}`{''.join(function.partition(',')[1:])}, {option} | "
                text += " | ".join(cells) + " |\n"
    return text + "\n" + "".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1))


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
