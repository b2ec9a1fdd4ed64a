// Matrix products whose result is in the dtype that is computed in.
#pragma once

#include "common.h"

namespace planlm {

// The products of matrices in memory may be called from several threads at once.

// A factor of the products below: bf16 where the working dtype is float32 and bf16 can be multiplied, that dtype otherwise.
Tensor factor(const Tensor& matrix, at::ScalarType working);

// out = a b, or out += a b; with `transposed`, b is given as its transpose. a and b share a kind, bf16 or that of `out`.
// at::mm rounds the product of bf16 matrices to bf16: once more than an eager chain does where the result is then summed,
// scaled or compared, and 2^-9 of a large common part where only differences count.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool transposed, bool add);

// out = a^T b, or out += a^T b: sums over rows, of three matrices of one kind that is not bf16.
void multiply_rows(const Matrix& out, const Matrix& a, const Matrix& b, bool add);

// x weight^T + bias, in the dtype that all of them have.
Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace planlm
