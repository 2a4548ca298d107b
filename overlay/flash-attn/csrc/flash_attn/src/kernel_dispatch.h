// Dispatches a call to a kernel of this build.

#pragma once

#include "backward_by_forwards.h"
#include "built_kernels.h"
#include "flash.h"
#include "flash_nosoftmax.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

// Calls the launcher that use_softmax asks for. Launchers are generic, so that kernels outside this build are not
// instantiated.
template <built::Pass pass, typename T, int kHeadDim, typename Params, typename Without, typename With>
void launch_built(Params &params, Without without_softmax, With with_softmax) {
    check_built<pass, T, kHeadDim>(params.use_softmax);
    if constexpr (kIsBuilt<pass, T, kHeadDim>) {
        if (!params.use_softmax) {
            // Without queries there is nothing to compute, and a grid of no blocks is an error.
            if (params.seqlen_q > 0) { without_softmax(params); }
        } else if constexpr (built::with_softmax) {
            with_softmax(params);
        }
    }
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_fwd(Flash_fwd_params &params, cudaStream_t stream) {
    launch_built<built::fwd, T, kHeadDim>(
        params, [stream](auto &params) { run_mha_fwd_nosoftmax<T, kHeadDim>(with_score(params), stream); },
        [stream](auto &params) { run_mha_fwd_<T, kHeadDim, Is_causal>(params, stream); });
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_fwd_splitkv(Flash_fwd_params &params, cudaStream_t stream) {
    launch_built<built::splitkv, T, kHeadDim>(
        params, [stream](auto &params) { run_mha_fwd_splitkv_nosoftmax<T, kHeadDim>(with_score(params), stream); },
        [stream](auto &params) { run_mha_fwd_splitkv_dispatch<T, kHeadDim, Is_causal>(params, stream); });
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_bwd(Flash_bwd_params &params, cudaStream_t stream) {
    launch_built<built::bwd, T, kHeadDim>(
        params,
        [stream](auto &params) {
            if constexpr (kIsBuilt<built::fwd, T, kHeadDim>) {
                if (params.dq_accum_ptr == nullptr) { return run_backward_by_forwards<T, kHeadDim>(with_score(params), stream); }
            }
            run_mha_bwd_nosoftmax<T, kHeadDim>(with_score(params), stream);
        },
        [stream](auto &params) { run_mha_bwd_<T, kHeadDim, Is_causal>(params, stream); });
}

}  // namespace FLASH_NAMESPACE
