#include "product.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <exception>

#include "pack.h"

#if __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif

// BLAS, which torch's library for the CPU carries or is linked to. It goes by columns.
extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace planlm {

using Half = at::BFloat16;

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)  // torch's own word for whether its brgemm multiplies bf16

// oneDNN's batch-reduce kernels leave their float32 sums alone.
void multiply_panel(const PanelProduct& p) {
  at::native::cpublas::brgemm(p.rows, p.columns, p.depth, p.a_step, p.columns, p.out_step, p.add, p.a, p.b, p.out,
                              /*is_vnni=*/true);
}

void release_panels() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }

#else

void multiply_panel(const PanelProduct&) { PLANLM_EXPECT(false, "this torch has no bf16 products"); }

void release_panels() {}

#endif

// oneDNN's own settings (ONEDNN_MAX_CPU_ISA, torch.backends.mkldnn) may forbid what the processor has: it then refuses to
// make a kernel.
bool has_bf16_products() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool made = [] {
    const Half one[4] = {1, 1, 1, 1};
    float sum[2];
    try {
      multiply_panel({1, 2, 2, one, 2, one, sum, 2, false});
      release_panels();
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return made;
}

namespace {

// oneDNN's linear layer, which takes the bias on in the product; nothing where torch has none for these operands. The
// float32 of at::mm is MKL's: 113 GFLOP/s for 192 rows, 384 deep and 16,128 wide on two cores of an AMD EPYC, 180 here.
OptionalTensor tried_affine(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using Settings = c10::List<std::optional<at::Scalar>>;
  using Layer = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, Settings,
                       std::optional<std::string_view>);
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool known = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
  const bool dense = weight.is_contiguous() || weight.t().is_contiguous();
  if (!found || !known || !dense || !at::globalContext().userEnabledMkldnn() || x.numel() == 0 || weight.numel() == 0)
    return std::nullopt;
  try {  // oneDNN's settings may forbid bf16; memory may be short, of which at::mm then has more to say
    return found->typed<Layer>().call(x, weight, bias, "none", Settings(), "");
  } catch (const std::exception&) {  // also where a release gives it other arguments
    return std::nullopt;
  }
}

void clear(const Matrix& matrix) {
  for (int64_t row = 0; row < matrix.rows; ++row)
    std::memset(matrix.strip(row).data, 0, matrix.columns * bytes(matrix.kind));
}

// bf16 products of oneDNN take pairs of values: what is left of an odd depth is added by this.
void add_last(const Matrix& out, const Matrix& a, const Matrix& b, bool transposed, int64_t k) {
  const auto* right = b.at<Half>(transposed ? 0 : k, transposed ? k : 0);
  const int64_t step = transposed ? b.step : 1;
  for (int64_t row = 0; row < out.rows; ++row) {
    const float left = *a.at<Half>(row, k);
    float* const sum = out.at<float>(row);
    for (int64_t i = 0; i < out.columns; ++i) sum[i] += left * float(right[i * step]);
  }
}

void multiply_bf16(const Matrix& out, const Matrix& a, const Matrix& b, bool transposed, bool add) {
  PLANLM_EXPECT(b.kind == Kind::bf16 && out.kind == Kind::f32, "a product of several kinds");
  const int64_t depth = a.columns / 2 * 2;
  if (depth == 0 && !add) clear(out);
  const int64_t panels = depth == 0 ? 0 : (out.columns + panel - 1) / panel;
  const int64_t threads = at::get_num_threads();
  // Every panel is packed by whoever multiplies with it; rows are cut into bands only where panels are too few for that.
  const int64_t bands = std::clamp<int64_t>(threads / std::max<int64_t>(1, panels), 1, std::max<int64_t>(1, out.rows / 32));
  const int64_t band = (out.rows + bands - 1) / bands;
  at::parallel_for(0, panels * bands, 1, [&](int64_t begin, int64_t end) {
    Buffer<Half> packed(depth * panel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / bands * panel, width = std::min(panel, out.columns - column);
      const int64_t row = task % bands * band, count = std::min(band, out.rows - row);
      if (count <= 0) continue;
      if (task == begin || task % bands == 0)
        (transposed ? pack_transposed : pack)(transposed ? b.at<Half>(column) : b.at<Half>(0, column), b.step,
                                              packed.data(), depth, width);
      multiply_panel({count, width, depth, a.at<Half>(row), a.step, packed.data(), out.at<float>(row, column), out.step,
                      add});
    }
    release_panels();
  });
  if (depth < a.columns) add_last(out, a, b, transposed, depth);
}

// What BLAS is given is the product's transpose, of the factors in the other order.
void multiply_as_given(const Matrix& out, const Matrix& a, const Matrix& b, char right, char left, int64_t depth, bool add) {
  PLANLM_EXPECT(a.kind == out.kind && b.kind == out.kind, "a product of several kinds");
  const int columns = int(out.columns), rows = int(out.rows), k = int(depth);
  const int a_step = int(a.step), b_step = int(b.step), out_step = int(out.step);
  const auto call = [&](auto gemm, auto beta) {
    using R = decltype(beta);
    const R one = 1;
    gemm(&right, &left, &columns, &rows, &k, &one, b.at<R>(0), &b_step, a.at<R>(0), &a_step, &beta, out.at<R>(0),
         &out_step);
  };
  out.kind == Kind::f32 ? call(sgemm_, float(add)) : call(dgemm_, double(add));
}

}  // namespace

Tensor affine(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const OptionalTensor added = bias.defined() ? OptionalTensor(bias.to(x.scalar_type()).contiguous()) : std::nullopt;
  if (const OptionalTensor y = tried_affine(x, weight, added)) return *y;
  return added ? at::addmm(*added, x, weight.t()) : at::mm(x, weight.t());
}

Tensor factor(const Tensor& matrix, at::ScalarType working) {
  if (!matrix.defined()) return matrix;
  const bool taken = matrix.scalar_type() == at::kBFloat16 && working == at::kFloat && has_bf16_products();
  const Tensor values = with_adjacent_columns(taken ? matrix : matrix.to(working));
  const bool overlaps = values.size(0) > 1 && values.stride(0) < values.size(1);  // expanded
  return overlaps ? values.contiguous() : values;
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool transposed, bool add) {
  if (out.rows == 0 || out.columns == 0) return;
  if (a.columns == 0) {
    if (!add) clear(out);
  } else if (a.kind == Kind::bf16) {
    multiply_bf16(out, a, b, transposed, add);
  } else {
    multiply_as_given(out, a, b, transposed ? 'T' : 'N', 'N', a.columns, add);
  }
}

void multiply_rows(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  if (out.rows > 0 && out.columns > 0 && a.rows > 0) multiply_as_given(out, a, b, 'N', 'T', a.rows, add);
}

}  // namespace planlm
