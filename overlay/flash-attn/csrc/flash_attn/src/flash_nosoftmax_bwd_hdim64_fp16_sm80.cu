// One head size and element type in each file, to compile them side by side.
// Written by generate_nosoftmax_kernels.py.

#include "namespace_config.h"
#include "flash_nosoftmax_launch_template.h"

namespace FLASH_NAMESPACE {

template void run_mha_bwd_nosoftmax<cutlass::half_t, 64>(Flash_bwd_params &params, cudaStream_t stream);

}  // namespace FLASH_NAMESPACE
