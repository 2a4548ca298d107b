// Says which kernels this build holds. kernel_build.py passes the lists as macros. A call of any other kernel gets an
// error that names the build option, and never an undefined symbol.

#pragma once

#include <array>
#include <string>
#include <type_traits>

#include <c10/util/Exception.h>
#include <cutlass/numeric_types.h>

#include "hardware_info.h"
#include "namespace_config.h"

namespace FLASH_NAMESPACE {

namespace built {

enum Dtype { fp16, bf16 };
enum Pass { fwd, bwd, splitkv };

inline constexpr std::array head_dims{FLASH_BUILT_HEAD_DIMS};
inline constexpr std::array dtypes{FLASH_BUILT_DTYPES};
inline constexpr std::array passes{FLASH_BUILT_PASSES};
inline constexpr std::array archs{FLASH_BUILT_ARCHS};  // compute capabilities with machine code, such as 80 and 90
inline constexpr bool with_softmax = FLASH_BUILT_WITH_SOFTMAX;

inline const char *name(const Dtype dtype) { return dtype == fp16 ? "fp16" : "bf16"; }
inline const char *name(const Pass pass) { return pass == fwd ? "fwd" : pass == bwd ? "bwd" : "splitkv"; }

template <typename List, typename Item>
constexpr bool holds(const List &list, const Item item) {
    for (const Item held : list) {
        if (held == item) { return true; }
    }
    return false;
}

template <typename T>
inline constexpr Dtype dtype_of = std::is_same_v<T, cutlass::half_t> ? fp16 : bf16;

}  // namespace built

template <built::Pass pass, typename T, int kHeadDim>
inline constexpr bool kIsBuilt = built::holds(built::passes, pass) && built::holds(built::dtypes, built::dtype_of<T>)
    && built::holds(built::head_dims, kHeadDim);

// Numbers become text here and not in the stream of the message, which crashes if the extension has its own libstdc++
// beside torch's.

// Machine code runs on its own major version, from its minor version on.
inline void check_arch_built() {
    const auto [major, minor] = get_compute_capability(get_current_device());
    std::string names;
    for (const int arch : built::archs) {
        if (arch / 10 == major && arch % 10 <= minor) { return; }
        names += (names.empty() ? "" : ";") + std::to_string(arch);
    }
    TORCH_CHECK(false, "This flash attention build is for compute capabilities ", names, " and this GPU has ",
                std::to_string(major), ".", std::to_string(minor), ": rebuild with ARCHS=", std::to_string(major * 10));
}

template <built::Pass pass, typename T, int kHeadDim>
void check_built(const bool use_softmax) {
    constexpr built::Dtype dtype = built::dtype_of<T>;
    const std::string build = "This flash attention build has no kernels ";
    TORCH_CHECK(built::holds(built::dtypes, dtype), build, "for ", name(dtype),
                ": rebuild with DTYPES=", name(dtype), " added, or without DTYPES");
    TORCH_CHECK(built::holds(built::head_dims, kHeadDim), build, "for head dimensions up to ", std::to_string(kHeadDim),
                ": rebuild with HEAD_DIMS=", std::to_string(kHeadDim), " added, or without HEAD_DIMS");
    TORCH_CHECK(built::holds(built::passes, pass), build, "for the pass ", name(pass),
                ": rebuild with PASSES=", name(pass), " added, or without PASSES");
    TORCH_CHECK(built::with_softmax || !use_softmax, build,
                "with softmax: pass use_softmax=False, or rebuild without NO_SOFTMAX_ONLY");
    check_arch_built();
}

}  // namespace FLASH_NAMESPACE
