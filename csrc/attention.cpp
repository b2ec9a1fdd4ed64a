// planlm::packed_attention and its backward for the CPU: causal attention within each of the documents of a sequence, bf16.
//
// torch's own attention for the CPU works through the masked half too and multiplies bf16 at float32's speed where there
// is no AMX. Here only keys that a block of queries sees are touched, and products go through oneDNN's batch-reduce
// kernels. Queries are taken in blocks, keys in tiles; the softmax is normalised online (FlashAttention-2,
// arXiv:2307.08691), the backward recomputes it from the logarithm of its sum. That one works on transposed tiles, keys
// by queries: their sum and inner product are then vectors, and no tile has to be transposed for the products after.
//
// Sizes: B sequences, W positions, H query heads, G key heads, d channels of a head.
#include "operators.h"
#include "pack.h"
#include "product.h"
#include "segment_sum.h"
#include "softmax.h"

namespace planlm {
namespace {

using Half = at::BFloat16;

constexpr int64_t queries = 128;  // of a block
constexpr int64_t keys = 256;     // of a tile: two of float32 and three of bf16 are 448 KiB

Strip strip(Half* data) { return {data, Kind::bf16}; }

// One head of one sequence of a [B, W, H, d] tensor.
struct Head {
  Half* data;
  int64_t step;
  Half* at(int64_t position) const { return data + position * step; }
};

// All heads of such a tensor.
struct Heads {
  Half* data;
  int64_t sequence_step, step, head_step;
  explicit Heads(const Tensor& tensor)
      : data(tensor.data_ptr<Half>()),
        sequence_step(tensor.stride(0)),
        step(tensor.stride(1)),
        head_step(tensor.stride(2)) {}
  Head of(int64_t sequence, int64_t head) const { return {data + sequence * sequence_step + head * head_step, step}; }
};

struct Shape {
  int64_t batch, width, heads, groups, size;
  explicit Shape(const Tensor& query, const Tensor& key)
      : batch(query.size(0)), width(query.size(1)), heads(query.size(2)), groups(key.size(2)), size(query.size(3)) {}
};

// Positions `begin` to `end`, transposed, as the right factor of a product over channels.
void pack_panels(const Head& head, int64_t begin, int64_t end, int64_t size, Half* to) {
  for (int64_t at = begin; at < end; at += panel)
    pack_transposed(head.at(at), head.step, to + (at - begin) * size, size, std::min(panel, end - at));
}

// out[count, width] = left right^T, the right in panels as above.
void multiply_panels(const Head& left, int64_t position, int64_t count, const Half* right, int64_t width, int64_t size,
                     float* out, int64_t out_step) {
  for (int64_t at = 0; at < width; at += panel)
    multiply_panel({count, std::min(panel, width - at), size, left.at(position), left.step, right + at * size, out + at,
                    out_step, false});
}

// The tile in which a block's first key lies.
int64_t first_tile(int64_t key) { return key / panel * panel; }

void clear_outside(Half* strip, int64_t begin, int64_t end, int64_t count) {
  std::fill(strip, strip + begin, Half(0));
  std::fill(strip + std::min(end, count), strip + count, Half(0));
}

// The whole vectors in which the elements `begin` to `end` lie.
struct Covering {
  int64_t from, to;
  Covering(int64_t begin, int64_t end)
      : from(begin / lanes<float> * lanes<float>),
        to(begin < end ? (end + lanes<float> - 1) / lanes<float> * lanes<float> : from) {}
};

// Adds the scores `begin` to `end` to a query's softmax and writes their weights, zero elsewhere. Returns the factor that
// rescales what was accumulated before. Scores around both ends are overwritten.
float soften(float* scores, int64_t count, int64_t begin, int64_t end, float factor, Softmax<float>& state, Half* weights) {
  const Covering whole(begin, end);
  float rescale = 1;
  if (begin < end) {
    std::fill(scores + whole.from, scores + begin, lowest<float>);
    std::fill(scores + end, scores + whole.to, lowest<float>);
    const float *const from = scores + whole.from, most = largest_of<float>(from, whole.to - whole.from);
    rescale = state.add(from, whole.to - whole.from, most, factor, strip(weights + whole.from));
  }
  clear_outside(weights, whole.from, whole.to, count);
  return rescale;
}

float dot(const Half* a, const Half* b, int64_t count) {
  Vector<float> total = {};
  each_vector<float>(count, [&](int64_t i, int64_t used) INLINE_LAMBDA {
    const auto at = [&](const Half* from) { return read<float>(reinterpret_cast<const Bf16*>(from + i), used); };
    total += at(a) * at(b);
  });
  return sum_of<float>(total);
}

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& first) {
  const Shape shape(query, key);
  TORCH_CHECK(has_bf16_products(), "packed_attention: there are no products of bf16 here");
  TORCH_CHECK_VALUE(shape.groups > 0 && shape.heads % shape.groups == 0, "key: got ", shape.groups,
                    " heads, needs a number that divides the query's ", shape.heads);
  TORCH_CHECK_VALUE(key.size(0) == shape.batch && key.size(1) == shape.width && key.size(3) == shape.size &&
                        value.sizes() == key.sizes() && first.size(0) == shape.batch && first.size(1) == shape.width,
                    "packed_attention: got query ", query.sizes(), ", key ", key.sizes(), ", value ", value.sizes(),
                    ", first ", first.sizes(), ", needs the same sequences, positions and channels in all");
  PLANLM_EXPECT(shape.width % 2 == 0 && shape.size % 2 == 0, "odd sizes");
  for (const Tensor& tensor : {query, key, value})
    PLANLM_EXPECT(tensor.scalar_type() == at::kBFloat16 && tensor.stride(3) == 1, "bf16 with adjacent channels");
  const int64_t* from = first.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t t = 0; t < shape.width; ++t) {
      const int64_t at = from[b * shape.width + t], before = t > 0 ? from[b * shape.width + t - 1] : 0;
      TORCH_CHECK_VALUE(before <= at && at <= t, "first: got ", at, " at position ", t,
                        ", needs a position that never falls along the sequence and is not behind its own");
    }
}

