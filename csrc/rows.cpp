// Which instruction set's loops run. torch's own choice is followed, so ATEN_CPU_CAPABILITY lowers both.
#include <ATen/Version.h>

#include <string>

#include "rows.h"

namespace planlm {

#if defined(__x86_64__)
namespace avx512_bf16 {
template <class R>
const Rows<R>& table();
}
namespace avx512 {
template <class R>
const Rows<R>& table();
}
namespace avx2 {
template <class R>
const Rows<R>& table();
}
#endif
namespace plain {
template <class R>
const Rows<R>& table();
}

template <class R>
static const Rows<R>& chosen() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::table<R>();
  if (capability == "AVX512") return avx512::table<R>();
  if (capability == "AVX2") return avx2::table<R>();
#endif
  return plain::table<R>();
}

template <>
const Rows<float>& rows<float>() {
  static const Rows<float>& loops = chosen<float>();
  return loops;
}

template <>
const Rows<double>& rows<double>() {
  static const Rows<double>& loops = chosen<double>();
  return loops;
}

}  // namespace planlm
