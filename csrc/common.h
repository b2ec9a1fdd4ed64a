// What the operators share: from tensors to strips of memory, and errors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"

// Broken promises of the Python side, which has checked the user's arguments: never seen unless there is a bug.
#define PLANLM_EXPECT(condition, ...) TORCH_INTERNAL_ASSERT(condition, "planlm: ", __VA_ARGS__)

namespace planlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Kind::f32;
    case at::kBFloat16: return Kind::bf16;
    case at::kDouble: return Kind::f64;
    default: PLANLM_EXPECT(false, "no loops for ", tensor.scalar_type());
  }
}

// A matrix with adjacent columns as memory, or none. Loops that run in several threads see this and never a tensor: a thread
// of at::parallel_for knows nothing of its caller's modes (inference, gradients, autocast), on which tensors depend.
struct Matrix {
  void* data = nullptr;
  Kind kind = Kind::f32;
  int64_t rows = 0, columns = 0, step = 0;  // elements from row to row

  Matrix() = default;
  Matrix(void* data_, Kind kind_, int64_t rows_, int64_t columns_, int64_t step_)
      : data(data_), kind(kind_), rows(rows_), columns(columns_), step(step_) {}
  explicit Matrix(const Tensor& tensor) {
    if (!tensor.defined()) return;
    *this = {tensor.data_ptr(), kind_of(tensor), tensor.size(0), tensor.size(1),
             tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1)};
  }

  explicit operator bool() const { return data != nullptr; }
  Strip strip(int64_t row, int64_t column = 0) const {
    return data ? Strip{data, kind} + (row * step + column) : Strip{};
  }
  template <class T>
  T* at(int64_t row, int64_t column = 0) const {
    return static_cast<T*>(data) + row * step + column;
  }
  Matrix part(int64_t row, int64_t num_rows, int64_t column, int64_t num_columns) const {
    return data ? Matrix{strip(row, column).data, kind, num_rows, num_columns, step} : Matrix{};
  }
};

inline Tensor given(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }

inline Tensor with_adjacent_columns(const Tensor& matrix) {
  return !matrix.defined() || matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// Blocks that stay with the process (csrc/allocator.cpp); null where there are none.
c10::Allocator* blocks();

// An uninitialised tensor. glibc's malloc maps every block over 32 MiB anew, and touching fresh memory can cost more than
// the arithmetic on it: so large ones come from `blocks`. Where the system only offers huge pages to those who ask, those
// of 2 MiB and more ask.
inline Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t mapped = size_t(32) << 20;
  if (c10::multiply_integers(sizes) * options.dtype().itemsize() > mapped && blocks())
    return at::detail::empty_generic(sizes, blocks(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     c10::typeMetaToScalarType(options.dtype()), std::nullopt);
  Tensor tensor = at::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is no harm
#endif
  return tensor;
}

// A result larger than the second-level caches is written past them: reading a line only to overwrite it is a third of
// the traffic.
inline bool worth_streaming(const Tensor& result) { return result.nbytes() > (size_t(4) << 20); }

// Room for `count` values, begun on a cache line (vectors across two are half as fast) and ended a whole vector later,
// so that the loops may write a full one at a strip's end.
template <class R>
class Buffer {
 public:
  explicit Buffer(int64_t count) : room_(new R[count + 32 + 64 / sizeof(R)]) {
    const auto at = reinterpret_cast<uintptr_t>(room_.get());
    data_ = room_.get() + (64 - at % 64) % 64 / sizeof(R);
  }
  R* data() { return data_; }
  R& operator[](int64_t i) { return data_[i]; }

 private:
  std::unique_ptr<R[]> room_;
  R* data_;
};

// total = sum of the rows `begin` to `end` of a matrix, `count` columns from `first` on, less those with a negative id.
// Thirty-two rows at a time, those sums in double: one float32 sum of thousands of equal values is off by 1e-4.
template <class R>
void sum_rows(R* total, const Matrix& matrix, int64_t begin, int64_t end, int64_t first, int64_t count,
              const int64_t* ids) {
  constexpr int64_t block = 32;
  const auto add = [&](int64_t row, R* sum) {
    rows<R>().sum_rows(sum, matrix.strip(row, first), matrix.step, ids + (row - begin),
                       std::min(block, end - row), count);
  };
  if (end - begin <= block) return add(begin, total);
  std::vector<double> whole(count, 0.0);
  for (int64_t row = begin; row < end; row += block) {
    add(row, total);
    rows<R>().accumulate(whole.data(), total, count);
  }
  std::copy(whole.begin(), whole.end(), total);
}

}  // namespace planlm
