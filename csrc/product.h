// Matrix products whose result is in the dtype that is computed in.
#pragma once

#include "common.h"

namespace planlm {

// out = a b, or out += a b; with `transposed`, b is given as its transpose. a and b share a dtype, bf16 or that of `out`.
// at::mm rounds the product of bf16 matrices to bf16: once more than an eager chain does where the result is then summed,
// scaled or compared, and 2^-9 of a large common part where only differences count.
void multiply(Tensor& out, const Tensor& a, const Tensor& b, bool transposed, bool add);

// x weight^T + bias, in the dtype that all of them have.
Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace planlm
