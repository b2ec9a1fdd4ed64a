// planlm::plan_projection and its backward for the CPU.
//
// The scores are worked through in tiles of rows and actions that fit the processor's caches: a vector loop turns a
// tile of logits into weights, a matrix product of torch's own library takes the weights on. So the probabilities never
// exist as a whole, and where the logits come from the planner's states neither do the logits.
//
// Where there are actions enough every thread has a split of them to itself, and what is summed over actions is summed
// up once at the end. Threads that share tiles read what another has just written: cores without a common third-level
// cache then took 1.3 times as long, and a virtual machine's may be such cores at one moment and not at the next.
//
// With p = softmax(scores / t), w the oracle's weight, M the gradient of the mixture and E the action embeddings:
//   gradient of scores  = p * ((1 - w) (M E^T - M . mixture) + gradient of log_normalizer) / t
//   gradient of logits  = gradient of scores + gradient of oracle_nll * (softmax(logits) - onehot(oracle))
//   gradient of E       = ((1 - w) p + w onehot(oracle))^T M
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>

#include <limits>

#include "planner.h"

namespace planlm {
namespace {

// The `kept` largest of one row's scores, offered in the order of the actions; among equals the first ones.
template <class R>
class Largest {
 public:
  Largest(int64_t kept, int64_t slack) : kept_(kept), most_(kept + slack) {}

  // A NaN counts as larger than any number, as in torch.sort.
  void offer(R score, int64_t action) {
    if (std::isnan(score)) score = std::numeric_limits<R>::infinity();
    if (int64_t(found_.size()) >= kept_ && score <= least_) return;
    found_.emplace_back(score, action);
    if (int64_t(found_.size()) >= most_) least();
  }

  // The least score kept, and the last action kept among those equal to it.
  std::pair<R, int64_t> least() {
    std::nth_element(found_.begin(), found_.begin() + (kept_ - 1), found_.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    found_.resize(kept_);
    least_ = found_.back().first;
    return found_.back();
  }

 private:
  int64_t kept_, most_;
  R least_ = lowest<R>;
  std::vector<std::pair<R, int64_t>> found_;
};

// Thresholds and tie indices of top-k.
template <class R>
void find_largest(const Planner& planner, R* thresholds, int64_t* tie_indices) {
  const int64_t kept = planner.top_k, slack = std::max<int64_t>(64, kept / 4);
  // Candidates of all rows at once could outgrow the logits: half of those at most, and as many passes as that takes.
  const int64_t group = std::max<int64_t>(1, planner.num_rows * planner.num_actions / (8 * (kept + slack)));
  const Splits whole = planner.split_into(1);
  const Workspace rooms = planner.tiles(whole, planner.projects, planner.real());
  for (int64_t from = 0; from < planner.num_rows; from += group) {
    const int64_t to = std::min(planner.num_rows, from + group);
    std::vector<Largest<R>> found(to - from, Largest<R>(kept, slack));
    planner.each_tile(whole, rooms, [&](int64_t, const Tile& tile, const Matrix& logits) {
      const int64_t first = std::max(from, tile.row), last = std::min(to, tile.row + tile.rows);
      at::parallel_for(first, std::max(first, last), 1, [&](int64_t begin, int64_t end) {
        Buffer<R> buffer(tile.count);
        for (int64_t row = begin; row < end; ++row) {
          load_scores(planner.scores<R>(tile, logits, row - tile.row), buffer.data());
          for (int64_t i = 0; i < tile.count; ++i) found[row - from].offer(buffer[i], tile.first + i);
        }
      });
    });
    for (int64_t row = from; row < to; ++row) std::tie(thresholds[row], tie_indices[row]) = found[row - from].least();
  }
}

template <class R>
struct Mixing {
  const Planner& planner;
  const Tensor& codebook;
  const int64_t* labels;  // actions of the oracle, or null
  int64_t num_rows = planner.num_rows, size = codebook.defined() ? codebook.size(1) : 0;
  Splits splits = planner.splits(size);
  bool separate = planner.separate && labels;
  ProjectionOutputs result{{},
                    empty({num_rows}, planner.real()),
                    at::zeros({num_rows}, planner.real()),
                    empty({num_rows}, planner.whole()),
                    planner.zeros(num_rows, size),
                    empty({NUM_STATISTICS, num_rows}, planner.real()),
                    at::full({num_rows}, planner.num_actions - 1, planner.whole())};
  Tensor partial = splits.count > 1 ? planner.zeros(splits.count * num_rows, size) : result.mixture;
  Matrix actions{codebook}, mixture{result.mixture}, partial_mixtures{partial}, statistics{result.statistics};
  int64_t* tie_indices = result.tie_index.mutable_data_ptr<int64_t>();
  std::vector<RowState<R>> states = std::vector<RowState<R>>(splits.count * num_rows);
  Workspace logits_memory = planner.tiles(splits, planner.projects, planner.real());
  Workspace weights_memory = planner.tiles(splits, bool(actions), actions ? codebook.options() : planner.real());

