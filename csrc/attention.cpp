// planlm::packed_attention and its backward for the CPU: causal attention within each of the documents of a row, bf16.
//
// torch's own attention for the CPU works through the masked half too and multiplies bf16 at float32's speed where there
// is no AMX. Here only keys that a block of queries sees are touched, and products go through oneDNN's batch-reduce
// kernels. Queries are taken in blocks, keys in tiles; the softmax is normalised online (FlashAttention-2,
// arXiv:2307.08691), the backward recomputes it from the logarithm of its sum. That one works on transposed tiles, keys
// by queries: their sum and inner product are then vectors, and no tile has to be transposed for the products after.
//
// Sizes: B rows, W positions, H query heads, G key heads, d channels of a head.
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace planlm {
namespace {

using Half = at::BFloat16;

constexpr int64_t panel = 64;     // columns of one product: four vectors of 16 float32
constexpr int64_t queries = 128;  // of a block
constexpr int64_t keys = 256;     // of a tile: two of float32 and three of bf16 are 448 KiB
constexpr double log2e = 1.4426950408889634;

// out[rows, width] = or += a[rows, depth] b, of which `b` is packed in panels.
void product(int64_t rows, int64_t width, int64_t depth, const Half* a, int64_t a_step, const Half* b, float* out,
             int64_t out_step, bool add) {
  at::native::cpublas::brgemm(rows, width, depth, a_step, width, out_step, add, a, b, out, /*is_vnni=*/true);
}

// One head of one row of a [B, W, H, d] tensor.
struct Head {
  Half* data;
  int64_t step;
  Half* row(int64_t position) const { return data + position * step; }
};

// All heads of such a tensor.
struct Heads {
  Half* data;
  int64_t row_step, step, head_step;
  explicit Heads(const Tensor& tensor)
      : data(tensor.data_ptr<Half>()),
        row_step(tensor.stride(0)),
        step(tensor.stride(1)),
        head_step(tensor.stride(2)) {}
  Head at(int64_t b, int64_t h) const { return {data + b * row_step + h * head_step, step}; }
};

// Rows `begin` to `end` as the right factor of a product over positions, and, transposed, of one over channels.
void pack(const Head& head, int64_t begin, int64_t end, int64_t size, Half* to) {
  rows<float>().pack(head.row(begin), head.step, to, end - begin, size);
}

void pack_transposed(const Head& head, int64_t begin, int64_t end, int64_t size, Half* to) {
  for (int64_t at = begin; at < end; at += panel)
    rows<float>().pack_transposed(head.row(at), head.step, to + (at - begin) * size, size, std::min(panel, end - at));
}

// All rows, transposed; `pairs` has room for a panel.
void turn(const Head& head, int64_t width, int64_t size, Half* pairs, Half* to) {
  for (int64_t at = 0; at < width; at += panel) {
    const int64_t count = std::min(panel, width - at);
    pack_transposed(head, at, at + count, size, pairs);
    for (int64_t c = 0; c < size; ++c)
      for (int64_t k = 0; k < count; ++k) to[c * width + at + k] = pairs[c / 2 * 2 * count + 2 * k + c % 2];
  }
}

// scores[count, depth of panels] = left right^T, the right in transposed panels.
void scores_of(const Half* left, int64_t left_step, int64_t count, const Half* right, int64_t width, int64_t size,
               float* out, int64_t out_step) {
  for (int64_t at = 0; at < width; at += panel)
    product(count, std::min(panel, width - at), size, left, left_step, right + at * size, out + at, out_step, false);
}

struct Shape {
  int64_t batch, width, heads, groups, size;
  explicit Shape(const Tensor& query, const Tensor& key)
      : batch(query.size(0)), width(query.size(1)), heads(query.size(2)), groups(key.size(2)), size(query.size(3)) {}
};

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first) {
  const Shape shape(query, key);
  TORCH_CHECK_VALUE(shape.groups > 0 && shape.heads % shape.groups == 0, "key: got ", shape.groups,
                    " heads, needs a number that divides the query's ", shape.heads);
  TORCH_CHECK_VALUE(key.size(0) == shape.batch && key.size(1) == shape.width && key.size(3) == shape.size &&
                        value.sizes() == key.sizes() && first.size(0) == shape.batch && first.size(1) == shape.width,
                    "packed_attention: got query ", query.sizes(), ", key ", key.sizes(), ", value ", value.sizes(),
                    ", first ", first.sizes(), ", needs the same rows, positions and channels in all");
  PLANLM_EXPECT(shape.width % 2 == 0 && shape.size % 2 == 0, "odd sizes");
  for (const Tensor& tensor : {query, key, value})
    PLANLM_EXPECT(tensor.scalar_type() == at::kBFloat16 && tensor.stride(3) == 1, "packed_attention takes bf16 rows");
  const int64_t* from = first.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t t = 0; t < shape.width; ++t) {
      const int64_t at = from[b * shape.width + t], before = t > 0 ? from[b * shape.width + t - 1] : 0;
      TORCH_CHECK_VALUE(before <= at && at <= t, "first: got ", at, " at position ", t,
                        ", needs a position that never falls along the row and is not behind its own");
    }
}

