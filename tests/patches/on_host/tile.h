// A tile of bf16 of the CUDA kernels, compiled for the CPU.

#pragma once

#include "cuda_names.h"

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/layout/layout.h>
#include <cutlass/numeric_types.h>

#define __CUDA_ARCH__ 800  // Older ones have neither bf16 nor the tiles' products.
#include "kernel_traits.h"
#undef __CUDA_ARCH__
#include "utils.h"

#define asm(...)  // Of conversions to fp16: the tile is bf16.
#include "nosoftmax.h"
#undef asm

namespace {

using namespace flash;

struct Sequence {
    int actual_seqlen_q, actual_seqlen_k;
    int64_t q_offset(int64_t, int64_t, int) const { return 0; }
};

}  // namespace
