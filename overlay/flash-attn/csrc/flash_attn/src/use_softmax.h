// What flash_api.cpp needs for its trailing use_softmax argument: checks, outputs that do not exist without softmax,
// and Python bindings that keep callers of upstream's positional signatures working.

#pragma once

#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>

#include <torch/python.h>

#include "built_kernels.h"
#include "kernel_dispatch.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

// For messages, in place of a stream: streaming a floating-point number crashes in an extension that its toolchain links
// with a libstdc++ of its own, since torch brings another one into the process.
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

// There is no log-sum-exp without softmax: an empty tensor, never uninitialised memory.
inline at::Tensor empty_unless(const bool exists, const at::IntArrayRef shape, const at::TensorOptions &options) {
    return torch::empty(exists ? shape : at::IntArrayRef({0}), options.dtype(at::kFloat));
}

// Sums the gradients of the query heads that share a key head. Without softmax a sum over heads may leave the range of
// fp16, and saturates.
inline void sum_groups(at::Tensor &out, const at::Tensor &expanded, const at::IntArrayRef dim, const bool use_softmax) {
    if (use_softmax || out.scalar_type() != at::kHalf) {
        at::sum_out(out, expanded, dim);
    } else {
        const double largest = std::numeric_limits<at::Half>::max();
        out.copy_(at::sum(expanded, dim, /*keepdim=*/false, at::kFloat).clamp_(-largest, largest));
    }
}

////////////////////////////////////////////////////////////////////////////////////////////////////

template <typename Function, size_t... I>
void def_with_default(pybind11::module_ &m, const char *name, Function function, const char *doc,
                      std::index_sequence<I...>) {
    m.def(name, function, doc, (static_cast<void>(I), pybind11::arg())..., pybind11::arg("use_softmax") = true);
}

// `function` ends with use_softmax, which callers of upstream's positional signature leave out.
template <typename R, typename... Args>
void def_with_use_softmax(pybind11::module_ &m, const char *name, R (*function)(Args...), const char *doc) {
    def_with_default(m, name, function, doc, std::make_index_sequence<sizeof...(Args) - 1>{});
}

template <typename Item, size_t n>
pybind11::tuple names_of(const std::array<Item, n> &items) {
    pybind11::list names;
    for (const Item item : items) { names.append(built::name(item)); }
    return pybind11::tuple(names);
}

// What this build holds, for callers that choose a backend and for error messages.
inline void def_built_kernels(pybind11::module_ &m) {
    m.attr("has_use_softmax") = true;
    m.attr("built_with_softmax") = built::with_softmax;
    m.attr("built_head_dims") = pybind11::tuple(pybind11::cast(built::head_dims));
    m.attr("built_dtypes") = names_of(built::dtypes);
    m.attr("built_passes") = names_of(built::passes);
    m.attr("built_archs") = pybind11::tuple(pybind11::cast(built::archs));
}

}  // namespace FLASH_NAMESPACE
