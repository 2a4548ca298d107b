// Conversions to 16 bit that saturate, for kernels without softmax. Softmax bounds P by 1. Without it nothing bounds P,
// and fp16 holds no more than 65504. bf16 has the range of fp32 and needs none of this.

#pragma once

#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include "activations.h"
#include "namespace_config.h"
#include "utils.h"

namespace FLASH_NAMESPACE {

using namespace cute;

// Turns an infinity into NaN and leaves all else unchanged, with one FFMA: 2x - x is x, and NaN for an infinity. Finite
// inputs in fp16 give finite sums in fp32, so an infinity came from an input, and saturation would hide it.
__forceinline__ __device__ float show_infinity(const float x) { return __fmaf_rn(x, 2.f, -x); }

// Clamps to the finite range of fp16. NaN stays NaN.
__forceinline__ __device__ float limit_to_half(float x) {
    asm("min.NaN.f32 %0, %0, %1;\n" : "+f"(x) : "f"(65504.f));
    asm("max.NaN.f32 %0, %0, %1;\n" : "+f"(x) : "f"(-65504.f));
    return x;
}

// Converts two floats to fp16. With Saturates, numbers that are too large and infinities become the largest finite
// number. Without, they become infinite. NaN stays NaN.
template <bool Saturates>
__forceinline__ __device__ uint32_t convert_to_half2(float2 a) {
    uint32_t out;
    if constexpr (Saturates) {
        #if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1)
            asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(a.y), "f"(a.x));
            return out;
        #else  // That instruction needs PTX ISA 8.1.
            a = make_float2(limit_to_half(a.x), limit_to_half(a.y));
        #endif
    }
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(a.y), "f"(a.x));
    return out;
}

// Rounds two weights to 16 bits, and saturates them in fp16. With Is_clamped, those below 0 become 0, by the same
// instruction. NaN stays NaN.
template <typename To_type, bool Is_clamped=false>
__forceinline__ __device__ uint32_t convert_weights(float first, float second) {
    constexpr bool Is_half = std::is_same_v<To_type, cutlass::half_t>;
    if constexpr (Is_clamped) {
        #if defined(__CUDACC__) && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1))
            uint32_t out;
            if constexpr (Is_half) {
                asm("cvt.rn.relu.satfinite.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(second), "f"(first));
            } else {
                asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(second), "f"(first));
            }
            return out;
        #else
            first = machine::max(first, 0.f);
            second = machine::max(second, 0.f);
        #endif
    }
    if constexpr (Is_half) {
        return convert_to_half2</*Saturates=*/true>(make_float2(first, second));
    } else {
        cutlass::NumericArrayConverter<To_type, float, 2> convert;
        const float pair[2] = {first, second};
        const auto converted = convert(*reinterpret_cast<const cutlass::Array<float, 2> *>(pair));
        return *reinterpret_cast<const uint32_t *>(&converted);
    }
}

// convert_type for fp16, saturating or not: `saturates` is uniform over the grid. If true, it hides infinities: call
// show_infinity first where they can occur.
template <typename To_type, typename Engine, typename Layout>
__forceinline__ __device__ auto convert_to_half(Tensor<Engine, Layout> const &tensor, const bool saturates) {
    static_assert(std::is_same_v<To_type, cutlass::half_t> && std::is_same_v<float, typename Engine::value_type>);
    static_assert(decltype(size(tensor))::value % 2 == 0);
    Tensor pairs = recast<float2>(tensor);
    Tensor out = make_tensor<To_type>(tensor.layout());
    Tensor out_pairs = recast<uint32_t>(out);
    if (saturates) {
        #pragma unroll
        for (int i = 0; i < size(out_pairs); ++i) { out_pairs(i) = convert_to_half2</*Saturates=*/true>(pairs(i)); }
    } else {
        #pragma unroll
        for (int i = 0; i < size(out_pairs); ++i) { out_pairs(i) = convert_to_half2</*Saturates=*/false>(pairs(i)); }
    }
    return out;
}

// Converts to 16 bits, saturating in fp16, into a tensor with the same layout in registers.
template <typename Engine0, typename Layout0, typename Engine1, typename Layout1>
__forceinline__ __device__ void convert_saturating(Tensor<Engine0, Layout0> const &tensor, Tensor<Engine1, Layout1> &out) {
    using To_type = typename Engine1::value_type;
    constexpr int kSize = decltype(size(tensor))::value;
    if constexpr (std::is_same_v<To_type, cutlass::half_t>) {
        cute::copy(FLASH_NAMESPACE::convert_to_half<To_type>(tensor, /*saturates=*/true), out);
    } else {
        cutlass::NumericArrayConverter<To_type, float, kSize> convert;
        *reinterpret_cast<cutlass::Array<To_type, kSize> *>(out.data()) =
            convert(*reinterpret_cast<const cutlass::Array<float, kSize> *>(tensor.data()));
    }
}

// convert_type for numbers that saturate in fp16 if they are finite, while infinities become NaN.
template <typename To_type, typename Engine, typename Layout>
__forceinline__ __device__ auto convert_finite_saturating(Tensor<Engine, Layout> &tensor, const bool saturates=true) {
    if constexpr (std::is_same_v<To_type, cutlass::half_t>) {
        #pragma unroll
        for (int i = 0; i < size(tensor); ++i) { tensor(i) = show_infinity(tensor(i)); }
        return FLASH_NAMESPACE::convert_to_half<To_type>(tensor, saturates);
    } else {
        return FLASH_NAMESPACE::convert_type<To_type>(tensor);
    }
}

// Saturates before convert_type, because rotary embedding may make finite fp16 numbers sqrt(2) times as large.
template <typename To_type, typename Engine, typename Layout>
__forceinline__ __device__ void saturate(Tensor<Engine, Layout> &tensor) {
    if constexpr (std::is_same_v<To_type, cutlass::half_t>) {
        #pragma unroll
        for (int i = 0; i < size(tensor); ++i) { tensor(i) = limit_to_half(show_infinity(tensor(i))); }
    }
}

}  // namespace FLASH_NAMESPACE
