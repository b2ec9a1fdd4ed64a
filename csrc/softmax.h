// The softmax of a row of scores, taken in strips, and its gradient.
#pragma once

#include <algorithm>
#include <utility>

#include "vector.h"

namespace planlm {

// What the scores of one row are made of: `logits + noise`, less what top-k drops. R is what is computed in.
template <class R>
struct Scores {
  Strip logits;
  Strip noise;    // none: the scores are the logits
  int64_t first;  // action number of the strip's first element
  int64_t count;  // elements in the strip
  R inverse_temperature;
  bool top_k;     // drop scores below the threshold, and those equal to it behind action `tie_index`
  R threshold;
  int64_t tie_index;

  bool holds(int64_t action) const { return action >= first && action < first + count; }
  bool rescored() const { return noise || top_k; }
};

template <class R>
void load_scores(const Scores<R>& row, R* out) {
  with_type<R>(row.logits, [&](const auto* logits) INLINE_LAMBDA {
    each_vector<R>(row.count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
      Vector<R> v = read<R>(logits + i, used);
      if (row.noise) v += read<R>(row.noise, i, used);
      write<R>(out + i, v, used);
    });
  });
  for (int64_t i = 0; row.top_k && i < row.count; ++i)  // written so that a NaN is kept
    if (out[i] < row.threshold || (out[i] == row.threshold && row.first + i > row.tie_index)) out[i] = lowest<R>;
}

// A NaN is never the largest.
template <class R, class T>
R largest_of(const T* values, int64_t count) {
  Vector<R> largest = Vector<R>{} + lowest<R>;
  each_vector<R>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
    Vector<R> v = read<R>(values + i, used);
    fill_behind(v, used, lowest<R>);
    largest = v > largest ? v : largest;
  });
  return max_of<R>(largest);
}

// An online softmax: the largest value so far, and the sum of 2^(factor (value - largest)).
template <class R>
struct Softmax {
  R largest = lowest<R>, exp_sum = 0;

  // Adds values, the largest of which is `found`, and writes their weights in the sum where there is room for them.
  // Returns the factor that rescales what was accumulated before.
  template <class T>
  R add(const T* values, int64_t count, R found, R factor, Strip weights = {}) {
    const R before = largest;
    if (found > before) largest = found;
    BlockSum<R> total;
    const auto weigh = [&, shift = shift(), factor](auto to) INLINE_LAMBDA {
      each_vector<R>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
        Vector<R> weight = Lanes<R>::exp2((read<R>(values + i, used) - shift) * factor);
        fill_behind(weight, used, R(0));
        total.add(i, weight);
        if constexpr (std::is_pointer_v<decltype(to)>) write<R>(to + i, weight, used);
      });
    };
    weights ? with_type<R>(weights, weigh) : weigh(nullptr);
    const R rescale = found > before ? exp2_of<R>((before - found) * factor) : R(1);
    exp_sum = exp_sum * rescale + total.value();
    return rescale;
  }

  // Adds another softmax. Returns the factors that rescale what either has accumulated.
  std::pair<R, R> add(const Softmax& other, R factor) {
    const R before = largest;
    largest = std::max(largest, other.largest);
    const std::pair<R, R> rescale{std::exp2((before - shift()) * factor), std::exp2((other.largest - shift()) * factor)};
    exp_sum = exp_sum * rescale.first + other.exp_sum * rescale.second;
    return rescale;
  }

 private:
  // Nothing but -inf so far: exp(0 - 0) would count it. A NaN still reaches the sum.
  R shift() const { return largest == lowest<R> ? R(0) : largest; }
};

// The partial statistics of a row, carried from strip to strip.
template <class R>
struct RowState {
  Softmax<R> scores, logits;  // the logits' only where it differs from that of the scores and is wanted
  R logit_of_oracle = 0;
  int64_t best = 0;
};