  ProjectionOutputs run() {
    std::fill_n(statistics.at<R>(THRESHOLD), num_rows, lowest<R>);
    if (planner.top_k > 0 && num_rows > 0) find_largest<R>(planner, statistics.at<R>(THRESHOLD), tie_indices);
    planner.each_tile(splits, logits_memory, [&](int64_t split, const Tile& tile, const Matrix& logits) {
      mix_tile(split, tile, logits);
    });
    for (int64_t s = 0; s < num_rows; ++s) finish(s);
    return result;
  }

  void mix_tile(int64_t split, const Tile& tile, const Matrix& logits) {
    const Matrix weights = weights_memory.of(split, tile);
    const Matrix sums = tile.rows_of(partial_mixtures.part(split * num_rows, num_rows));
    at::parallel_for(0, tile.rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<R> buffer(tile.count);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t s = tile.row + row;
        const R rescale = advance(planner.scores<R>(tile, logits, row, statistics, tie_indices),
                                  states[split * num_rows + s], separate, labels ? labels[s] : -1, weights.strip(row),
                                  buffer.data());
        for (int64_t a = 0; rescale != R(1) && a < size; ++a) sums.at<R>(row)[a] *= rescale;
      }
    });
    if (actions) multiply(sums, weights, tile.actions_of(actions), /*transposed=*/false, /*add=*/true);
  }

  // Adds up the partial statistics and mixtures of a row.
  RowState<R> merged(int64_t s) {
    RowState<R> state = states[s];
    R* const sum = mixture.at<R>(s);
    if (splits.count > 1) std::copy_n(partial_mixtures.at<R>(s), size, sum);
    for (int64_t split = 1; split < splits.count; ++split) {
      const auto& other = states[split * num_rows + s];
      if (other.scores.largest > state.scores.largest) state.best = other.best;
      if (labels && labels[s] >= split * splits.size) state.logit_of_oracle = other.logit_of_oracle;
      state.logits.add(other.logits, log2e<R>);
      const auto [ours, theirs] = state.scores.add(other.scores, R(1.0 / planner.temperature) * log2e<R>);
      const R* const added = partial_mixtures.at<R>(split * num_rows + s);
      for (int64_t a = 0; a < size; ++a) sum[a] = sum[a] * ours + added[a] * theirs;
    }
    if (state.scores.largest == lowest<R>)  // -inf everywhere, or NaN
      state.scores.exp_sum = std::numeric_limits<R>::quiet_NaN();
    if (!separate) state.logits = state.scores;
    return state;
  }

  void finish(int64_t s) {
    const RowState<R> state = merged(s);
    const R log_sum = std::log(state.scores.exp_sum), logit_log_sum = std::log(state.logits.exp_sum);
    *statistics.at<R>(SCORE_MAX, s) = state.scores.largest;
    *statistics.at<R>(SCORE_LOG_SUM, s) = log_sum;
    *statistics.at<R>(LOGIT_MAX, s) = state.logits.largest;
    *statistics.at<R>(LOGIT_LOG_SUM, s) = logit_log_sum;
    result.log_normalizer.mutable_data_ptr<R>()[s] = R(state.scores.largest / planner.temperature) + log_sum;
    result.best.mutable_data_ptr<int64_t>()[s] = state.best;
    if (labels && labels[s] >= 0)
      result.oracle_nll.mutable_data_ptr<R>()[s] = (state.logits.largest - state.logit_of_oracle) + logit_log_sum;
    for (int64_t a = 0; a < size; ++a) mixture.at<R>(s)[a] /= state.scores.exp_sum;
  }
};

// Softmax statistics of all rows and, where there are action embeddings `[K, A]`, their mixture.
ProjectionOutputs mix(const Planner& planner, const Tensor& codebook, const Tensor& oracle) {
  const int64_t* const labels = oracle.defined() ? oracle.const_data_ptr<int64_t>() : nullptr;
  return planner.working == at::kDouble ? Mixing<double>{planner, codebook, labels}.run()
                                        : Mixing<float>{planner, codebook, labels}.run();
}

// At every call, as compiled code comes here unchecked; in the words of kernels/checks.py.
ProjectionInputs checked(ProjectionInputs inputs, int64_t num_actions) {
  if (!inputs.oracle.defined()) return inputs;
  inputs.oracle = inputs.oracle.contiguous();
  const int64_t* actions = inputs.oracle.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < inputs.oracle.size(0); ++s)
    TORCH_CHECK_VALUE(actions[s] < num_actions, "oracle: got action ", actions[s], ", needs actions below ", num_actions,
                      " (K); negative means none");
  return inputs;
}

