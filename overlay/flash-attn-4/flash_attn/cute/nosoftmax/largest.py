"""Find the largest of the given row factors of each sequence, for the backward (kernel.Normalization).

One block of threads reads the factors of a sequence, so that the host waits for nothing.
"""

from typing import Optional

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.nosoftmax import plan
from flash_attn.cute.testing import is_fake_mode
from quack.compile_utils import make_fake_tensor
from quack.reduce import block_reduce, warp_reduce

_THREADS = 256
# Results are at least this and at most its inverse, so that their reciprocal is a normal number too.
_SMALLEST = 2.0**-126


class _Largest:
    @cute.jit
    def __call__(
        self,
        mFactors: cute.Tensor,
        mCuSeqlens: Optional[cute.Tensor],
        mSeqused: Optional[cute.Tensor],
        mLargest: cute.Tensor,
        # Must be last: TVM FFI fills it in.
        stream: cuda.CUstream = None,
    ):
        self.kernel(mFactors, mCuSeqlens, mSeqused, mLargest).launch(
            grid=[mLargest.shape[0], 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mFactors: cute.Tensor,
        mCuSeqlens: Optional[cute.Tensor],
        mSeqused: Optional[cute.Tensor],
        mLargest: cute.Tensor,
    ):
        thread, sequence = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        if const_expr(mCuSeqlens is None):
            factors = mFactors[sequence, None]
            count = Int32(mFactors.shape[1])
        else:
            factors = cute.domain_offset((mCuSeqlens[sequence],), mFactors)
            count = mCuSeqlens[sequence + 1] - mCuSeqlens[sequence]
        if const_expr(mSeqused is not None):
            count = mSeqused[sequence]
        largest = Float32(_SMALLEST)
        for i in cutlass.range(thread, count, _THREADS, unroll=4):
            largest = cute.arch.fmax(largest, factors[i])
        warps = cute.make_layout((1, _THREADS // cute.arch.WARP_SIZE))
        of_warps = cutlass.utils.SmemAllocator().allocate_tensor(Float32, warps)
        largest = block_reduce(warp_reduce(largest, cute.arch.fmax), cute.arch.fmax, of_warps, Float32(0.0))
        if thread == 0:
            mLargest[sequence] = cute.arch.fmin(largest, 1.0 / _SMALLEST)


def largest_factors(
    factors: torch.Tensor, cu_seqlens: Optional[torch.Tensor], seqused: Optional[torch.Tensor]
) -> torch.Tensor:
    """Return the largest factor of each sequence, (batch,), within [2^-126, 2^126].

    factors: (batch, seqlen), or (total,) with cu_seqlens; contiguous. Factors behind seqused do not count.
    """
    batch = factors.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # The launch writes it before another one reads it.
    largest = plan.not_read(factors.new_empty(batch))
    key = cu_seqlens is not None, seqused is not None
    cache = largest_factors.compile_cache
    if key not in cache:
        cache[key] = _compile(*key)
    if not is_fake_mode():
        cache[key](factors, cu_seqlens, seqused, largest)
    return largest


largest_factors.compile_cache = get_jit_cache("nosoftmax_largest")


def _compile(packed: bool, used: bool):
    def vector(dtype):
        return make_fake_tensor(dtype, (cute.sym_int(),))

    factors = vector(Float32) if packed else make_fake_tensor(Float32, (cute.sym_int(), cute.sym_int()))
    return cute.compile(
        _Largest(),
        factors,
        vector(Int32) if packed else None,
        vector(Int32) if used else None,
        vector(Float32),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )
