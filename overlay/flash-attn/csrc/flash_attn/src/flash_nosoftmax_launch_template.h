// Launches the kernels without softmax, fewer than upstream has with softmax. Special kernels run calls with a head
// size that fills the tile, at most one of ALiBi, softcap and dropout, no decay and no diagonal, and an ordinary scale. General
// kernels run all others: in them ALiBi, and forward softcap, are run-time choices and causal masking is a window.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include <c10/cuda/CUDAException.h>  // For C10_CUDA_CHECK and C10_CUDA_KERNEL_LAUNCH_CHECK

#include "flash_bwd_launch_template.h"
#include "flash_fwd_launch_template.h"
#include "flash_nosoftmax.h"
#include "nosoftmax.h"
#include "philox.cuh"

namespace FLASH_NAMESPACE {

// Upstream's kernels, with parameters that have a Score.

template<typename Kernel_traits, bool Is_dropout, bool Is_causal, bool Is_local, bool Has_alibi, bool Is_even_MN,
         bool Is_even_K, bool Is_softcap>
__global__ void flash_nosoftmax_fwd_kernel(KERNEL_PARAM_MODIFIER const FwdParams params) {
    static_assert(!(Is_causal && Is_local));
    FLASH_NAMESPACE::compute_attn<Kernel_traits, Is_dropout, Is_causal, Is_local, Has_alibi, Is_even_MN, Is_even_K,
                                  Is_softcap, /*Return_softmax=*/false>(params);
}

template<typename Kernel_traits, bool Is_local, bool Split, bool Append_KV>
__global__ void flash_nosoftmax_fwd_splitkv_kernel(KERNEL_PARAM_MODIFIER const FwdParams params) {
    FLASH_NAMESPACE::compute_attn_splitkv<Kernel_traits, /*Is_causal=*/false, Is_local, kBuildAlibi,
                                          /*Is_even_MN=*/false, /*Is_even_K=*/false, /*Is_softcap=*/false, Split,
                                          Append_KV>(params);
}

template<typename Kernel_traits, bool Is_dropout, bool Is_causal, bool Is_local, bool Has_alibi, bool Is_even_K,
         bool Is_softcap>
__global__ void flash_nosoftmax_bwd_kernel(KERNEL_PARAM_MODIFIER const BwdParams params) {
    static_assert(!(Is_causal && Is_local));
    FLASH_NAMESPACE::compute_dq_dk_dv_seqk_parallel<Kernel_traits, Is_dropout, Is_causal, Is_local, Has_alibi,
                                                    /*Is_even_MN=*/false, Is_even_K, Is_softcap>(params);
}

template<typename Kernel_traits>
__global__ void flash_nosoftmax_convert_dq_kernel(KERNEL_PARAM_MODIFIER const BwdParams params, const int nsplits) {
    FLASH_NAMESPACE::convert_dQ<Kernel_traits>(params, nsplits);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

template <typename Params>
bool is_windowed(const Params &params) { return params.window_size_left >= 0 || params.window_size_right >= 0; }

// Whether a sequence may be shorter than seqlen_q or seqlen_k.
template <typename Params>
bool is_varlen(const Params &params) {
    return params.cu_seqlens_q != nullptr || params.cu_seqlens_k != nullptr || params.seqused_k != nullptr
        || params.leftpad_k != nullptr;
}

// Whether a special kernel runs this call, and not a general one.
template <int Headdim, typename Params>
bool is_special(const Params &params) {
    const int features = (params.alibi_slopes_ptr != nullptr) + (params.softcap > 0.f) + (params.p_dropout < 1.f);
    return params.d == Headdim && features <= 1 && params.score.decay_slopes == nullptr
        && params.score.diagonals == nullptr && (params.is_bf16 || params.scale_softmax >= kLeastScale);
}

// Whether a kernel with one activation runs this plain call.
template <typename Params>
bool has_own_kernel(const Params &params) {
    const Score &score = params.score;
    const float scale = params.scale_softmax;
    if (scale < kLeastOwnScale || scale > kMostOwnScale) { return false; }
    switch (score.activation) {
        case Activation::relu:
        case Activation::silu: return true;
        case Activation::relu2: return scale >= kLeastOwnScaleOfRelu2;
        case Activation::sigmoid:
            return !score.bias_is_minus_log_n && score.sigmoid_biases == nullptr && score.sigmoid_bias >= kMinBiasForTanh;
        default: return false;
    }
}

template <typename Kernel, typename Params>
void launch(Kernel kernel, const dim3 grid, const int num_threads, const size_t smem_size, const Params &params,
            cudaStream_t stream) {
    if (smem_size >= 48 * 1024) {
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_size));
    }
    kernel<<<grid, num_threads, smem_size, stream>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The most blocks along the y and the z axis of a grid.
inline constexpr int kMaxGridYZ = 65535;

// Row blocks of all sequences along x, for more sequences than the other axes hold.
inline int all_row_blocks(const int num_row_blocks, const int num_sequences) {
    const int64_t num_blocks = int64_t(num_row_blocks) * num_sequences;
    TORCH_CHECK(num_blocks <= std::numeric_limits<int>::max(), std::to_string(num_sequences), " sequences of ", std::to_string(num_row_blocks),
                " blocks of rows are more than a grid holds: pass fewer sequences, or a smaller max_seqlen");
    return int(num_blocks);
}

// The grid that place_in_grid reads.
inline dim3 grid_of(const int num_row_blocks, const int num_sequences, const int num_heads) {
    TORCH_CHECK(num_heads <= kMaxGridYZ, "attention on CUDA takes at most ", std::to_string(kMaxGridYZ), " heads, got ", std::to_string(num_heads));
    return num_sequences <= kMaxGridYZ ? dim3(num_row_blocks, num_sequences, num_heads)
                                       : dim3(all_row_blocks(num_row_blocks, num_sequences), 1, num_heads);
}

// The grid that place_in_splitkv_grid reads.
inline dim3 splitkv_grid_of(const int num_row_blocks, const int num_splits, const int num_sequences,
                            const int num_heads) {
    TORCH_CHECK(num_heads <= kMaxGridYZ, "attention on CUDA takes at most ", std::to_string(kMaxGridYZ), " heads, got ", std::to_string(num_heads));
    return int64_t(num_sequences) * num_heads <= kMaxGridYZ
        ? dim3(num_row_blocks, num_splits, num_sequences * num_heads)
        : dim3(all_row_blocks(num_row_blocks, num_sequences), num_splits, num_heads);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Tiles (block of queries, block of keys, warps) of the forward kernels.
template <int Headdim, bool Is_dropout> struct FwdTile;
template <bool Is_dropout> struct FwdTile<32, Is_dropout> {
    static constexpr int kM = 128, kN = 128, kWarps = 4;
};
template <bool Is_dropout> struct FwdTile<64, Is_dropout> {
    static constexpr int kM = 128, kN = Is_dropout ? 64 : 128, kWarps = 4;
};
template <bool Is_dropout> struct FwdTile<96, Is_dropout> {
    static constexpr int kM = 128, kN = 64, kWarps = 4;
};
template <bool Is_dropout> struct FwdTile<128, Is_dropout> {
    static constexpr int kM = 128, kN = Is_dropout ? 32 : 64, kWarps = 4;
};
template <bool Is_dropout> struct FwdTile<192, Is_dropout> {
    static constexpr int kM = Is_dropout ? 64 : 128, kN = 64, kWarps = Is_dropout ? 4 : 8;
};
template <bool Is_dropout> struct FwdTile<256, Is_dropout> {
    static constexpr int kM = 64, kN = 64, kWarps = 4;
};

template <typename T, int Headdim, bool Is_dropout, Variant variant>
using FwdTraits = NoSoftmaxTraits<Flash_fwd_kernel_traits<
    Headdim, FwdTile<Headdim, Is_dropout>::kM, FwdTile<Headdim, Is_dropout>::kN, FwdTile<Headdim, Is_dropout>::kWarps,
    /*Is_Q_in_regs=*/false, /*Share_Q_K_smem=*/false, T>, variant>;

template <typename Kernel_traits>
dim3 fwd_grid(const FwdParams &params) {
    return grid_of(cute::ceil_div(params.seqlen_q, Kernel_traits::kBlockM), params.b, params.h);
}

// Whether there are forward kernels of one activation: where they were measured.
template <int Headdim> inline constexpr bool kHasOwnFwd = Headdim == 64 || Headdim == 128;

template<typename T, int Headdim, bool Is_dropout, bool Has_alibi, bool Is_softcap, Variant variant>
void run_special_fwd(const FwdParams &params, cudaStream_t stream) {
    using Traits = FwdTraits<T, Headdim, Is_dropout, variant>;
    // As upstream, head sizes above 128 have one kernel for full and ragged tiles.
    constexpr bool Has_even_MN = Headdim <= 128 && !Is_dropout && !Has_alibi && !Is_softcap;
    const bool is_even_MN = Has_even_MN && !is_varlen(params) && params.seqlen_k % Traits::kBlockN == 0
        && params.seqlen_q % Traits::kBlockM == 0;
    const bool is_local = is_windowed(params) && !params.is_causal;
    BOOL_SWITCH(params.is_causal, Is_causal, [&] {
        LOCAL_SWITCH(is_local, Is_windowed, [&] {
            constexpr bool Is_local = Is_windowed && !Traits::Only::kExists;  // with which no call comes to its own kernel
            BOOL_SWITCH(is_even_MN, Is_even_MN, [&] {
                // A causal kernel masks its last blocks anyway. One that chooses among activations is for rare calls
                // where the usual ones have kernels of their own.
                constexpr bool Is_usual = Traits::kIdentity || Traits::Only::kExists || !kHasOwnFwd<Headdim>;
                constexpr bool Is_even = Is_even_MN && Has_even_MN && Is_usual && (Is_causal ? Traits::kIdentity : !Is_local);
                auto kernel = &flash_nosoftmax_fwd_kernel<Traits, Is_dropout, Is_causal, Is_local && !Is_causal,
                                                          Has_alibi, Is_even, /*Is_even_K=*/true, Is_softcap>;
                launch(kernel, fwd_grid<Traits>(params), Traits::kNThreads, Traits::kSmemSize, params, stream);
            });
        });
    });
}

template<typename T, int Headdim, bool Is_dropout>
void run_general_fwd(const FwdParams &params, cudaStream_t stream) {
    using Traits = FwdTraits<T, Headdim, Is_dropout, Variant::general>;
    BOOL_SWITCH(is_windowed(params), Is_local, [&] {
        auto kernel = &flash_nosoftmax_fwd_kernel<Traits, Is_dropout, /*Is_causal=*/false, Is_local, kBuildAlibi,
                                                  /*Is_even_MN=*/false, /*Is_even_K=*/false, /*Is_softcap=*/false>;
        launch(kernel, fwd_grid<Traits>(params), Traits::kNThreads, Traits::kSmemSize, params, stream);
    });
}

// Writes which entries dropout keeps, for callers that ask for them: 1 kept, -1 dropped, 0 outside the sequences. One
// warp for each block of 16 queries x 32 keys, which one draw of a warp covers (Dropout::apply_dropout). A grid whose y
// or z axis is too short goes over the blocks of rows, or the heads of the sequences, several times.
template <typename Element>
__global__ void flash_nosoftmax_keep_mask_kernel(const FwdParams params) {
    const int lane = threadIdx.x % 32;
    const unsigned col_block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const auto seed_offset = at::cuda::philox::unpack(params.philox_args);
    for (int head = blockIdx.z; head < params.b * params.h; head += gridDim.z) {
        const int bidb = head / params.h, bidh = head % params.h;
        const Dropout dropout(std::get<0>(seed_offset), std::get<1>(seed_offset), params.p_dropout_in_uint8_t,
                              bidb, bidh, lane, params.h);
        const BlockInfo</*Varlen=*/true> binfo(params, bidb);
        Element *mask = reinterpret_cast<Element *>(params.p_ptr)
            + int64_t(head) * params.seqlen_q_rounded * params.seqlen_k_rounded;
        for (unsigned row_block = blockIdx.y; row_block < params.seqlen_q_rounded / 16; row_block += gridDim.y) {
            const uint2 block = make_uint2(row_block, col_block);
            const uint4 random = FLASH_NAMESPACE::philox(
                dropout.seed, reinterpret_cast<const unsigned long long &>(block), dropout.offset);
            const uint8_t (&bytes)[16] = reinterpret_cast<const uint8_t (&)[16]>(random);
            #pragma unroll
            for (int i = 0; i < 16; ++i) {
                // Element i of a thread's two 16x16 accumulators, in the layout of m16n8k16.
                const int row = block.x * 16 + lane / 4 + (i >> 1 & 1) * 8;
                const int col = block.y * 32 + (i >> 3) * 16 + (i >> 2 & 1) * 8 + lane % 4 * 2 + (i & 1);
                const bool inside = row < binfo.actual_seqlen_q && col < binfo.actual_seqlen_k;
                const float keep = bytes[i] <= params.p_dropout_in_uint8_t ? 1.f : -1.f;
                mask[int64_t(row) * params.seqlen_k_rounded + col] = Element(inside ? keep : 0.f);
            }
        }
    }
}

template<typename T>
void write_keep_mask(const FwdParams &params, cudaStream_t stream) {
    constexpr int kWarps = 4;
    const dim3 grid(params.seqlen_k_rounded / (32 * kWarps), std::min(params.seqlen_q_rounded / 16, kMaxGridYZ),
                    std::min(params.b * params.h, kMaxGridYZ));
    launch(&flash_nosoftmax_keep_mask_kernel<T>, grid, 32 * kWarps, 0, params, stream);
}

template<typename T, int Headdim>
void run_mha_fwd_nosoftmax(const FwdParams &params, cudaStream_t stream) {
    const bool is_special_call = is_special<Headdim>(params);
    DROPOUT_SWITCH(params.p_dropout < 1.f, Is_dropout, [&] {
        SOFTCAP_SWITCH(params.softcap > 0.f, Is_softcap_, [&] {
            constexpr bool Is_softcap = Is_softcap_ && !Is_dropout;  // both together are rejected before
            if (!is_special_call) { return run_general_fwd<T, Headdim, Is_dropout>(params, stream); }
            ALIBI_SWITCH(params.alibi_slopes_ptr != nullptr, Has_alibi, [&] {
                constexpr bool Is_alibi = Has_alibi && !Is_dropout && !Is_softcap;
                constexpr bool Has_options = Is_alibi || Is_dropout || Is_softcap;
                if constexpr (!Has_options && kHasOwnFwd<Headdim>) {
                    if ((params.is_causal || !is_windowed(params)) && has_own_kernel(params)) {
                        return with_own_variant(params.score.activation, [&](const auto variant) {
                            run_special_fwd<T, Headdim, /*Is_dropout=*/false, /*Has_alibi=*/false, /*Is_softcap=*/false,
                                            decltype(variant)::value>(params, stream);
                        });
                    }
                }
                BOOL_SWITCH(params.score.activation == Activation::identity, Is_identity, [&] {
                    constexpr Variant variant = Has_options ? Variant::options
                        : Is_identity ? Variant::identity : Variant::plain;
                    run_special_fwd<T, Headdim, Is_dropout, Is_alibi, Is_softcap, variant>(params, stream);
                });
            });
        });
        if constexpr (Is_dropout) {
            if (params.p_ptr != nullptr) { write_keep_mask<T>(params, stream); }
        }
    });
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Partial sums over disjoint keys add up: O = norm times the sum over splits of Oaccum, in a fixed order. A thread sums
// 4 columns.
template <typename Element>
__global__ void flash_nosoftmax_combine_kernel(const FwdParams params) {
    const int threads_per_row = params.d_rounded / 4;
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t row = index / threads_per_row;  // of (b, h, seqlen_q)
    const int col = index % threads_per_row * 4;
    const int64_t num_rows = int64_t(params.b) * params.h * params.seqlen_q;
    if (row >= num_rows || col >= params.d) { return; }
    const float4 *partial = reinterpret_cast<const float4 *>(
        reinterpret_cast<const float *>(params.oaccum_ptr) + row * params.d_rounded + col);
    const int64_t split_stride = num_rows * threads_per_row;
    Tensor sum = make_tensor<float>(Shape<_4>{});
    clear(sum);
    #pragma unroll 8
    for (int split = 0; split < params.num_splits; ++split) {
        const float4 x = partial[split * split_stride];
        sum(0) += x.x; sum(1) += x.y; sum(2) += x.z; sum(3) += x.w;
    }
    const int bidb = row / (int64_t(params.h) * params.seqlen_q);
    const int bidh = row / params.seqlen_q % params.h;
    const int row_of_head = row % params.seqlen_q;
    const BlockInfo</*Varlen=*/true> binfo(params, bidb);
    if (row_of_head >= binfo.actual_seqlen_q) { return; }
    const auto row_factors = row_factors_of(params, binfo, bidb);
    const float factor = row_factors.of_sequence() * (params.score.by_row() ? row_factors.of_row(row_of_head) : 1.f);
    #pragma unroll
    for (int i = 0; i < 4; ++i) { sum(i) *= factor; }
    const int64_t offset = binfo.q_offset(params.o_batch_stride, params.o_row_stride, bidb)
        + bidh * params.o_head_stride + row_of_head * params.o_row_stride + col;
    if (params.score.is_wide) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) { reinterpret_cast<float *>(params.o_ptr)[offset + i] = sum(i); }
        return;
    }
    Tensor out = FLASH_NAMESPACE::convert_finite_saturating<Element>(sum);
    Element *o_ptr = reinterpret_cast<Element *>(params.o_ptr) + offset;
    // One by one: the strides of the caller's output need not keep 8 bytes of alignment.
    #pragma unroll
    for (int i = 0; i < 4; ++i) { o_ptr[i] = out(i); }
}

template<typename T, int Headdim>
void run_mha_fwd_splitkv_nosoftmax(const FwdParams &params, cudaStream_t stream) {
    // The tile has to match set_params_splitkv.
    constexpr int kBlockM = 64, kBlockN = Headdim <= 64 ? 256 : (Headdim <= 128 ? 128 : 64);
    using Traits = NoSoftmaxTraits<Flash_fwd_kernel_traits<Headdim, kBlockM, kBlockN, 4, false, false, T>,
                                   Variant::few_rows>;
    const int num_m_block = cute::ceil_div(params.seqlen_q, kBlockM);
    BOOL_SWITCH(params.num_splits > 1, Split, [&] {
        const dim3 grid = Split ? splitkv_grid_of(num_m_block, params.num_splits, params.b, params.h)
                                : grid_of(num_m_block, params.b, params.h);
        BOOL_SWITCH(is_windowed(params), Is_local, [&] {
            BOOL_SWITCH(params.knew_ptr != nullptr, Append_KV, [&] {
                auto kernel = &flash_nosoftmax_fwd_splitkv_kernel<Traits, Is_local, Split, Append_KV>;
                launch(kernel, grid, Traits::kNThreads, Traits::kSmemSize, params, stream);
            });
        });
        if constexpr (Split) {
            constexpr int kThreads = 128;
            const int64_t num_threads = int64_t(params.b) * params.h * params.seqlen_q * (params.d_rounded / 4);
            const dim3 combine_grid((num_threads + kThreads - 1) / kThreads);
            launch(&flash_nosoftmax_combine_kernel<T>, combine_grid, kThreads, 0, params, stream);
        }
    });
}

////////////////////////////////////////////////////////////////////////////////////////////////////

template<typename Kernel_traits, bool Is_dropout, bool Is_causal, bool Is_local, bool Has_alibi, bool Is_even_K,
         bool Is_softcap>
void launch_bwd_kernels(BwdParams params, cudaStream_t stream) {
    // As upstream: with deterministic, each of the blocks along x adds to its own dq_accum.
    int num_n_block = cute::ceil_div(params.seqlen_k, Kernel_traits::kBlockN);
    if (params.deterministic) {
        num_n_block = cute::ceil_div(get_num_sm(get_current_device()), params.b * params.h);
        // A kernel steps from one dq_accum to the next by blockIdx.x, which also counts sequences in a long grid.
        if (params.b > kMaxGridYZ) { params.dq_accum_split_stride = 0; }
    }
    auto kernel = &flash_nosoftmax_bwd_kernel<Kernel_traits, Is_dropout, Is_causal, Is_local, Has_alibi, Is_even_K,
                                              Is_softcap>;
    launch(kernel, grid_of(num_n_block, params.b, params.h), Kernel_traits::kNThreads,
           Kernel_traits::kSmemSize1colblock, params, stream);

    auto convert = &flash_nosoftmax_convert_dq_kernel<NoSoftmaxTraits<typename Kernel_traits::Upstream>>;
    constexpr int smem_dq = Kernel_traits::kSmemdQSize;
    if (smem_dq >= 48 * 1024) {
        C10_CUDA_CHECK(cudaFuncSetAttribute(convert, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_dq));
    }
    const dim3 grid_m = grid_of(cute::ceil_div(params.seqlen_q, Kernel_traits::kBlockM), params.b, params.h);
    const int num_dq_accum = params.deterministic ? num_n_block : 1;
    convert<<<grid_m, Kernel_traits::kNThreads, smem_dq, stream>>>(params, num_dq_accum);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template<typename Upstream_traits, typename T, Variant variant, bool Is_causal>
void launch_own_bwd(BwdParams params, cudaStream_t stream) {
    using Traits = NoSoftmaxTraits<Upstream_traits, variant>;
    // Only the kernels' last steps, for dK and dQ, read this product.
    params.scale_softmax_rp_dropout *= own_slopes_at_end<T, typename Traits::Only>(params.scale_softmax);
    launch_bwd_kernels<Traits, /*Is_dropout=*/false, Is_causal, /*Is_local=*/false, /*Has_alibi=*/false,
                       /*Is_even_K=*/true, /*Is_softcap=*/false>(params, stream);
}

// Own: the dtype, if activations have kernels of their own. They do where they were measured, on the tiles for A100 and H100.
template<typename Upstream_traits, typename Own=void>
void run_bwd(const BwdParams &params, cudaStream_t stream) {
    using Traits = NoSoftmaxTraits<Upstream_traits>;
    constexpr int Headdim = Traits::kHeadDim;
    const bool is_special_call = is_special<Headdim>(params) && params.alibi_slopes_ptr == nullptr
        && !params.score.by_row() && (params.is_causal || !is_windowed(params));
    // A special call with a window is a causal one, and its weights have no factors of rows.
    BOOL_SWITCH(is_windowed(params), Is_local, [&] {
        DROPOUT_SWITCH(params.p_dropout < 1.f, Is_dropout, [&] {
            SOFTCAP_SWITCH(params.softcap > 0.f, Is_softcap, [&] {
                // With 32 keys a tile there is no draw of 16 x 32 for each warp.
                constexpr bool Dropout_fits = Traits::kBlockN >= 64;
                TORCH_CHECK(!Is_dropout || Dropout_fits, "FlashAttention backward with dropout and head dimension ",
                            std::to_string(Headdim), " needs 144 KB of shared memory a block, more than this GPU has");
                constexpr bool Dropout = Is_dropout && Dropout_fits, Softcap = Is_softcap && !Is_dropout;
                if constexpr (!std::is_void_v<Own> && !Is_dropout && !Is_softcap) {
                    if (is_special_call && has_own_kernel(params)) {
                        return with_own_variant(params.score.activation, [&](const auto variant) {
                            launch_own_bwd<Upstream_traits, Own, decltype(variant)::value, Is_local>(params, stream);
                        });
                    }
                }
                if (is_special_call) {
                    launch_bwd_kernels<Traits, Dropout, /*Is_causal=*/Is_local, /*Is_local=*/false, /*Has_alibi=*/false,
                                       /*Is_even_K=*/true, Softcap>(params, stream);
                } else {
                    launch_bwd_kernels<NoSoftmaxTraits<Upstream_traits, Variant::general>, Dropout,
                                       /*Is_causal=*/false, Is_local, kBuildAlibi, /*Is_even_K=*/false, Softcap>(
                        params, stream);
                }
            });
        });
    });
}

inline int max_smem_per_block() {
    int bytes;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, get_current_device()));
    return bytes;
}