// The forward of one thread.
struct Forward {
  const Shape& shape;
  float factor;
  const int64_t width = shape.width, size = shape.size;
  Buffer<Half> key_panels{width * size}, value_pairs{width * size}, weights{queries * keys};
  Buffer<float> scores{queries * keys}, mixture{queries * size};

  void take_keys(const Head& key, const Head& value) {
    pack_panels(key, 0, width, size, key_panels.data());
    pack(value.at(0), value.step, value_pairs.data(), width, size);
  }

  // The block of queries from position `q` on.
  void mix(const Head& query, const int64_t* first, int64_t q, const Head& out, float* log_sums) {
    const int64_t block = std::min(queries, width - q), last = q + block;
    Softmax<float> states[queries];
    float* const mixed = mixture.data();
    std::fill_n(mixed, block * size, 0.0f);
    for (int64_t k = first_tile(first[q]); k < last; k += keys) {
      const int64_t count = std::min(keys, last - k);
      multiply_panels(query, q, block, key_panels.data() + k * size, count, size, scores.data(), keys);
      for (int64_t r = 0; r < block; ++r) {
        const int64_t seen = std::clamp<int64_t>(first[q + r] - k, 0, count), stop = std::min(count, q + r + 1 - k);
        const float rescale =
            soften(scores.data() + r * keys, count, seen, stop, factor, states[r], weights.data() + r * keys);
        for (int64_t c = 0; rescale != 1.0f && c < size; ++c) mixed[r * size + c] *= rescale;
      }
      multiply_panel({block, size, count, weights.data(), keys, value_pairs.data() + k * size, mixed, size, true});
    }
    for (int64_t r = 0; r < block; ++r) {
      for (int64_t c = 0; c < size; ++c) mixed[r * size + c] /= states[r].exp_sum;
      store<float>(mixed + r * size, nullptr, strip(out.at(q + r)), size);
      log_sums[q + r] = states[r].largest * factor + std::log2(states[r].exp_sum);
    }
  }
};

