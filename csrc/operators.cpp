// Registers the operators, and add_plan's rules of differentiation: an LM calls it in every layer, where those of
// kernels/operators.py, the same in Python, took longer than some of the work.
#include "operators.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace planlm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Operators with more arguments than a function should have are called with a stack of them.
class Arguments {
 public:
  Arguments(Stack* stack, size_t count) : values_(torch::jit::pop(*stack, count)) {}
  Tensor tensor() {
    const auto value = next();
    return value.isNone() ? Tensor() : value.toTensor();
  }
  c10::IValue next() { return values_[at_++]; }

 private:
  std::vector<c10::IValue> values_;
  size_t at_ = 0;
};

ProjectionInputs projection_inputs(Arguments& from) {
  return {from.tensor(), from.tensor(), from.tensor(), from.tensor(), from.tensor(),
          from.tensor(), from.tensor(), from.tensor(), from.tensor()};
}

void call_plan_projection(const c10::OperatorHandle&, Stack* stack) {
  Arguments from(stack, 12);
  ProjectionInputs inputs = projection_inputs(from);
  inputs.temperature = from.next().toDouble();
  inputs.top_k = from.next().toInt();
  from.next();  // which of CUDA's forms
  const ProjectionOutputs found = plan_projection(inputs);
  torch::jit::push(*stack, found.projected, found.log_normalizer, found.oracle_nll, found.best, found.mixture,
                   found.statistics, found.tie_index);
}

void call_plan_projection_backward(const c10::OperatorHandle&, Stack* stack) {
  Arguments from(stack, 20);
  const ProjectionOutputs upstream{from.tensor(), from.tensor(), from.tensor(), {}, {}, {}, {}};
  ProjectionInputs inputs = projection_inputs(from);
  const ProjectionOutputs forward{{}, {}, {}, from.tensor(), from.tensor(), from.tensor(), from.tensor()};
  inputs.temperature = from.next().toDouble();
  inputs.top_k = from.next().toInt();
  from.next();  // which of CUDA's forms
  const auto needs = from.next().toBoolList();
  const ProjectionGradients to = plan_projection_backward(
      inputs, upstream, forward, {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5], needs[6], needs[7]});
  torch::jit::push(*stack, std::vector<Tensor>{to.source, to.head, to.head_bias, to.codebook, to.weight, to.bias, to.noise,
                                               to.oracle_weight});
}

// In the words of kernels/operators.py.
struct Refused : Function<Refused> {
  static Tensor forward(AutogradContext*, const Tensor& gradient) { return gradient.view_as(gradient); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "planlm.kernels has first derivatives only, and a second one was asked for; "
                "leave create_graph off for losses that go through these operations");
  }
};

// Through the dispatcher, so that tracing and fake tensors see the operators.
template <class Operator>
auto dispatched(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Operator>();
}

struct AddPlan : Function<AddPlan> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& plan, const Tensor& segment_ids,
                        const OptionalTensor& gate) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = dispatched<decltype(add_plan)>("planlm::add_plan");
    // Without a gate only the plan's shape and dtype are wanted: its memory is let go.
    const Tensor kept = gate ? plan : plan.new_empty({}).expand_symint(plan.sym_sizes());
    ctx->save_for_backward({kept, segment_ids, gate ? *gate : Tensor()});
    return op.call(x, plan, segment_ids, gate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = dispatched<decltype(add_plan_backward)>("planlm::add_plan_backward");
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor gate = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const bool to_x = ctx->needs_input_grad(0), to_plan = ctx->needs_input_grad(1);
    const bool to_gate = gate && ctx->needs_input_grad(3);
    const bool again = at::GradMode::is_enabled();
    // Where these gradients may be differentiated themselves, the operator's rule in Python refuses it.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!again) below.emplace();
    Tensor to_plans, to_gates;
    if (to_plan || to_gate)
      std::tie(to_plans, to_gates) = op.call(grads[0], saved[0], saved[1], gate, {to_plan, to_gate});
    return {to_x ? again ? Refused::apply(grads[0]) : grads[0] : Tensor(), to_plan ? to_plans : Tensor(), Tensor(),
            to_gate ? to_gates : Tensor()};
  }
};

Tensor differentiable_add_plan(const Tensor& x, const Tensor& plan, const Tensor& segment_ids, const OptionalTensor& gate) {
  return AddPlan::apply(x, plan, segment_ids, gate);
}

}  // namespace
}  // namespace planlm

TORCH_LIBRARY_IMPL(planlm, CPU, library) {
  library.impl("plan_projection", torch::CppFunction::makeFromBoxedFunction<&planlm::call_plan_projection>());
  library.impl("plan_projection_backward",
               torch::CppFunction::makeFromBoxedFunction<&planlm::call_plan_projection_backward>());
  library.impl("add_plan", planlm::add_plan);
  library.impl("add_plan_backward", planlm::add_plan_backward);
  library.impl("cross_entropy_", planlm::cross_entropy_);
  library.impl("packed_attention", planlm::packed_attention);
  library.impl("packed_attention_backward", planlm::packed_attention_backward);
}

TORCH_LIBRARY_IMPL(planlm, AutogradCPU, library) { library.impl("add_plan", planlm::differentiable_add_plan); }
