// The backward of plan_projection: gradients of scores, and what is multiplied with them.
#include <ATen/ops/from_blob.h>

#include "pack.h"
#include "planner.h"
#include "segment_sum.h"

namespace planlm {
namespace {

// Adds the sum over rows, formed in the working dtype.
template <class R>
void add_sum_of_rows(R* sum, const Matrix& matrix) {
  constexpr int64_t strip = 512;
  const std::vector<int64_t> every(matrix.rows, 0);
  at::parallel_for(0, (matrix.columns + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
    Buffer<R> total(strip);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * strip, count = std::min(strip, matrix.columns - first);
      sum_rows(total.data(), matrix.strip(0, first), matrix.step, every.data(), matrix.rows, count);
      for (int64_t j = 0; j < count; ++j) sum[first + j] += total[j];
    }
  });
}

// A gradient that is a sum over rows, of left^T right for the actions of each tile; rounded once. oneDNN's bf16 products
// are not of transposed left factors: there right^T left is formed, of `right` transposed once for all tiles, and
// transposed back.
class SumOverRows {
 public:
  // `whole`: the sum, or undefined. `right`: as many rows as there are in all.
  SumOverRows(const Tensor& whole, const Tensor& right, const Splits& splits) : whole_(whole), right_(right) {
    if (!whole_ || right_.kind != Kind::bf16) return;
    transposed_ = right.t().contiguous();
    right_ = Matrix(transposed_);
    // Where all rows are one tile no sum waits for the next one, and a part of a tile's actions needs room at a time.
    step_ = right.size(0) > most_rows ? splits.step : std::min(splits.step, most_actions);
    sums_ = Workspace(splits.count, right.size(1) * step_, right.options().dtype(at::kFloat));
  }
  explicit operator bool() const { return bool(whole_); }

  void add(int64_t split, const Tile& tile, const Matrix& left) const {
    const bool begun = tile.row > 0;
    if (!sums_.rooms) return multiply_rows(tile.actions_of(whole_), left, tile.rows_of(right_), begun);
    const Matrix rows = right_.part(0, right_.rows, tile.row, tile.rows);
    for (int64_t first = 0; first < tile.count; first += step_) {
      const int64_t count = std::min(step_, tile.count - first);
      const Matrix sum = sums_.of(split, whole_.columns, count);
      multiply(sum, rows, left.part(0, left.rows, first, count), /*transposed=*/false, begun);
      if (tile.row + tile.rows == right_.columns) transpose_back(sum, whole_.part(tile.first + first, count));
    }
  }

 private:
  static constexpr int64_t most_actions = 256;

  static void transpose_back(const Matrix& sum, const Matrix& wanted) {
    constexpr int64_t most = 64;  // lines of 768 values are then 192 KiB
    at::parallel_for(0, (sum.columns + most - 1) / most, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> lines(most * sum.rows);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * most, count = std::min(most, sum.columns - first);
        pack_transposed(sum.at<float>(0, first), 2 * sum.step, lines.data(), 2 * count, sum.rows);
        for (int64_t j = 0; j < count; ++j)
          store<float>(lines.data() + j * sum.rows, nullptr, wanted.strip(first + j), sum.rows);
      }
    });
  }

  Tensor transposed_;
  Matrix whole_, right_;
  Workspace sums_;
  int64_t step_ = 0;  // actions of a sum
};

// Gradients that are written by products as a whole need no zeros.
Tensor room_like(const Tensor& tensor, bool wanted, bool written = true) {
  if (!wanted || !tensor.defined()) return {};
  return written ? empty(tensor.sizes(), tensor.options()) : at::zeros(tensor.sizes(), tensor.options());
}

template <class R>
struct Differentiation {
  const Planner& planner;
  const Tensor &codebook, &mixture_gradient;
  const ProjectionOutputs& forward;
  const ProjectionNeeds& needs;
  const std::vector<RowGradient<R>> rows;

