// The parameters of kernels without softmax that upstream's parameter structs do not have. The machine code for softmax
// reads the offsets of those structs, so they can't grow: kernels without softmax take WithScore<Params> instead.

#pragma once

#include <cstdint>

#include "activations.h"
#include "flash.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

// What becomes +-65504 in fp16 instead of infinite. Forward: P and O. Where a backward pass is made of forward passes, P
// in that for dV, and in those for dQ and dK, whose products are dS, nothing: a gradient that is finite has to be right.
enum class Saturates : uint8_t { products_and_output, products, nothing };

// How the factor of a row of O depends on n, the number of keys of its sequence. per_visible: on the number of keys that
// the row sees, where a window makes it differ from n.
enum class Normalization : uint8_t { none, per_n, per_sqrt_n, per_visible };

struct Score {
    Activation activation = Activation::identity;
    Normalization normalization = Normalization::none;
    Saturates saturates = Saturates::products_and_output;
    bool bias_is_minus_log_n = false;
    bool is_transposed = false;  // a pass takes keys as queries: n counts queries, and the diagonals are of the keys
    float factor = 1.f;             // on every row of O
    float sigmoid_bias = 0.f;
    const float *sigmoid_biases = nullptr;  // (h) or (b, h), in place of sigmoid_bias
    int sigmoid_biases_batch_stride = 0;
    const float *decay_slopes = nullptr;  // (h) or (b, h): P is multiplied by exp(-slope · |distance|)
    int decay_slopes_batch_stride = 0;
    // Further factors on the rows of O: (b), or one for each row. `largest`: (b), the largest of a sequence, for backward.
    const float *sequence_factors = nullptr;
    const float *row_factors = nullptr;
    const float *largest_row_factors = nullptr;
    const int *diagonals = nullptr;  // (b): the key that query 0 is aligned with; none is seqlen_k - seqlen_q
    bool is_wide = false;            // the results are float32, and zero at first
    int rows_of_query = 1;  // Heads that became rows of q, because a group of them shares its keys.
    int q_group_size = 1;   // Heads that share a head of q; not 1 only where a backward pass transposes GQA.

    // Whether the rows of a sequence have factors that differ.
    __host__ __device__ bool by_row() const {
        return row_factors != nullptr || normalization == Normalization::per_visible;
    }
};

template <typename Params>
struct WithScore : public Params {
    Score score;
};

// flash_api.cpp lets the pointer to the log-sum-exp, which does not exist without softmax, point at the Score.
template <typename Params>
WithScore<Params> with_score(const Params &params) {
    return {params, *static_cast<const Score *>(params.softmax_lse_ptr)};
}

// Sets the largest of the factors of each sequence, within [2^-126, 2^126]: row_factors.cu.
void find_largest_factors(float *largest, const float *row_factors, const int *cu_seqlens_q, int batch_size,
                          int seqlen_q, cudaStream_t stream);

}  // namespace FLASH_NAMESPACE
