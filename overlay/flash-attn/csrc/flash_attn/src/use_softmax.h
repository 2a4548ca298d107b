// Supports the trailing arguments use_softmax and score of flash_api.cpp: checks, empty outputs for those that do not
// exist without softmax, and Python bindings that keep callers of upstream's positional signatures working.

#pragma once

#include <array>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/python.h>

#include "built_kernels.h"
#include "flash_nosoftmax.h"
#include "kernel_dispatch.h"
#include "namespace_config.h"
#include "window.h"

namespace FLASH_NAMESPACE {

// Formats a number for messages. Streaming it would crash in an extension that its toolchain links with its own
// libstdc++, because torch brings another one into the process.
inline std::string text(const float x) {
    std::array<char, 32> buffer{};
    std::snprintf(buffer.data(), buffer.size(), "%g", x);
    return buffer.data();
}

inline void check_nosoftmax_arguments(const float softmax_scale, const float softcap, const bool has_alibi) {
    TORCH_CHECK(std::isfinite(softmax_scale), "use_softmax=False needs a finite softmax_scale, got ", text(softmax_scale));
    TORCH_CHECK(softcap <= 0.f || softmax_scale > 0.f,
                "use_softmax=False with softcap=", text(softcap), " needs softmax_scale > 0, got ", text(softmax_scale));
    TORCH_CHECK(!has_alibi || softmax_scale != 0.f,
                "use_softmax=False with alibi_slopes needs a softmax_scale other than 0");
}

// Without softmax there is no log-sum-exp: returns an empty tensor, never uninitialised memory.
inline at::Tensor empty_unless(const bool exists, const at::IntArrayRef shape, const at::TensorOptions &options) {
    return torch::empty(exists ? shape : at::IntArrayRef({0}), options.dtype(at::kFloat));
}

// The results of a forward function where no query sees a key.
inline std::vector<at::Tensor> output_of_nothing(const at::Tensor &q, const bool is_wide, std::optional<at::Tensor> &out,
                                                 const bool return_mask, const int64_t batch_size,
                                                 const int64_t seqlen_q, const int64_t seqlen_k) {
    const auto rounded = [](const int64_t n) { return (n + 127) / 128 * 128; };
    return {out.has_value() ? out.value().zero_() : torch::zeros_like(q, is_wide ? at::kFloat : q.scalar_type()),
            torch::empty({0}, q.options().dtype(at::kFloat)),
            return_mask ? torch::zeros({batch_size, q.size(-2), rounded(seqlen_q), rounded(seqlen_k)}, q.options())
                        : torch::empty({0}, q.options()),
            torch::zeros({2}, q.options().dtype(at::kLong))};
}

inline std::vector<at::Tensor> gradients_of_nothing(at::Tensor &dq, at::Tensor &dk, at::Tensor &dv) {
    return {dq.zero_(), dk.zero_(), dv.zero_(), torch::empty({0}, dq.options().dtype(at::kFloat))};
}

// Zeroes the rows of packed tensors (total, heads, head_dim) before the first sequence and behind the last.
inline void zero_slack(const std::initializer_list<std::pair<at::Tensor, const int *>> tensors, const int batch_size,
                       cudaStream_t stream) {
    PackedTensors packed{};
    for (const auto &[tensor, cu_seqlens] : tensors) {
        packed.items[packed.size++] = {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), int(tensor.size(0)),
                                       int(tensor.size(1)), int(tensor.size(2)), cu_seqlens};
    }
    zero_slack_rows(packed, batch_size, stream);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

// The activation, the bias of the sigmoid (none is -log n) and its tensor; the normalization, its number, and its tensor
// for sequences and for rows; the slopes of the decay; the diagonals, and whether the results are float32. The tensors are
// contiguous, float32 but int32 for the diagonals. Without a score: the identity, without normalization.
using ScoreArguments = std::tuple<std::string, std::optional<float>, std::optional<at::Tensor>, std::optional<std::string>,
                                  float, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>,
                                  std::optional<at::Tensor>, bool>;

inline constexpr std::array kNormalizationNames{"", "1/n", "1/sqrt(n)", "1/visible"};  // in the order of the enum

template <typename Enum, size_t n>
Enum value_of(const std::string_view name, const std::array<const char *, n> &names) {
    for (size_t i = 0; i < n; ++i) {
        if (name == names[i]) { return Enum(i); }
    }
    TORCH_CHECK(false, "This flash attention build has no kernels for ", std::string(name), ": rebuild it");
}

inline const float *floats(const std::optional<at::Tensor> &tensor) {
    if (!tensor.has_value()) { return nullptr; }
    TORCH_CHECK(tensor->is_cuda() && tensor->is_contiguous() && tensor->scalar_type() == at::kFloat,
                "biases, factors and slopes must be contiguous float32 CUDA tensors");
    return tensor->data_ptr<float>();
}

// Fits the window of a call, or opens its sides if the call has a diagonal.
inline void fit_window(int &left, int &right, const int max_seqlen_q, const int max_seqlen_k,
                       const std::optional<ScoreArguments> &arguments) {
    if (arguments.has_value() && std::get<8>(*arguments).has_value()) { return open_sides(left, right); }
    fit_window(left, right, max_seqlen_q, max_seqlen_k);
}

// The stride between sequences of a tensor (h) or (b, h).
inline int batch_stride(const std::optional<at::Tensor> &by_head) {
    return by_head.has_value() && by_head->dim() == 2 ? by_head->size(1) : 0;
}

// A Score, and the memory that it points at beside its arguments.
struct HostScore : public Score {