  bool mixes = mixture_gradient.defined() && codebook.defined(), weighs = mixes && needs.codebook;
  bool to_states = planner.projects && needs.source, to_logits = needs.source || needs.head || needs.head_bias;
  bool to_scores = mixes && (to_logits || needs.noise);
  bool corrects = to_scores && planner.source.scalar_type() == planner.working;
  int64_t num_rows = planner.num_rows;
  Splits splits = planner.splits(to_states ? planner.source.size(1) : 0);
  ProjectionGradients result{.source = room_like(planner.source, needs.source && !to_states),
                             .head = room_like(planner.head, needs.head, num_rows > 0),
                             .head_bias = room_like(planner.head_bias, needs.head_bias, false),
                             .codebook = room_like(codebook, needs.codebook, mixes && num_rows > 0),
                             .noise = room_like(planner.noise, needs.noise)};
  Tensor partial = to_states ? planner.zeros(splits.count * num_rows, planner.source.size(1)) : Tensor();  // of the states
  Matrix upstream{mixture_gradient}, actions{codebook}, statistics{forward.statistics};
  Matrix for_logits{result.source}, for_noise{result.noise}, for_states{partial}, for_head_bias{result.head_bias};
  SumOverRows for_head{result.head, planner.source, splits};
  SumOverRows for_codebook{weighs ? result.codebook : Tensor(), mixture_gradient, splits};
  const int64_t* tie_indices = forward.tie_index.const_data_ptr<int64_t>();
  bool streamed = for_logits && worth_streaming(result.source);
  Workspace logits_memory = planner.tiles(splits, planner.projects, planner.real());
  Workspace products_memory = planner.tiles(splits, to_scores, planner.real());
  Workspace weights_memory = planner.tiles(splits, weighs, weighs ? codebook.options() : planner.real());
  Workspace slopes_memory = planner.tiles(splits, planner.projects && to_logits, planner.source.options());
  std::vector<double> inner = std::vector<double>(corrects ? splits.count * num_rows : 0);

  ProjectionGradients run() {
    planner.each_tile(splits, logits_memory, [&](int64_t split, const Tile& tile, const Matrix& logits) {
      differentiate_tile(split, tile, logits);
    });
    if (to_states)
      result.source = partial.view({splits.count, num_rows, partial.size(1)}).sum(0).to(planner.source.scalar_type());
    if (corrects) correct();
    if (for_head_bias) result.head_bias.squeeze_(0);
    return result;
  }

  void differentiate_tile(int64_t split, const Tile& tile, const Matrix& logits) {
    const Matrix product = products_memory.of(split, tile), weights = weights_memory.of(split, tile);
    const Matrix slopes = planner.projects ? slopes_memory.of(split, tile) : tile.of(for_logits);
    const Matrix noise_slopes = tile.of(for_noise);
    if (product)
      multiply(product, tile.rows_of(upstream), tile.actions_of(actions), /*transposed=*/true, /*add=*/false);
    at::parallel_for(0, tile.rows, 1, [&](int64_t begin, int64_t end) {
      Buffer<R> buffer(tile.count);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t s = tile.row + row;
        const Slopes to{slopes.strip(row), noise_slopes.strip(row), weights.strip(row), streamed};
        const R found = differentiate_strip(planner.scores<R>(tile, logits, row, statistics, tie_indices), rows[s],
                                            product ? product.at<R>(row) : nullptr, to, buffer.data());
        if (corrects) inner[split * num_rows + s] += found;
      }
      if (streamed) fence();
    });
    if (weights) for_codebook.add(split, tile, weights);
    if (for_head) for_head.add(split, tile, slopes);
    if (for_head_bias) add_sum_of_rows(for_head_bias.at<R>(0, tile.first), slopes);
    if (for_states)
      multiply(tile.rows_of(for_states.part(split * num_rows, num_rows)), slopes, tile.actions_of(planner.heads),
               /*transposed=*/false, /*add=*/true);
  }

  // The gradient of a score is p (product - inner), `inner` the sum of all p times product, as the mixture's gradient
  // times the mixture. Computed so it rounds otherwise than the products do, and where one action has nearly all of the
  // probability the difference, next to nothing, would be that error. So the sum itself is formed on the way, by split,
  // and the difference made up for at the likeliest action, where it counts.
  void correct() {
    std::vector<R> missing(num_rows);
    const int64_t* const best = forward.best.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < num_rows; ++s) {
      double exact = 0;
      for (int64_t split = 0; split < splits.count; ++split) exact += inner[split * num_rows + s];
      const double kept = (1.0 - rows[s].oracle_weight) / planner.temperature;
      missing[s] = R(std::exp(-double(rows[s].score_log_sum)) * kept * (rows[s].inner - exact));
      for (const Matrix& matrix : {for_noise, for_logits}) {
        const Strip entry = matrix.strip(s, best[s]);
        if (entry) write<R>(entry, 0, read<R>(entry, 0, 1) + missing[s], 1);
      }
    }
    const Tensor added = at::from_blob(missing.data(), {num_rows, 1}, planner.real());
    if (for_states) result.source.addcmul_(planner.head.index_select(0, forward.best), added);
    if (for_head) result.head.index_add_(0, forward.best, planner.source * added);
    if (for_head_bias) result.head_bias.index_add_(1, forward.best, added.t());
  }
};

