// Replaces the online softmax in the forward, split-KV and backward kernels: O = norm ⊙ dropout(M ⊙ f(scale · Q Kᵀ)) V. A
// kernel chooses this through its traits: NoSoftmaxTraits<KT> is KT with a tag, so that no template list changes, and
// the code for softmax compiles as before. f and norm are choices at run time: params.score.

#pragma once

#include <limits>
#include <type_traits>

#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include "namespace_config.h"
#include "activations.h"
#include "mask.h"
#include "row_factors.h"
#include "saturate.h"
#include "score_params.h"
#include "softmax.h"
#include "utils.h"

namespace FLASH_NAMESPACE {

using namespace cute;

////////////////////////////////////////////////////////////////////////////////////////////////////

// The kernels, from the most to the least special.
//
// identity: forward, f is the identity. As a choice at run time it would be a tenth slower (docs/results/h200-score.md).
// relu to silu: plain, with that activation and an ordinary scale (has_own_kernel in the launch template).
// plain: forward without ALiBi, softcap and dropout; backward without ALiBi, and with at most one of the other two.
// options: forward with one of ALiBi, softcap and dropout.
// general: any call. few_rows: the same with split keys, where most rows of a tile may be beyond the last query.
enum class Variant { identity, relu, relu2, sigmoid, silu, plain, options, general, few_rows };

inline constexpr float kLeastScale = 1.f / 128;

// What general kernels choose at run time, if the build has it.
#ifdef FLASHATTENTION_DISABLE_ALIBI
inline constexpr bool kBuildAlibi = false;
#else
inline constexpr bool kBuildAlibi = true;
#endif
#ifdef FLASHATTENTION_DISABLE_SOFTCAP
inline constexpr bool kBuildSoftcap = false;
#else
inline constexpr bool kBuildSoftcap = true;
#endif

// The activation that is the only one of a variant; the identity stands for none.
constexpr Activation only_activation(const Variant variant) {
    switch (variant) {
        case Variant::relu: return Activation::relu;
        case Variant::relu2: return Activation::relu2;
        case Variant::sigmoid: return Activation::sigmoid;
        case Variant::silu: return Activation::silu;
        default: return Activation::identity;
    }
}

// Calls visit with the variant, as a constant, of the kernels of an activation that has its own.
template <typename Visit>
void with_own_variant(const Activation activation, Visit visit) {
    switch (activation) {
        case Activation::relu: return visit(std::integral_constant<Variant, Variant::relu>{});
        case Activation::relu2: return visit(std::integral_constant<Variant, Variant::relu2>{});
        case Activation::sigmoid: return visit(std::integral_constant<Variant, Variant::sigmoid>{});
        default: return visit(std::integral_constant<Variant, Variant::silu>{});
    }
}

template <typename Kernel_traits, Variant variant=Variant::plain>
struct NoSoftmaxTraits : public Kernel_traits {
    using Upstream = Kernel_traits;
    static constexpr bool Is_nosoftmax = true;
    static constexpr bool kIdentity = variant == Variant::identity;
    static constexpr bool kFewRows = variant == Variant::few_rows;
    using Only = Own<only_activation(variant)>;
    // Whether the kernel takes every call: a decay too, and in fp16 scales below kLeastScale, for one more multiplication
    // a score. Other kernels round scale + 1, an error of less than 2^-16 of their scales, where fp16 keeps 2^-11 of the
    // score.
    static constexpr bool kIsGeneral = variant == Variant::general || variant == Variant::few_rows;
    // Upstream masks the last steps of a row of tiles in an unrolled loop, and has another for those without a mask. Here
    // the first loop, not unrolled, takes them all and asks for each tile: code for one tile instead of up to five, and up
    // to 8 % slower.
    static constexpr bool kTakesEveryStep = variant >= Variant::options;
};

template <typename Kernel_traits, typename = void>
inline constexpr bool kUseSoftmax = true;

template <typename Kernel_traits>
inline constexpr bool kUseSoftmax<Kernel_traits, std::void_t<decltype(Kernel_traits::Is_nosoftmax)>> = false;

// bf16 has the range of fp32, so raw scores fit. fp16 would saturate on them.
template <typename Element>
inline constexpr bool kHoldsRawScores = std::is_same_v<Element, cutlass::bfloat16_t>;

// Where raw scores fit and f allows it (scales_at_end), the scale waits for the accumulators of O and dV: one
// multiplication for each of their elements instead of one for each score. Any other f scales its argument itself. ALiBi is
// added to the scaled score. For device code alone: on the host Kernel_traits::Element is half_t, whatever the dtype is.
template <typename Kernel_traits, bool Has_alibi>
inline constexpr bool kScaleAtEnd =
    !kUseSoftmax<Kernel_traits> && !Has_alibi && kHoldsRawScores<typename Kernel_traits::Element>;

// What a kernel with one activation and this dtype leaves for the end of dQ and dK, where its launch multiplies by it.
template <typename Element, typename Only>
float own_slopes_at_end(const float scale) { return Only::slopes_at_end(kHoldsRawScores<Element> ? scale : 1.f); }

inline constexpr int kEveryStep = std::numeric_limits<int>::max();

template <typename Kernel_traits, typename = void>
inline constexpr bool kTakesEveryStep = false;

template <typename Kernel_traits>
inline constexpr bool kTakesEveryStep<Kernel_traits, std::void_t<decltype(Kernel_traits::Is_nosoftmax)>> =
    Kernel_traits::kTakesEveryStep;

////////////////////////////////////////////////////////////////////////////////////////////////////

// Causal backward kernels with one activation take the steps that hide no score in a loop of their own, without code
// that hides: a tenth faster. Others have one loop, for their size.
template <typename Kernel_traits, bool Is_causal>
__forceinline__ __device__ constexpr int number_of_loops() {
    if constexpr (kUseSoftmax<Kernel_traits>) { return 1; }
    else { return Kernel_traits::Only::kExists && Is_causal ? 2 : 1; }
}

// Whether a step is beyond the loop: the first of two ends at the first tile with a hidden score.
template <int kLoops, typename Weights>
__forceinline__ __device__ bool is_beyond_loop(const int loop, const Weights &weights, const int tile_row, const int tile_col) {
    if constexpr (kLoops == 1) { return false; }
    else { return loop == 0 && !weights.is_tile_visible(tile_row, tile_col); }
}

// dS = dP f'. `slope` is what ScoreWeights::differentiate left.
template <typename Kernel_traits>
__forceinline__ __device__ float times_slope(const float dp, const float slope) {
    if constexpr (!kUseSoftmax<Kernel_traits>) {
        if constexpr (Kernel_traits::Only::kExists) { return Kernel_traits::Only::times_slope(dp, slope); }
    }
    return dp * slope;
}

// Whether this warp holds rows before the last query, of which a tile has rows_left. If not, it need not multiply.
template <typename Kernel_traits>
__forceinline__ __device__ bool warp_has_rows(const int rows_left) {
    if constexpr (!kUseSoftmax<Kernel_traits>) {
        if constexpr (Kernel_traits::kFewRows) { return int(threadIdx.x / 32) * 16 < rows_left; }
    }
    return true;
}

// The first column of a tile that this thread holds; col0 is the first column of its warp's tile.
__forceinline__ __device__ int col_of_thread(const int col0) { return col0 + (threadIdx.x % 4) * 2; }

// Calls visit(coordinate, row, col) for each score that this thread holds. Scores have shape (nrow=(2, MMA_M),
// ncol=(2, MMA_N)); row counts from this thread's first row, and col from its first column.
template <typename Engine, typename Layout, typename Visit>
__forceinline__ __device__ void for_each_place(Tensor<Engine, Layout> const &scores, const int row_stride, Visit visit) {
    static_assert(Layout::rank == 2, "Only support 2D Tensor");
    #pragma unroll
    for (int mi = 0; mi < size<0, 1>(scores); ++mi) {
        #pragma unroll
        for (int i = 0; i < size<0, 0>(scores); ++i) {
            #pragma unroll
            for (int nj = 0; nj < size<1, 1>(scores); ++nj) {
                #pragma unroll
                for (int j = 0; j < size<1, 0>(scores); ++j) {
                    visit(make_coord(make_coord(i, mi), make_coord(j, nj)), mi * row_stride + i * 8, nj * 8 + j);
                }
            }
        }
    }
}

// Calls visit(score, row, col) for the same scores, with their place in the sequences. row0 is this thread's first row.
template <typename Engine, typename Layout, typename Visit>
__forceinline__ __device__ void for_each_score(Tensor<Engine, Layout> &scores, const int col0, const int row0,
                                               const int row_stride, Visit visit) {
    const int first_col = col_of_thread(col0);
    for_each_place(scores, row_stride, [&](const auto place, const int row, const int col) {
        visit(scores(place), row0 + row, first_col + col);
    });
}

// Registers can't be indexed in a loop that is not unrolled, so visit(i) for each element i of a fragment is as much code
// as the fragment has elements. For a long formula this does the first kRound elements in each round of a loop, and turns
// the fragments, all of one size: a few moves an element, for a fraction of the code.
inline constexpr int kRound = 8;

template <typename Engine, typename Layout>
__forceinline__ __device__ void turn(Tensor<Engine, Layout> &x) {
    constexpr int kSize = decltype(size(x))::value;
    #pragma unroll
    for (int i = 0; i < kRound; ++i) {  // In this order, one register more is enough.
        const auto first = x(i);
        #pragma unroll
        for (int j = i; j < kSize - kRound; j += kRound) { x(j) = x(j + kRound); }
        x(kSize - kRound + i) = first;
    }
}

template <bool Is_long, typename Visit, typename Tensor0, typename... Tensors>
__forceinline__ __device__ void in_rounds(Visit visit, Tensor0 &x, Tensors &...others) {
    constexpr int kSize = decltype(size(x))::value;
    if constexpr (!Is_long || kSize <= kRound) {
        #pragma unroll
        for (int i = 0; i < kSize; ++i) { visit(i); }
    } else {
        static_assert(kSize % kRound == 0);
        #pragma unroll 1
        for (int round = 0; round < kSize / kRound; ++round) {
            #pragma unroll
            for (int i = 0; i < kRound; ++i) { visit(i); }
            turn(x);
            (turn(others), ...);
        }
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// The window of a sequence. Only general kernels run calls with a diagonal.
template <typename Kernel_traits, typename Params, typename Block_info>
__forceinline__ __device__ Window window_of(const Params &params, const Block_info &binfo, const int bidb) {
    if constexpr (!kUseSoftmax<Kernel_traits>) {
        if constexpr (Kernel_traits::kIsGeneral) { return window_of_sequence(params, binfo, bidb); }
    }
    return {params.window_size_left, params.window_size_right};
}

// The keys that some query of a sequence sees. Without a window the beginning means nothing.
struct SeenKeys { int begin, end; };

template <typename Kernel_traits, bool Is_local, typename Params, typename Block_info>
__forceinline__ __device__ SeenKeys seen_keys(const Params &params, const Block_info &binfo, const int bidb) {
    const Window window = window_of<Kernel_traits>(params, binfo, bidb);
    const int begin = binfo.actual_seqlen_k - binfo.actual_seqlen_q - window.left;
    if constexpr (!kUseSoftmax<Kernel_traits> && Is_local) {
        // Only a diagonal leaves keys behind the last one that the last query sees.
        if constexpr (Kernel_traits::kIsGeneral) { return {begin, binfo.actual_seqlen_k + std::min(window.right, 0)}; }
    }
    return {begin, binfo.actual_seqlen_k};
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Turns scores into attention weights P = M ⊙ decay ⊙ f(scale · qk - slope · |distance|), and applies what was left for
// the end to the accumulators.
template <typename Kernel_traits, bool Is_causal, bool Is_local, bool Has_alibi, typename Params, typename Block_info>
struct ScoreWeights {

    const Params &params;
    const RowFactors<Params, Block_info> row_factors;
    const float bias;  // of the sigmoid
    const int seqlen_k;
    const int diagonal;  // the key that query 0 is aligned with
    const int counted_diagonal;  // the key from which the sides of the window count there
    const Window window;
    const float scale, alibi_slope;
    const float decay_rate;  // decay = 2^(decay_rate · |distance|), at most 0
    const int first_row;  // of the block of queries, in the forward kernels

    // Called by the forward kernels, with the signature of Mask::apply_mask.
    template <bool Causal_mask=false, bool Is_even_MN=true, typename Engine, typename Layout>
    __forceinline__ __device__ void apply_mask(Tensor<Engine, Layout> &acc_s, const int col0, const int row0,
                                               const int row_stride) const {
        Tensor scores = make_tensor(acc_s.data(), FLASH_NAMESPACE::convert_layout_acc_rowcol(acc_s.layout()));
        if constexpr (Kernel_traits::kIsGeneral && kBuildSoftcap) {
            if (params.softcap > 0.f) { FLASH_NAMESPACE::apply_softcap(scores, params.softcap); }
        }
        if constexpr (Kernel_traits::kFewRows) {
            // In a warp, 8 rows of the tile follow one another, with 4 threads each.
            const int rows_left = row_factors.binfo.actual_seqlen_q - (row0 - int(threadIdx.x % 32) / 4);
            if (rows_left <= 0) { return; }
            prepare(scores, col0, row0, row_stride);
            #pragma unroll
            for (int mi = 0; mi < size<0>(scores); ++mi) {
                static_assert(decltype(size<0>(scores))::value == 2);
                Tensor row = scores(mi, _);
                if (mi * 8 < rows_left) { activate(row); }
            }
        } else {
            prepare(scores, col0, row0, row_stride);
            activate(scores);
        }
        decay(col0, row0, row_stride, scores);
        if constexpr (Causal_mask || Is_local || !Is_even_MN) {
            if (!is_tile_visible(first_row, col0)) { hide(scores, col0, row0, row_stride); }
        }
    }

    // Scales scores and adds ALiBi's bias, as far as the activation does not.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ void prepare(Tensor<Engine, Layout> &scores, const int col0, const int row0,
                                            const int row_stride) const {
        if constexpr (std::is_same_v<typename Kernel_traits::Element, cutlass::half_t>) {
            scale_and_show_infinity(scores);
        } else if constexpr (kPrepares) {
            #pragma unroll
            for (int i = 0; i < size(scores); ++i) { scores(i) *= scale; }
        }
        if constexpr (Has_alibi) {
            if (alibi_slope != 0.f) {
                // The full bias, also when causal: adding slope * col to a whole row would change the result here.
                for_each_score(scores, col0, row0, row_stride, [&](float &score, const int row, const int col) {
                    score -= alibi_slope * abs(row + diagonal - col);
                });
            }
        }
    }

    // Turns prepared scores into weights.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ void activate(Tensor<Engine, Layout> &scores) const {
        if constexpr (Only::kExists) {
            const Only f(scale_of_activation(), bias);
            #pragma unroll
            for (int i = 0; i < size(scores); ++i) { scores(i) = f.value(scores(i)); }
        } else {
            visit_activation([&](const auto f) {
                in_rounds<f.kIsLong>([&](const int i) { scores(i) = f.value(scores(i)); }, scores);
            });
        }
    }

    // Multiplies weights, and their derivatives, by their decay.
    template <typename Tensor0, typename... Tensors>
    __forceinline__ __device__ void decay(const int col0, const int row0, const int row_stride, Tensor0 &x,
                                          Tensors &...others) const {
        if constexpr (Kernel_traits::kIsGeneral) {
            if (decay_rate != 0.f) {
                // As a float within the tile: one conversion for each row. Far from the diagonal it is rounded, by less
                // than 2^-24 of itself.
                const int distance = row0 + diagonal - col_of_thread(col0);
                for_each_place(x, row_stride, [&](const auto place, const int row, const int col) {
                    const float factor = exp2f(decay_rate * fabsf(float(distance + row) - float(col)));
                    x(place) *= factor;
                    ((others(place) *= factor), ...);
                });
            }
        }
    }

    // Turns scores, an accumulator of a tile, into the derivatives of the weights by the scaled score, and returns the
    // weights in 16 bits. Both include the decay, and the factors of the rows, divided by the largest of their sequence.
    // With has_hidden, weights outside the window are 0.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ auto differentiate(Tensor<Engine, Layout> &acc_s, const int col0, const int row0,
                                                  const int row_stride, const bool has_hidden) const {
        Tensor scores = make_tensor(acc_s.data(), FLASH_NAMESPACE::convert_layout_acc_rowcol(acc_s.layout()));
        prepare(scores, col0, row0, row_stride);
        Tensor packed = make_tensor<typename Kernel_traits::Element>(acc_s.layout());
        if constexpr (Only::kExists) {
            if (has_hidden) { hide(scores, col0, row0, row_stride, kHiddenScore); }
            const Only f(scale_of_activation(), bias);
            Tensor pairs = recast<uint32_t>(packed);
            #pragma unroll
            for (int i = 0; i < size(pairs); ++i) {
                const float first = f.value(acc_s(2 * i), acc_s(2 * i)), second = f.value(acc_s(2 * i + 1), acc_s(2 * i + 1));
                pairs(i) = FLASH_NAMESPACE::convert_weights<typename Kernel_traits::Element, Only::kIsClamped>(first, second);
            }
        } else if constexpr (!Kernel_traits::kIsGeneral) {
            // Without decay and factors of rows, weights are rounded at once: registers hold no tile of them in fp32.
            float first;
            visit_activation([&](const auto f) {
                in_rounds<f.kIsLong>([&](const int i) {
                    const float weight = f.value(acc_s(i), acc_s(i));
                    if (i % 2 == 0) { first = weight; } else { set_pair(packed, i - 1, first, weight); }
                }, acc_s, packed);
            });
        } else {
            Tensor weights = make_tensor<float>(scores.layout());
            visit_activation([&](const auto f) {
                in_rounds<f.kIsLong>([&](const int i) { weights(i) = f.value(scores(i), scores(i)); }, weights, scores);
            });
            decay(col0, row0, row_stride, weights, scores);
            if (params.score.by_row()) {
                const float largest = row_factors.largest_of_rows();
                for_each_row(scores, row0, row_stride, [&](const int mi, const int row) {
                    const float factor = row_factors.of_row(row, largest);
                    #pragma unroll
                    for (int ni = 0; ni < size<1>(scores); ++ni) {
                        weights(mi, ni) *= factor;
                        scores(mi, ni) *= factor;
                    }
                });
            }
            Tensor flat = make_tensor(weights.data(), acc_s.layout());
            FLASH_NAMESPACE::convert_saturating(flat, packed);
        }
        if constexpr (!Only::kExists) {
            Tensor packed_scores = make_tensor(packed.data(), scores.layout());
            if (has_hidden) { hide(packed_scores, col0, row0, row_stride); }
        }
        return packed;
    }

    // Multiplies O by everything that was left for the end. With splits, their sum gets the factors of the rows.
    template <bool Is_dropout, bool Split, typename Engine, typename Layout>
    __forceinline__ __device__ void finish(Tensor<Engine, Layout> &acc_o, const int row0, const int row_stride) const {
        if constexpr (Split && kPrepares) { return; }
        const float factor = weights_at_end() * (Split ? 1.f : row_factors.of_sequence())
            * (Is_dropout ? params.rp_dropout : 1.f);
        Tensor rows = make_tensor(acc_o.data(), FLASH_NAMESPACE::convert_layout_acc_rowcol(acc_o.layout()));
        const bool by_row = !Split && params.score.by_row();
        for_each_row(rows, row0, row_stride, [&](const int mi, const int row) {
            const float factor_of_row = by_row ? factor * row_factors.of_row(row) : factor;
            #pragma unroll
            for (int ni = 0; ni < size<1>(rows); ++ni) { rows(mi, ni) *= factor_of_row; }
        });
    }

    // Does the same for dV and dK, which the kernel multiplies by rp_dropout, and dK by the scale.
    template <typename Engine0, typename Layout0, typename Engine1, typename Layout1>
    __forceinline__ __device__ void finish_gradients(Tensor<Engine0, Layout0> &acc_dv,
                                                     Tensor<Engine1, Layout1> &acc_dk) const {
        const float factor = row_factors.of_gradients(), of_dv = factor * weights_at_end();
        #pragma unroll
        for (int i = 0; i < size(acc_dv); ++i) { acc_dv(i) *= of_dv; }
        #pragma unroll
        for (int i = 0; i < size(acc_dk); ++i) { acc_dk(i) *= factor; }
    }

    // Multiplies by the scale and turns infinities, which the conversion to fp16 would hide, into NaN. If the scale is
    // neither tiny nor negative, one instruction does both, as many as the product needs: s (scale + 1) - s. A branch
    // on the scale would cost registers that the tiles do not have.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ void scale_and_show_infinity(Tensor<Engine, Layout> &scores) const {
        const float scale_plus_1 = scale + 1.f;
        #pragma unroll
        for (int i = 0; i < size(scores); ++i) {
            scores(i) = Kernel_traits::kIsGeneral ? __fmaf_rn(scores(i), scale, __fmul_rn(scores(i), 0.f))
                                                  : __fmaf_rn(scores(i), scale_plus_1, -scores(i));
        }
    }

