// The operators for the CPU; kernels/operators.py has their schemas.
//
// Sizes: S sentences, K actions, A action-embedding size, D plan size, P planner state.
#pragma once

#include <array>
#include <tuple>

#include "memory.h"

namespace planlm {

Tensor add_plan(const Tensor& x, const Tensor& plan, const Tensor& segment_ids, const OptionalTensor& gate);

std::tuple<Tensor, Tensor> add_plan_backward(const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                                             const OptionalTensor& gate, std::array<bool, 2> needs);

Tensor cross_entropy_(Tensor logits, const Tensor& labels);

std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& documents, double scale);

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& log_sums, const Tensor& documents,
                                                             double scale);

// Rows of `statistics`, as kernels/operators.py describes them.
enum Statistic : int64_t { SCORE_MAX, SCORE_LOG_SUM, LOGIT_MAX, LOGIT_LOG_SUM, THRESHOLD, NUM_STATISTICS };

// Tensors are undefined where they are not given, wanted or reached by a gradient.
struct ProjectionInputs {
  Tensor source, head, head_bias, codebook, weight, bias, noise, oracle, oracle_weight;
  double temperature;
  int64_t top_k;
};

struct ProjectionOutputs {
  Tensor projected, log_normalizer, oracle_nll, best, mixture, statistics, tie_index;
};

struct ProjectionNeeds {
  bool source, head, head_bias, codebook, weight, bias, noise, oracle_weight;
};

struct ProjectionGradients {
  Tensor source, head, head_bias, codebook, weight, bias, noise, oracle_weight;
};

ProjectionOutputs plan_projection(const ProjectionInputs& inputs);

// `upstream`: gradients of `projected`, `log_normalizer` and `oracle_nll`. `forward`: all but `projected`.
ProjectionGradients plan_projection_backward(const ProjectionInputs& inputs, const ProjectionOutputs& upstream,
                                             const ProjectionOutputs& forward, const ProjectionNeeds& needs);

}  // namespace planlm