// The backward of one thread: one key head of a sequence after the other, with the query heads that share it.
struct Backward {
  const Shape& shape;
  float scale, factor;
  const int64_t width = shape.width, size = shape.size;
  Buffer<Half> transposed_keys{size * width}, pairs{size * panel};
  Buffer<Half> query_panels{queries * size}, query_pairs{queries * size};
  Buffer<Half> grad_panels{queries * size}, grad_pairs{queries * size};
  Buffer<Half> weights{keys * queries}, slopes{keys * queries}, slope_pairs{keys * queries};
  Buffer<float> scores{keys * queries}, products{keys * queries}, for_query{size * queries}, lines{size * queries};
  Buffer<float> for_key{width * size}, for_value{width * size};
  std::vector<int64_t> stop = std::vector<int64_t>(width);  // the first position that does not see a key
  Head key{}, value{};
  const int64_t* first = nullptr;
  float log_sums[queries] = {}, inner[queries] = {};  // gradient of each output times that output

  void take_keys(const Head& from_key, const Head& from_value, const int64_t* starts) {
    key = from_key;
    value = from_value;
    first = starts;
    for (int64_t k = 0, t = 0; k < width; ++k) {
      while (t < width && first[t] <= k) ++t;
      stop[k] = t;
    }
    for (int64_t at = 0; at < width; at += panel) {
      const int64_t count = std::min(panel, width - at);
      pack_panels(key, at, at + count, size, pairs.data());
      for (int64_t c = 0; c < size; ++c)
        for (int64_t k = 0; k < count; ++k)
          transposed_keys[c * width + at + k] = pairs[c / 2 * 2 * count + 2 * k + c % 2];
    }
    std::fill_n(for_key.data(), width * size, 0.0f);
    std::fill_n(for_value.data(), width * size, 0.0f);
  }

  // Adds the block of queries from position `q` on; writes its gradient.
  void add(const Head& query, const Head& grad, const Head& out, const float* sums, int64_t q, const Head& to) {
    const int64_t block = std::min(queries, width - q), last = q + block;
    pack_panels(query, q, last, size, query_panels.data());
    pack_panels(grad, q, last, size, grad_panels.data());
    pack(query.at(q), query.step, query_pairs.data(), block, size);
    pack(grad.at(q), grad.step, grad_pairs.data(), block, size);
    std::copy_n(sums + q, block, log_sums);
    for (int64_t r = 0; r < block; ++r) inner[r] = dot(grad.at(q + r), out.at(q + r), size);
    std::fill_n(for_query.data(), size * queries, 0.0f);
    for (int64_t k = first_tile(first[q]); k < last; k += keys) add_tile(k, std::min(keys, last - k), q, block);
    pack_transposed(for_query.data(), 2 * queries, lines.data(), 2 * block, size);  // pairs of bf16 for float32
    for (int64_t r = 0; r < block; ++r) store<float>(lines.data() + r * size, nullptr, strip(to.at(q + r)), size);
  }

  void finish(const Head& to_key, const Head& to_value) {
    for (int64_t k = 0; k < width; ++k) {
      store<float>(for_key.data() + k * size, nullptr, strip(to_key.at(k)), size);
      store<float>(for_value.data() + k * size, nullptr, strip(to_value.at(k)), size);
    }
  }

