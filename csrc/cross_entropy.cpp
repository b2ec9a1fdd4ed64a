// planlm::cross_entropy_ for the CPU: logits of a language model's head become the gradient of their cross-entropy.
//
// In torch that is nine passes over a matrix that no cache holds; here it is three over each row, which a second-level
// cache does hold, and one exponential more.
#include <torch/library.h>

#include <cstring>

#include "common.h"

namespace planlm {

Tensor cross_entropy_(Tensor logits, const Tensor& labels) {
  PLANLM_EXPECT(logits.stride(1) == 1 || logits.size(1) <= 1, "cross_entropy_ takes adjacent columns");
  const int64_t num_rows = logits.size(0), num_columns = logits.size(1);
  Tensor nll = at::zeros({num_rows}, logits.options().dtype(at::kFloat));
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == num_rows, "target: got shape ", labels.sizes(),
                    ", needs one for each of ", num_rows, " rows");
  const Tensor target = labels.contiguous();
  const int64_t* targets = target.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < num_rows; ++row)
    TORCH_CHECK_INDEX(targets[row] < num_columns, "target ", targets[row], " is out of bounds: there are ", num_columns,
                      " columns");
  const Matrix matrix(logits);
  float* const losses = nll.data_ptr<float>();
  at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (targets[row] < 0)
        std::memset(matrix.strip(row).data, 0, num_columns * bytes(matrix.kind));
      else
        losses[row] = rows<float>().cross_entropy(matrix.strip(row), num_columns, targets[row]);
  });
  return nll;
}

}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) { library.impl("cross_entropy_", planlm::cross_entropy_); }