// The tile in which a block's first key lies.
int64_t first_tile(int64_t key) { return key / panel * panel; }

}  // namespace

std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& documents, double scale) {
  const Tensor first = documents.contiguous();
  check(query, key, value, first);
  const Shape shape(query, key);
  const auto [batch, width, heads, groups, size] = shape;
  Tensor out = empty({batch, width, heads, size}, query.options());
  Tensor log_sums = empty({batch, heads, width}, query.options().dtype(at::kFloat));
  const float factor = float(scale * log2e);
  const int64_t shared = heads / groups;
  const Heads all_queries(query), all_keys(key), all_values(value), all_out(out);
  const int64_t* const starts = first.const_data_ptr<int64_t>();
  float* const all_log_sums = log_sums.data_ptr<float>();
  at::parallel_for(0, batch * heads, 1, [&, width = width, heads = heads, size = size](int64_t begin, int64_t end) {
    Buffer<Half> key_panels(width * size), value_pairs(width * size), weights(queries * keys);
    Buffer<float> scores(queries * keys), mixed(queries * size);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads;
      const Head to_query = all_queries.at(b, h), to_key = all_keys.at(b, h / shared),
                 to_value = all_values.at(b, h / shared), to_out = all_out.at(b, h);
      if (packed != task / shared) {
        pack_transposed(to_key, 0, width, size, key_panels.data());
        pack(to_value, 0, width, size, value_pairs.data());
        packed = task / shared;
      }
      const int64_t* from = starts + b * width;
      float* log_sum = all_log_sums + (b * heads + h) * width;
      for (int64_t q = 0; q < width; q += queries) {
        const int64_t block = std::min(queries, width - q), last = q + block;
        float largest[queries], sum[queries];
        std::fill_n(largest, block, -std::numeric_limits<float>::infinity());
        std::fill_n(sum, block, 0.0f);
        std::fill_n(mixed.data(), block * size, 0.0f);
        for (int64_t k = first_tile(from[q]); k < last; k += keys) {
          const int64_t count = std::min(keys, last - k);
          scores_of(to_query.row(q), to_query.step, block, key_panels.data() + k * size, count, size, scores.data(),
                    keys);
          for (int64_t r = 0; r < block; ++r) {
            const int64_t seen = std::clamp<int64_t>(from[q + r] - k, 0, count), stop = std::min(count, q + r + 1 - k);
            const float rescale = rows<float>().soften(scores.data() + r * keys, count, seen, stop, factor, largest[r],
                                                       sum[r], Strip{weights.data() + r * keys, Kind::bf16});
            if (rescale != 1.0f)
              for (int64_t c = 0; c < size; ++c) mixed[r * size + c] *= rescale;
          }
          product(block, size, count, weights.data(), keys, value_pairs.data() + k * size, mixed.data(), size, true);
        }
        for (int64_t r = 0; r < block; ++r) {
          for (int64_t c = 0; c < size; ++c) mixed[r * size + c] /= sum[r];
          rows<float>().store(mixed.data() + r * size, nullptr, Strip{to_out.row(q + r), Kind::bf16}, size);
          log_sum[q + r] = largest[r] * factor + std::log2(sum[r]);
        }
      }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& log_sums, const Tensor& documents,
                                                             double scale) {
  const Tensor first = documents.contiguous();
  const Shape shape(query, key);
  const auto [batch, width, heads, groups, size] = shape;
  const Tensor upstream = grad.stride(3) == 1 ? grad : grad.contiguous();
  Tensor to_query = empty(query.sizes(), query.options()), to_key = empty(key.sizes(), key.options()),
         to_value = empty(value.sizes(), value.options());
  const float factor = float(scale * log2e);
  const int64_t shared = heads / groups;
  const Heads all_queries(query), all_keys(key), all_values(value), all_out(out), all_grads(upstream);
  const Heads for_query(to_query), for_key(to_key), for_value(to_value);
  const int64_t* const starts = first.const_data_ptr<int64_t>();
  const float* const all_log_sums = log_sums.const_data_ptr<float>();
  at::parallel_for(0, batch * groups, 1, [&, width = width, heads = heads, groups = groups, size = size](int64_t begin,
                                                                                                         int64_t end) {
    Buffer<Half> turned(size * width), pairs(size * panel);        // K^T, and what it comes from
    Buffer<Half> query_panels(queries * size), query_pairs(queries * size);
    Buffer<Half> grad_panels(queries * size), grad_pairs(queries * size);
    Buffer<Half> weights(keys * queries), slopes(keys * queries), slope_pairs(keys * queries);
    Buffer<float> scores(keys * queries), products(keys * queries), of_query(size * queries), lines(size * queries);
    Buffer<float> of_key(width * size), of_value(width * size);
    std::vector<int64_t> stop(width);                              // the first position that does not see a key
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, g = task % groups;
      const Head from_key = all_keys.at(b, g), from_value = all_values.at(b, g);
      const int64_t* from = starts + b * width;
      for (int64_t k = 0, t = 0; k < width; ++k) {
        while (t < width && from[t] <= k) ++t;
        stop[k] = t;
      }
      turn(from_key, width, size, pairs.data(), turned.data());
      std::fill_n(of_key.data(), width * size, 0.0f);
      std::fill_n(of_value.data(), width * size, 0.0f);
      for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
        const Head from_query = all_queries.at(b, h), from_grad = all_grads.at(b, h), from_out = all_out.at(b, h),
                   into_query = for_query.at(b, h);
        const float* log_sum = all_log_sums + (b * heads + h) * width;
        for (int64_t q = 0; q < width; q += queries) {
          const int64_t block = std::min(queries, width - q), last = q + block;
          pack_transposed(from_query, q, last, size, query_panels.data());
          pack_transposed(from_grad, q, last, size, grad_panels.data());
          pack(from_query, q, last, size, query_pairs.data());
          pack(from_grad, q, last, size, grad_pairs.data());
          float inner[queries] = {}, sums[queries] = {};  // gradient of each output times that output
          std::copy_n(log_sum + q, block, sums);
          for (int64_t r = 0; r < block; ++r)
            inner[r] = rows<float>().dot(Strip{from_grad.row(q + r), Kind::bf16}, Strip{from_out.row(q + r), Kind::bf16},
                                         size);
          std::fill_n(of_query.data(), size * queries, 0.0f);
          for (int64_t k = first_tile(from[q]); k < last; k += keys) {
            const int64_t count = std::min(keys, last - k);
            scores_of(from_key.row(k), from_key.step, count, query_panels.data(), block, size, scores.data(), queries);
            scores_of(from_value.row(k), from_value.step, count, grad_panels.data(), block, size, products.data(),
                      queries);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t seen = std::clamp<int64_t>(k + i - q, 0, block);
              const int64_t until = std::clamp<int64_t>(stop[k + i] - q, seen, block);
              rows<float>().slope(scores.data() + i * queries, products.data() + i * queries, sums, inner, block,
                                  seen, until, factor, float(scale), Strip{weights.data() + i * queries, Kind::bf16},
                                  Strip{slopes.data() + i * queries, Kind::bf16});
            }
            product(count, size, block, weights.data(), queries, grad_pairs.data(), of_value.data() + k * size, size,
                    true);
            product(count, size, block, slopes.data(), queries, query_pairs.data(), of_key.data() + k * size, size,
                    true);
            for (int64_t at = 0; at < block; at += panel) {
              const int64_t columns = std::min(panel, block - at);
              rows<float>().pack(slopes.data() + at, queries, slope_pairs.data(), count, columns);
              product(size, columns, count, turned.data() + k, width, slope_pairs.data(), of_query.data() + at, queries,
                      true);
            }
          }
          // float32 as pairs of bf16: packing them is to transpose
          rows<float>().pack_transposed(of_query.data(), 2 * queries, lines.data(), 2 * block, size);
          for (int64_t r = 0; r < block; ++r)
            rows<float>().store(lines.data() + r * size, nullptr, Strip{into_query.row(q + r), Kind::bf16}, size);
        }
      }
      const Head into_key = for_key.at(b, g), into_value = for_value.at(b, g);
      for (int64_t k = 0; k < width; ++k) {
        rows<float>().store(of_key.data() + k * size, nullptr, Strip{into_key.row(k), Kind::bf16}, size);
        rows<float>().store(of_value.data() + k * size, nullptr, Strip{into_value.row(k), Kind::bf16}, size);
      }
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
  return {to_query, to_key, to_value};
}

}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  library.impl("packed_attention", planlm::packed_attention);
  library.impl("packed_attention_backward", planlm::packed_attention_backward);
}
