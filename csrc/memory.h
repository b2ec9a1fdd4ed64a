// From tensors to memory: what loops that run in several threads see.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vector.h"

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
  Matrix part(int64_t row, int64_t num_rows) const { return part(row, num_rows, 0, columns); }
};

inline Tensor with_adjacent_columns(const Tensor& matrix) {
  return !matrix.defined() || matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// An uninitialised tensor. Where the system only offers huge pages to those who ask, one of 2 MiB and more asks: touching
// fresh memory page by page can cost more than the arithmetic on it.
inline Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
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

// What the operators compute in.
inline at::ScalarType working_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

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

}  // namespace planlm
