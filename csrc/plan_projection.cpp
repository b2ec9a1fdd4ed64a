// planlm::plan_projection and its backward for the CPU.
//
// The scores are worked through in tiles of rows and actions that fit the processor's caches: a vector loop turns a
// tile of logits into weights, a matrix product of torch's own library takes the weights on. So the probabilities never
// exist as a whole, and where the logits come from the planner's states neither do the logits.
//
// Where there are actions enough every thread has a range of them to itself, and what is summed over actions is summed
// up once at the end. Threads that share tiles read what another has just written: cores without a common third-level
// cache then took 1.3 times as long, and a virtual machine's may be such cores at one moment and not at the next.
//
// With p = softmax(scores / t), w the oracle's share, M the gradient of the mixture and E the action embeddings:
//   gradient of scores  = p * ((1 - w) (M E^T - M . mixture) + gradient of log_normalizer) / t
//   gradient of logits  = gradient of scores + gradient of oracle_nll * (softmax(logits) - onehot(oracle))
//   gradient of E       = ((1 - w) p + w onehot(oracle))^T M
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "product.h"

namespace planlm {
namespace {

// Elements of a tile. Smaller ones cost the products their speed, larger ones fall out of the third-level cache: the best
// of 2^18 to 2^21 for S = 512, K = 65536 on two cores.
constexpr int64_t tile_elements = int64_t(1) << 20;
constexpr int64_t most_rows = 8192;

struct Tile {
  int64_t row, rows, first, count;
};

// All actions, cut into `count` ranges of `size`, the last one perhaps shorter; tiles take `step` of them at a time.
struct Ranges {
  int64_t count, size, step;
};

// One room for each range, allocated before their threads begin.
struct Rooms {
  Tensor memory;  // [ranges, elements of a room], or none
  Matrix rooms;

  Rooms() = default;
  Rooms(int64_t count, int64_t elements, const at::TensorOptions& options)
      : memory(empty({count, elements}, options)), rooms(memory) {}
  // A matrix of that size in the room of `range`; none in none.
  Matrix of(int64_t range, int64_t num_rows, int64_t num_columns) const {
    return rooms ? Matrix{rooms.strip(range).data, rooms.kind, num_rows, num_columns, num_columns} : Matrix{};
  }
  Matrix of(int64_t range, const Tile& tile) const { return of(range, tile.rows, tile.count); }
};

// Where logits come from, and how they become scores.
struct Planner {
  Tensor source, head, head_bias, noise;
  Matrix sources, heads, biases, noises;  // their memory
  at::ScalarType working;
  double temperature;
  int64_t top_k;
  bool projects;  // states, with a head
  int64_t num_rows, num_actions, row_step;

  Planner(const Tensor& source_, const OptionalTensor& head_, const OptionalTensor& head_bias_,
          const OptionalTensor& noise_, at::ScalarType working_, double temperature_, int64_t top_k_)
      : source(head_ ? factor(source_, working_) : with_adjacent_columns(source_)),
        head(factor(given(head_), working_)),
        head_bias(given(head_bias_)),
        noise(with_adjacent_columns(given(noise_))),
        working(working_),
        temperature(temperature_),
        top_k(top_k_),
        projects(head_.has_value()),
        num_rows(source_.size(0)),
        num_actions(head.defined() ? head.size(0) : source_.size(1)) {
    row_step = std::max<int64_t>(1, std::min(num_rows, most_rows));
    if (head.defined() && head.scalar_type() != source.scalar_type()) {
      source = source.to(working);
      head = head.to(working);
    }
    if (head_bias.defined()) biases = Matrix(head_bias = head_bias.to(working).contiguous().unsqueeze(0));
    sources = Matrix(source);
    heads = Matrix(head);
    noises = Matrix(noise);
  }

  bool separate() const { return temperature != 1.0 || noise.defined() || top_k > 0; }

  // A range for each thread, where each has a sum of `size` values a row of its own; one for all where such sums would
  // outgrow the logits (or a quarter of them, if they do not exist), or the threads have more to do together.
  Ranges ranges(int64_t size) const {
    const int64_t threads = at::get_num_threads(), sums = threads * (head.defined() ? 4 * size : size);
    return in_ranges(std::max(sums, threads * 256) <= num_actions ? threads : 1);
  }

