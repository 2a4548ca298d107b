// Entry points of the kernels without softmax, one set for each element type and head size. They are defined in
// flash_nosoftmax_launch_template.h and instantiated in the files that ../generate_nosoftmax_kernels.py writes.

#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "flash.h"
#include "namespace_config.h"
#include "score_params.h"

namespace FLASH_NAMESPACE {

using FwdParams = WithScore<Flash_fwd_params>;
using BwdParams = WithScore<Flash_bwd_params>;

template<typename T, int Headdim> void run_mha_fwd_nosoftmax(const FwdParams &params, cudaStream_t stream);
template<typename T, int Headdim> void run_mha_fwd_splitkv_nosoftmax(const FwdParams &params, cudaStream_t stream);
template<typename T, int Headdim> void run_mha_bwd_nosoftmax(const BwdParams &params, cudaStream_t stream);

// A packed tensor (total, heads, head_dim) of 16-bit elements, and the offsets of its sequences.
struct PackedRows {
    void *ptr;
    int64_t row_stride, head_stride;
    int total, heads, head_dim;
    const int *cu_seqlens;
};

struct PackedTensors {
    PackedRows items[3];
    int size;
};

// Zeroes the rows before cu_seqlens[0] and behind cu_seqlens[batch_size]: slack_rows.cu.
void zero_slack_rows(const PackedTensors &tensors, int batch_size, cudaStream_t stream);

}  // namespace FLASH_NAMESPACE
