// The activations f of attention without softmax, elementwise in float32: f(s) and f'(s) for s = scale * x. The formulas
// and their constants are those of flash_attn/cute/nosoftmax/formulas.py, which says where they come from.
//
// To add an activation: write a functor, and name it in the enum, in kActivationNames and in with_activation.

#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "namespace_config.h"

namespace FLASH_NAMESPACE {

enum class Activation : unsigned char { identity, relu, relu2, sigmoid, silu, gelu, softplus };

// In the order of the enum, as score.py spells them.
inline constexpr std::array kActivationNames{"identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus"};

namespace machine {

#ifdef __CUDACC__

#define NOSOFTMAX_DEVICE __forceinline__ __device__
NOSOFTMAX_DEVICE float tanh(const float x) { float y; asm("tanh.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x)); return y; }
NOSOFTMAX_DEVICE float exp2(const float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x)); return y; }
NOSOFTMAX_DEVICE float rcp(const float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x)); return y; }
NOSOFTMAX_DEVICE float fma(const float x, const float y, const float z) { return __fmaf_rn(x, y, z); }
// These two are never made one instruction.
NOSOFTMAX_DEVICE float mul(const float x, const float y) { return __fmul_rn(x, y); }
NOSOFTMAX_DEVICE float add(const float x, const float y) { return __fadd_rn(x, y); }
// x where y > 0, NaN where y is NaN, and else 0: a comparison, and an instruction that runs where it fails.
NOSOFTMAX_DEVICE float where_positive(float x, const float y) {
    asm("{ .reg .pred p; setp.gt.f32 p, %1, 0f00000000; @!p max.NaN.f32 %0, %1, 0f00000000; }\n" : "+f"(x) : "f"(y));
    return x;
}
// NaN stays NaN.
NOSOFTMAX_DEVICE float max(const float x, const float y) { float z; asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(z) : "f"(x), "f"(y)); return z; }

#else  // As host code, for a test without a GPU.

#define NOSOFTMAX_DEVICE inline
NOSOFTMAX_DEVICE float tanh(const float x) { return std::tanh(x); }
NOSOFTMAX_DEVICE float exp2(const float x) { return std::exp2(x); }
NOSOFTMAX_DEVICE float rcp(const float x) { return 1.f / x; }
NOSOFTMAX_DEVICE float fma(const float x, const float y, const float z) { return std::fma(x, y, z); }
NOSOFTMAX_DEVICE float mul(const float x, const float y) { return x * y; }
NOSOFTMAX_DEVICE float add(const float x, const float y) { return x + y; }
NOSOFTMAX_DEVICE float max(const float x, const float y) { return x != x ? x : x > y ? x : y; }
NOSOFTMAX_DEVICE float where_positive(const float x, const float y) { return y > 0.f ? x : y != y ? y : 0.f; }

#endif

}  // namespace machine

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kMaxRelu2Score = 68719476736.f;  // 2^36: score.py, "Finite in, finite out"
// Below this bias, sigmoid is too small for (1 + tanh) / 2: tanh.approx has an error of 2^-11 near 1.
inline constexpr float kMinBiasForTanh = -2.f;

// A functor has value(x), and value(x, derivative), which also sets f'(s). kIsLong: code for each of a thread's many
// scores is not worth its size. NaN gives NaN in both. An infinite score gives
// Inf or NaN, unless f maps it to a finite number.

// Without a scale, which the caller has applied or left for the end.
struct Identity {
    static constexpr bool kIsLong = false;

    NOSOFTMAX_DEVICE float value(const float x) const { return x; }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        derivative = 1.f;
        return x;
    }
};

// For scale = 1, or where a positive scale is left for the end.
struct PlainRelu {
    static constexpr bool kIsLong = false;

    NOSOFTMAX_DEVICE float value(const float x) const { return machine::max(x, 0.f); }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        const float p = value(x);
        derivative = p > 0.f ? 1.f : p;  // p is 0 or NaN there
        return p;
    }
};