  Ranges in_ranges(int64_t count) const {
    // Ranges begin on a cache line, for what is written past the caches.
    const int64_t size = count == 1 ? num_actions : (num_actions + 32 * count - 1) / (32 * count) * 32;
    // The logits of all sentences may not exist at once, however small the problem or many the threads.
    const int64_t most = head.defined() ? (size + 3) / 4 : size;
    const int64_t elements = 2 * tile_elements / std::max<int64_t>(2, count);
    return {count, size, std::min(std::max<int64_t>(128, elements / row_step / 128 * 128), most)};
  }

  // Calls `body(range, first action, action behind the last)` for every range, at once where there are several.
  template <class Body>
  void each_range(const Ranges& ranges, Body body) const {
    const auto run = [&](int64_t range) {
      body(range, std::min(range * ranges.size, num_actions), std::min((range + 1) * ranges.size, num_actions));
    };
    if (ranges.count == 1) return run(0);  // not in parallel: so what is in the body can be
    at::parallel_for(0, ranges.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) run(range);
    });
  }

  // Calls `body(tile, logits of the tile)` for the tiles of actions `from` to `to`, all rows of a strip of actions
  // before the next strip. `rooms`: that of the range takes logits that come from a head.
  template <class Body>
  void each_tile(int64_t from, int64_t to, int64_t step, const Rooms& rooms, int64_t range, Body body) const {
    for (int64_t first = from; first < to; first += step) {
      const int64_t count = std::min(step, to - first);
      for (int64_t row = 0; row < num_rows; row += row_step) {
        const Tile tile{row, std::min(row_step, num_rows - row), first, count};
        body(tile, projects ? projected(tile, rooms.of(range, tile)) : sources.part(row, tile.rows, first, count));
      }
    }
  }

  // Room for one tile a range; none where it is not wanted.
  Rooms tiles(const Ranges& ranges, bool wanted, const at::TensorOptions& options) const {
    return wanted ? Rooms(ranges.count, row_step * ranges.step, options) : Rooms();
  }

  // Room for the logits of tiles, where they come from a head.
  Rooms logits_tiles(const Ranges& ranges) const {
    return tiles(ranges, head.defined(), source.options().dtype(working));
  }

  // A strip of one row: of the logits handed to `each_tile`'s body and of the noise.
  template <class R>
  Scores<R> scores(const Tile& tile, const Matrix& logits, int64_t row, const R* thresholds, const int64_t* cuts) const {
    Scores<R> result{};
    result.logits = logits.strip(row);
    result.noise = noises.strip(tile.row + row, tile.first);
    result.first = tile.first;
    result.count = tile.count;
    result.inverse_temperature = R(1.0 / temperature);
    result.top_k = top_k > 0 && thresholds;
    if (result.top_k) {
      result.threshold = thresholds[tile.row + row];
      result.cut = cuts[tile.row + row];
    }
    return result;
  }

 private:
  Matrix projected(const Tile& tile, const Matrix& logits) const {
    for (int64_t row = 0; biases && row < tile.rows; ++row)
      std::memcpy(logits.strip(row).data, biases.strip(0, tile.first).data, tile.count * bytes(logits.kind));
    multiply(logits, sources.part(tile.row, tile.rows, 0, sources.columns),
             heads.part(tile.first, tile.count, 0, heads.columns), /*transposed=*/true, /*add=*/bool(biases));
    return logits;
  }
};