    at::Tensor largest;

    HostScore(const std::optional<ScoreArguments> &arguments, const bool is_windowed) {
        if (!arguments.has_value()) { return; }
        const auto &[activation_name, bias, biases, normalization_name, number, of_sequences, of_rows, slopes, of_queries, wide]
            = *arguments;
        activation = value_of<Activation>(activation_name, kActivationNames);
        normalization = value_of<Normalization>(normalization_name.value_or(""), kNormalizationNames);
        // If every query sees every key, the two are the same.
        if (!is_windowed && normalization == Normalization::per_visible) { normalization = Normalization::per_n; }
        bias_is_minus_log_n = !bias.has_value();
        sigmoid_bias = bias.value_or(0.f);
        sigmoid_biases = floats(biases);
        sigmoid_biases_batch_stride = batch_stride(biases);
        decay_slopes = floats(slopes);
        decay_slopes_batch_stride = batch_stride(slopes);
        factor = number;
        sequence_factors = floats(of_sequences);
        row_factors = floats(of_rows);
        if (of_queries.has_value()) {
            TORCH_CHECK(of_queries->is_cuda() && of_queries->is_contiguous() && of_queries->scalar_type() == at::kInt,
                        "diagonals must be a contiguous int32 CUDA tensor");
            diagonals = of_queries->data_ptr<int>();
        }
        is_wide = wide;
    }

    // Makes a result, or a part of one: float32 ones are zero at first.
    at::Tensor empty(const at::IntArrayRef shape, const at::TensorOptions &options) const {
        return is_wide ? torch::zeros(shape, options.dtype(at::kFloat)) : torch::empty(shape, options);
    }

    at::Tensor empty_like(const at::Tensor &x) const { return is_wide ? empty(x.sizes(), x.options()) : torch::empty_like(x); }

    // Checks the results that the caller gave.
    void check_given(const std::initializer_list<std::optional<at::Tensor>> results) const {
        for (const auto &result : results) {
            TORCH_CHECK(!is_wide || !result.has_value(), "float32 results do not go into given tensors: leave them out");
        }
    }

    void refuse_pages_if_wide(const bool is_paged) const {
        TORCH_CHECK(!is_paged || !is_wide, "a call with pages has no float32 result");
    }

    void refuse_part() const {
        TORCH_CHECK(!is_wide && diagonals == nullptr, "a call with a cache has neither diagonals nor a float32 result");
    }

    // Whether it differs between heads. They can't become rows then.
    bool by_head() const { return sigmoid_biases != nullptr || decay_slopes != nullptr; }

    void set(Flash_fwd_params &params, const bool use_softmax, const bool heads_are_rows = false) {
        params.use_softmax = use_softmax;
        TORCH_CHECK(!use_softmax || (!is_wide && diagonals == nullptr), "diagonals and float32 results need use_softmax=False");
        if (use_softmax) { return; }
        rows_of_query = heads_are_rows ? params.seqlen_q : 1;
        params.softmax_lse_ptr = static_cast<Score *>(this);
    }

    void set_for_backward(Flash_bwd_params &params, const bool use_softmax, const at::TensorOptions &options,
                          cudaStream_t stream) {
        set(params, use_softmax);
        if (use_softmax || row_factors == nullptr) { return; }
        largest = torch::empty({params.b}, options.dtype(at::kFloat));
        largest_row_factors = largest.data_ptr<float>();
        find_largest_factors(largest.data_ptr<float>(), row_factors, params.cu_seqlens_q, params.b, params.seqlen_q, stream);
    }
};

////////////////////////////////////////////////////////////////////////////////////////////////////

template <typename Function, size_t... I>
void def_with_defaults(pybind11::module_ &m, const char *name, Function function, const char *doc,
                       std::index_sequence<I...>) {
    m.def(name, function, doc, (static_cast<void>(I), pybind11::arg())..., pybind11::arg("use_softmax") = true,
          pybind11::arg("score") = pybind11::none());
}

// `function` ends with use_softmax and score, which callers of upstream's positional signature leave out.
template <typename R, typename... Args>
void def_with_use_softmax(pybind11::module_ &m, const char *name, R (*function)(Args...), const char *doc) {
    def_with_defaults(m, name, function, doc, std::make_index_sequence<sizeof...(Args) - 2>{});
}

template <typename Item, size_t n>
pybind11::tuple names_of(const std::array<Item, n> &items) {
    pybind11::list names;
    for (const Item item : items) { names.append(built::name(item)); }
    return pybind11::tuple(names);
}

// Exports which kernels this build holds, for callers that choose a backend and for error messages.
inline void def_built_kernels(pybind11::module_ &m) {
    m.attr("has_use_softmax") = true;
    m.attr("built_with_softmax") = built::with_softmax;
    m.attr("built_head_dims") = pybind11::tuple(pybind11::cast(built::head_dims));
    m.attr("built_dtypes") = names_of(built::dtypes);
    m.attr("built_passes") = names_of(built::passes);
    m.attr("built_archs") = pybind11::tuple(pybind11::cast(built::archs));
}

}  // namespace FLASH_NAMESPACE