struct Relu {
    static constexpr bool kIsLong = false;
    const float scale;

    NOSOFTMAX_DEVICE float value(const float x) const { return machine::max(scale * x, 0.f); }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        return PlainRelu{}.value(scale * x, derivative);
    }
};

struct Relu2 {
    static constexpr bool kIsLong = false;
    const float scale;

    // s * 0 restores the NaN or Inf that the clamp lost, as NaN.
    NOSOFTMAX_DEVICE float value(const float x) const {
        const float s = scale * x, r = fminf(fmaxf(s, 0.f), kMaxRelu2Score);
        return machine::fma(s, 0.f, r * r);
    }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        derivative = 2.f * machine::max(scale * x, 0.f);
        return value(x);
    }
};

// sigmoid(s + bias) = 1/2 + 1/2 tanh((s + bias) / 2)
struct SigmoidByTanh {
    static constexpr bool kIsLong = false;
    const float half_scale, half_bias;

    NOSOFTMAX_DEVICE float value(const float x) const {
        return machine::fma(0.5f, machine::tanh(machine::fma(x, half_scale, half_bias)), 0.5f);
    }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        const float t = machine::tanh(machine::fma(x, half_scale, half_bias));
        derivative = machine::fma(-0.25f * t, t, 0.25f);
        return machine::fma(0.5f, t, 0.5f);
    }
};

// sigmoid(s + bias) = 1 / (1 + 2^(-(s + bias) log2 e)), accurate where it is small.
struct SigmoidByExp2 {
    static constexpr bool kIsLong = false;
    const float minus_scale, minus_bias;  // times log2 e

    NOSOFTMAX_DEVICE float value(const float x) const {
        return machine::rcp(1.f + machine::exp2(machine::fma(x, minus_scale, minus_bias)));
    }

    // sigmoid(y) sigmoid(-y), because p - p^2 would lose its digits where p is about 1. The limit avoids Inf * 0.
    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        const float e = machine::exp2(machine::fma(x, minus_scale, minus_bias)), p = machine::rcp(1.f + e);
        derivative = fminf(e, 1.2676506e30f) * p * p;
        return p;
    }
};

// silu(2y) = y + y tanh(y)
struct Silu {
    static constexpr bool kIsLong = false;
    const float half_scale;

    NOSOFTMAX_DEVICE float value(const float x) const {
        const float y = x * half_scale;
        return machine::fma(y, machine::tanh(y), y);
    }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        const float y = x * half_scale, t = machine::tanh(y);
        derivative = 0.5f * machine::fma(y, machine::fma(-t, t, 1.f), 1.f + t);
        return machine::fma(y, t, y);
    }
};

// s Phi(s) = max(s, 0) - |s| Phi(-|s|), with Phi(-|s|) = e^(-s^2 / 2) t P(t), which keeps its digits in the tail.
struct Gelu {
    static constexpr bool kIsLong = true;
    const float scale;

    NOSOFTMAX_DEVICE float value(const float x) const {
        float density;
        const float s = scale * x;
        return machine::fma(-fabsf(s), tail(s, density), machine::max(s, 0.f));
    }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        float density;
        const float s = scale * x, h = tail(s, density);
        derivative = machine::fma(density * 0.3989422804f, s, s > 0.f ? 1.f - h : h);
        return machine::fma(-fabsf(s), h, machine::max(s, 0.f));
    }

private:

    // Returns Phi(-|s|), and sets `density` to e^(-s^2 / 2).
    static NOSOFTMAX_DEVICE float tail(const float s, float &density) {
        const float t = machine::rcp(machine::fma(fabsf(s), 0.375f, 1.f));
        density = machine::exp2(s * s * (-0.5f * kLog2E));
        float p = -0.0906432187f;
        p = machine::fma(p, t, 0.2002825670f);
        p = machine::fma(p, t, 0.0835633490f);
        p = machine::fma(p, t, 0.1577342061f);
        p = machine::fma(p, t, 0.1490610035f);
        return density * t * p;
    }
};