// The largest `top_k` scores of each row: threshold (the least score kept) and, among those equal to it, the last
// action kept; among equals the lowest come first. A NaN counts as larger than any number, as in torch.sort.
template <class R>
void find_largest(Planner& planner, Tensor& statistics, Tensor& cut) {
  using Candidate = std::pair<R, int64_t>;
  const auto larger = [](const Candidate& a, const Candidate& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  const int64_t kept = planner.top_k, slack = std::max<int64_t>(64, kept / 4);
  // Candidates of all rows at once could outgrow the logits: half of those at most, and as many passes as that takes.
  const int64_t group = std::max<int64_t>(1, planner.num_rows * planner.num_actions / (8 * (kept + slack)));
  R* threshold = statistics.data_ptr<R>() + 4 * planner.num_rows;
  int64_t* last_kept = cut.data_ptr<int64_t>();
  const Ranges whole = planner.in_ranges(1);
  const Rooms rooms = planner.logits_tiles(whole);
  for (int64_t from = 0; from < planner.num_rows; from += group) {
    const int64_t to = std::min(planner.num_rows, from + group);
    std::vector<std::vector<Candidate>> found(to - from);
    for (auto& best : found) best.reserve(std::min(kept + slack, planner.num_actions));
    planner.each_tile(0, planner.num_actions, whole.step, rooms, 0, [&](const Tile& tile, const Matrix& logits) {
      const int64_t first = std::max(from, tile.row), last = std::min(to, tile.row + tile.rows);
      at::parallel_for(first, std::max(first, last), 1, [&](int64_t begin, int64_t end) {
        Buffer<R> buffer(tile.count);
        for (int64_t row = begin; row < end; ++row) {
          auto& best = found[row - from];
          R least = -std::numeric_limits<R>::infinity();
          const auto prune = [&] {
            std::nth_element(best.begin(), best.begin() + (kept - 1), best.end(), larger);
            best.resize(kept);
            least = best.back().first;
          };
          if (int64_t(best.size()) >= kept) prune();
          rows<R>().scores(planner.scores<R>(tile, logits, row - tile.row, nullptr, nullptr), buffer.data());
          for (int64_t i = 0; i < tile.count; ++i) {
            const R score = std::isnan(buffer[i]) ? std::numeric_limits<R>::infinity() : buffer[i];
            if (int64_t(best.size()) >= kept && score <= least) continue;
            best.emplace_back(score, tile.first + i);
            if (int64_t(best.size()) >= kept + slack) prune();
          }
        }
      });
    });
    for (int64_t row = from; row < to; ++row) {
      auto& best = found[row - from];
      std::nth_element(best.begin(), best.begin() + (kept - 1), best.end(), larger);
      threshold[row] = best[kept - 1].first;
      last_kept[row] = best[kept - 1].second;
    }
  }
}

struct Forward {
  Tensor log_normalizer, oracle_nll, best, mixture, statistics, cut;
};

// Adds one online softmax to another. Returns what was weighted by either has to be multiplied with.
template <class R>
std::pair<R, R> add_softmax(R& largest, R& sum, R other_largest, R other_sum, R inverse_temperature) {
  const R most = std::max(largest, other_largest);
  const R shift = most == -std::numeric_limits<R>::infinity() ? R(0) : most;  // no score yet in either
  const std::pair<R, R> scales{std::exp((largest - shift) * inverse_temperature),
                               std::exp((other_largest - shift) * inverse_temperature)};
  sum = sum * scales.first + other_sum * scales.second;
  largest = most;
  return scales;
}

// Softmax statistics of every row and, where there are action embeddings, their mixture.
template <class R>
Forward mix(Planner& planner, const Tensor& codebook, const Tensor& oracle) {
  const int64_t num_rows = planner.num_rows;
  const auto real = planner.source.options().dtype(planner.working);
  const auto whole = planner.source.options().dtype(at::kLong);
  const int64_t size = codebook.defined() ? codebook.size(1) : 0;
  Forward result{empty({num_rows}, real),      at::zeros({num_rows}, real),
                 empty({num_rows}, whole),     at::zeros({num_rows, size}, real),
                 empty({5, num_rows}, real),   at::full({num_rows}, planner.num_actions - 1, whole)};
  result.statistics.select(0, 4).fill_(-std::numeric_limits<double>::infinity());
  if (planner.top_k > 0 && num_rows > 0) find_largest<R>(planner, result.statistics, result.cut);

  constexpr R lowest = -std::numeric_limits<R>::infinity();
  const Ranges ranges = planner.ranges(size);
  std::vector<RowState<R>> states(ranges.count * num_rows, {lowest, 0, lowest, 0, 0, 0});
  const int64_t* labels = oracle.defined() ? oracle.const_data_ptr<int64_t>() : nullptr;
  const bool separate = planner.separate() && oracle.defined();
  const Tensor mixtures = ranges.count == 1 ? result.mixture : at::zeros({ranges.count * num_rows, size}, real);
  const Matrix all_sums(mixtures), actions(codebook);
  const Rooms weights_rooms = planner.tiles(ranges, codebook.defined(), codebook.defined() ? codebook.options() : real);
  const Rooms logits_rooms = planner.logits_tiles(ranges);
  R* const statistics = result.statistics.template data_ptr<R>();
  const int64_t* const cuts = result.cut.template const_data_ptr<int64_t>();
  planner.each_range(ranges, [&](int64_t range, int64_t from, int64_t to) {
    const Matrix sums = all_sums.part(range * num_rows, num_rows, 0, size);
    R* const mixture = sums.template at<R>(0);
    planner.each_tile(from, to, ranges.step, logits_rooms, range, [&](const Tile& tile, const Matrix& logits) {
      const Matrix weights = weights_rooms.of(range, tile);
      at::parallel_for(0, tile.rows, 1, [&](int64_t begin, int64_t end) {
        Buffer<R> buffer(tile.count);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t s = tile.row + row;
          const auto scores = planner.scores<R>(tile, logits, row, statistics + 4 * num_rows, cuts);
          const R rescale = rows<R>().advance(scores, states[range * num_rows + s], separate, labels ? labels[s] : -1,
                                              weights.strip(row), buffer.data());
          if (rescale != R(1))
            for (int64_t a = 0; a < size; ++a) mixture[s * size + a] *= rescale;
        }
      });
      if (!actions) return;
      multiply(sums.part(tile.row, tile.rows, 0, size), weights, actions.part(tile.first, tile.count, 0, size),
               /*transposed=*/false, /*add=*/true);
    });
  });

  const R* const parts = mixtures.const_data_ptr<R>();
  R* const mixture = result.mixture.template data_ptr<R>();
  for (int64_t s = 0; s < num_rows; ++s) {
    auto state = states[s];
    R* const total = mixture + s * size;
    if (ranges.count > 1) std::copy_n(parts + s * size, size, total);
    for (int64_t range = 1; range < ranges.count; ++range) {
      const auto& other = states[range * num_rows + s];
      if (other.score_max > state.score_max) state.best = other.best;
      if (labels && labels[s] >= range * ranges.size) state.logit_of_oracle = other.logit_of_oracle;
      add_softmax(state.logit_max, state.logit_sum, other.logit_max, other.logit_sum, R(1));
      const auto [ours, theirs] = add_softmax(state.score_max, state.score_sum, other.score_max, other.score_sum,
                                              R(1.0 / planner.temperature));
      const R* const part = parts + (range * num_rows + s) * size;
      for (int64_t a = 0; a < size; ++a) total[a] = total[a] * ours + part[a] * theirs;
    }
    if (state.score_max == lowest) state.score_sum = std::numeric_limits<R>::quiet_NaN();  // -inf everywhere, or NaN
    if (!separate) {
      state.logit_max = state.score_max;
      state.logit_sum = state.score_sum;
    }
    const R log_sum = std::log(state.score_sum);
    statistics[s] = state.score_max;
    statistics[num_rows + s] = log_sum;
    statistics[2 * num_rows + s] = state.logit_max;
    statistics[3 * num_rows + s] = std::log(state.logit_sum);
    result.log_normalizer.template data_ptr<R>()[s] = R(state.score_max / planner.temperature) + log_sum;
    result.best.template data_ptr<int64_t>()[s] = state.best;
    if (labels && labels[s] >= 0)
      result.oracle_nll.template data_ptr<R>()[s] =
          (state.logit_max - state.logit_of_oracle) + statistics[3 * num_rows + s];
    for (int64_t a = 0; a < size; ++a) total[a] /= state.score_sum;
  }
  return result;
}