    // Sets dS outside the window to 0, where the slopes did not.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ void hide_products(Tensor<Engine, Layout> &ds, const int col0, const int row0,
                                                  const int row_stride) const {
        if constexpr (!Only::kHidesSlopes) { hide(ds, col0, row0, row_stride); }
    }

    // Whether every query of the tile sees every key of it. The same for all threads.
    __forceinline__ __device__ bool is_tile_visible(const int tile_row, const int tile_col) const {
        return tile_col + Kernel_traits::kBlockN <= end_of_row(tile_row)
            && (!Is_local || tile_col >= begin_of_row(tile_row + Kernel_traits::kBlockM - 1));
    }

    // Sets scores, in fp32 or packed, outside the window to 0. By assignment, after f: f(0) need not be 0, and a product
    // with 0 would keep the NaN that unwritten shared memory or an unused cache slot may hold. Before f, `hidden` is a
    // score that f maps to 0.
    template <typename Engine, typename Layout>
    __forceinline__ __device__ void hide(Tensor<Engine, Layout> &scores, const int col0, const int row0,
                                         const int row_stride, const float hidden=0.f) const {
        using T = typename Engine::value_type;
        for_each_score(scores, col0, row0, row_stride, [&](T &score, const int row, const int col) {
            if (col >= end_of_row(row) || (Is_local && col < begin_of_row(row))) { score = T(hidden); }
        });
    }

