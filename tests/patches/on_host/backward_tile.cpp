// What the threads of one block of the backward kernel do with a tile of scores, and where they add dQ.

#include "tile.h"

namespace {

// Head size, queries, keys, warps, and warps along one side of the products S, dK and dQ: run_mha_bwd_nosoftmax.
template <int... kSizes>
using Tile = Flash_bwd_kernel_traits<kSizes..., /*Is_V_in_regs=*/false, /*No_double_buffer=*/false, cutlass::bfloat16_t>;
using Tiles = std::tuple<
    Tile<32, 128, 128, 8, 4, 4, 4>, Tile<64, 128, 128, 8, 4, 4, 4>, Tile<64, 64, 128, 8, 2, 4, 4>,
    Tile<96, 64, 128, 8, 2, 4, 4>, Tile<128, 64, 128, 8, 2, 4, 2>, Tile<128, 64, 64, 8, 4, 2, 2>,
    Tile<192, 64, 64, 8, 4, 2, 2>, Tile<256, 64, 64, 8, 4, 2, 2>, Tile<256, 64, 32, 8, 4, 1, 2>>;

template <typename Visit, int kTile=0>
auto with_tile(const int tile, Visit visit) {
    using Traits = std::tuple_element_t<kTile, Tiles>;
    if constexpr (kTile + 1 < std::tuple_size_v<Tiles>) {
        if (tile != kTile) { return with_tile<Visit, kTile + 1>(tile, visit); }
    }
    return visit(Traits{});
}

template <typename Traits, bool Has_alibi>
void differentiate_tile(const WithScore<Flash_bwd_params> &params, const Sequence &sequence, const int first_row,
                        const int first_col, const float *scores, const float *dp, float *p, float *ds) {
    constexpr int kWarpsM = Traits::AtomLayoutMSdP, kCols = Traits::kBlockN;
    const auto weights = make_mask<Traits, /*Is_causal=*/false, /*Is_local=*/true, Has_alibi>(params, sequence, 0.f, 0, 0);
    for (int thread = 0; thread < Traits::kNThreads; ++thread) {
        threadIdx.x = thread;
        Tensor acc_s = partition_fragment_C(typename Traits::TiledMmaSdP{}, Shape<Int<Traits::kBlockM>, Int<kCols>>{});
        const int warp = thread / 32, row0 = warp % kWarpsM * 16 + thread % 32 / 4, col0 = warp / kWarpsM * size<2>(acc_s) * 8;
        const auto visit = [&](auto &values, const auto visit) {
            for (int i = 0; i < size(values); ++i) {  // of m16n8k16's accumulators: 2 columns, 8 rows further 2 more, ...
                const int atom = i / 4, rows = size<1>(acc_s);
                const int row = row0 + atom % rows * kWarpsM * 16 + i / 2 % 2 * 8;
                const int col = col0 + atom / rows * 8 + thread % 4 * 2 + i % 2;
                visit(values(i), row * kCols + col);
            }
        };
        visit(acc_s, [&](float &x, const int place) { x = scores[place]; });
        Tensor packed = weights.differentiate(acc_s, first_col + col0, first_row + row0, kWarpsM * 16, /*has_hidden=*/true);
        visit(packed, [&](const auto &x, const int place) { p[place] = float(x); });
        visit(acc_s, [&](float &x, const int place) { x = times_slope<Traits>(dp[place], x); });
        Tensor products = make_tensor(acc_s.data(), convert_layout_acc_rowcol(acc_s.layout()));
        weights.hide_products(products, first_col + col0, first_row + row0, kWarpsM * 16);
        visit(acc_s, [&](const float &x, const int place) {
            ds[place] = x;
            if constexpr (Traits::Only::kExists) {
                ds[place] *= own_slopes_at_end<typename Traits::Element, typename Traits::Only>(params.scale_softmax);
            }
        });
    }
}

}  // namespace

extern "C" int number_of_tiles() { return std::tuple_size_v<Tiles>; }

extern "C" void shape_of_tile(const int tile, int *sizes) {
    with_tile(tile, [&](const auto traits) {
        sizes[0] = traits.kBlockM;
        sizes[1] = traits.kBlockN;
        sizes[2] = traits.kHeadDim;
    });
}

// Sets P and dS under a causal mask, for a tile of raw scores and dP at (first_row, first_col). Kernels: 0 special, 1
// general, 2 with one activation. General kernels take a decay and factors of rows. The others leave a scale for the end: P
// is then without it, and dS has its own.
extern "C" void differentiate(const int tile, const int kernel, const int activation, const float scale,
                              const float bias, const float decay_slope, const bool per_visible, const int seqlen_q,
                              const int seqlen_k, const int first_row, const int first_col, const float *scores,
                              const float *dp, float *p, float *ds) {
    const bool is_general = kernel == 1;
    WithScore<Flash_bwd_params> params{};
    params.scale_softmax = scale;
    params.window_size_left = seqlen_k;
    params.score.activation = Activation(activation);
    params.score.sigmoid_bias = bias;
    if (per_visible) { params.score.normalization = Normalization::per_visible; }
    if (is_general) { params.score.decay_slopes = &decay_slope; }
    const Sequence sequence{seqlen_q, seqlen_k};
    with_tile(tile, [&](const auto traits) {
        using Upstream = std::remove_cv_t<decltype(traits)>;
        const auto call = [&](const auto traits) {
            using Traits = std::remove_cv_t<decltype(traits)>;
            differentiate_tile<Traits, /*Has_alibi=*/Traits::kIsGeneral>(
                params, sequence, first_row, first_col, scores, dp, p, ds);
        };
        if (is_general) { return call(NoSoftmaxTraits<Upstream, Variant::general>{}); }
        if (kernel == 0) { return call(NoSoftmaxTraits<Upstream>{}); }
        with_own_variant(Activation(activation), [&](const auto variant) {
            call(NoSoftmaxTraits<Upstream, decltype(variant)::value>{});
        });
    });
}

// Counts how often the threads add to each place of a tile of dQ by vectors. Returns whether each vector is whole.
extern "C" bool count_added(const int tile, int *counts) {
    return with_tile(tile, [&](const auto traits) {
        using Traits = std::remove_cv_t<decltype(traits)>;
        constexpr int kRows = Traits::kBlockM, kCols = Traits::kHeadDim;
        bool is_whole = true;
        for (int thread = 0; thread < Traits::kNThreads; ++thread) {
            typename Traits::GmemTiledCopydQaccum copy;
            Tensor tile = make_tensor(counts, Shape<Int<kRows>, Int<kCols>>{}, Stride<Int<kCols>, _1>{});
            Tensor places = copy.get_thread_slice(thread).partition_D(tile);
            Tensor acc_dq = partition_fragment_C(typename Traits::TiledMmadQ{}, Shape<Int<kRows>, Int<kCols>>{});
            static_assert(decltype(size(acc_dq) == size(places))::value);
            for (int i = 0; i < size(places); ++i) {
                ++places(i);
                is_whole = is_whole && &places(i) - &places(i / 4 * 4) == i % 4 && (&places(i / 4 * 4) - counts) % 4 == 0;
            }
        }
        return is_whole;
    });
}