// The oracle action's share in each row, `[S, 1]`; undefined where there is none.
Tensor shares(const Tensor& oracle, const Tensor& oracle_weight, at::ScalarType working) {
  if (!oracle.defined() || !oracle_weight.defined()) return {};
  return oracle_weight.to(working).masked_fill(oracle < 0, 0.0).unsqueeze(1).contiguous();
}

Tensor of_oracle(const Tensor& codebook, const Tensor& oracle, at::ScalarType working) {
  return codebook.index_select(0, oracle.clamp_min(0)).to(working);  // [S, A]
}

Tensor with_oracle(const Tensor& mixture, const Tensor& codebook, const Tensor& oracle, const Tensor& share) {
  if (!share.defined()) return mixture;
  return (1 - share) * mixture + share * of_oracle(codebook, oracle, mixture.scalar_type());
}

struct Backward {
  Tensor source, noise, codebook, head, head_bias;
};

// Adds the sum over rows, formed in the working dtype.
template <class R>
void add_sum_of_rows(R* sum, const Matrix& matrix) {
  constexpr int64_t width = 512;
  const std::vector<int64_t> every(matrix.rows, 0);
  at::parallel_for(0, (matrix.columns + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    Buffer<R> total(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * width, count = std::min(width, matrix.columns - first);
      sum_rows(total.data(), matrix, 0, matrix.rows, first, count, every.data());
      for (int64_t j = 0; j < count; ++j) sum[first + j] += total[j];
    }
  });
}

