// planlm::cross_entropy_ for the CPU: logits of a language model's head become the gradient of their cross-entropy.
//
// In torch that is nine passes over a matrix that no cache holds; here a row passes through the second-level cache once.
#include "operators.h"
#include "softmax.h"

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
  float* const losses = nll.mutable_data_ptr<float>();
  at::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> buffer(num_columns);
    for (int64_t row = begin; row < end; ++row) {
      const Strip strip = matrix.strip(row);
      if (targets[row] < 0) {
        std::memset(strip.data, 0, num_columns * bytes(strip.kind));
        continue;
      }
      const Scores<float> scores{.logits = strip, .count = num_columns, .inverse_temperature = 1};
      RowState<float> state;
      advance(scores, state, /*separate=*/false, targets[row], {}, buffer.data());
      const float log_sum = std::log(state.scores.exp_sum);
      losses[row] = (state.scores.largest - state.logit_of_oracle) + log_sum;
      const RowGradient<float> gradient{
          .score_max = state.scores.largest, .score_log_sum = log_sum, .nll = 1, .oracle = targets[row]};
      differentiate_strip<float>(scores, gradient, nullptr, {.logits = strip}, buffer.data());
    }
  });
  return nll;
}

}  // namespace planlm
