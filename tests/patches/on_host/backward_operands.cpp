// Where the three forward passes of a backward read and write, as bytes behind the start of each tensor: for a test.

#include "cuda_names.h"

// What a build holds, which built_kernels.h asks for.
#define FLASH_BUILT_HEAD_DIMS 64
#define FLASH_BUILT_DTYPES fp16
#define FLASH_BUILT_PASSES fwd
#define FLASH_BUILT_ARCHS 90
#define FLASH_BUILT_WITH_SOFTMAX false
#include "backward_by_forwards.h"

using namespace FLASH_NAMESPACE;

// found: for dQ, dK and dV the offsets of q, k, v and o of the launch, and the row strides after them.
extern "C" void operands(
    const bool is_causal, const bool is_wide, const int seqlen_q, const int seqlen_k, const int64_t row_stride,
    int64_t *found
) {
    using Element = cutlass::half_t;
    char memory[1];
    const Operand tensor{memory, 0, row_stride, 0};
    BwdParams params{};
    params.is_causal = is_causal;
    params.seqlen_q = seqlen_q;
    params.seqlen_k = seqlen_k;
    params.score.is_wide = is_wide;
    for (const FwdParams &fwd : {
            forward_params<Element>(params, tensor, tensor, tensor, tensor, /*is_transposed=*/false, /*is_dv=*/false),
            forward_params<Element>(params, tensor, tensor, tensor, tensor, /*is_transposed=*/true, /*is_dv=*/false),
            forward_params<Element>(params, tensor, tensor, tensor, tensor, /*is_transposed=*/true, /*is_dv=*/true)}) {
        for (const void *ptr : {fwd.q_ptr, fwd.k_ptr, fwd.v_ptr, fwd.o_ptr}) {
            *found++ = static_cast<const char *>(ptr) - memory;
        }
        for (const int64_t stride : {fwd.q_row_stride, fwd.k_row_stride, fwd.v_row_stride, fwd.o_row_stride}) {
            *found++ = stride;
        }
    }
}