private:

    // Whether `prepare` scales scores, and the activation does not.
    static constexpr bool kPrepares = !kScaleAtEnd<Kernel_traits, Has_alibi>;

    using Only = typename Kernel_traits::Only;

    // The scale that `prepare` left to the activation.
    __forceinline__ __device__ float scale_of_activation() const { return kPrepares ? 1.f : scale; }

    // Rounds two weights to 16 bits with one instruction. `packed` is compact.
    template <typename Engine, typename Layout>
    static __forceinline__ __device__ void set_pair(Tensor<Engine, Layout> &packed, const int i, const float first,
                                                    const float second) {
        Tensor pair = make_tensor<float>(Int<2>{});
        pair(0) = first;
        pair(1) = second;
        Tensor places = make_tensor(packed.data() + i, make_layout(Int<2>{}));
        FLASH_NAMESPACE::convert_saturating(pair, places);
    }

    template <typename Engine, typename Layout, typename Visit>
    static __forceinline__ __device__ void for_each_row(Tensor<Engine, Layout> &rows, const int row0,
                                                        const int row_stride, Visit visit) {
        #pragma unroll
        for (int mi = 0; mi < size<0, 1>(rows); ++mi) {
            #pragma unroll
            for (int i = 0; i < size<0, 0>(rows); ++i) { visit(mi * size<0, 0>(rows) + i, row0 + mi * row_stride + i * 8); }
        }
    }

    // The scale if the scores were not multiplied by it, else 1.
    __forceinline__ __device__ float scale_at_end() const {
        const bool waits = Kernel_traits::kIdentity || scales_at_end(params.score.activation, scale);
        return !kPrepares && waits ? scale : 1.f;
    }

    __forceinline__ __device__ float weights_at_end() const {
        if constexpr (Only::kExists) { return Only::weights_at_end(scale_of_activation()); }
        else { return scale_at_end(); }
    }

    template <typename Visit>
    __forceinline__ __device__ void visit_activation(Visit visit) const {
        if constexpr (!Kernel_traits::kIdentity) {
            with_activation</*At_end=*/!kPrepares>(params.score.activation, scale_of_activation(), bias, visit);
        }
    }

    __forceinline__ __device__ int begin_of_row(const int row) const { return row + counted_diagonal - window.left; }

    __forceinline__ __device__ int end_of_row(const int row) const {
        if constexpr (!Is_causal && !Is_local) { return seqlen_k; }
        return std::min(seqlen_k, row + 1 + counted_diagonal + (Is_causal ? 0 : window.right));
    }
};

