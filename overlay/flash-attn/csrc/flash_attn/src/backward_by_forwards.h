// Runs the backward pass of attention without softmax as three forward passes, if f is linear.

#pragma once

#include <cstdlib>
#include <string>
#include <utility>

#include "built_kernels.h"
#include "flash.h"
#include "flash_nosoftmax.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

// Whether the backward pass is three forward passes: with F the forward without softmax and Mᵀ the transposed mask,
// dQ = F(dO, V, K; M), dK = F(V, dO, Q; Mᵀ), dV = F(K, Q, dO; Mᵀ, same bias), M with its decay. It needs no workspace and no
// atomics, and holds for linear f: no softcap, no dropout; and for factors that all rows of a sequence share. With grouped
// heads, dK and dV are computed for each query head, as in the backward kernels, and the caller sums them.
// FLASH_ATTENTION_NOSOFTMAX_BACKWARD=kernel|forwards overrides the choice where both ways are possible.
inline bool backward_by_forwards(const float softcap, const float p_dropout, const Score &score) {
    if (!built::holds(built::passes, built::fwd) || softcap > 0.f || p_dropout > 0.f
        || score.activation != Activation::identity || score.by_row()) { return false; }
    const char *choice = std::getenv("FLASH_ATTENTION_NOSOFTMAX_BACKWARD");
    return choice == nullptr || std::string(choice) != "kernel";
}

// An operand of one of the three passes, in the role of Q, K, V or O, and its strides (batch, row, head).
struct Operand {
    void *ptr;
    Qkv_params::index_t batch_stride, row_stride, head_stride;
};

template <typename Element>
FwdParams forward_params(const BwdParams &params, Operand q, Operand k, Operand v, Operand o,
                                const bool is_transposed, const bool is_dv) {
    FwdParams fwd{params, params.score};
    fwd.score.saturates = is_dv ? Saturates::products : Saturates::nothing;
    fwd.score.is_transposed = is_transposed;
    // If both sequences are walked backwards, the transposed causal mask is the causal mask, which has faster kernels.
    const bool is_backwards = is_transposed && params.is_causal && params.cu_seqlens_q == nullptr
        && params.seqlen_q == params.seqlen_k && params.score.diagonals == nullptr;
    if (is_backwards) {
        for (Operand *x : {&q, &k, &v, &o}) {
            const int64_t size = x == &o && params.score.is_wide ? sizeof(float) : sizeof(Element);
            x->ptr = static_cast<char *>(x->ptr) + (params.seqlen_q - 1) * x->row_stride * size;
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
    if (!is_dv) { fwd.alibi_slopes_ptr = nullptr; }
    if (is_transposed) {
        fwd.score.q_group_size = params.h_h_k_ratio;
        fwd.h_h_k_ratio = 1;
    }
    if (is_transposed && !is_backwards) {
        std::swap(fwd.seqlen_q, fwd.seqlen_k);
        std::swap(fwd.seqlen_q_rounded, fwd.seqlen_k_rounded);
        std::swap(fwd.cu_seqlens_q, fwd.cu_seqlens_k);
        // Both sides are finite if one is (fit_window), and causal has (seqlen_k, 0).
        std::swap(fwd.window_size_left, fwd.window_size_right);
        fwd.is_causal = false;
    }
    return fwd;
}

template <typename T, int kHeadDim>
void run_backward_by_forwards(const BwdParams &params, cudaStream_t stream) {
    const Operand q{params.q_ptr, params.q_batch_stride, params.q_row_stride, params.q_head_stride};
    const Operand k{params.k_ptr, params.k_batch_stride, params.k_row_stride, params.k_head_stride};
    const Operand v{params.v_ptr, params.v_batch_stride, params.v_row_stride, params.v_head_stride};
    const Operand dout{params.do_ptr, params.do_batch_stride, params.do_row_stride, params.do_head_stride};
    const Operand dq{params.dq_ptr, params.dq_batch_stride, params.dq_row_stride, params.dq_head_stride};
    const Operand dk{params.dk_ptr, params.dk_batch_stride, params.dk_row_stride, params.dk_head_stride};
    const Operand dv{params.dv_ptr, params.dv_batch_stride, params.dv_row_stride, params.dv_head_stride};
    for (const FwdParams &fwd : {
            forward_params<T>(params, dout, v, k, dq, /*is_transposed=*/false, /*is_dv=*/false),
            forward_params<T>(params, v, dout, q, dk, /*is_transposed=*/true, /*is_dv=*/false),
            forward_params<T>(params, k, q, dout, dv, /*is_transposed=*/true, /*is_dv=*/true)}) {
        run_mha_fwd_nosoftmax<T, kHeadDim>(fwd, stream);
    }
}

}  // namespace FLASH_NAMESPACE
