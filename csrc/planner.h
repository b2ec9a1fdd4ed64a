// The planner's logits in tiles of sentences and actions, and how they become scores.
#pragma once

#include <cstring>

#include "operators.h"
#include "product.h"
#include "softmax.h"

namespace planlm {

// Elements of a tile. Smaller ones cost the products their speed, larger ones fall out of the third-level cache: the best
// of 2^18 to 2^21 for S = 512, K = 65536 on two cores.
constexpr int64_t tile_elements = int64_t(1) << 20;
constexpr int64_t most_rows = 8192;

struct Tile {
  int64_t row, rows, first, count;

  // What lies in the tile of a matrix of all sentences by all actions, and, by `rows_of`, of all sentences by anything.
  Matrix of(const Matrix& all) const { return all.part(row, rows, first, count); }
  Matrix rows_of(const Matrix& all) const { return all.part(row, rows); }
  Matrix actions_of(const Matrix& all) const { return all.part(first, count); }
};

// All actions, cut into `count` splits of `size`, the last one perhaps shorter; tiles take `step` of them at a time.
struct Splits {
  int64_t count, size, step;
};

// Memory for each split, allocated before their threads begin.
struct Workspace {
  Tensor memory;  // [splits, elements], or none
  Matrix rooms;

  Workspace() = default;
  Workspace(int64_t splits, int64_t elements, const at::TensorOptions& options)
      : memory(empty({splits, elements}, options)), rooms(memory) {}
  // A matrix of that size in the memory of `split`; none in none.
  Matrix of(int64_t split, int64_t num_rows, int64_t num_columns) const {
    return rooms ? Matrix{rooms.strip(split).data, rooms.kind, num_rows, num_columns, num_columns} : Matrix{};
  }
  Matrix of(int64_t split, const Tile& tile) const { return of(split, tile.rows, tile.count); }
};

// Where logits come from, and how they become scores.
struct Planner {
  at::ScalarType working;
  Tensor source, head, head_bias, noise;
  Matrix sources, heads, biases, noises;  // their memory
  double temperature;
  int64_t top_k;
  bool projects, separate;  // states, with a head; the softmax of the logits is not that of the scores
  int64_t num_rows, num_actions, row_step;

  explicit Planner(const ProjectionInputs& inputs)
      : working(working_type(inputs.source)),
        source(inputs.head.defined() ? factor(inputs.source, working) : with_adjacent_columns(inputs.source)),
        head(factor(inputs.head, working)),
        noise(with_adjacent_columns(inputs.noise)),
        temperature(inputs.temperature),
        top_k(inputs.top_k),
        projects(head.defined()),
        separate(temperature != 1.0 || noise.defined() || top_k > 0),
        num_rows(source.size(0)),
        num_actions(projects ? head.size(0) : source.size(1)),
        row_step(std::max<int64_t>(1, std::min(num_rows, most_rows))) {
    if (projects && head.scalar_type() != source.scalar_type()) {
      source = source.to(working);
      head = head.to(working);
    }
    if (inputs.head_bias.defined()) head_bias = inputs.head_bias.to(working).contiguous().unsqueeze(0);
    sources = Matrix(source);
    heads = Matrix(head);
    biases = Matrix(head_bias);
    noises = Matrix(noise);
  }

  at::TensorOptions real() const { return source.options().dtype(working); }
  at::TensorOptions whole() const { return source.options().dtype(at::kLong); }
  Tensor zeros(int64_t rows, int64_t columns) const { return at::zeros({rows, columns}, real()); }

  // A split for each thread, where each has a sum of `size` values a row of its own; one for all where such sums would
  // outgrow the logits (or a quarter of them, if they do not exist), or the threads have more to do together.
  Splits splits(int64_t size) const {
    const int64_t threads = at::get_num_threads(), sums = threads * (projects ? 4 * size : size);
    return split_into(std::max(sums, threads * 256) <= num_actions ? threads : 1);
  }

