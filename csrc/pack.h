// Panels of bf16 matrices as processors multiply them: adjacent pairs of rows, interleaved, so that a 32-bit word holds two
// values of a column.
#pragma once

#include "vector.h"

namespace planlm {

// Packs `depth` rows of `width` values, `step` apart; `depth` is even.
inline void pack(const void* from, int64_t step, void* to, int64_t depth, int64_t width) {
  const auto* row = static_cast<const uint16_t*>(from);
  auto* out = static_cast<uint32_t*>(to);
  for (int64_t k = 0; k < depth; k += 2, row += 2 * step, out += width)
    for (int64_t n = 0; n < width; ++n) out[n] = uint32_t(row[n]) | uint32_t(row[n + step]) << 16;
}

// Eight words of each, in turns, from word `o` on.
#if defined(__clang__)
#define ZIP(a, b, o)                                                                                              \
  __builtin_shufflevector(a, b, o, o + 16, o + 1, o + 17, o + 2, o + 18, o + 3, o + 19, o + 4, o + 20, o + 5, o + 21, \
                          o + 6, o + 22, o + 7, o + 23)
#else
#define ZIP(a, b, o) \
  __builtin_shuffle(a, b, Lanes<float>::Bits{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23} + o)
#endif

// 16 rows of 16 words, `step` bytes apart, written as 16 columns, `width` words apart: four times the first half of the
// rows is dealt out between the second.
INLINE void transpose(const char* from, int64_t step, uint32_t* to, int64_t width) {
  using Bits = Lanes<float>::Bits;
  Bits now[16], next[16];
  for (int i = 0; i < 16; ++i) now[i] = take<Bits>(from + i * step);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = ZIP(now[i], now[i + 8], 0);
      next[2 * i + 1] = ZIP(now[i], now[i + 8], 8);
    }
    for (int i = 0; i < 16; ++i) now[i] = next[i];
  }
  for (int i = 0; i < 16; ++i) put(to + i * width, now[i]);
}

// Packs a matrix that is given as its transpose, `width` rows of `depth` values. Of a matrix of 32-bit words, taken as
// pairs of bf16, this is the transpose.
inline void pack_transposed(const void* from, int64_t step, void* to, int64_t depth, int64_t width) {
  const auto* row = static_cast<const char*>(from);
  auto* out = static_cast<uint32_t*>(to);
  const int64_t pairs = depth / 2;
  for (int64_t n = 0; n < width; n += 16)
    for (int64_t k = 0; k < pairs; k += 16)
      if (n + 16 <= width && k + 16 <= pairs)
        transpose(row + n * step * 2 + k * 4, step * 2, out + k * width + n, width);
      else
        for (int64_t i = n; i < n + 16 && i < width; ++i)
          for (int64_t j = k; j < k + 16 && j < pairs; ++j) out[j * width + i] = take<uint32_t>(row + i * step * 2 + j * 4);
}

}  // namespace planlm
