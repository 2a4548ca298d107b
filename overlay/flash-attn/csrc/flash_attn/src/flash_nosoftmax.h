// Entry points of the kernels without softmax, one set for each element type and head size. They are defined in
// flash_nosoftmax_launch_template.h and instantiated in the generated flash_nosoftmax_*.cu files.

#pragma once

#include "flash.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

template<typename T, int Headdim> void run_mha_fwd_nosoftmax(Flash_fwd_params &params, cudaStream_t stream);
template<typename T, int Headdim> void run_mha_fwd_splitkv_nosoftmax(Flash_fwd_params &params, cudaStream_t stream);
template<typename T, int Headdim> void run_mha_bwd_nosoftmax(Flash_bwd_params &params, cudaStream_t stream);

}  // namespace FLASH_NAMESPACE