  Splits split_into(int64_t count) const {
    // Splits begin on a cache line, for what is written past the caches.
    const int64_t size = count == 1 ? num_actions : (num_actions + 32 * count - 1) / (32 * count) * 32;
    // The logits of all sentences may not exist at once, however small the problem or many the threads.
    const int64_t most = projects ? (size + 3) / 4 : size;
    const int64_t elements = 2 * tile_elements / std::max<int64_t>(2, count);
    return {count, size, std::min(std::max<int64_t>(128, elements / row_step / 128 * 128), most)};
  }

  // Calls `body(split, first action, action behind the last)` for every split, at once where there are several.
  template <class Body>
  void each_split(const Splits& splits, Body body) const {
    const auto run = [&](int64_t split) {
      body(split, std::min(split * splits.size, num_actions), std::min((split + 1) * splits.size, num_actions));
    };
    if (splits.count == 1) return run(0);  // not in parallel: so what is in the body can be
    at::parallel_for(0, splits.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) run(split);
    });
  }

  // Calls `body(split, tile, logits of the tile)` for all tiles, all rows of a strip of actions before the next strip.
  // `rooms` takes logits that come from a head.
  template <class Body>
  void each_tile(const Splits& splits, const Workspace& rooms, Body body) const {
    each_split(splits, [&](int64_t split, int64_t from, int64_t to) {
      for (int64_t first = from; first < to; first += splits.step)
        for (int64_t row = 0; row < num_rows; row += row_step) {
          const Tile tile{row, std::min(row_step, num_rows - row), first, std::min(splits.step, to - first)};
          body(split, tile, projects ? projected(tile, rooms.of(split, tile)) : tile.of(sources));
        }
    });
  }

  // Room for one tile a split; none where it is not wanted.
  Workspace tiles(const Splits& splits, bool wanted, const at::TensorOptions& options) const {
    return wanted ? Workspace(splits.count, row_step * splits.step, options) : Workspace();
  }

  // A strip of one row: of the logits handed to `each_tile`'s body and of the noise, without what top-k drops.
  template <class R>
  Scores<R> scores(const Tile& tile, const Matrix& logits, int64_t row) const {
    return {logits.strip(row), noises.strip(tile.row + row, tile.first), tile.first, tile.count, R(1.0 / temperature),
            /*top_k=*/false, /*threshold=*/0, /*tie_index=*/0};
  }

  // And with it, from the statistics and tie indices of all rows.
  template <class R>
  Scores<R> scores(const Tile& tile, const Matrix& logits, int64_t row, const Matrix& statistics,
                   const int64_t* tie_indices) const {
    Scores<R> result = scores<R>(tile, logits, row);
    result.top_k = top_k > 0;
    result.threshold = *statistics.at<R>(THRESHOLD, tile.row + row);
    result.tie_index = tie_indices[tile.row + row];
    return result;
  }

 private:
  Matrix projected(const Tile& tile, const Matrix& logits) const {
    for (int64_t row = 0; biases && row < tile.rows; ++row)
      std::memcpy(logits.strip(row).data, biases.strip(0, tile.first).data, tile.count * bytes(logits.kind));
    multiply(logits, tile.rows_of(sources), tile.actions_of(heads), /*transposed=*/true, /*add=*/bool(biases));
    return logits;
  }
};

// What a row's gradient comes from, each where it is defined.
struct MixtureGradients {
  Tensor mixture, log_normalizer, oracle_nll;
};

// Gradients of logits (or of states, head and head bias), noise and action embeddings, where wanted.
ProjectionGradients differentiate(const Planner& planner, const ProjectionInputs& inputs, const Tensor& codebook,
                                  const MixtureGradients& upstream, const ProjectionOutputs& forward,
                                  const ProjectionNeeds& needs);

// The sum over the rows of a matrix, formed in the working dtype.
Tensor sum_of_rows(const Tensor& matrix, at::ScalarType working);

}  // namespace planlm
