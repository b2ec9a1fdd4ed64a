// Sums over the rows of a matrix, and a row plus another.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace planlm {

// total = sum of those of `num_rows` rows, `step` elements apart, whose id is not negative, in their order. One row after
// the other: processors fetch ahead along a single stream, and four rows at a time took twice as long.
template <class R>
void sum_block(R* total, Strip first, int64_t step, const int64_t* ids, int64_t num_rows, int64_t count) {
  std::fill_n(total, count, R(0));
  with_type<R>(first, [&](auto* row) INLINE_LAMBDA {
    for (int64_t t = 0; t < num_rows; ++t, row += step) {
      if (ids[t] < 0) continue;
      const auto add = [&](int64_t i, int64_t used) INLINE_LAMBDA {
        write<R>(total + i, read<R>(total + i, used) + read<R>(row + i, used), used);
      };
      int64_t i = 0;
      for (; i + 2 * lanes<R> <= count; i += 2 * lanes<R>) {
        add(i, lanes<R>);
        add(i + lanes<R>, lanes<R>);
      }
      for (; i < count; i += lanes<R>) add(i, std::min(lanes<R>, count - i));
    }
  });
}

// The same for any number of rows: 32 at a time, and those sums in double. One float32 sum of thousands of equal values
// is off by 1e-4.
template <class R>
void sum_rows(R* total, Strip first, int64_t step, const int64_t* ids, int64_t num_rows, int64_t count) {
  constexpr int64_t block = 32;
  if (num_rows <= block) return sum_block(total, first, step, ids, num_rows, count);
  std::vector<double> whole(count, 0.0);
  for (int64_t row = 0; row < num_rows; row += block) {
    sum_block(total, first + row * step, step, ids + row, std::min(block, num_rows - row), count);
    for (int64_t i = 0; i < count; ++i) whole[i] += total[i];
  }
  std::copy(whole.begin(), whole.end(), total);
}

// strip = values * gate; gate may be null.
template <class R>
void store(const R* values, const R* gate, Strip strip, int64_t count) {
  with_type<R>(strip, [&](auto* to) INLINE_LAMBDA {
    each_vector<R>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
      Vector<R> v = read<R>(values + i, used);
      if (gate) v *= read<R>(gate + i, used);
      write<R>(to + i, v, used);
    });
  });
}

// out = x + gate * plan, in one rounding; gate may be null, x and out are of one kind. `streamed`: past the caches, where
// `out` is aligned for it.
template <class R>
void add_row(Strip x, Strip plan, const R* gate, Strip out, int64_t count, bool streamed) {
  streamed = streamed && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  with_type<R>(x, [&](auto* from) INLINE_LAMBDA {
    with_type<R>(plan, [&](auto* added) INLINE_LAMBDA {
      auto* const to = static_cast<decltype(from)>(out.data);
      each_vector<R>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
        Vector<R> v = read<R>(added + i, used);
        if (gate) v *= read<R>(gate + i, used);
        write<R>(to + i, read<R>(from + i, used) + v, used, streamed);
      });
    });
  });
}

}  // namespace planlm
