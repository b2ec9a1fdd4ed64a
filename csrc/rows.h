// The vector loops of the CPU operators: one row of actions or one token at a time. Free of torch, so that each file
// rows_<instructions>.cpp can compile them for one instruction set; `rows()` picks the set when the process runs.
#pragma once

#include <cstdint>

namespace planlm {

enum class Kind : int { f32, bf16, f64 };

constexpr int64_t bytes(Kind kind) { return kind == Kind::bf16 ? 2 : kind == Kind::f32 ? 4 : 8; }

// A strip of one row in memory, in any of the kinds.
struct Strip {
  void* data = nullptr;
  Kind kind = Kind::f32;

  explicit operator bool() const { return data != nullptr; }
  Strip operator+(int64_t elements) const {
    return {static_cast<char*>(data) + elements * bytes(kind), kind};
  }
};

// What the scores of one row are made of: `logits + noise`, less what top-k drops. R is what is computed in.
template <class R>
struct Scores {
  Strip logits;
  Strip noise;             // none: the scores are the logits
  int64_t first;           // action number of the strip's first element
  int64_t count;           // elements in the strip
  R inverse_temperature;
  bool top_k;              // drop scores below the threshold, and those equal to it after action `cut`
  R threshold;
  int64_t cut;
};

// Online softmax of one row, carried from strip to strip. `separate`: the logits' own normaliser differs from that of
// the scores (a temperature, noise or top-k is in use) and is wanted.
template <class R>
struct RowState {
  R score_max, score_sum;  // sum of exp((score - score_max) / temperature)
  R logit_max, logit_sum;  // sum of exp(logit - logit_max); filled only where separate
  R logit_of_oracle;
  int64_t best;
};

// What one row's gradient is made of; see plan_projection.cpp for the formulas.
template <class R>
struct RowGradient {
  R score_max, score_log_sum, logit_max, logit_log_sum;
  R share;                 // of the oracle action in the mixture
  R inner;                 // gradient of the mixture times the mixture
  R offset;                // gradient of log_normalizer
  R nll;                   // gradient of the oracle's cross-entropy
  int64_t oracle;          // negative: none
  bool separate;
};

template <class R>
struct Rows {
  // Advances `state` by one strip and writes exp((score - score_max) / temperature) to `weights` if there are any.
  // Returns what everything accumulated before has to be multiplied with. `buffer` holds `count` + 32 values.
  R (*advance)(const Scores<R>&, RowState<R>&, bool separate, int64_t oracle, Strip weights, R* buffer);
  // Writes the gradients of logits and noise and the weights of the actions in the mixture, each where wanted.
  // `product`: gradient of the mixture times the strip's action embeddings. `stream`: the gradient of the logits goes
  // past the caches, where it is aligned for that. Returns the sum of the probabilities times `product` where the
  // logits are of the working dtype.
  R (*differentiate)(const Scores<R>&, const RowGradient<R>&, Strip product, Strip logits, Strip noise,
                     Strip weights, R* buffer, bool stream);
  // The scores themselves.
  void (*scores)(const Scores<R>&, R* out);
  // total = sum of those of `num_rows` strips, `step` elements apart, whose id is not negative; in their order.
  // `total` has room for a whole vector at its end.
  void (*sum_rows)(R* total, Strip first, int64_t step, const int64_t* ids, int64_t num_rows, int64_t count);
  void (*accumulate)(double* sum, const R* values, int64_t count);
  // out = x + gate * plan, in one rounding; gate may be null. `stream`: past the caches, where `out` is aligned for it.
  void (*add)(Strip x, Strip plan, const R* gate, Strip out, int64_t count, bool stream);
  // Makes what was streamed visible to other threads.
  void (*fence)();
  // strip = values * gate; gate may be null
  void (*store)(const R* values, const R* gate, Strip strip, int64_t count);
  // A panel of a bf16 matrix, `depth` by `width`, as the processor multiplies it: adjacent pairs of rows, interleaved.
  // `pack_transposed` is given the transpose, `width` rows of `depth`. `depth` is even.
  void (*pack)(const void* from, int64_t step, void* to, int64_t depth, int64_t width);
  void (*pack_transposed)(const void* from, int64_t step, void* to, int64_t depth, int64_t width);
  // A row of logits becomes the gradient of its cross-entropy with `target`; returns that.
  R (*cross_entropy)(Strip logits, int64_t count, int64_t target);
  // GELU in its tanh form, and `grad` times its slope. All strips are of one kind.
  void (*gelu)(Strip x, Strip out, int64_t count);
  void (*gelu_slope)(Strip x, Strip grad, Strip out, int64_t count);
  // Attention. Weights 2^(factor (score - largest)) of the strip's elements `begin` to `end`, zero elsewhere; advances
  // the row's `largest` score and its `sum`, and returns what was accumulated before has to be multiplied with. Scores
  // around both ends are overwritten.
  R (*soften)(R* scores, int64_t count, int64_t begin, int64_t end, R factor, R& largest, R& sum, Strip weights);
  // weights = 2^(factor * scores - log_sums), slopes = scale * weights * (products - inner) for the elements `begin` to
  // `end`, zero elsewhere. All strips and vectors have room for a whole vector at their end.
  void (*slope)(const R* scores, const R* products, const R* log_sums, const R* inner, int64_t count, int64_t begin,
                int64_t end, R factor, R scale, Strip weights, Strip slopes);
  // Inner product of two strips of one kind.
  R (*dot)(Strip a, Strip b, int64_t count);
};

// The loops for the best instruction set that this processor has and torch may use.
template <class R>
const Rows<R>& rows();

}  // namespace planlm