// ALiBi's bias is in units of the score: before scaling with softmax, after scaling without.
template <typename Kernel_traits>
__forceinline__ __device__ float alibi_unit(const float softmax_scale) {
    return kUseSoftmax<Kernel_traits> ? softmax_scale : 1.f;
}

// The bias of the sigmoid for one head of one sequence.
template <typename Params, typename Block_info>
__forceinline__ __device__ float sigmoid_bias(const Params &params, const RowFactors<Params, Block_info> &row_factors,
                                              const int bidb, const int bidh) {
    const Score &score = params.score;
    if (score.activation != Activation::sigmoid) { return 0.f; }
    if (score.bias_is_minus_log_n) { return -logf(row_factors.number_of_keys()); }
    return score.sigmoid_biases == nullptr
        ? score.sigmoid_bias : score.sigmoid_biases[bidb * score.sigmoid_biases_batch_stride + bidh];
}

// The decay of one head of one sequence, as an exponent of 2 for each key of distance.
__forceinline__ __device__ float decay_rate(const Score &score, const int bidb, const int bidh) {
    return score.decay_slopes == nullptr
        ? 0.f : -float(M_LOG2E) * score.decay_slopes[bidb * score.decay_slopes_batch_stride + bidh];
}

template <typename Kernel_traits, bool Is_causal, bool Is_local, bool Has_alibi, typename Params, typename Block_info>
__forceinline__ __device__ auto make_mask(const Params &params, const Block_info &binfo, const float alibi_slope,
                                          const int bidb, const int bidh, const int first_row=0) {
    if constexpr (kUseSoftmax<Kernel_traits>) {
        return Mask<Is_causal, Is_local, Has_alibi>(binfo.actual_seqlen_k, binfo.actual_seqlen_q,
                                                    params.window_size_left, params.window_size_right, alibi_slope);
    } else {
        const Window window = window_of<Kernel_traits>(params, binfo, bidb);
        const auto row_factors = row_factors_of(params, binfo, bidb, window);
        const int counted_diagonal = binfo.actual_seqlen_k - binfo.actual_seqlen_q;
        const int shift = Kernel_traits::kIsGeneral ? diagonal_shift(params.score, binfo, bidb) : 0;
        return ScoreWeights<Kernel_traits, Is_causal, Is_local, Has_alibi, Params, Block_info>{
            params, row_factors, sigmoid_bias(params, row_factors, bidb, bidh),
            binfo.actual_seqlen_k, counted_diagonal + shift, counted_diagonal, window, params.scale_softmax, alibi_slope,
            decay_rate(params.score, bidb, bidh), first_row};
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Replaces Softmax<kNRows>: no row needs a maximum or a sum, so there is no state and nothing to rescale.
template <int kNRows>
struct NoRowState {

    using TensorT = decltype(make_tensor<float>(Shape<Int<kNRows>>{}));

    template <bool Is_first, bool Check_inf=false, typename Tensor0, typename Tensor1>
    __forceinline__ __device__ void softmax_rescale_o(Tensor0 &, Tensor1 &, float) {}

    // Returns zeros for the log-sum-exp, which are never stored. ScoreWeights::finish normalizes.
    template <bool Is_dropout=false, bool Split=false, typename Tensor0>
    __forceinline__ __device__ TensorT normalize_softmax_lse(Tensor0 &, float, float=1.0) {
        TensorT lse;
        clear(lse);
        return lse;
    }
};

template <typename Kernel_traits, int kNRows>
using RowState = std::conditional_t<kUseSoftmax<Kernel_traits>, Softmax<kNRows>, NoRowState<kNRows>>;

////////////////////////////////////////////////////////////////////////////////////////////////////

// What a launch saturates in fp16: see Saturates.
template <typename Kernel_traits, typename Params>
__forceinline__ __device__ bool saturates_products(const Params &params) {
    if constexpr (kUseSoftmax<Kernel_traits>) { return false; }
    else { return params.score.saturates != Saturates::nothing; }
}

template <typename Kernel_traits, typename Params>
__forceinline__ __device__ bool saturates_output(const Params &params) {
    if constexpr (kUseSoftmax<Kernel_traits>) { return false; }
    else { return params.score.saturates == Saturates::products_and_output; }
}

// Whether the results of a launch are float32. They are zero at first, so that a block without work leaves them alone.
template <typename Kernel_traits, typename Params>
__forceinline__ __device__ bool is_wide(const Params &params) {
    if constexpr (kUseSoftmax<Kernel_traits>) { return false; }
    else { return params.score.is_wide; }
}

// Writes an accumulator of a tile as it is, from its registers. offset, row_stride: of the tile's rows in the result;
// rows, cols: those of the tile that it holds.
template <int kRows, int kCols, typename Thr_mma, typename Engine, typename Layout, typename Index>
__forceinline__ __device__ void store_wide(const Thr_mma &thr_mma, Tensor<Engine, Layout> const &acc, void *ptr,
                                           const Index offset, const Index row_stride, const int rows, const int cols) {
    Tensor places = thr_mma.partition_C(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
    static_assert(decltype(size(acc) == size(places))::value);
    float *tile = reinterpret_cast<float *>(ptr) + offset;
    #pragma unroll
    for (int i = 0; i < size(acc); i += 2) {  // Two neighbours in a row.
        const int row = get<0>(places(i)), col = get<1>(places(i));
        if (row < rows && col < cols) {
            *reinterpret_cast<float2 *>(tile + row * row_stride + col) = make_float2(acc(i), acc(i + 1));
        }
    }
}

// Whether the conversion to 16 bits is what clamps weights.
template <typename Kernel_traits>
__forceinline__ __device__ constexpr bool is_clamped() {
    if constexpr (kUseSoftmax<Kernel_traits>) { return false; }
    else if constexpr (!Kernel_traits::Only::kExists) { return false; }
    else { return Kernel_traits::Only::kIsClamped; }
}

// convert_type (or convert_type_relu) for P, chosen by the kernel's traits. ScoreWeights has already turned infinities
// into NaN.
template <typename Kernel_traits, typename To_type, bool Relu=false, typename Engine, typename Layout>
__forceinline__ __device__ auto convert_products(Tensor<Engine, Layout> const &tensor, const bool saturates=true) {
    if constexpr (is_clamped<Kernel_traits>()) {
        Tensor floats = recast<float2>(tensor);
        Tensor out = make_tensor<To_type>(tensor.layout());
        Tensor pairs = recast<uint32_t>(out);
        #pragma unroll
        for (int i = 0; i < size(pairs); ++i) {
            pairs(i) = FLASH_NAMESPACE::convert_weights<To_type, /*Is_clamped=*/true>(floats(i).x, floats(i).y);
        }
        return out;
    } else if constexpr (kUseSoftmax<Kernel_traits> && Relu) {
        return FLASH_NAMESPACE::convert_type_relu<To_type>(tensor);
    } else if constexpr (kUseSoftmax<Kernel_traits> || !std::is_same_v<To_type, cutlass::half_t>) {
        return FLASH_NAMESPACE::convert_type<To_type>(tensor);
    } else {
        return FLASH_NAMESPACE::convert_to_half<To_type>(tensor, saturates);
    }
}

// The same in the backward kernels. Without softmax, ScoreWeights::differentiate has packed P.
template <typename Kernel_traits, bool Relu, typename Packed, typename Engine, typename Layout>
__forceinline__ __device__ auto packed_or_converted(Packed const &packed, Tensor<Engine, Layout> const &acc_s) {
    if constexpr (!kUseSoftmax<Kernel_traits>) { return packed; }
    else { return convert_products<Kernel_traits, typename Kernel_traits::Element, Relu>(acc_s); }
}

// convert_type for O, which is float if it is a part of a sum.
template <typename Kernel_traits, typename To_type, typename Engine, typename Layout>
__forceinline__ __device__ auto convert_output(Tensor<Engine, Layout> &tensor, const bool saturates=true) {
    if constexpr (kUseSoftmax<Kernel_traits>) {
        return FLASH_NAMESPACE::convert_type<To_type>(tensor);
    } else {
        return FLASH_NAMESPACE::convert_finite_saturating<To_type>(tensor, saturates);
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Whether thread blocks add their parts of dQ by vectors of 4 floats, a quarter of the instructions. This needs sm_90, and
// PTX ISA 8.1.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 \
    && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1))
#define NOSOFTMAX_ADDS_VECTORS 1
#else
#define NOSOFTMAX_ADDS_VECTORS 0
#endif

template <typename Kernel_traits>
inline constexpr bool kAddsVectors = NOSOFTMAX_ADDS_VECTORS && !kUseSoftmax<Kernel_traits>;

// The place in dq_accum of each element of a thread's accumulator of dQ. Any will do, if the kernel that adds and the one
// that converts have the same.
template <typename Kernel_traits>
using dQaccumAtomicAdd = std::conditional_t<kAddsVectors<Kernel_traits>, typename Kernel_traits::GmemTiledCopydQaccum,
                                            typename Kernel_traits::GmemTiledCopydQaccumAtomicAdd>;

// Adds an accumulator of dQ to its places.
template <typename Engine0, typename Layout0, typename Engine1, typename Layout1>
__forceinline__ __device__ void add_vectors(Tensor<Engine0, Layout0> const &acc_dq, Tensor<Engine1, Layout1> &places) {
#if NOSOFTMAX_ADDS_VECTORS
    static_assert(decltype(size<0>(places))::value == 4 && decltype(stride<0, 1>(places))::value == 1);
    #pragma unroll
    for (int i = 0; i < size(acc_dq); i += 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n"
                     :: "l"(__cvta_generic_to_global(&places(i))), "f"(acc_dq(i)), "f"(acc_dq(i + 1)), "f"(acc_dq(i + 2)),
                        "f"(acc_dq(i + 3)) : "memory");
    }
#endif
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// With splits, the fp32 parts of O lie one after another, and their offsets may exceed an int.
template <typename Kernel_traits>
using accum_offset_t = std::conditional_t<kUseSoftmax<Kernel_traits>, int, typename Kernel_traits::index_t>;

// The work of a thread block: a block of rows (queries or keys) of one sequence and head.
struct GridPlace {
    const int row_block, num_row_blocks, sequence, head;

    __forceinline__ __device__ int row_blocks_behind() const { return num_row_blocks - 1 - row_block; }
};

// The head of q that a block of head bidh reads.
template <typename Kernel_traits, typename Params>
__forceinline__ __device__ int head_of_q(const Params &params, const int bidh) {
    if constexpr (kUseSoftmax<Kernel_traits>) { return bidh; } else { return bidh / params.score.q_group_size; }
}

// The place in a grid where the row blocks of all sequences lie along x.
__forceinline__ __device__ GridPlace place_in_long_grid(const int num_sequences) {
    const int num_row_blocks = gridDim.x / unsigned(num_sequences);
    const int sequence = blockIdx.x / unsigned(num_row_blocks);
    return {int(blockIdx.x) - sequence * num_row_blocks, num_row_blocks, sequence, int(blockIdx.z)};
}

// Without softmax the grid is (row blocks, sequences, heads), and (row blocks of all sequences, 1, heads) where there
// are more sequences than its y axis holds: grid_of() in the launch template.
template <typename Params>
__forceinline__ __device__ GridPlace place_in_grid(const Params &params) {
    if (gridDim.y != params.b) { return place_in_long_grid(params.b); }
    return {int(blockIdx.x), int(gridDim.x), int(blockIdx.y), int(blockIdx.z)};
}

// With splits the grid is (row blocks, splits, sequences x heads), and (row blocks of all sequences, splits, heads)
// where there are more than its z axis holds.
template <bool Split, typename Params>
__forceinline__ __device__ GridPlace place_in_splitkv_grid(const Params &params) {
    if constexpr (!Split) {
        return place_in_grid(params);
    } else {
        if (gridDim.z == params.h) { return place_in_long_grid(params.b); }  // for one sequence it is the same
        const int sequence = blockIdx.z / params.h;
        return {int(blockIdx.x), int(gridDim.x), sequence, int(blockIdx.z - sequence * params.h)};
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// copy() for a tile of V in the forward or K in the backward kernels, where a masked weight of 0 does not stop a NaN.
// Without softmax, rows below min_MN are zeroed too, because a window may leave keys that no query sees.
template <typename Kernel_traits, bool Is_local, bool Is_even_MN, bool Is_even_K, bool Clear_OOB_MN=false,
          typename TiledCopy, typename Engine0, typename Layout0, typename Engine1, typename Layout1,
          typename Engine2, typename Layout2, typename Engine3, typename Layout3>
__forceinline__ __device__ void copy_seen_keys(TiledCopy tiled_copy, Tensor<Engine0, Layout0> const &S,
                                               Tensor<Engine1, Layout1> &D,
                                               Tensor<Engine2, Layout2> const &identity_MN,
                                               Tensor<Engine3, Layout3> const &predicate_K,
                                               const int max_MN, const int min_MN) {
    if constexpr (kUseSoftmax<Kernel_traits> || !Is_local) {
        FLASH_NAMESPACE::copy<Is_even_MN, Is_even_K, Clear_OOB_MN>(tiled_copy, S, D, identity_MN, predicate_K, max_MN);
    } else if (min_MN <= 0 && max_MN >= Kernel_traits::kBlockN) {
        FLASH_NAMESPACE::copy</*Is_even_MN=*/true, Is_even_K>(tiled_copy, S, D, identity_MN, predicate_K);
    } else {
        #pragma unroll
        for (int m = 0; m < size<1>(S); ++m) {
            const int row = get<0>(identity_MN(0, m, 0));
            #pragma unroll
            for (int k = 0; k < size<2>(S); ++k) {
                if (row >= min_MN && row < max_MN && (Is_even_K || predicate_K(k))) {
                    cute::copy(tiled_copy, S(_, m, k), D(_, m, k));
                } else {
                    cute::clear(D(_, m, k));
                }
            }
        }
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// Draws which scores of a fragment dropout keeps: all bits of an element are set, or none. The backward pass needs this
// for dS as well as for P, and the sign of P, which may be negative, can't carry it.
template <typename Element, typename Dropout, typename Layout>
__forceinline__ __device__ auto draw_kept(Dropout dropout, const Layout &acc_layout, const int block_row_start,
                                          const int block_col_start, const int block_row_stride) {
    Tensor kept = make_tensor<Element>(acc_layout);
    Tensor bits = recast<uint32_t>(kept);
    #pragma unroll
    for (int i = 0; i < size(bits); ++i) { bits(i) = 0xffffffff; }
    dropout.apply_dropout(kept, block_row_start, block_col_start, block_row_stride);
    return kept;
}

template <typename Engine0, typename Layout0, typename Engine1, typename Layout1>
__forceinline__ __device__ void drop(Tensor<Engine0, Layout0> &tensor, Tensor<Engine1, Layout1> const &kept) {
    Tensor tensor_bits = recast<uint32_t>(tensor);
    Tensor kept_bits = recast<uint32_t>(kept);
    #pragma unroll
    for (int i = 0; i < size(tensor_bits); ++i) { tensor_bits(i) &= kept_bits(i); }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

} // namespace FLASH_NAMESPACE
