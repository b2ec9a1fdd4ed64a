// Products through what torch carries: of bf16 matrices by oneDNN's batch-reduce kernels, which leave their float32 sums
// alone, of others by BLAS, and of plans by oneDNN's linear layer.
#include "product.h"

#include <ATen/native/CPUBlas.h>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstring>
#include <exception>

// BLAS, which torch's library for the CPU carries or is linked to.
extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace planlm {
namespace {

using Half = at::BFloat16;

void clear(const Matrix& matrix) {
  for (int64_t row = 0; row < matrix.rows; ++row)
    std::memset(matrix.strip(row).data, 0, matrix.columns * bytes(matrix.kind));
}

// Columns that one kernel call produces: four vectors of 16 float32.
constexpr int64_t panel = 64;

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
  // Every panel is packed by whoever multiplies with it; rows are shared out only where panels are too few for that.
  const int64_t shares = std::clamp<int64_t>(threads / std::max<int64_t>(1, panels), 1, std::max<int64_t>(1, out.rows / 32));
  const int64_t share = (out.rows + shares - 1) / shares;
  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    Buffer<Half> packed(depth * panel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / shares * panel, width = std::min(panel, out.columns - column);
      const int64_t row = task % shares * share, count = std::min(share, out.rows - row);
      if (count <= 0) continue;
      if (task == begin || task % shares == 0)
        (transposed ? rows<float>().pack_transposed : rows<float>().pack)(
            transposed ? b.at<Half>(column) : b.at<Half>(0, column), b.step, packed.data(), depth, width);
      at::native::cpublas::brgemm(count, width, depth, a.step, width, out.step, add, a.at<Half>(row), packed.data(),
                                  out.at<float>(row, column), /*is_vnni=*/true);
    }
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  });
  if (depth < a.columns) add_last(out, a, b, transposed, depth);
}

void gemm(char left, char right, int m, int n, int k, float beta, const float* a, int a_step, const float* b, int b_step,
          float* c, int c_step) {
  const float one = 1;
  sgemm_(&left, &right, &m, &n, &k, &one, a, &a_step, b, &b_step, &beta, c, &c_step);
}

void gemm(char left, char right, int m, int n, int k, double beta, const double* a, int a_step, const double* b,
          int b_step, double* c, int c_step) {
  const double one = 1;
  dgemm_(&left, &right, &m, &n, &k, &one, a, &a_step, b, &b_step, &beta, c, &c_step);
}

// BLAS goes by columns: what it is given is the product's transpose, of the factors in the other order.
template <class R>
void multiply_in(const Matrix& out, const Matrix& a, const Matrix& b, char right, char left, int64_t depth, bool add) {
  gemm(right, left, int(out.columns), int(out.rows), int(depth), R(add), b.at<R>(0), int(b.step), a.at<R>(0), int(a.step),
       out.at<R>(0), int(out.step));
}

void multiply_as_given(const Matrix& out, const Matrix& a, const Matrix& b, char right, char left, int64_t depth, bool add) {
  PLANLM_EXPECT(a.kind == out.kind && b.kind == out.kind, "a product of several kinds");
  out.kind == Kind::f32 ? multiply_in<float>(out, a, b, right, left, depth, add)
                        : multiply_in<double>(out, a, b, right, left, depth, add);
}

// oneDNN's own settings (ONEDNN_MAX_CPU_ISA, torch.backends.mkldnn) may forbid what the processor has: it then refuses to
// make a kernel.
bool has_bf16_products() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool made = [] {
    const Half one[4] = {1, 1, 1, 1};
    float sum[2];
    try {
      at::native::cpublas::brgemm(1, 2, 2, 2, 2, 2, false, one, one, sum, /*is_vnni=*/true);
      at::native::cpublas::brgemm_release(/*is_vnni=*/true);
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return made;
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
