"""Compile kernels of flash_attn.cute for Hopper without a GPU. Run by compile_check.py with the tree to
compile on PYTHONPATH.

    compile_worker.py FOLDER < cases.json        writes FOLDER/<case>.<fwd|bwd>.cubin, prints a line a case

A case is a dict of the arguments of `compile_case`. softmax=True takes upstream's functions, which a pristine
tree has too.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH, SEQLEN = 3, 1000
EM_CUDA = 190


def cubins(data: bytes) -> Iterator[bytes]:
    """Yield the cubins inside an object file: ELF files for the machine CUDA, up to the end of their
    tables.
    """
    at = data.find(b"\x7fELF")
    while at >= 0:
        (machine,) = struct.unpack_from("<H", data, at + 18)
        if machine == EM_CUDA:
            program, section = struct.unpack_from("<QQ", data, at + 32)
            program_size, programs, section_size, sections = struct.unpack_from("<4H", data, at + 54)
            yield data[at : at + max(program + program_size * programs, section + section_size * sections)]
        at = data.find(b"\x7fELF", at + 4)


class Compiled:
    """Writes the kernels that one of upstream's compile caches got since the last write."""

    def __init__(self, function: Any, folder: Path) -> None:
        self.cache = function.compile_cache
        self.seen: set = set()
        self.folder = folder

    def write(self, name: str) -> None:
        for key in [k for k in self.cache.cache if k not in self.seen]:
            self.seen.add(key)
            path = self.folder / f"{name}.o"
            self.cache.cache[key].export_to_c(object_file_path=str(path), function_name="func")
            (cubin,) = cubins(path.read_bytes())
            path.with_name(f"{name}.cubin").write_bytes(cubin)
            path.unlink()


def compile_case(
    head_dim: int,
    head_dim_v: int = 0,
    dtype: str = "bfloat16",
    softmax: bool = False,
    activation: str = "identity",
    bias: float | None | str = 0.0,
    softcap: float = 0.0,
    normalization: str | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    group: int = 1,
    varlen: bool = False,
    seqused: bool = False,
    page_size: int = 0,
    decay: bool = False,
    hstu: dict[str, Any] | None = None,
    intervals: int = 0,
    deterministic: bool = False,
    diagonal: bool = False,
    wide: bool = False,
    seqlen: int = SEQLEN,
    longest: int = 0,
) -> None:
    """normalization: as in marker.NoSoftmax: "number", "sequence" and "row" are factors of the caller. bias:
    "by head" is one for each head. hstu: the parts of a marker.HSTUKind. intervals: how many a row has.
    diagonal: whether the call gives one, beside causal and window or another mask. wide: float32 results.
    longest: max_seqlen of packed sequences, if not seqlen: far more, and the lengths differ too much for a
    grid of blocks and sequences.
    """
    import torch
    from flash_attn.cute import interface
    from torch._subclasses.fake_tensor import FakeTensorMode

    head_dim_v = head_dim_v or head_dim
    heads = 4 * group
    kind = getattr(torch, dtype)

    def tensor(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        tokens = (BATCH * seqlen,) if varlen else (BATCH, seqlen)
        q, dout = tensor(*tokens, heads, head_dim), tensor(*tokens, heads, head_dim_v)
        pool = (40, page_size) if page_size else tokens
        k, v = tensor(*pool, 4, head_dim), tensor(*pool, 4, head_dim_v)
        lengths = tensor(BATCH + 1, dtype=torch.int32) if varlen else None
        used = tensor(BATCH, dtype=torch.int32) if seqused or page_size else None
        pages = tensor(BATCH, 10, dtype=torch.int32) if page_size else None
        most = (longest or seqlen) if varlen else None
        if softmax:
            given = dict(
                causal=causal,
                window_size_left=window[0],
                window_size_right=window[1],
                softcap=softcap,
                cu_seqlens_q=lengths,
                cu_seqlens_k=lengths,
                seqused_k=used,
                max_seqlen_q=most,
                max_seqlen_k=most,
            )
            out, lse, *_ = interface._flash_attn_fwd(q, k, v, return_lse=True, page_table=pages, **given)
            if not page_size:
                interface._flash_attn_bwd(q, k, v, out, dout, lse, **given)
            return
        from flash_attn.cute.nosoftmax import launch
        from flash_attn.cute.nosoftmax.marker import HSTUKind, WindowKind
        from flash_attn.cute.nosoftmax.score_mods import of_activation

        parts = None if hstu is None else HSTUKind(**hstu)
        sides = None
        if diagonal and parts is None and not intervals:
            sides = WindowKind(window[0] is not None, causal or window[1] is not None)
            causal, window = False, (None, None)
        given = [x for x in parts or sides or () if x]
        mods = of_activation(
            activation, bias, softcap, normalization, decay, parts, intervals, diagonal, sides, wide
        )
        shapes = (
            [(BATCH,)] * given.count("sequence") if parts else [(*tokens, intervals)] * 2 * (intervals > 0)
        )
        sequences, rows, by_head = (
            tensor(*shape, dtype=torch.float32) for shape in ((BATCH,), tokens, (BATCH, heads))
        )
        call = launch.Call(
            mods, head_dim**-0.5, causal, tuple(window), lengths, lengths, None, used, most, most,
            factor=0.5 if normalization == "number" else None,
            sequence_factors=sequences if normalization == "sequence" else None,
            row_factors=rows if normalization == "row" else None,
            sigmoid_biases=by_head if bias == "by head" else None,
            decay_slopes=by_head.clone() if decay else None,
            mask_numbers=(3,) * sum(x != "sequence" for x in given),
            mask_tensors=tuple(tensor(*shape, dtype=torch.int32) for shape in shapes),
            diagonal=tensor(BATCH, dtype=torch.int32) if diagonal else None,
        )  # fmt: skip
        launch.forward(call, q, k, v, page_table=pages)
        if not page_size:
            launch.backward(call, dout, q, k, v, deterministic=deterministic)


def fake_semaphores(interface: Any) -> None:
    """Let the deterministic backward's semaphores be fake too: upstream asks their memory for an address."""
    import cutlass
    import cutlass.cute as cute
    from quack.compile_utils import make_fake_tensor

    def fake(x: Any, leading_dim: int, alignment: int = 16, stride_order: Any = None) -> Any:
        return make_fake_tensor(
            cutlass.Int32, [cute.sym_int() for _ in x.shape], divisibility=1, leading_dim=leading_dim
        )

    interface.utils.convert_from_dlpack_leading_static = fake


def main() -> None:
    from flash_attn.cute import interface

    fake_semaphores(interface)

    folder = Path(sys.argv[1])
    forward = Compiled(interface._flash_attn_fwd, folder)
    backward = Compiled(interface._flash_attn_bwd, folder)
    for name, case in json.load(sys.stdin).items():
        compile_case(**case)
        forward.write(f"{name}.fwd")
        backward.write(f"{name}.bwd")
        print(name, flush=True)


if __name__ == "__main__":
    main()