// at::sum would first make a copy of a bf16 matrix in the working dtype.
Tensor sum_of_rows(const Tensor& matrix, at::ScalarType working) {
  const Tensor values = with_adjacent_columns(matrix);
  Tensor sum = at::zeros({matrix.size(1)}, matrix.options().dtype(working));
  working == at::kDouble ? add_sum_of_rows(sum.data_ptr<double>(), Matrix(values))
                         : add_sum_of_rows(sum.data_ptr<float>(), Matrix(values));
  return sum;
}

// A gradient that is a sum over rows, of left^T right for the actions of each tile; rounded once. oneDNN's bf16 products
// are not of transposed left factors: there right^T left is formed, of `right` turned once for all tiles, and turned back.
class SumOverRows {
 public:
  SumOverRows() = default;
  // `right`: as many rows as there are in all.
  SumOverRows(const Tensor& whole, const Tensor& right, const Ranges& ranges)
      : whole_(whole), right_(right), num_rows_(right.size(0)) {
    if (right_.kind != Kind::bf16) return;
    turned_ = right.t().contiguous();
    right_ = Matrix(turned_);
    sums_ = Rooms(ranges.count, right.size(1) * ranges.step, right.options().dtype(at::kFloat));
  }
  explicit operator bool() const { return bool(whole_); }

  void add(int64_t range, const Tile& tile, const Matrix& left) const {
    const Matrix wanted = whole_.part(tile.first, tile.count, 0, whole_.columns);
    const bool begun = tile.row > 0;
    if (!sums_.rooms) return multiply_rows(wanted, left, right_.part(tile.row, tile.rows, 0, right_.columns), begun);
    const Matrix sum = sums_.of(range, whole_.columns, tile.count);
    multiply(sum, right_.part(0, right_.rows, tile.row, tile.rows), left, /*transposed=*/false, begun);
    if (tile.row + tile.rows == num_rows_) turn_back(sum, wanted);
  }

 private:
  static void turn_back(const Matrix& sum, const Matrix& wanted) {
    constexpr int64_t most = 64;  // lines of 768 values are then 192 KiB
    at::parallel_for(0, (sum.columns + most - 1) / most, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> lines(most * sum.rows);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * most, count = std::min(most, sum.columns - first);
        // float32 as pairs of bf16: packing them is to transpose
        rows<float>().pack_transposed(sum.at<float>(0, first), 2 * sum.step, lines.data(), 2 * count, sum.rows);
        for (int64_t j = 0; j < count; ++j)
          rows<float>().store(lines.data() + j * sum.rows, nullptr, wanted.strip(first + j), sum.rows);
      }
    });
  }

  Tensor turned_;
  Matrix whole_, right_;
  int64_t num_rows_ = 0;
  Rooms sums_;
};

// Adds a value to one entry of each row.
template <class R>
void add_at(Tensor& matrix, const Tensor& columns, const std::vector<R>& values) {
  if (!matrix.defined()) return;
  const int64_t* column = columns.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, matrix.scalar_type(), "plan_projection_backward", [&] {
    for (int64_t s = 0; s < matrix.size(0); ++s) {
      scalar_t& entry = matrix.data_ptr<scalar_t>()[s * matrix.stride(0) + column[s] * matrix.stride(1)];
      entry = scalar_t(R(entry) + values[s]);
    }
  });
}