  // The keys `k` to `k + count` with the block of queries from `q` on.
  void add_tile(int64_t k, int64_t count, int64_t q, int64_t block) {
    multiply_panels(key, k, count, query_panels.data(), block, size, scores.data(), queries);
    multiply_panels(value, k, count, grad_panels.data(), block, size, products.data(), queries);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seen = std::clamp<int64_t>(k + i - q, 0, block);
      differentiate(i, seen, std::clamp<int64_t>(stop[k + i] - q, seen, block), block);
    }
    multiply_panel(
        {count, size, block, weights.data(), queries, grad_pairs.data(), for_value.data() + k * size, size, true});
    multiply_panel({count, size, block, slopes.data(), queries, query_pairs.data(), for_key.data() + k * size, size, true});
    for (int64_t at = 0; at < block; at += panel) {
      const int64_t columns = std::min(panel, block - at);
      pack(slopes.data() + at, queries, slope_pairs.data(), count, columns);
      multiply_panel({size, columns, count, transposed_keys.data() + k, width, slope_pairs.data(),
                      for_query.data() + at, queries, true});
    }
  }

  // Weights and gradients of the scores of key `i` of the tile with the block's queries `begin` to `end`, zero elsewhere.
  void differentiate(int64_t i, int64_t begin, int64_t end, int64_t block) {
    const Covering whole(begin, end);
    Half *const of_weights = weights.data() + i * queries, *const of_slopes = slopes.data() + i * queries;
    for (int64_t j = whole.from; j < whole.to; j += lanes<float>) {
      const auto at = [&](const float* from) { return take<Vector<float>>(from + j); };
      Vector<float> weight = Lanes<float>::exp2(at(scores.data() + i * queries) * factor - at(log_sums));
      Vector<float> slope = weight * (at(products.data() + i * queries) - at(inner)) * scale;
      if (j < begin || j + lanes<float> > end)
        for (int64_t lane = 0; lane < lanes<float>; ++lane)
          if (j + lane < begin || j + lane >= end) weight[lane] = slope[lane] = 0;
      put(of_weights + j, narrow<Bf16>(weight));
      put(of_slopes + j, narrow<Bf16>(slope));
    }
    clear_outside(of_weights, whole.from, whole.to, block);
    clear_outside(of_slopes, whole.from, whole.to, block);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& documents, double scale) {
  const Tensor first = documents.contiguous();
  check(query, key, value, first);
  const Shape shape(query, key);
  Tensor out = empty(query.sizes(), query.options());
  Tensor log_sums = empty({shape.batch, shape.heads, shape.width}, query.options().dtype(at::kFloat));
  const Heads queries_of(query), keys_of(key), values_of(value), outs_of(out);
  const int64_t* const starts = first.const_data_ptr<int64_t>();
  float* const sums = log_sums.mutable_data_ptr<float>();
  const int64_t shared = shape.heads / shape.groups;
  const float factor = float(scale * log2e<double>);
  at::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t begin, int64_t end) {
    Forward thread{shape, factor};
    int64_t taken = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / shape.heads, h = task % shape.heads;
      if (taken != task / shared) thread.take_keys(keys_of.of(b, h / shared), values_of.of(b, h / shared));
      taken = task / shared;
      for (int64_t q = 0; q < shape.width; q += queries)
        thread.mix(queries_of.of(b, h), starts + b * shape.width, q, outs_of.of(b, h), sums + task * shape.width);
    }
    release_panels();
  });
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& log_sums, const Tensor& documents,
                                                             double scale) {
  const Tensor first = documents.contiguous();
  const Shape shape(query, key);
  const Tensor upstream = grad.stride(3) == 1 ? grad : grad.contiguous();
  Tensor to_query = empty(query.sizes(), query.options()), to_key = empty(key.sizes(), key.options()),
         to_value = empty(value.sizes(), value.options());
  const Heads queries_of(query), keys_of(key), values_of(value), outs_of(out), grads_of(upstream);
  const Heads for_query(to_query), for_key(to_key), for_value(to_value);
  const int64_t* const starts = first.const_data_ptr<int64_t>();
  const float* const sums = log_sums.const_data_ptr<float>();
  const int64_t shared = shape.heads / shape.groups;
  const float factor = float(scale * log2e<double>);
  at::parallel_for(0, shape.batch * shape.groups, 1, [&](int64_t begin, int64_t end) {
    Backward thread{shape, float(scale), factor};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / shape.groups, g = task % shape.groups;
      thread.take_keys(keys_of.of(b, g), values_of.of(b, g), starts + b * shape.width);
      for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
        for (int64_t q = 0; q < shape.width; q += queries)
          thread.add(queries_of.of(b, h), grads_of.of(b, h), outs_of.of(b, h), sums + (b * shape.heads + h) * shape.width, q,
                     for_query.of(b, h));
      thread.finish(for_key.of(b, g), for_value.of(b, g));
    }
    release_panels();
  });
  return {to_query, to_key, to_value};
}

}  // namespace planlm