// Tiles are upstream's: the first for A100 and H100, the last for GPUs with 99 KB of shared memory a block.
template<typename T, int Headdim>
void run_mha_bwd_nosoftmax(const BwdParams &params, cudaStream_t stream) {
    const int smem = max_smem_per_block();
    if constexpr (Headdim == 32) {
        run_bwd<Flash_bwd_kernel_traits<32, 128, 128, 8, 4, 4, 4, true, false, T>>(params, stream);
    } else if constexpr (Headdim == 64) {
        if (smem >= 144 * 1024) {
            run_bwd<Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4, false, false, T>, /*Own=*/T>(params, stream);
        } else {
            run_bwd<Flash_bwd_kernel_traits<64, 64, 128, 8, 2, 4, 4, true, false, T>>(params, stream);
        }
    } else if constexpr (Headdim == 96) {
        run_bwd<Flash_bwd_kernel_traits<96, 64, 128, 8, 2, 4, 4, true, false, T>>(params, stream);
    } else if constexpr (Headdim == 128) {
        if (smem >= 144 * 1024) {
            run_bwd<Flash_bwd_kernel_traits<128, 64, 128, 8, 2, 4, 2, false, false, T>, /*Own=*/T>(params, stream);
        } else {
            run_bwd<Flash_bwd_kernel_traits<128, 64, 64, 8, 4, 2, 2, true, false, T>>(params, stream);
        }
    } else if constexpr (Headdim == 192) {
        if (smem >= 136 * 1024) {
            run_bwd<Flash_bwd_kernel_traits<192, 64, 64, 8, 4, 2, 2, false, false, T>>(params, stream);
        } else {
            run_bwd<Flash_bwd_kernel_traits<192, 64, 64, 8, 4, 2, 2, true, true, T>>(params, stream);
        }
    } else {
        static_assert(Headdim == 256);
        if (smem >= 176 * 1024) {
            run_bwd<Flash_bwd_kernel_traits<256, 64, 64, 8, 4, 2, 2, false, false, T>>(params, stream);
        } else if (smem >= 144 * 1024) {
            run_bwd<Flash_bwd_kernel_traits<256, 64, 64, 8, 4, 2, 2, false, true, T>>(params, stream);
        } else {
            run_bwd<Flash_bwd_kernel_traits<256, 64, 32, 8, 4, 1, 2, true, true, T>>(params, stream);
        }
    }
}

}  // namespace FLASH_NAMESPACE