// What the gradients of all rows are made of.
template <class R>
std::vector<RowGradient<R>> row_gradients(const Planner& planner, const ProjectionInputs& inputs,
                                          const MixtureGradients& upstream, const ProjectionOutputs& forward) {
  const auto values = [&](const Tensor& tensor) {
    return tensor.defined() ? tensor.to(planner.working).contiguous() : at::zeros({planner.num_rows}, planner.real());
  };
  const bool labelled = inputs.oracle.defined();
  const Tensor offsets = values(upstream.log_normalizer), nlls = values(labelled ? upstream.oracle_nll : Tensor());
  const Tensor weights = values(labelled ? inputs.oracle_weight : Tensor());
  const Tensor inners =
      values(upstream.mixture.defined() ? (upstream.mixture.to(planner.working) * forward.mixture).sum(1) : Tensor());
  const Matrix statistics(forward.statistics);
  std::vector<RowGradient<R>> rows;
  for (int64_t s = 0; s < planner.num_rows; ++s) {
    const int64_t action = labelled ? inputs.oracle.const_data_ptr<int64_t>()[s] : -1;
    rows.push_back({*statistics.at<R>(SCORE_MAX, s), *statistics.at<R>(SCORE_LOG_SUM, s), *statistics.at<R>(LOGIT_MAX, s),
                    *statistics.at<R>(LOGIT_LOG_SUM, s), action < 0 ? R(0) : weights.const_data_ptr<R>()[s],
                    inners.const_data_ptr<R>()[s], offsets.const_data_ptr<R>()[s], nlls.const_data_ptr<R>()[s], action,
                    planner.separate});
  }
  return rows;
}

}  // namespace

ProjectionGradients differentiate(const Planner& planner, const ProjectionInputs& inputs, const Tensor& codebook,
                                  const MixtureGradients& upstream, const ProjectionOutputs& forward,
                                  const ProjectionNeeds& needs) {
  const auto run = [&](auto real) {
    using R = decltype(real);
    return Differentiation<R>{planner, codebook, upstream.mixture, forward, needs,
                              row_gradients<R>(planner, inputs, upstream, forward)}
        .run();
  };
  return planner.working == at::kDouble ? run(double()) : run(float());
}

// at::sum would first make a copy of a bf16 matrix in the working dtype.
Tensor sum_of_rows(const Tensor& matrix, at::ScalarType working) {
  const Tensor values = with_adjacent_columns(matrix);
  Tensor sum = at::zeros({matrix.size(1)}, matrix.options().dtype(working));
  working == at::kDouble ? add_sum_of_rows(sum.mutable_data_ptr<double>(), Matrix(values))
                         : add_sum_of_rows(sum.mutable_data_ptr<float>(), Matrix(values));
  return sum;
}

}  // namespace planlm