// Gradients of logits (or of states, head and head bias), noise and codebook, where wanted.
template <class R>
Backward differentiate(Planner& planner, const Tensor& codebook, const Tensor& mixture_gradient, const Tensor& mixture,
                       const Tensor& log_normalizer_gradient, const Tensor& nll_gradient, const Tensor& oracle,
                       const Tensor& share, const Tensor& best, const Tensor& statistics, const Tensor& cut,
                       bool to_source, bool to_head, bool to_head_bias, bool to_noise, bool to_codebook) {
  const int64_t num_rows = planner.num_rows, num_actions = planner.num_actions;
  const bool hidden = planner.head.defined(), to_logits = to_source || to_head || to_head_bias;
  const bool mixes = mixture_gradient.defined() && codebook.defined();
  to_codebook = to_codebook && codebook.defined();
  Backward result;
  // Sums over rows: written by the products, so that only what no product reaches has to be zero.
  const auto summed = [&](const Tensor& like, bool reached) {
    return reached && num_rows > 0 ? empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
  };
  const auto real = planner.source.options().dtype(planner.working);
  if (to_noise) result.noise = empty(planner.noise.sizes(), planner.noise.options());
  const Ranges ranges = planner.ranges(hidden && to_source ? planner.source.size(1) : 0);
  Tensor states_gradients;
  if (hidden && to_source) states_gradients = at::zeros({ranges.count * num_rows, planner.source.size(1)}, real);
  if (!hidden && to_source) result.source = empty(planner.source.sizes(), planner.source.options());
  if (to_head) result.head = summed(planner.head, true);
  if (to_head_bias) result.head_bias = at::zeros({num_actions}, real);
  if (to_codebook) result.codebook = summed(codebook, mixes);

  const bool to_scores = to_logits || to_noise, weighs = mixes && to_codebook;
  Tensor offset = at::zeros({num_rows}, real), inner;
  if (log_normalizer_gradient.defined()) offset = offset + log_normalizer_gradient.to(planner.working);
  if (mixes) inner = (mixture_gradient.to(planner.working) * mixture).sum(1);
  const Tensor nll = nll_gradient.defined() && oracle.defined() ? nll_gradient.to(planner.working).contiguous() : Tensor();
  const R* offsets = offset.const_data_ptr<R>();
  const R* inners = mixes ? inner.const_data_ptr<R>() : nullptr;
  const R* shares = share.defined() ? share.const_data_ptr<R>() : nullptr;
  const R* nlls = nll.defined() ? nll.const_data_ptr<R>() : nullptr;
  const int64_t* labels = oracle.defined() ? oracle.const_data_ptr<int64_t>() : nullptr;
  const R* stats = statistics.const_data_ptr<R>();
  const bool separate = planner.separate();

  const bool stream = result.source.defined() && worth_streaming(result.source);
  const Rooms product_rooms = planner.tiles(ranges, mixes && to_scores, real);
  const Rooms weights_rooms = planner.tiles(ranges, weighs, weighs ? codebook.options() : real);
  const Rooms gradient_rooms = planner.tiles(ranges, hidden && to_logits, planner.source.options());
  const Rooms logits_rooms = planner.logits_tiles(ranges);
  const SumOverRows for_codebook = weighs ? SumOverRows(result.codebook, mixture_gradient, ranges) : SumOverRows();
  const SumOverRows for_head = to_head ? SumOverRows(result.head, planner.source, ranges) : SumOverRows();
  R* const for_head_bias = to_head_bias ? result.head_bias.template data_ptr<R>() : nullptr;
  const Matrix upstreams(mixture_gradient), actions(codebook), for_logits(hidden ? Tensor() : result.source),
      for_noise(result.noise), for_states(states_gradients);
  const int64_t* const cuts = cut.const_data_ptr<int64_t>();
  // The gradient of a score is p (product - inner), `inner` the sum of all p times product, as the mixture's gradient
  // times the mixture. Computed so it rounds otherwise than the products do, and where one action has nearly all of the
  // probability the difference, next to nothing, would be that error. So the sum itself is formed on the way, by range,
  // and the difference made up for at the likeliest action, where it counts.
  const bool corrects = mixes && to_scores && planner.source.scalar_type() == planner.working;
  std::vector<double> sums(corrects ? ranges.count * num_rows : 0, 0.0);
  planner.each_range(ranges, [&](int64_t range, int64_t from, int64_t to) {
    planner.each_tile(from, to, ranges.step, logits_rooms, range, [&](const Tile& tile, const Matrix& logits) {
      const Matrix product = product_rooms.of(range, tile), weights = weights_rooms.of(range, tile);
      const Matrix slopes = hidden ? gradient_rooms.of(range, tile)
                                   : for_logits.part(tile.row, tile.rows, tile.first, tile.count);
      const Matrix noise_slopes = for_noise.part(tile.row, tile.rows, tile.first, tile.count);
      if (product)
        multiply(product, upstreams.part(tile.row, tile.rows, 0, upstreams.columns),
                 actions.part(tile.first, tile.count, 0, actions.columns), /*transposed=*/true, /*add=*/false);
      at::parallel_for(0, tile.rows, 1, [&](int64_t begin, int64_t end) {
        Buffer<R> buffer(tile.count);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t s = tile.row + row;
          const RowGradient<R> gradient{stats[s],
                                        stats[num_rows + s],
                                        stats[2 * num_rows + s],
                                        stats[3 * num_rows + s],
                                        shares ? shares[s] : R(0),
                                        mixes ? inners[s] : R(0),
                                        offsets[s],
                                        nlls ? nlls[s] : R(0),
                                        labels ? labels[s] : -1,
                                        separate};
          const Scores<R> scores = planner.scores<R>(tile, logits, row, stats + 4 * num_rows, cuts);
          const R found = rows<R>().differentiate(scores, gradient, product.strip(row), slopes.strip(row),
                                                  noise_slopes.strip(row), weights.strip(row), buffer.data(), stream);
          if (corrects) sums[range * num_rows + s] += found;
        }
        if (stream) rows<R>().fence();
      });
      if (for_codebook) for_codebook.add(range, tile, weights);
      if (for_head) for_head.add(range, tile, slopes);
      if (for_head_bias) add_sum_of_rows(for_head_bias + tile.first, slopes);
      if (for_states)
        multiply(for_states.part(range * num_rows + tile.row, tile.rows, 0, for_states.columns), slopes,
                 planner.heads.part(tile.first, tile.count, 0, planner.heads.columns), /*transposed=*/false,
                 /*add=*/true);
    });
  });
  if (states_gradients.defined())
    result.source = states_gradients.view({ranges.count, num_rows, planner.source.size(1)}).sum(0).to(planner.source.scalar_type());
  if (corrects) {
    std::vector<R> missing(num_rows);
    for (int64_t s = 0; s < num_rows; ++s) {
      double exact = 0;
      for (int64_t range = 0; range < ranges.count; ++range) exact += sums[range * num_rows + s];
      const double kept = (1.0 - (shares ? shares[s] : R(0))) / planner.temperature;
      missing[s] = R(std::exp(-double(stats[num_rows + s])) * kept * (inners[s] - exact));
    }
    const Tensor added = at::from_blob(missing.data(), {num_rows, 1}, real);
    add_at(result.noise, best, missing);
    if (!hidden) add_at(result.source, best, missing);
    if (hidden && to_source) result.source.addcmul_(planner.head.index_select(0, best), added);
    if (to_head) result.head.index_add_(0, best, planner.source * added);
    if (to_head_bias) result.head_bias.index_add_(0, best, added.squeeze(1));
  }
  return result;
}

