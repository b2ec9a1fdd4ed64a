// planlm::add_plan and its backward for the CPU: a gather-and-add, and a segment sum in token order.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common.h"

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
      const auto [lowest, highest] = std::minmax_element(values, values + ids.size(0));
      TORCH_CHECK_VALUE(false, "segment_ids: got ids from ", *lowest, " to ", *highest,
                        ", needs -1 (no plan) or a row of plan, below ", num_segments);
    }
    TORCH_CHECK_VALUE(id >= last, "segment_ids: got ", last, " before ", id, ", needs ids that never fall, apart from -1");
    last = id;
  }
}

template <class R>
void add(const Tensor& x, const Tensor& plan, const Tensor& ids, const Tensor& gate, Tensor& out) {
  const int64_t* rows_of = ids.const_data_ptr<int64_t>();
  const R* gates = gate.defined() ? gate.const_data_ptr<R>() : nullptr;
  const int64_t columns = x.size(1), row_bytes = columns * x.element_size();
  const bool stream = worth_streaming(out);
  const Matrix states(x), plans(plan), result(out);
  at::parallel_for(0, x.size(0), grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (rows_of[t] < 0)  // bit for bit
        std::memcpy(result.strip(t).data, states.strip(t).data, row_bytes);
      else
        rows<R>().add(states.strip(t), plans.strip(rows_of[t]), gates, result.strip(t), columns, stream);
    }
    if (stream) rows<R>().fence();
  });
}

// Segment sums, times the gate, into `grad_plan` and their products with the plan into `grad_gate`, where defined.
template <class R>
void sum_segments(const Tensor& gradient, const Tensor& plan, const Tensor& ids, const Tensor& gate,
                  Tensor& grad_plan, Tensor& grad_gate) {
  const int64_t num_tokens = gradient.size(0), columns = gradient.size(1), num_segments = plan.size(0);
  const int64_t* rows_of = ids.const_data_ptr<int64_t>();
  // Tokens of segment s lie in [starts[s], starts[s + 1]), perhaps with some of no segment among them.
  std::vector<int64_t> starts(num_segments + 1, num_tokens);
  int64_t next = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (; next <= rows_of[t]; ++next) starts[next] = t;

  // Strips of columns keep all threads busy when segments are few; the order of a sum never depends on them.
  const int64_t threads = at::get_num_threads();
  const int64_t width = grad_gate.defined() || num_segments < 8 * threads
                            ? std::max<int64_t>(64, ((columns + threads - 1) / threads + 15) / 16 * 16)
                            : std::max<int64_t>(1, columns);
  const int64_t strips = (columns + width - 1) / width;
  const R* gates = gate.defined() ? gate.const_data_ptr<R>() : nullptr;
  R* const for_gates = grad_gate.defined() ? grad_gate.data_ptr<R>() : nullptr;
  const Matrix upstream(gradient), for_plan(grad_plan);
  const Matrix plans = for_gates ? Matrix(plan) : Matrix();
  const auto run = [&](int64_t first, int64_t count, int64_t begin, int64_t end, R* for_gate) {
    Buffer<R> total(count), row(for_gate ? count : 0);
    std::vector<double> sum(for_gate ? count : 0, 0.0);
    for (int64_t s = begin; s < end; ++s) {
      sum_rows(total.data(), upstream, starts[s], starts[s + 1], first, count, rows_of + starts[s]);
      if (for_plan) rows<R>().store(total.data(), gates ? gates + first : nullptr, for_plan.strip(s, first), count);
      if (for_gate) {
        const int64_t any = 0;
        rows<R>().sum_rows(row.data(), plans.strip(s, first), 0, &any, 1, count);  // the plan's row, as R
        for (int64_t i = 0; i < count; ++i) sum[i] += double(total[i]) * row[i];
      }
    }
    for (int64_t i = 0; for_gate && i < count; ++i) for_gate[i] += R(sum[i]);
  };
  if (strips > 1 || for_gates) {
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        run(i * width, std::min(width, columns - i * width), 0, num_segments, for_gates ? for_gates + i * width : nullptr);
    });
  } else if (strips == 1) {
    // Shared out by tokens, as segments differ in length: each goes to whoever has its first token, or the end for the
    // last ones, if they have none.
    const auto segment_at = [&](int64_t token) {
      return std::lower_bound(starts.begin(), starts.end() - 1, token) - starts.begin();
    };
    at::parallel_for(0, num_tokens + 1, grain(columns), [&](int64_t begin, int64_t end) {
      run(0, columns, segment_at(begin), segment_at(end), nullptr);
    });
  }
}

