// Matrix products through what torch carries, with results in the dtype that is computed in. Those of memory may be called
// from several threads at once.
//
// product.cpp is the only file that names private symbols of torch, which a release may rename or take away. Without them
// bf16 matrices are multiplied as float32 and linear layers by at::addmm.
#pragma once

#include "memory.h"

namespace planlm {

// Whether there are products of bf16 matrices: the release, the processor or oneDNN's settings may not have them.
bool has_bf16_products();

// out[rows, columns] = or += a[rows, depth] b, of which `b` is packed in a panel (pack.h). A thread releases what it holds
// for such products when it has made its last one.
struct PanelProduct {
  int64_t rows, columns, depth;
  const at::BFloat16* a;
  int64_t a_step;
  const at::BFloat16* b;
  float* out;
  int64_t out_step;
  bool add;
};
void multiply_panel(const PanelProduct& product);
void release_panels();
constexpr int64_t panel = 64;  // columns of one product: four vectors of 16 float32

// A factor of the products below: bf16 where the working dtype is float32 and bf16 can be multiplied, that dtype otherwise.
Tensor factor(const Tensor& matrix, at::ScalarType working);

// out = a b, or out += a b; with `transposed`, b is given as its transpose. a and b share a kind, bf16 or that of `out`.
// at::mm rounds the product of bf16 matrices to bf16: once more than an eager chain does where the result is then summed,
// scaled or compared, and 2^-9 of a large common part where only differences count.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool transposed, bool add);

// out = a^T b, or out += a^T b: sums over rows, of three matrices of one kind that is not bf16.
void multiply_rows(const Matrix& out, const Matrix& a, const Matrix& b, bool add);

// x weight^T + bias, in the dtype of x and weight; the bias may be undefined.
Tensor affine(const Tensor& x, const Tensor& weight, const Tensor& bias);

}  // namespace planlm