// At every call, as compiled code comes here unchecked; in the words of kernels/checks.py.
Tensor checked(const OptionalTensor& oracle, int64_t num_actions) {
  if (!oracle) return {};
  const Tensor labels = oracle->contiguous();
  const int64_t* values = labels.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < labels.size(0); ++s)
    TORCH_CHECK_VALUE(values[s] < num_actions, "oracle: got action ", values[s], ", needs actions below ", num_actions,
                      " (K); negative means none");
  return labels;
}

at::ScalarType working_type(const Tensor& source) {
  return source.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plan_projection(
    const Tensor& source, const OptionalTensor& head, const OptionalTensor& head_bias, const OptionalTensor& codebook,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& oracle,
    const OptionalTensor& oracle_weight, double temperature, int64_t top_k) {
  const auto working = working_type(source);
  Planner planner(source, head, head_bias, noise, working, temperature, top_k);
  const Tensor actions = given(codebook), labels = checked(oracle, planner.num_actions);
  const Tensor embeddings = factor(actions, working);
  const Forward mixed = working == at::kDouble ? mix<double>(planner, embeddings, labels)
                                               : mix<float>(planner, embeddings, labels);
  Tensor projected = mixed.mixture;
  if (actions.defined()) {
    const Tensor share = shares(labels, given(oracle_weight), working);
    projected = with_oracle(mixed.mixture, actions, labels, share);
    if (weight) {
      projected = projected.to(actions.scalar_type());
      projected = affine(projected, *weight, bias ? OptionalTensor(bias->to(actions.scalar_type())) : bias);
    } else {
      if (bias) projected = projected + *bias;
      projected = projected.to(actions.scalar_type(), /*non_blocking=*/false, /*copy=*/!bias && !share.defined());
    }
  } else {
    projected = projected.clone();
  }
  return {projected, mixed.log_normalizer, mixed.oracle_nll, mixed.best, mixed.mixture, mixed.statistics, mixed.cut};
}

std::vector<Tensor> plan_projection_backward(
    const OptionalTensor& grad_projected, const OptionalTensor& grad_log_normalizer,
    const OptionalTensor& grad_oracle_nll, const Tensor& source, const OptionalTensor& head,
    const OptionalTensor& head_bias, const OptionalTensor& codebook, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& noise, const OptionalTensor& oracle,
    const OptionalTensor& oracle_weight, const Tensor& best, const Tensor& mixture, const Tensor& statistics,
    const Tensor& cut, double temperature, int64_t top_k, std::array<bool, 8> needs) {
  const auto working = working_type(source);
  const auto [to_source, to_head, to_head_bias, to_codebook, to_weight, to_bias, to_noise, to_share] = needs;
  Planner planner(source, head, head_bias, noise, working, temperature, top_k);
  const Tensor actions = given(codebook), labels = checked(oracle, planner.num_actions);
  const Tensor share = shares(labels, given(oracle_weight), working);

  Tensor mixture_gradient, grad_weight, grad_bias, grad_share;
  const Tensor gradient = actions.defined() ? given(grad_projected) : Tensor();
  if (gradient.defined()) {
    mixture_gradient = weight ? at::mm(gradient, *weight) : with_adjacent_columns(gradient);  // [S, A]
    if (to_weight) {
      const Tensor mixed = with_oracle(mixture, actions, labels, share).to(actions.scalar_type());
      grad_weight = empty(weight->sizes(), weight->options());
      at::mm_out(grad_weight, gradient.t(), mixed);
    }
    if (to_bias) grad_bias = sum_of_rows(gradient, working);
    if (to_share && share.defined())
      grad_share = (mixture_gradient.to(working) * (of_oracle(actions, labels, working) - mixture))
                       .sum(1)
                       .masked_fill(labels < 0, 0.0);
  }
  Backward found;
  if (to_source || to_head || to_head_bias || to_codebook || to_noise) {
    const auto run = [&](auto real) {
      return differentiate<decltype(real)>(planner, factor(actions, working), factor(mixture_gradient, working), mixture,
                                           given(grad_log_normalizer), given(grad_oracle_nll), labels, share, best,
                                           statistics, cut, to_source, to_head, to_head_bias, to_noise, to_codebook);
    };
    found = working == at::kDouble ? run(double{}) : run(float{});
  }
  // Each gradient in its tensor's dtype; zeros where none arrives, nothing where none is wanted.
  const auto finished = [&](bool wanted, const Tensor& gradient, const OptionalTensor& like) {
    if (!wanted || !like) return empty({0}, source.options());
    return gradient.defined() ? gradient.to(like->scalar_type()) : at::zeros(like->sizes(), like->options());
  };
  return {finished(to_source, found.source, source),
          finished(to_head, found.head, head),
          finished(to_head_bias, found.head_bias, head_bias),
          finished(to_codebook, found.codebook, codebook),
          finished(to_weight, grad_weight, weight),
          finished(to_bias, grad_bias, bias),
          finished(to_noise, found.noise, noise),
          finished(to_share, grad_share, oracle_weight)};
}

}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  library.impl("plan_projection", planlm::plan_projection);
  library.impl("plan_projection_backward", planlm::plan_projection_backward);
}