// Advances `state` by one strip and writes the weights of its actions where there is room for them. Returns the factor
// that rescales what was accumulated before. `buffer` holds a strip where the scores are not the logits.
template <class R>
R advance(const Scores<R>& row, RowState<R>& state, bool separate, int64_t oracle, Strip weights, R* buffer) {
  const auto add = [&](const auto* scores) {
    const R found = largest_of<R>(scores, row.count);
    const auto is_best = [&](auto score) { return value_of(score) == found; };
    if (found > state.scores.largest)
      state.best = row.first + (std::find_if(scores, scores + row.count, is_best) - scores);
    return state.scores.add(scores, row.count, found, row.inverse_temperature * log2e<R>, weights);
  };
  if (row.rescored()) load_scores(row, buffer);
  return with_type<R>(row.logits, [&](const auto* logits) {
    if (row.holds(oracle)) state.logit_of_oracle = value_of(logits[oracle - row.first]);
    if (separate) state.logits.add(logits, row.count, largest_of<R>(logits, row.count), log2e<R>);
    return row.rescored() ? add(buffer) : add(logits);
  });
}

// What one row's gradient is made of; plan_projection.cpp has the formulas.
template <class R>
struct RowGradient {
  R score_max, score_log_sum, logit_max, logit_log_sum;
  R oracle_weight;  // in the mixture
  R inner;          // gradient of the mixture times the mixture
  R offset;         // gradient of log_normalizer
  R nll;            // gradient of the oracle's cross-entropy
  int64_t oracle;   // negative: none
  bool separate;    // the logits' softmax is not that of the scores
};

// Where the gradients of logits and noise and the weights of the actions in the mixture go, each where wanted. `streamed`:
// the gradient of the logits goes past the caches, where it is aligned for that.
struct Slopes {
  Strip logits, noise, weights;
  bool streamed;
};

// `product`: gradient of the mixture times the strip's action embeddings, or none. Returns the sum of the probabilities
// times `product` where the logits are of the working dtype. `buffer` as above.
template <class R>
R differentiate_strip(const Scores<R>& row, const RowGradient<R>& g, const R* product, const Slopes& to, R* buffer) {
  const bool rescored = row.rescored();
  if (rescored) load_scores(row, buffer);
  const bool streamed = to.streamed && reinterpret_cast<uintptr_t>(to.logits.data) % 64 == 0;
  const int64_t at = row.holds(g.oracle) ? g.oracle - row.first : -1;
  const bool labelled = g.oracle >= 0 && g.nll != R(0);
  const R own = labelled && !g.separate ? g.nll : R(0);  // the logits' own probabilities are those of the scores
  const R factor = row.inverse_temperature * log2e<R>;
  const R kept = (R(1) - g.oracle_weight) * row.inverse_temperature;
  const R offset = g.offset * row.inverse_temperature + own;
  BlockSum<R> inner;
  with_type<R>(row.logits, [&](auto* logits) INLINE_LAMBDA {
    each_vector<R>(row.count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
      const Vector<R> raw = read<R>(logits + i, used);
      const Vector<R> score = rescored ? read<R>(buffer + i, used) : raw;
      Vector<R> p = Lanes<R>::exp2((score - g.score_max) * factor - g.score_log_sum * log2e<R>);
      fill_behind(p, used, R(0));
      const bool here = at >= i && at < i + lanes<R>;
      if (to.weights) {
        Vector<R> weight = p * (R(1) - g.oracle_weight);
        if (here) weight[at - i] += g.oracle_weight;
        write<R>(to.weights, i, weight, used);
      }
      if (!to.logits && !to.noise) return;
      Vector<R> slope = p * offset;
      if (product) {
        const Vector<R> of_action = read<R>(product + i, used);
        if constexpr (sizeof(*logits) == sizeof(R)) inner.add(i, p * of_action);
        slope = p * ((of_action - g.inner) * kept + offset);
      }
      if (to.noise) write<R>(to.noise, i, slope, used);
      if (!to.logits) return;
      if (labelled && g.separate) slope += g.nll * Lanes<R>::exp2(((raw - g.logit_max) - g.logit_log_sum) * log2e<R>);
      if (labelled && here) slope[at - i] -= g.nll;
      write<R>(to.logits, i, slope, used, streamed);
    });
  });
  return inner.value();
}

}  // namespace planlm
