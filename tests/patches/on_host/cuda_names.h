// CUDA's names for g++: device code runs as host code, one thread after another.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>
#include <cuda_fp16.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;
using std::max;
using std::min;
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
// CUTLASS names these in templates that nothing here instantiates.
int __dp4a(int, int, int);
uint32_t __byte_perm(uint32_t, uint32_t, uint32_t);
__half2 __hfma2(__half2, __half2, __half2);
