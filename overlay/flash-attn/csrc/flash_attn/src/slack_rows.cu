// Zeroes the rows of packed tensors that belong to no sequence. The host does not know where the sequences end, so a few
// blocks look on the device, and leave at once where there is nothing to do.

#include <c10/cuda/CUDAException.h>  // For C10_CUDA_KERNEL_LAUNCH_CHECK

#include "flash_nosoftmax.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

namespace {

constexpr int kBlocks = 64, kThreads = 256;

// Vector is a part of a row that the alignment of the tensor allows to write at once.
template <typename Vector>
__device__ void zero_rows(const PackedRows &rows, const int first, const int slack) {
    constexpr int kWidth = sizeof(Vector) / sizeof(uint16_t);
    const int vectors_of_head = rows.head_dim / kWidth;
    const int64_t vectors_of_row = int64_t(rows.heads) * vectors_of_head;
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < slack * vectors_of_row; i += step) {
        const int64_t row = i / vectors_of_row < first ? i / vectors_of_row : rows.total - slack + i / vectors_of_row;
        const int vector = i % vectors_of_row;
        uint16_t *element = static_cast<uint16_t *>(rows.ptr) + row * rows.row_stride
            + vector / vectors_of_head * rows.head_stride + vector % vectors_of_head * kWidth;
        *reinterpret_cast<Vector *>(element) = Vector{};
    }
}

__global__ void flash_nosoftmax_zero_slack_rows_kernel(const PackedTensors tensors, const int batch_size) {
    const PackedRows rows = tensors.items[blockIdx.y];
    const int first = rows.cu_seqlens[0];
    const int slack = first + rows.total - rows.cu_seqlens[batch_size];
    if (slack <= 0) { return; }
    const int64_t strides = rows.row_stride | rows.head_stride | rows.head_dim;
    if (reinterpret_cast<uintptr_t>(rows.ptr) % sizeof(uint4) == 0 && strides % 8 == 0) {
        zero_rows<uint4>(rows, first, slack);
    } else {
        zero_rows<uint16_t>(rows, first, slack);
    }
}

}  // namespace

void zero_slack_rows(const PackedTensors &tensors, const int batch_size, cudaStream_t stream) {
    flash_nosoftmax_zero_slack_rows_kernel<<<dim3(kBlocks, tensors.size), kThreads, 0, stream>>>(tensors, batch_size);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace FLASH_NAMESPACE
