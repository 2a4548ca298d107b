// What the threads of one block of the forward kernel do with a tile of scores.

#include "tile.h"

namespace {

// Those of head sizes 64 and 128: FwdTile.
template <int kHeadDim, int kRows, int kCols>
using ForwardTile = Flash_fwd_kernel_traits<kHeadDim, kRows, kCols, /*kNWarps=*/4, /*Is_Q_in_regs=*/false,
                                     /*Share_Q_K_smem=*/false, cutlass::bfloat16_t>;

enum class Kind { plain, own, general };

template <typename Traits>
void weigh_tile(const WithScore<Flash_fwd_params> &params, const Sequence &sequence, const int first_row,
                const int first_col, const float *scores, float *p) {
    constexpr int kRows = Traits::kBlockM, kCols = Traits::kBlockN, kRowStride = Traits::kNWarps * 16;
    constexpr bool Is_local = Traits::kIsGeneral;  // whose causal mask is a window
    const auto weights = make_mask<Traits, /*Is_causal=*/!Is_local, Is_local, /*Has_alibi=*/false>(
        params, sequence, 0.f, 0, 0, first_row);
    for (int thread = 0; thread < Traits::kNThreads; ++thread) {
        threadIdx.x = thread;
        typename Traits::TiledMma mma;
        Tensor acc_s = partition_fragment_C(mma, Shape<Int<kRows>, Int<kCols>>{});
        Tensor places = mma.get_thread_slice(thread).partition_C(make_identity_tensor(Shape<Int<kRows>, Int<kCols>>{}));
        const auto place = [&](const int i) { return get<0>(places(i)) * kCols + get<1>(places(i)); };
        for (int i = 0; i < size(acc_s); ++i) { acc_s(i) = scores[place(i)]; }
        const int row0 = first_row + thread / 32 * 16 + thread % 32 / 4;
        weights.template apply_mask</*Causal_mask=*/!Is_local, /*Is_even_MN=*/false>(acc_s, first_col, row0, kRowStride);
        if constexpr (is_clamped<Traits>()) {  // Upstream's conversion returns a pointer into its own frame.
            Tensor packed = convert_products<Traits, cutlass::bfloat16_t>(acc_s);
            for (int i = 0; i < size(acc_s); ++i) { acc_s(i) = float(packed(i)); }
        }
        weights.template finish</*Is_dropout=*/false, /*Split=*/false>(acc_s, row0, kRowStride);  // as if V were 1
        for (int i = 0; i < size(acc_s); ++i) { p[place(i)] = acc_s(i); }
    }
}

template <typename Upstream>
void weigh(const Kind kind, const WithScore<Flash_fwd_params> &params, const Sequence &sequence, const int first_row,
           const int first_col, const float *scores, float *p) {
    const auto call = [&](const auto traits) {
        weigh_tile<std::remove_cv_t<decltype(traits)>>(params, sequence, first_row, first_col, scores, p);
    };
    if (kind == Kind::plain) { return call(NoSoftmaxTraits<Upstream>{}); }
    if (kind == Kind::general) { return call(NoSoftmaxTraits<Upstream, Variant::general>{}); }
    if (params.score.activation == Activation::identity) { return call(NoSoftmaxTraits<Upstream, Variant::identity>{}); }
    with_own_variant(params.score.activation, [&](const auto variant) {
        call(NoSoftmaxTraits<Upstream, decltype(variant)::value>{});
    });
}

}  // namespace

// Sets P under a causal mask, for a tile of raw scores at (first_row, first_col). kind: a Kind; own: the kernel has one
// activation. softcap: 0, or a number for kind general alone.
extern "C" void weigh(const int head_dim, const int kind, const int activation, const float scale, const float bias,
                      const float softcap, const int seqlen_q, const int seqlen_k, const int first_row, const int first_col,
                      const float *scores, float *p) {
    WithScore<Flash_fwd_params> params{};
    // As set_params_fprop does.
    params.scale_softmax = softcap > 0.f ? softcap : scale;
    params.softcap = softcap > 0.f ? scale / softcap : 0.f;
    params.window_size_left = Kind(kind) == Kind::general ? seqlen_q + seqlen_k : -1;
    params.score.activation = Activation(activation);
    params.score.sigmoid_bias = bias;
    const Sequence sequence{seqlen_q, seqlen_k};
    if (head_dim == 64) {
        weigh<ForwardTile<64, 128, 128>>(Kind(kind), params, sequence, first_row, first_col, scores, p);
    } else {
        weigh<ForwardTile<128, 128, 64>>(Kind(kind), params, sequence, first_row, first_col, scores, p);
    }
}