at::ScalarType working_type(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

Tensor add_plan(const Tensor& x, const Tensor& plan, const Tensor& segment_ids, const OptionalTensor& gate) {
  const Tensor states = with_adjacent_columns(x), plans = with_adjacent_columns(plan), ids = segment_ids.contiguous();
  check_ids(ids, plan.size(0));
  Tensor out = empty(x.sizes(), x.options());
  const auto working = working_type(x, plan);
  const Tensor gates = gate ? gate->to(working).contiguous() : Tensor();
  working == at::kDouble ? add<double>(states, plans, ids, gates, out) : add<float>(states, plans, ids, gates, out);
  return out;
}

std::tuple<Tensor, Tensor> add_plan_backward(const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                                             const OptionalTensor& gate, std::array<bool, 2> needs) {
  // Without a gate the plan is only asked for its shape: it need not have values.
  const Tensor gradient = with_adjacent_columns(grad), plans = needs[1] ? with_adjacent_columns(plan) : plan;
  const auto working = working_type(grad, plan);
  const Tensor gates = gate ? gate->to(working).contiguous() : Tensor();
  Tensor grad_plan, grad_gate;
  if (needs[0]) grad_plan = empty(plan.sizes(), plan.options());
  if (needs[1] && gate) grad_gate = at::zeros(gate->sizes(), gates.options());
  const Tensor ids = segment_ids.contiguous();
  check_ids(ids, plan.size(0));
  working == at::kDouble ? sum_segments<double>(gradient, plans, ids, gates, grad_plan, grad_gate)
                         : sum_segments<float>(gradient, plans, ids, gates, grad_plan, grad_gate);
  if (!grad_plan.defined()) grad_plan = at::empty({0}, grad.options());
  grad_gate = grad_gate.defined() ? grad_gate.to(gate->scalar_type()) : at::empty({0}, grad.options());
  return {grad_plan, grad_gate};
}

}  // namespace planlm

// Autograd in C++: an LM calls add_plan in every layer, where kernels/operators.py's rules, the same in Python, took
// longer than some of the work. That file has the words of the refusal, too.
namespace planlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

variable_list refuse() {
  TORCH_CHECK(false,
              "planlm.kernels has first derivatives only, and a second one was asked for; "
              "leave create_graph off for losses that go through these operations");
}

struct Refused : Function<Refused> {
  static Tensor forward(AutogradContext*, const Tensor& gradient) { return gradient.view_as(gradient); }
  static variable_list backward(AutogradContext*, const variable_list&) { return refuse(); }
};

// Through the dispatcher, so that tracing and fake tensors see the operators.
std::tuple<Tensor, Tensor> call_backward(const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                                         const OptionalTensor& gate, std::array<bool, 2> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("planlm::add_plan_backward", "")
                             .typed<decltype(add_plan_backward)>();
  return op.call(grad, plan, segment_ids, gate, needs);
}

struct AddPlanBackward : Function<AddPlanBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                               const OptionalTensor& gate, std::array<bool, 2> needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [to_plan, to_gate] = call_backward(grad, plan, segment_ids, gate, needs);
    return {to_plan, to_gate};
  }
  static variable_list backward(AutogradContext*, const variable_list&) { return refuse(); }
};

std::tuple<Tensor, Tensor> differentiable_backward(const Tensor& grad, const Tensor& plan, const Tensor& segment_ids,
                                                   const OptionalTensor& gate, std::array<bool, 2> needs) {
  const auto found = AddPlanBackward::apply(grad, plan, segment_ids, gate, needs);
  return {found[0], found[1]};
}

struct AddPlan : Function<AddPlan> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& plan, const Tensor& segment_ids,
                        const OptionalTensor& gate) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("planlm::add_plan", "").typed<decltype(add_plan)>();
    // Without a gate only the plan's shape and dtype are wanted: its memory is let go.
    const Tensor kept = gate ? plan : plan.new_empty({}).expand_symint(plan.sym_sizes());
    ctx->save_for_backward({kept, segment_ids, gate ? *gate : Tensor()});
    return op.call(x, plan, segment_ids, gate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& grad = grads[0];
    const bool to_plan = ctx->needs_input_grad(1), to_gate = saved[2].defined() && ctx->needs_input_grad(3);
    Tensor grad_plan, grad_gate;
    if (to_plan || to_gate)
      std::tie(grad_plan, grad_gate) =
          call_backward(grad, saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt,
                        {to_plan, to_gate});
    Tensor grad_x;
    if (ctx->needs_input_grad(0)) grad_x = at::GradMode::is_enabled() ? Refused::apply(grad) : grad;
    return {grad_x, to_plan ? grad_plan : Tensor(), Tensor(), to_gate ? grad_gate : Tensor()};
  }
};

Tensor differentiable(const Tensor& x, const Tensor& plan, const Tensor& segment_ids, const OptionalTensor& gate) {
  return AddPlan::apply(x, plan, segment_ids, gate);
}

}  // namespace
}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  library.impl("add_plan", planlm::add_plan);
  library.impl("add_plan_backward", planlm::add_plan_backward);
}

TORCH_LIBRARY_IMPL(planlm, AutogradCPU, library) {
  library.impl("add_plan", planlm::differentiable);
  library.impl("add_plan_backward", planlm::differentiable_backward);
}
