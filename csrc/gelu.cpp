// planlm::gelu and its backward for the CPU: GELU in its tanh form, one exponential an element.
#include <torch/library.h>

#include "common.h"

namespace planlm {
namespace {

// Elements at a time: three strips of them stay in a first-level cache's worth of vectors, and threads share evenly.
constexpr int64_t block = 4096;

template <class Body>
void in_blocks(int64_t count, Body body) {
  at::parallel_for(0, (count + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * block; at < std::min(end * block, count); at += block) body(at, std::min(block, count - at));
  });
}

Strip all_of(const Tensor& tensor) { return {tensor.data_ptr(), kind_of(tensor)}; }

}  // namespace

Tensor gelu(const Tensor& x) {
  PLANLM_EXPECT(x.is_contiguous(), "gelu takes contiguous tensors");
  Tensor out = empty(x.sizes(), x.options());
  const Strip from = all_of(x), to = all_of(out);
  in_blocks(x.numel(), [&](int64_t at, int64_t count) { rows<float>().gelu(from + at, to + at, count); });
  return out;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  const Tensor slope = grad.contiguous();
  Tensor out = empty(x.sizes(), x.options());
  const Strip from = all_of(x), upstream = all_of(slope), to = all_of(out);
  in_blocks(x.numel(), [&](int64_t at, int64_t count) {
    rows<float>().gelu_slope(from + at, upstream + at, to + at, count);
  });
  return out;
}

}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  library.impl("gelu", planlm::gelu);
  library.impl("gelu_backward", planlm::gelu_backward);
}
