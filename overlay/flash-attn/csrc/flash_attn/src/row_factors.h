// The factor norm_i on row i of O in the kernels without softmax, and its part in the backward pass.

#pragma once

#include "namespace_config.h"
#include "score_params.h"
#include "window.h"

namespace FLASH_NAMESPACE {

// How far a sequence's diagonal lies from the one that aligns the last query with the last key.
template <typename Block_info>
__forceinline__ __device__ int diagonal_shift(const Score &score, const Block_info &binfo, const int bidb) {
    if (score.diagonals == nullptr) { return 0; }
    const int diagonal = score.is_transposed ? -score.diagonals[bidb] : score.diagonals[bidb];
    return diagonal - (binfo.actual_seqlen_k - binfo.actual_seqlen_q);
}

// The sides of a sequence's window, counted from the key that aligns the last query with the last key: window.h.
struct Window { int left, right; };

template <typename Params, typename Block_info>
__forceinline__ __device__ Window window_of_sequence(const Params &params, const Block_info &binfo, const int bidb) {
    if (params.score.diagonals == nullptr) { return {params.window_size_left, params.window_size_right}; }
    const int shift = diagonal_shift(params.score, binfo, bidb);
    return {shifted_side(params.window_size_left, -shift), shifted_side(params.window_size_right, shift)};
}

// `row` counts the rows of a tile's tensor in the sequence.
template <typename Params, typename Block_info>
struct RowFactors {

    const Params &params;
    const Block_info &binfo;
    const int bidb;
    const Window window;

    __forceinline__ __device__ float number_of_keys() const {
        return float(max(params.score.is_transposed ? binfo.actual_seqlen_q : binfo.actual_seqlen_k, 1));
    }

    // The factor that all rows share.
    __forceinline__ __device__ float of_sequence() const {
        const Score &score = params.score;
        float factor = score.factor;
        if (score.normalization == Normalization::per_n) { factor /= number_of_keys(); }
        if (score.normalization == Normalization::per_sqrt_n) { factor *= rsqrtf(number_of_keys()); }
        if (score.sequence_factors != nullptr) { factor *= score.sequence_factors[bidb]; }
        return factor;
    }

    // The factor that a row has beside it, if score.by_row().
    __forceinline__ __device__ float of_row(const int row) const {
        const Score &score = params.score;
        if (row >= binfo.actual_seqlen_q) { return 1.f; }
        if (score.row_factors == nullptr) { return 1.f / number_of_visible_keys(row); }
        const int64_t first = binfo.q_offset(int64_t(params.seqlen_q), int64_t(1), bidb);
        return score.row_factors[(first + row) / score.rows_of_query];
    }

    // In backward, the factors of the rows go into P and dS divided by the largest of them, before these are rounded to 16
    // bits. The largest is left for the sums in fp32.
    __forceinline__ __device__ float largest_of_rows() const {
        const Score &score = params.score;
        if (!score.by_row()) { return 1.f; }
        if (score.row_factors != nullptr) { return score.largest_row_factors[bidb]; }
        // The number of visible keys is a concave function of the row.
        return 1.f / fminf(number_of_visible_keys(0), number_of_visible_keys(binfo.actual_seqlen_q - 1));
    }

    // At most 1, or 4 where factors exceed 2^126. NaN where a factor is NaN.
    __forceinline__ __device__ float of_row(const int row, const float largest) const { return of_row(row) / largest; }

    // The factor on the sums that make dQ, dK and dV.
    __forceinline__ __device__ float of_gradients() const { return of_sequence() * largest_of_rows(); }

private:

    __forceinline__ __device__ float number_of_visible_keys(const int row) const {
        const int aligned = row + binfo.actual_seqlen_k - binfo.actual_seqlen_q;
        const int end = min(binfo.actual_seqlen_k, aligned + 1 + window.right);
        return float(max(end - max(aligned - window.left, 0), 1));
    }
};

template <typename Params, typename Block_info>
__forceinline__ __device__ RowFactors<Params, Block_info> row_factors_of(const Params &params, const Block_info &binfo,
                                                                         const int bidb, const Window window) {
    return {params, binfo, bidb, window};
}

template <typename Params, typename Block_info>
__forceinline__ __device__ RowFactors<Params, Block_info> row_factors_of(const Params &params, const Block_info &binfo,
                                                                         const int bidb) {
    return row_factors_of(params, binfo, bidb, window_of_sequence(params, binfo, bidb));
}

}  // namespace FLASH_NAMESPACE
