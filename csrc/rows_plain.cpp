// The vector loops compiled for what every processor of the kind has.
#include "rows.h"

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#define LEVEL 0  // of the instructions: 256 AVX2, 512 AVX-512, 516 AVX-512 with bf16
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace planlm::plain {
#include "rows.inl"
template const Rows<float>& table<float>();
template const Rows<double>& table<double>();
}  // namespace planlm::plain
