// planlm::add_plan and its backward for the CPU: a gather-and-add, and a segment sum in token order.
#include "memory.h"
#include "operators.h"
#include "segment_sum.h"

namespace planlm {
namespace {

// Memory is the limit: a thread is worth waking for about 32 KiB of it.
int64_t grain(int64_t columns) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns)); }

// What the loops below rely on, at every call: a tensor's values can change without its version (numpy, compiled code).
// The words are those of kernels/checks.py.
void check_ids(const Tensor& ids, int64_t num_segments) {
  const int64_t* values = ids.const_data_ptr<int64_t>();
  int64_t last = -1;
  for (int64_t t = 0; t < ids.size(0); ++t) {
    const int64_t id = values[t];
    if (id == -1) continue;
    if (id < 0 || id >= num_segments) {
      const auto [least, most] = std::minmax_element(values, values + ids.size(0));
      TORCH_CHECK_VALUE(false, "segment_ids: got ids from ", *least, " to ", *most,
                        ", needs -1 (no plan) or a row of plan, below ", num_segments);
    }
    TORCH_CHECK_VALUE(id >= last, "segment_ids: got ", last, " before ", id, ", needs ids that never fall, apart from -1");
    last = id;
  }
}

template <class R>
void add(const Tensor& x, const Tensor& plan, const Tensor& ids, const Tensor& gate, Tensor& out) {
  const int64_t* segment_of = ids.const_data_ptr<int64_t>();
  const R* gates = gate.defined() ? gate.const_data_ptr<R>() : nullptr;
  const int64_t columns = x.size(1), row_bytes = columns * x.element_size();
  const bool streamed = worth_streaming(out);
  const Matrix states(x), plans(plan), result(out);
  at::parallel_for(0, x.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (segment_of[t] < 0)  // bit for bit
        std::memcpy(result.strip(t).data, states.strip(t).data, row_bytes);
      else
        add_row<R>(states.strip(t), plans.strip(segment_of[t]), gates, result.strip(t), columns, streamed);
    }
    if (streamed) fence();
  });
}

// Segment sums of the upstream gradient, times the gate, and their products with the plan, each where wanted.
template <class R>
struct SegmentSums {
  Matrix upstream, plan, for_plan;
  const int64_t* segment_of;  // each token's
  const R* gate;
  R* for_gate;
  std::vector<int64_t> starts;  // tokens of segment s lie in [starts[s], starts[s + 1]), perhaps with some of none

  // Segments `begin` to `end`, `count` columns from `first` on.
  void run(int64_t first, int64_t count, int64_t begin, int64_t end) const {
    Buffer<R> total(count), row(for_gate ? count : 0);
    const int64_t any = 0;
    std::vector<double> products(for_gate ? count : 0, 0.0);
    for (int64_t s = begin; s < end; ++s) {
      sum_rows<R>(total.data(), upstream.strip(starts[s], first), upstream.step, segment_of + starts[s],
                  starts[s + 1] - starts[s], count);
      if (for_plan) store<R>(total.data(), gate ? gate + first : nullptr, for_plan.strip(s, first), count);
      if (for_gate) sum_block<R>(row.data(), plan.strip(s, first), 0, &any, 1, count);  // the plan's row, as R
      for (int64_t i = 0; for_gate && i < count; ++i) products[i] += double(total[i]) * row[i];
    }
    for (int64_t i = 0; for_gate && i < count; ++i) for_gate[first + i] += R(products[i]);
  }
};

template <class R>
void sum_segments(const Tensor& gradient, const Tensor& plan, const Tensor& ids, const Tensor& gate, Tensor& grad_plan,
                  Tensor& grad_gate) {
  const int64_t num_tokens = gradient.size(0), columns = gradient.size(1), num_segments = plan.size(0);
  SegmentSums<R> sums{Matrix(gradient),
                      Matrix(grad_gate.defined() ? plan : Tensor()),
                      Matrix(grad_plan),
                      ids.const_data_ptr<int64_t>(),
                      gate.defined() ? gate.const_data_ptr<R>() : nullptr,
                      grad_gate.defined() ? grad_gate.mutable_data_ptr<R>() : nullptr,
                      std::vector<int64_t>(num_segments + 1, num_tokens)};
  auto& starts = sums.starts;
  for (int64_t t = 0, next = 0; t < num_tokens; ++t)
    for (; next <= sums.segment_of[t]; ++next) starts[next] = t;

  // Strips of columns keep all threads busy when segments are few; the order of a sum never depends on them.
  const int64_t threads = at::get_num_threads();
  const int64_t width = sums.for_gate || num_segments < 8 * threads
                            ? std::max<int64_t>(64, ((columns + threads - 1) / threads + 15) / 16 * 16)
                            : std::max<int64_t>(1, columns);
  const int64_t strips = (columns + width - 1) / width;
  if (strips > 1 || sums.for_gate) {
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sums.run(i * width, std::min(width, columns - i * width), 0, num_segments);
    });
  } else if (strips == 1) {
    // Shared out by tokens, as segments differ in length: each goes to whoever has its first token, or the end for the
    // last ones, if they have none.
    const auto segment_at = [&](int64_t token) {
      return std::lower_bound(starts.begin(), starts.end() - 1, token) - starts.begin();
    };
    at::parallel_for(0, num_tokens + 1, grain(columns), [&](int64_t begin, int64_t end) {
      sums.run(0, columns, segment_at(begin), segment_at(end));
    });
  }
}

at::ScalarType common_working_type(const Tensor& a, const Tensor& b) {
  const auto working = working_type(a);
  PLANLM_EXPECT(working == working_type(b), "add_plan takes float64 alone");
  return working;
}

}  // namespace

Tensor add_plan(const Tensor& x, const Tensor& plan, const Tensor& segment_ids, const OptionalTensor& gate) {
  const Tensor states = with_adjacent_columns(x), plans = with_adjacent_columns(plan), ids = segment_ids.contiguous();
  check_ids(ids, plan.size(0));
  Tensor out = empty(x.sizes(), x.options());
  const auto working = common_working_type(x, plan);
  const Tensor gates = gate ? gate->to(working).contiguous() : Tensor();
  working == at::kDouble ? add<double>(states, plans, ids, gates, out) : add<float>(states, plans, ids, gates, out);
  return out;
}

std::tuple<Tensor, Tensor> add_plan_backward(const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                                             const OptionalTensor& gate, std::array<bool, 2> needs) {
  // Without a gate the plan is only asked for its shape: it need not have values.
  const Tensor gradient = with_adjacent_columns(grad), plans = needs[1] ? with_adjacent_columns(plan) : plan;
  const Tensor ids = segment_ids.contiguous();
  check_ids(ids, plan.size(0));
  const auto working = common_working_type(grad, plan);
  const Tensor gates = gate ? gate->to(working).contiguous() : Tensor();
  Tensor grad_plan, grad_gate;
  if (needs[0]) grad_plan = empty(plan.sizes(), plan.options());
  if (needs[1] && gate) grad_gate = at::zeros(gate->sizes(), gates.options());
  working == at::kDouble ? sum_segments<double>(gradient, plans, ids, gates, grad_plan, grad_gate)
                         : sum_segments<float>(gradient, plans, ids, gates, grad_plan, grad_gate);
  if (!grad_plan.defined()) grad_plan = at::empty({0}, grad.options());
  grad_gate = grad_gate.defined() ? grad_gate.to(gate->scalar_type()) : at::empty({0}, grad.options());
  return {grad_plan, grad_gate};
}

}  // namespace planlm
