// Vectors for the loops of the CPU operators: 64 bytes at a time, by the vector extensions of GCC and Clang. The compiler
// cuts them into what the instruction set has that the library is built for; kernels/cpp.py chooses it.
//
// Free of torch: loops run in several threads, which know nothing of their caller's modes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace planlm {

enum class Kind : int { f32, bf16, f64 };

constexpr int64_t bytes(Kind kind) { return kind == Kind::bf16 ? 2 : kind == Kind::f32 ? 4 : 8; }

struct Bf16 {
  uint16_t bits;
};

inline float value_of(Bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
template <class R>
R value_of(R x) {
  return x;
}

// Adjacent elements in memory: float64 where the loops compute in double, float32 or bf16 where they compute in float.
struct Strip {
  void* data = nullptr;
  Kind kind = Kind::f32;

  explicit operator bool() const { return data != nullptr; }
  Strip operator+(int64_t elements) const { return {static_cast<char*>(data) + elements * bytes(kind), kind}; }
};

template <class R>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int64_t count = 16;
  typedef float Vector __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));

  // 2^x for x <= 0: 2^n by the exponent's bits, 2^f for |f| <= 1/2 by a polynomial that is 1 at 0, minimax otherwise
  // (relative error 1.1e-7). Below 2^-126 zero or subnormal.
  static INLINE Vector exp2(Vector x) {
#if defined(__AVX512F__)
    x = (Vector)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // the second operand where one is a NaN
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vector shifted = x + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
    const Vector n = shifted - 12582912.0f;
#endif
    const Vector f = x - n;
    Vector p = f * 0.00132647261f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Vector result = p * (Vector)(((Bits)shifted << 23) + 0x3f800000u);
    return x < -126.0f ? Vector{} : result;  // a NaN compares false and stays
#endif
  }
};

template <>
struct Lanes<double> {
  static constexpr int64_t count = 8;
  typedef double Vector __attribute__((vector_size(64)));

  static INLINE Vector exp2(Vector x) {
    for (int i = 0; i < count; ++i) x[i] = std::exp2(x[i]);
    return x;
  }
};

template <class R>
using Vector = typename Lanes<R>::Vector;
template <class R>
constexpr int64_t lanes = Lanes<R>::count;
template <class R>
constexpr R lowest = -std::numeric_limits<R>::infinity();
// e^x = 2^(x log2(e)): every factor of an exponent carries this one.
template <class R>
constexpr R log2e = R(1.442695040888963407359924681);

template <class R>
INLINE R exp2_of(R x) {
  return Lanes<R>::exp2(Vector<R>{} + x)[0];
}

template <class V>
INLINE V take(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
INLINE void put(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Past the caches, to an address that is a multiple of the vector's size.
template <class V>
INLINE void stream(void* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#endif
#if defined(__AVX2__)
  for (size_t i = 0; i < sizeof(V) / 32; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(to) + i, take<__m256i>(reinterpret_cast<const char*>(&value) + 32 * i));
#else
  put(to, value);
#endif
}

// Makes what was streamed visible to other threads.
inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// A whole vector of R from memory. A bf16 value is the upper half of a float32.
template <class R, class T>
INLINE Vector<R> read(const T* from) {
  if constexpr (!std::is_same_v<T, Bf16>) {
    return take<Vector<R>>(from);
  } else {
#if defined(__AVX512F__)
    return (Vector<R>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(take<__m256i>(from)), 16);
#else
    return (Vector<R>)(__builtin_convertvector(take<typename Lanes<R>::Half>(from), typename Lanes<R>::Bits) << 16);
#endif
  }
}

// What a vector is in memory, as elements of T: the nearest bf16 values, ties to even.
template <class T, class V>
INLINE auto narrow(V value) {
  if constexpr (!std::is_same_v<T, Bf16>) {
    return value;
  } else {
    using L = Lanes<float>;
#if defined(__AVX512BF16__)
    return (typename L::Half)_mm512_cvtneps_pbh((__m512)value);
#else
    const auto bits = (typename L::Bits)value;
    const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const auto rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    return __builtin_convertvector(rounded >> 16, typename L::Half);
#endif
  }
}

// The first `used` lanes, the others zero. The last elements of a strip go through a whole vector: no loop has a second,
// scalar form.
template <class R, class T>
INLINE Vector<R> read(const T* from, int64_t used) {
  if (used == lanes<R>) return read<R>(from);
  T some[lanes<R>] = {};
  std::memcpy(some, from, used * sizeof(T));
  return read<R>(some);
}

template <class R, class T>
INLINE void write(T* to, Vector<R> value, int64_t used, bool streamed = false) {
  const auto narrowed = narrow<T>(value);
  if (used < lanes<R>)
    std::memcpy(to, &narrowed, used * sizeof(T));
  else if (streamed)
    stream(to, narrowed);
  else
    put(to, narrowed);
}

// Calls `body` with a pointer of the strip's type.
template <class R, class Body>
INLINE auto with_type(Strip strip, Body body) {
  if constexpr (std::is_same_v<R, double>)
    return body(static_cast<double*>(strip.data));
  else if (strip.kind == Kind::bf16)
    return body(static_cast<Bf16*>(strip.data));
  else
    return body(static_cast<float*>(strip.data));
}

template <class R>
INLINE Vector<R> read(Strip strip, int64_t i, int64_t used) {
  return with_type<R>(strip, [&](auto* from) INLINE_LAMBDA { return read<R>(from + i, used); });
}

template <class R>
INLINE void write(Strip strip, int64_t i, Vector<R> value, int64_t used, bool streamed = false) {
  with_type<R>(strip, [&](auto* to) INLINE_LAMBDA { write<R>(to + i, value, used, streamed); });
}

// Calls `body(index, lanes in use)` for each vector of `count` elements; only the last one's lanes may be fewer than all.
template <class R, class Body>
INLINE void each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + lanes<R> <= count; i += lanes<R>) body(i, lanes<R>);
  if (i < count) body(i, count - i);
}

// The lanes behind the first `used` become `value`.
template <class V, class R>
INLINE void fill_behind(V& vector, int64_t used, R value) {
  for (int64_t j = used; j < int64_t(sizeof(V) / sizeof(R)); ++j) vector[j] = value;
}

template <class R>
INLINE R sum_of(Vector<R> v) {
  for (int64_t half = lanes<R> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class R>
INLINE R max_of(Vector<R> v) {
  R largest = v[0];
  for (int64_t i = 1; i < lanes<R>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// A sum of vectors, in blocks: thousands of like values, one after the other, would be off by 1e-4 in float32.
template <class R>
class BlockSum {
  static constexpr int64_t block = 64 * lanes<R>;
  Vector<R> now_ = {};
  double whole_ = 0;

 public:
  // `i` counts elements, a vector at a time.
  INLINE void add(int64_t i, Vector<R> v) {
    now_ += v;
    if (i % block == block - lanes<R>) {
      whole_ += sum_of<R>(now_);
      now_ = Vector<R>{};
    }
  }
  INLINE R value() const { return R(whole_ + sum_of<R>(now_)); }
};

}  // namespace planlm
