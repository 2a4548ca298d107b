// Reduces the factors on the rows of each sequence to the largest, which row_factors.h splits off in the backward pass.

#include <c10/cuda/CUDAException.h>  // For C10_CUDA_KERNEL_LAUNCH_CHECK

#include "namespace_config.h"
#include "score_params.h"

namespace FLASH_NAMESPACE {

namespace {

constexpr int kThreadsOfSequence = 256, kWarpsOfSequence = kThreadsOfSequence / 32;

// Results are at least this and at most its inverse: divided by numbers beyond, a fast division gives 0.
constexpr float kSmallest = 0x1p-126f;

__device__ float largest_of_warp(float x) {
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) { x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset)); }
    return x;
}

__global__ void flash_nosoftmax_largest_factors_kernel(float *largest, const float *row_factors,
                                                       const int *cu_seqlens_q, const int seqlen_q) {
    const int sequence = blockIdx.x;
    const int64_t begin = cu_seqlens_q == nullptr ? int64_t(sequence) * seqlen_q : cu_seqlens_q[sequence];
    const int64_t end = cu_seqlens_q == nullptr ? begin + seqlen_q : cu_seqlens_q[sequence + 1];
    float x = kSmallest;
    for (int64_t row = begin + threadIdx.x; row < end; row += kThreadsOfSequence) { x = fmaxf(x, row_factors[row]); }
    __shared__ float of_warps[kWarpsOfSequence];
    x = largest_of_warp(x);
    if (threadIdx.x % 32 == 0) { of_warps[threadIdx.x / 32] = x; }
    __syncthreads();
    if (threadIdx.x < 32) {
        x = largest_of_warp(threadIdx.x < kWarpsOfSequence ? of_warps[threadIdx.x] : 0.f);
        if (threadIdx.x == 0) { largest[sequence] = fminf(x, 1.f / kSmallest); }
    }
}

}  // namespace

void find_largest_factors(float *largest, const float *row_factors, const int *cu_seqlens_q, const int batch_size,
                          const int seqlen_q, cudaStream_t stream) {
    flash_nosoftmax_largest_factors_kernel<<<batch_size, kThreadsOfSequence, 0, stream>>>(largest, row_factors, cu_seqlens_q, seqlen_q);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace FLASH_NAMESPACE
