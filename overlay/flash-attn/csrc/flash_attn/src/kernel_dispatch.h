// From the parameters of a call to a kernel of this build. A build may hold a subset of the kernels (kernel_build.py
// sets the macros); a call outside it says which build option brings what it needs, and there is no undefined symbol.

#pragma once

#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include <c10/util/Exception.h>
#include <cutlass/numeric_types.h>

#include "flash.h"
#include "flash_nosoftmax.h"
#include "hardware_info.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

#ifdef FLASHATTENTION_DISABLE_SOFTMAX
inline constexpr bool kSoftmaxBuilt = false;
#else
inline constexpr bool kSoftmaxBuilt = true;
#endif

#ifdef FLASHATTENTION_DISABLE_FWD
inline constexpr bool kFwdBuilt = false;
#else
inline constexpr bool kFwdBuilt = true;
#endif

#ifdef FLASHATTENTION_DISABLE_SPLITKV
inline constexpr bool kSplitKVBuilt = false;
#else
inline constexpr bool kSplitKVBuilt = true;
#endif

#ifdef FLASHATTENTION_DISABLE_BWD
inline constexpr bool kBwdBuilt = false;
#else
inline constexpr bool kBwdBuilt = true;
#endif

template <typename T>
constexpr bool is_dtype_built() {
    #ifdef FLASHATTENTION_DISABLE_FP16
        if (std::is_same_v<T, cutlass::half_t>) { return false; }
    #endif
    #ifdef FLASHATTENTION_DISABLE_BF16
        if (std::is_same_v<T, cutlass::bfloat16_t>) { return false; }
    #endif
    return true;
}

constexpr bool is_head_dim_built(const int head_dim) {
    switch (head_dim) {
        #ifdef FLASHATTENTION_DISABLE_HDIM32
            case 32: return false;
        #endif
        #ifdef FLASHATTENTION_DISABLE_HDIM64
            case 64: return false;
        #endif
        #ifdef FLASHATTENTION_DISABLE_HDIM96
            case 96: return false;
        #endif
        #ifdef FLASHATTENTION_DISABLE_HDIM128
            case 128: return false;
        #endif
        #ifdef FLASHATTENTION_DISABLE_HDIM192
            case 192: return false;
        #endif
        #ifdef FLASHATTENTION_DISABLE_HDIM256
            case 256: return false;
        #endif
        default: return true;
    }
}

// Compute capabilities that there is machine code for, such as 80 and 90; empty if the build did not say.
inline std::vector<int> built_archs() {
    return {
        #ifdef FLASHATTENTION_ARCH_80
            80,
        #endif
        #ifdef FLASHATTENTION_ARCH_90
            90,
        #endif
        #ifdef FLASHATTENTION_ARCH_100
            100,
        #endif
        #ifdef FLASHATTENTION_ARCH_120
            120,
        #endif
    };
}

// Machine code runs on its own major version, from its minor version on.
inline void check_arch_built() {
    const std::vector<int> archs = built_archs();
    if (archs.empty()) { return; }
    const auto [major, minor] = get_compute_capability(get_current_device());
    std::string names;
    for (const int arch : archs) {
        if (arch / 10 == major && arch % 10 <= minor) { return; }
        names += (names.empty() ? "" : ";") + std::to_string(arch);
    }
    TORCH_CHECK(false, "This flash attention build is for compute capabilities ", names, " and this GPU has ",
                major, ".", minor, ": rebuild with ARCHS=", major * 10);
}

