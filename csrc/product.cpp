// Products through oneDNN, which torch carries: of bf16 matrices by its batch-reduce kernels, which leave their float32 sums
// alone, and of plans by its linear layer.
#include "product.h"

#include <ATen/native/CPUBlas.h>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>

namespace planlm {
namespace {

// Columns that one kernel call produces: four vectors of 16 float32.
constexpr int64_t panel = 64;

void multiply_bf16(Tensor& out, const Tensor& a, const Tensor& b, bool transposed, bool add) {
  using Half = at::BFloat16;
  const int64_t num_rows = a.size(0), depth = a.size(1), num_columns = out.size(1);
  const int64_t panels = (num_columns + panel - 1) / panel;
  const int64_t threads = at::get_num_threads();
  // Every panel is packed by whoever multiplies with it; rows are shared out only where panels are too few for that.
  const int64_t shares = std::clamp<int64_t>(threads / panels, 1, std::max<int64_t>(1, num_rows / 32));
  const int64_t share = (num_rows + shares - 1) / shares;
  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    Buffer<Half> packed(depth * panel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / shares * panel, width = std::min(panel, num_columns - column);
      const int64_t row = task % shares * share, count = std::min(share, num_rows - row);
      if (count <= 0) continue;
      const Half* from = b.const_data_ptr<Half>() + (transposed ? column * b.stride(0) : column);
      if (task == begin || task % shares == 0)
        (transposed ? rows<float>().pack_transposed : rows<float>().pack)(from, b.stride(0), packed.data(), depth, width);
      at::native::cpublas::brgemm(count, width, depth, a.stride(0), width, out.stride(0), add,
                                  a.const_data_ptr<Half>() + row * a.stride(0), packed.data(),
                                  out.data_ptr<float>() + row * out.stride(0) + column, /*is_vnni=*/true);
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
}

// oneDNN's own settings (ONEDNN_MAX_CPU_ISA, torch.backends.mkldnn) may forbid what the processor has: it then refuses
// to make a kernel, before anything is written.
bool tried_bf16(Tensor& out, const Tensor& a, const Tensor& b, bool transposed, bool add) {
  static std::atomic<bool> refused{false};
  if (refused || !at::globalContext().userEnabledMkldnn()) return false;
  try {
    multiply_bf16(out, a, b, transposed, add);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception&) {
    refused = true;
  }
  return !refused;
}

// oneDNN's linear layer, which takes the bias on in the product; nothing where torch has none for these operands. The
// float32 of at::mm is MKL's: 113 GFLOP/s for 192 rows, 384 deep and 16,128 wide on two cores of an AMD EPYC, 180 here.
OptionalTensor tried_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool known = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
  const bool dense = weight.is_contiguous() || weight.t().is_contiguous();
  if (!found || !known || !dense || !at::globalContext().userEnabledMkldnn() || x.numel() == 0 || weight.numel() == 0)
    return std::nullopt;
  try {  // oneDNN's settings may forbid bf16; memory may be short, of which at::mm then has more to say
    return found
        ->typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
                       c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>()
        .call(x, weight, bias ? OptionalTensor(bias->contiguous()) : bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

}  // namespace

Tensor affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (const OptionalTensor y = tried_affine(x, weight, bias)) return *y;
  return bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
}

void multiply(Tensor& out, const Tensor& a, const Tensor& b, bool transposed, bool add) {
  if (out.numel() == 0) return;
  const Tensor right = transposed ? b.t() : b;
  const auto working = out.scalar_type();
  if (a.size(1) == 0) {
    if (!add) out.zero_();
  } else if (a.scalar_type() == at::kBFloat16 && working == at::kFloat && a.size(1) % 2 == 0 && a.stride(1) == 1 &&
             b.stride(1) == 1 && tried_bf16(out, a, b, transposed, add)) {
    return;
  } else if (add) {
    at::addmm_out(out, out, a.to(working), right.to(working));
  } else {
    at::mm_out(out, a.to(working), right.to(working));
  }
}

}  // namespace planlm