// The oracle action's weight in each row, `[S, 1]`; undefined where there is none.
Tensor weights_of_oracle(const ProjectionInputs& inputs, at::ScalarType working) {
  if (!inputs.oracle.defined() || !inputs.oracle_weight.defined()) return {};
  return inputs.oracle_weight.to(working).masked_fill(inputs.oracle < 0, 0.0).unsqueeze(1).contiguous();
}

Tensor of_oracle(const ProjectionInputs& inputs, at::ScalarType working) {
  return inputs.codebook.index_select(0, inputs.oracle.clamp_min(0)).to(working);  // [S, A]
}

Tensor with_oracle(const Tensor& mixture, const ProjectionInputs& inputs, const Tensor& weight) {
  if (!weight.defined()) return mixture;
  return (1 - weight) * mixture + weight * of_oracle(inputs, mixture.scalar_type());
}

}  // namespace

ProjectionOutputs plan_projection(const ProjectionInputs& given) {
  const Planner planner(given);
  const ProjectionInputs inputs = checked(given, planner.num_actions);
  ProjectionOutputs result = mix(planner, factor(inputs.codebook, planner.working), inputs.oracle);
  if (!inputs.codebook.defined()) {
    result.projected = result.mixture.clone();
    return result;
  }
  const Tensor weight = weights_of_oracle(inputs, planner.working);
  const Tensor mixture = with_oracle(result.mixture, inputs, weight);
  const auto dtype = inputs.codebook.scalar_type();
  if (inputs.weight.defined())
    result.projected = affine(mixture.to(dtype), inputs.weight, inputs.bias);
  else if (inputs.bias.defined())
    result.projected = (mixture + inputs.bias).to(dtype);
  else
    result.projected = mixture.to(dtype, /*non_blocking=*/false, /*copy=*/!weight.defined());
  return result;
}

ProjectionGradients plan_projection_backward(const ProjectionInputs& given, const ProjectionOutputs& upstream,
                                             const ProjectionOutputs& forward, const ProjectionNeeds& needs) {
  const Planner planner(given);
  const ProjectionInputs inputs = checked(given, planner.num_actions);
  const auto working = planner.working;
  const Tensor weight = weights_of_oracle(inputs, working);
  const Tensor gradient = inputs.codebook.defined() ? upstream.projected : Tensor();
  MixtureGradients to{{}, upstream.log_normalizer, upstream.oracle_nll};
  if (gradient.defined())  // [S, A]
    to.mixture = inputs.weight.defined() ? at::mm(gradient, inputs.weight) : with_adjacent_columns(gradient);

  ProjectionGradients result;
  if (needs.source || needs.head || needs.head_bias || needs.codebook || needs.noise) {
    const MixtureGradients factors{factor(to.mixture, working), to.log_normalizer, to.oracle_nll};
    result = differentiate(planner, inputs, factor(inputs.codebook, working), factors, forward, needs);
  }
  if (gradient.defined() && needs.weight)
    result.weight = at::mm(gradient.t(), with_oracle(forward.mixture, inputs, weight).to(inputs.codebook.scalar_type()));
  if (gradient.defined() && needs.bias) result.bias = sum_of_rows(gradient, working);
  if (gradient.defined() && needs.oracle_weight && weight.defined())
    result.oracle_weight = (to.mixture.to(working) * (of_oracle(inputs, working) - forward.mixture))
                               .sum(1)
                               .masked_fill(inputs.oracle < 0, 0.0);

  // Each gradient in its tensor's dtype; zeros where none arrives, nothing where none is wanted.
  const auto finish = [&](Tensor& found, bool wanted, const Tensor& like) {
    if (!wanted || !like.defined())
      found = at::empty({0}, inputs.source.options());
    else
      found = found.defined() ? found.to(like.scalar_type()) : at::zeros(like.sizes(), like.options());
  };
  finish(result.source, needs.source, inputs.source);
  finish(result.head, needs.head, inputs.head);
  finish(result.head_bias, needs.head_bias, inputs.head_bias);
  finish(result.codebook, needs.codebook, inputs.codebook);
  finish(result.weight, needs.weight, inputs.weight);
  finish(result.bias, needs.bias, inputs.bias);
  finish(result.noise, needs.noise, inputs.noise);
  finish(result.oracle_weight, needs.oracle_weight, inputs.oracle_weight);
  return result;
}

}  // namespace planlm
