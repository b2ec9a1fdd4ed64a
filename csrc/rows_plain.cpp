// The vector loops compiled for what every processor of the kind has.
#include "rows.h"

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#define STREAM_BYTES 0  // the longest vector that can be written past the caches
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace planlm::plain {
#include "rows.inl"
template const Rows<float>& table<float>();
template const Rows<double>& table<double>();
}  // namespace planlm::plain
