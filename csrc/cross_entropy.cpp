// planlm::cross_entropy_ for the CPU: logits of a language model's head become the gradient of their cross-entropy.
//
// In torch that is nine passes over a matrix that no cache holds; here it is three over each row, which a second-level
// cache does hold.
#include "operators.h"
#include "softmax.h"

namespace planlm {
namespace {

// A row of logits becomes the gradient of its cross-entropy with `token`; returns that.
template <class T>
float to_gradient(T* logits, int64_t count, int64_t token) {
  const float largest = largest_of<float>(logits, count), wanted = value_of(logits[token]);
  Softmax<float> softmax;
  softmax.add(logits, count, largest, log2e<float>);
  const float log_sum = std::log(softmax.exp_sum);
  const auto probability = [=](Vector<float> logit) INLINE_LAMBDA {
    return Lanes<float>::exp2(((logit - largest) - log_sum) * log2e<float>);
  };
  each_vector<float>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
    write<float>(logits + i, probability(read<float>(logits + i, used)), used);
  });
  write<float>(logits + token, probability(Vector<float>{} + wanted) - 1.0f, 1);
  return (largest - wanted) + log_sum;
}

}  // namespace

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
    for (int64_t row = begin; row < end; ++row) {
      const Strip strip = matrix.strip(row);
      if (targets[row] < 0) {
        std::memset(strip.data, 0, num_columns * bytes(strip.kind));
        continue;
      }
      losses[row] = with_type<float>(strip, [&](auto* values) { return to_gradient(values, num_columns, targets[row]); });
    }
  });
  return nll;
}

}  // namespace planlm