// log(1 + e^s) = max(s, 0) + log1p(e^-|s|); its derivative is the sigmoid.
struct Softplus {
    static constexpr bool kIsLong = true;
    const float scale;

    NOSOFTMAX_DEVICE float value(const float x) const {
        const float s = scale * x;
        return sum(s, machine::exp2(fabsf(s) * -kLog2E));
    }

    NOSOFTMAX_DEVICE float value(const float x, float &derivative) const {
        const float s = scale * x, e = machine::exp2(fabsf(s) * -kLog2E), p = machine::rcp(1.f + e);
        derivative = s > 0.f ? p : e * p;
        return sum(s, e);
    }

private:

    static NOSOFTMAX_DEVICE float sum(const float s, const float e) {
        float p = 0.0413473179f;
        p = machine::fma(p, e, -0.1574272832f);
        p = machine::fma(p, e, 0.3063010184f);
        p = machine::fma(p, e, -0.4969778394f);
        p = machine::fma(p, e, 0.9999432813f);
        return machine::fma(e, p, machine::max(s, 0.f));
    }
};

// The activations that have kernels of their own: fewer instructions a score than the functors above.
//
// value(x) returns f, and value(x, slope) sets what times_slope(dp, slope) needs, too. Both lack factors that wait for the sums: f has
// weights_at_end on dV, and f' slopes_at_end on dQ and dK. The score is scale * x, scale within [kLeastOwnScale,
// kMostOwnScale]. kIsClamped: f is max(value, 0), for the conversion to 16 bits. kHidesSlopes: where f hides a score,
// times_slope gives 0, also for a NaN in dp.
inline constexpr float kLeastOwnScale = 1.f / 65536, kMostOwnScale = 65536.f;
// relu2's weights then lack the square of the scale. 2^17 of the largest, times values of 1e9, still fit float32.
inline constexpr float kLeastOwnScaleOfRelu2 = 1.f / 16;
static_assert(double(kMaxRelu2Score) * kMaxRelu2Score / (kLeastOwnScaleOfRelu2 * kLeastOwnScaleOfRelu2) * 1e9 * 131072
              < std::numeric_limits<float>::max());
// A score that each of these f maps to 0 with every such scale. Infinity would make silu NaN.
inline constexpr float kHiddenScore = -18446744073709551616.f;  // -2^64

template <Activation activation> struct Own { static constexpr bool kExists = false, kHidesSlopes = false; };

template <> struct Own<Activation::relu> {
    static constexpr bool kExists = true, kIsClamped = true, kHidesSlopes = true;

    NOSOFTMAX_DEVICE Own(float, float) {}
    NOSOFTMAX_DEVICE float value(const float x) const { return x; }
    NOSOFTMAX_DEVICE float value(const float x, float &slope) const { return slope = x; }
    static NOSOFTMAX_DEVICE float times_slope(const float dp, const float slope) { return machine::where_positive(dp, slope); }
    static NOSOFTMAX_DEVICE float weights_at_end(const float scale) { return scale; }
    static float slopes_at_end(float) { return 1.f; }
};

template <> struct Own<Activation::relu2> {
    static constexpr bool kExists = true, kIsClamped = false, kHidesSlopes = false;
    const float limit;

    NOSOFTMAX_DEVICE Own(const float scale, float) : limit(kMaxRelu2Score / scale) {}
    NOSOFTMAX_DEVICE float value(const float x) const {
        float slope;
        return value(x, slope);
    }
    NOSOFTMAX_DEVICE float value(const float x, float &slope) const {
        slope = machine::max(x, 0.f);
        const float r = fminf(slope, limit);
        return machine::fma(slope, 0.f, r * r);  // NaN where the clamp lost NaN or Inf
    }
    static NOSOFTMAX_DEVICE float times_slope(const float dp, const float slope) { return dp * slope; }
    static NOSOFTMAX_DEVICE float weights_at_end(const float scale) { return scale * scale; }
    static float slopes_at_end(const float scale) { return 2.f * scale; }
};