template <typename T, int kHeadDim>
void check_built(const bool is_pass_built, const char *pass, const bool use_softmax) {
    constexpr const char *dtype = std::is_same_v<T, cutlass::half_t> ? "fp16" : "bf16";
    const std::string build = "This flash attention build has no kernels ";
    TORCH_CHECK(is_dtype_built<T>(), build, "for ", dtype,
                ": rebuild with DTYPES=", dtype, " added, or without DTYPES");
    TORCH_CHECK(is_head_dim_built(kHeadDim), build, "for head dimensions up to ", kHeadDim,
                ": rebuild with HEAD_DIMS=", kHeadDim, " added, or without HEAD_DIMS");
    TORCH_CHECK(is_pass_built, build, "for the pass ", pass,
                ": rebuild with PASSES=", pass, " added, or without PASSES");
    TORCH_CHECK(kSoftmaxBuilt || !use_softmax, build,
                "with softmax: pass use_softmax=False, or rebuild without NO_SOFTMAX_ONLY");
    check_arch_built();
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_fwd(Flash_fwd_params &params, cudaStream_t stream) {
    check_built<T, kHeadDim>(kFwdBuilt, "fwd", params.use_softmax);
    if constexpr (kFwdBuilt && is_dtype_built<T>() && is_head_dim_built(kHeadDim)) {
        if (!params.use_softmax) {
            run_mha_fwd_nosoftmax<T, kHeadDim>(params, stream);
        } else if constexpr (kSoftmaxBuilt) {
            run_mha_fwd_<T, kHeadDim, Is_causal>(params, stream);
        }
    }
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_fwd_splitkv(Flash_fwd_params &params, cudaStream_t stream) {
    check_built<T, kHeadDim>(kSplitKVBuilt, "splitkv", params.use_softmax);
    if constexpr (kSplitKVBuilt && is_dtype_built<T>() && is_head_dim_built(kHeadDim)) {
        if (!params.use_softmax) {
            run_mha_fwd_splitkv_nosoftmax<T, kHeadDim>(params, stream);
        } else if constexpr (kSoftmaxBuilt) {
            run_mha_fwd_splitkv_dispatch<T, kHeadDim, Is_causal>(params, stream);
        }
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Whether the backward pass is three forward passes: with F the forward without softmax and Mᵀ the transposed mask,
// dQ = F(dO, V, K; M), dK = F(V, dO, Q; Mᵀ), dV = F(K, Q, dO; Mᵀ, same bias). It needs no workspace and no atomics, and
// holds for linear f: no softcap, no dropout. With grouped heads the last two are for each query head, as the backward
// kernels do it, and the caller sums them. FLASH_ATTENTION_NOSOFTMAX_BACKWARD=kernel|forwards overrides the choice
// among the two where both are possible.
inline bool backward_by_forwards(const float softcap, const float p_dropout) {
    if (!kFwdBuilt || softcap > 0.f || p_dropout > 0.f) { return false; }
    const char *choice = std::getenv("FLASH_ATTENTION_NOSOFTMAX_BACKWARD");
    return choice == nullptr || std::string(choice) != "kernel";
}

// One of the three: the operands in the roles of Q, K, V and O, and their strides (batch, row, head).
struct Operand {
    void *ptr;
    Qkv_params::index_t batch_stride, row_stride, head_stride;
};

template <typename Element>
Flash_fwd_params forward_params(const Flash_bwd_params &params, Operand q, Operand k, Operand v, Operand o,
                                const bool is_transposed, const bool has_bias) {
    Flash_fwd_params fwd = params;
    // With both sequences walked backwards, the transposed causal mask is the causal mask, which has faster kernels.
    const bool is_backwards = is_transposed && params.is_causal && params.cu_seqlens_q == nullptr
        && params.seqlen_q == params.seqlen_k;
    if (is_backwards) {
        for (Operand *x : {&q, &k, &v, &o}) {
            x->ptr = static_cast<Element *>(x->ptr) + (params.seqlen_q - 1) * x->row_stride;
            x->row_stride = -x->row_stride;
        }
    }
    fwd.q_ptr = q.ptr; fwd.q_batch_stride = q.batch_stride;
    fwd.q_row_stride = q.row_stride; fwd.q_head_stride = q.head_stride;
    fwd.k_ptr = k.ptr; fwd.k_batch_stride = k.batch_stride;
    fwd.k_row_stride = k.row_stride; fwd.k_head_stride = k.head_stride;
    fwd.v_ptr = v.ptr; fwd.v_batch_stride = v.batch_stride;
    fwd.v_row_stride = v.row_stride; fwd.v_head_stride = v.head_stride;
    fwd.o_ptr = o.ptr; fwd.o_batch_stride = o.batch_stride;
    fwd.o_row_stride = o.row_stride; fwd.o_head_stride = o.head_stride;
    if (!has_bias) { fwd.alibi_slopes_ptr = nullptr; }
    if (is_transposed) {
        fwd.q_group_size = params.h_h_k_ratio;
        fwd.h_h_k_ratio = 1;
    }
    if (is_transposed && !is_backwards) {
        std::swap(fwd.seqlen_q, fwd.seqlen_k);
        std::swap(fwd.seqlen_q_rounded, fwd.seqlen_k_rounded);
        std::swap(fwd.cu_seqlens_q, fwd.cu_seqlens_k);
        // set_params_fprop has made both sides finite if one is, and causal has (seqlen_k, 0).
        std::swap(fwd.window_size_left, fwd.window_size_right);
        fwd.is_causal = false;
    }
    return fwd;
}

template <typename T, int kHeadDim>
void run_backward_by_forwards(const Flash_bwd_params &params, cudaStream_t stream) {
    const Operand q{params.q_ptr, params.q_batch_stride, params.q_row_stride, params.q_head_stride};
    const Operand k{params.k_ptr, params.k_batch_stride, params.k_row_stride, params.k_head_stride};
    const Operand v{params.v_ptr, params.v_batch_stride, params.v_row_stride, params.v_head_stride};
    const Operand dout{params.do_ptr, params.do_batch_stride, params.do_row_stride, params.do_head_stride};
    const Operand dq{params.dq_ptr, params.dq_batch_stride, params.dq_row_stride, params.dq_head_stride};
    const Operand dk{params.dk_ptr, params.dk_batch_stride, params.dk_row_stride, params.dk_head_stride};
    const Operand dv{params.dv_ptr, params.dv_batch_stride, params.dv_row_stride, params.dv_head_stride};
    for (Flash_fwd_params fwd : {
            forward_params<T>(params, dout, v, k, dq, /*is_transposed=*/false, /*has_bias=*/false),
            forward_params<T>(params, v, dout, q, dk, /*is_transposed=*/true, /*has_bias=*/false),
            forward_params<T>(params, k, q, dout, dv, /*is_transposed=*/true, /*has_bias=*/true)}) {
        run_mha_fwd_nosoftmax<T, kHeadDim>(fwd, stream);
    }
}

template <typename T, int kHeadDim, bool Is_causal>
void launch_bwd(Flash_bwd_params &params, cudaStream_t stream) {
    check_built<T, kHeadDim>(kBwdBuilt, "bwd", params.use_softmax);
    if constexpr (kBwdBuilt && is_dtype_built<T>() && is_head_dim_built(kHeadDim)) {
        if (!params.use_softmax) {
            if constexpr (kFwdBuilt) {
                if (params.dq_accum_ptr == nullptr) { return run_backward_by_forwards<T, kHeadDim>(params, stream); }
            }
            run_mha_bwd_nosoftmax<T, kHeadDim>(params, stream);
        } else if constexpr (kSoftmaxBuilt) {
            run_mha_bwd_<T, kHeadDim, Is_causal>(params, stream);
        }
    }
}

}  // namespace FLASH_NAMESPACE
