// The vector loops compiled for avx2,fma,bmi2.
#if defined(__x86_64__)
#include "rows.h"

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

#define LEVEL 256  // of the instructions: 256 AVX2, 512 AVX-512, 516 AVX-512 with bf16
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace planlm::avx2 {
#include "rows.inl"
template const Rows<float>& table<float>();
template const Rows<double>& table<double>();
}  // namespace planlm::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