template <> struct Own<Activation::sigmoid> {  // bias >= kMinBiasForTanh
    static constexpr bool kExists = true, kIsClamped = false, kHidesSlopes = false;
    const float half_scale, half_bias;

    NOSOFTMAX_DEVICE Own(const float scale, const float bias) : half_scale(0.5f * scale), half_bias(0.5f * bias) {}
    // Two instructions for x * half_scale + half_bias: with one, nvcc takes all of a tile's tanh before its products have
    // ended, and spills.
    NOSOFTMAX_DEVICE float value(const float x) const {
        return machine::fma(0.5f, machine::tanh(machine::add(machine::mul(x, half_scale), half_bias)), 0.5f);
    }
    NOSOFTMAX_DEVICE float value(const float x, float &slope) const {
        const float p = machine::fma(0.5f, machine::tanh(machine::fma(x, half_scale, half_bias)), 0.5f);
        slope = machine::fma(-p, p, p);
        return p;
    }
    static NOSOFTMAX_DEVICE float times_slope(const float dp, const float slope) { return dp * slope; }
    static NOSOFTMAX_DEVICE float weights_at_end(float) { return 1.f; }
    static float slopes_at_end(float) { return 1.f; }
};

template <> struct Own<Activation::silu> {  // f' = g + f (1 - g), with g = sigmoid(s)
    static constexpr bool kExists = true, kIsClamped = false, kHidesSlopes = false;
    const float half_scale;

    NOSOFTMAX_DEVICE Own(const float scale, float) : half_scale(0.5f * scale) {}
    NOSOFTMAX_DEVICE float value(const float x) const {
        float slope;
        return value(x, slope);
    }
    NOSOFTMAX_DEVICE float value(const float x, float &slope) const {
        const float y = x * half_scale, t = machine::tanh(y), p = machine::fma(y, t, y), g = machine::fma(0.5f, t, 0.5f);
        slope = machine::fma(p, 1.f - g, g);
        return p;
    }
    static NOSOFTMAX_DEVICE float times_slope(const float dp, const float slope) { return dp * slope; }
    static NOSOFTMAX_DEVICE float weights_at_end(float) { return 1.f; }
    static float slopes_at_end(float) { return 1.f; }
};

// Whether f(scale * x) = scale * f(x), so that the scale can wait for the end.
NOSOFTMAX_DEVICE bool scales_at_end(const Activation activation, const float scale) {
    return activation == Activation::identity || (activation == Activation::relu && scale > 0.f);
}

// Calls visit with the functor of an activation. A choice at run time, the same for all threads. With At_end, the functor
// leaves the scale out wherever scales_at_end. Without, the scale has to be 1 for the identity.
template <bool At_end, typename Visit>
NOSOFTMAX_DEVICE void with_activation(const Activation activation, const float scale, const float bias, Visit visit) {
    switch (activation) {
        case Activation::relu:
            if (At_end && scale > 0.f) { return visit(PlainRelu{}); }
            return visit(Relu{scale});
        case Activation::relu2: return visit(Relu2{scale});
        case Activation::silu: return visit(Silu{0.5f * scale});
        case Activation::gelu: return visit(Gelu{scale});
        case Activation::softplus: return visit(Softplus{scale});
        case Activation::sigmoid:
            if (bias >= kMinBiasForTanh) { return visit(SigmoidByTanh{0.5f * scale, 0.5f * bias}); }
            return visit(SigmoidByExp2{-kLog2E * scale, -kLog2E * bias});
        case Activation::identity: return visit(Identity{});
    }
}

}  // namespace FLASH_NAMESPACE
