"""Write 0 into the rows of packed results that belong to no sequence.

Only the device knows where these rows are, and they are few, so a separate kernel finds them. The host reads
nothing and waits for nothing, and no other row is touched. A mask would read and write the whole tensor.
"""

from typing import Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.cute_dsl_utils import torch2cute_dtype_map
from flash_attn.cute.testing import is_fake_mode
from quack.compile_utils import make_fake_tensor

_BLOCKS, _THREADS = 132, 256  # one block for each multiprocessor of an H100


class _ZeroSlack:
    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mCuSeqlensX: cute.Tensor,
        mY: Optional[cute.Tensor],
        mZ: Optional[cute.Tensor],
        mCuSeqlensYZ: Optional[cute.Tensor],
        # Must be last: TVM FFI fills it in.
        stream: cuda.CUstream = None,
    ):
        self.kernel(mX, mCuSeqlensX, mY, mZ, mCuSeqlensYZ).launch(
            grid=[_BLOCKS, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mCuSeqlensX: cute.Tensor,
        mY: Optional[cute.Tensor],
        mZ: Optional[cute.Tensor],
        mCuSeqlensYZ: Optional[cute.Tensor],
    ):
        self.zero(mX, mCuSeqlensX)
        if const_expr(mY is not None):
            self.zero(mY, mCuSeqlensYZ)
            self.zero(mZ, mCuSeqlensYZ)

    @cute.jit
    def zero(self, mX: cute.Tensor, mCuSeqlens: cute.Tensor):
        thread = cute.arch.thread_idx()[0]
        first, last = mCuSeqlens[0], mCuSeqlens[mCuSeqlens.shape[0] - 1]
        values = mX.shape[1] * mX.shape[2]
        slack = Int32(mX.shape[0] - last + first)
        for i in cutlass.range(cute.arch.block_idx()[0], slack, _BLOCKS, unroll=1):
            row = i if i < first else last - first + i
            mX_row = mX[row, None, None]
            flat = cute.make_tensor(mX_row.iterator, cute.make_layout(values))
            for j in cutlass.range(thread, values, _THREADS, unroll=1):
                flat[j] = mX.element_type(0.0)


def zero_slack(
    x: Optional[torch.Tensor],
    cu_seqlens_x: Optional[torch.Tensor],
    y: Optional[torch.Tensor] = None,
    z: Optional[torch.Tensor] = None,
    cu_seqlens_yz: Optional[torch.Tensor] = None,
) -> None:
    """Zero the rows of x, y and z before cu_seqlens[0] and from cu_seqlens[-1] on.

    All are contiguous, (rows, nheads, head_dim). A tensor without offsets has no such rows.
    """
    if cu_seqlens_yz is None:
        y = z = None
    if cu_seqlens_x is None:
        if cu_seqlens_yz is not None:
            zero_slack(y, cu_seqlens_yz)
            zero_slack(z, cu_seqlens_yz)
        return
    key = x.dtype, cu_seqlens_yz is not None
    cache = zero_slack.compile_cache
    if key not in cache:
        cache[key] = _compile(*key)
    if not is_fake_mode():
        cache[key](x, cu_seqlens_x, y, z, cu_seqlens_yz)


zero_slack.compile_cache = get_jit_cache("nosoftmax_slack")


def _compile(dtype: torch.dtype, has_yz: bool):
    def rows():
        shape = cute.sym_int(), cute.sym_int(), cute.sym_int()
        return make_fake_tensor(torch2cute_dtype_map[dtype], shape, divisibility=8)

    def offsets():
        return make_fake_tensor(Int32, (cute.sym_int(),), divisibility=1)

    return cute.compile(
        _ZeroSlack(),
        rows(),
        offsets(),
        *((rows(), rows(), offsets()) if has_yz else (None, None, None)),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )
