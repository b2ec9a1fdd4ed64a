// Included once by each rows_<instructions>.cpp inside a namespace of its own. Written with the vector extensions of
// GCC and Clang: 64 bytes at a time, which the compiler cuts into what the instruction set has.

template <class R>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int64_t width = 16;
  typedef float Vector __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef double Wide __attribute__((vector_size(128)));

  // 2^x for x <= 0: 2^n by the exponent's bits, 2^f for |f| <= 1/2 by a polynomial that is 1 at 0, minimax otherwise
  // (relative error 1.1e-7). Below 2^-126 zero or subnormal.
  static INLINE Vector exp2(Vector x) {
#if LEVEL >= 512
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
#if LEVEL >= 512
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Vector result = p * (Vector)(((Bits)shifted << 23) + 0x3f800000u);
    return x < -126.0f ? Vector{} : result;  // a NaN compares false and stays
#endif
  }
};

template <>
struct Lanes<double> {
  static constexpr int64_t width = 8;
  typedef double Vector __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));
  typedef float Narrow __attribute__((vector_size(32)));

  static INLINE Vector exp2(Vector x) {
    for (int i = 0; i < width; ++i) x[i] = std::exp2(x[i]);
    return x;
  }
};

template <class V>
INLINE V take(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
INLINE void put(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Past the caches, to an address that is a multiple of the vector's size.
template <class V>
INLINE void stream(void* to, V value) {
#if LEVEL >= 512
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#endif
#if LEVEL >= 256
  if constexpr (sizeof(V) % 32 == 0) {
    for (size_t i = 0; i < sizeof(V) / 32; ++i)
      _mm256_stream_si256(static_cast<__m256i*>(to) + i, take<__m256i>(reinterpret_cast<const char*>(&value) + 32 * i));
    return;
  }
#endif
  put(to, value);
}

inline void fence() {
#if LEVEL >= 256
  _mm_sfence();
#endif
}

// The nearest bf16 values, ties to even, in the upper halves of 32-bit words; what the lower halves hold does not count.
template <class Bits>
INLINE Bits to_upper_half(Bits bits) {
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// bf16 values as the upper halves of 32-bit words, and back.
template <class L>
INLINE typename L::Bits widen(const char* from) {
#if LEVEL >= 512
  if constexpr (L::width == 16)
    return (typename L::Bits)_mm512_slli_epi32(_mm512_cvtepu16_epi32(take<__m256i>(from)), 16);
#endif
  return __builtin_convertvector(take<typename L::Half>(from), typename L::Bits) << 16;
}

template <class L, class Single>
INLINE typename L::Half narrow(Single value) {
#if LEVEL >= 516
  if constexpr (L::width == 16) return (typename L::Half)_mm512_cvtneps_pbh((__m512)value);
#endif
  return __builtin_convertvector(to_upper_half((typename L::Bits)value) >> 16, typename L::Half);
}

// Full vectors of `kind` read as, and written from, vectors of R.
template <class R, Kind kind>
INLINE typename Lanes<R>::Vector read(const char* from) {
  using L = Lanes<R>;
  using V = typename L::Vector;
  if constexpr (kind == Kind::bf16) {
    const auto bits = widen<L>(from);
    if constexpr (sizeof(R) == 4)
      return (V)bits;
    else
      return __builtin_convertvector((typename L::Narrow)bits, V);
  } else if constexpr (kind == Kind::f32) {
    if constexpr (sizeof(R) == 4)
      return take<V>(from);
    else
      return __builtin_convertvector(take<typename L::Narrow>(from), V);
  } else {
    if constexpr (sizeof(R) == 8)
      return take<V>(from);
    else
      return __builtin_convertvector(take<typename L::Wide>(from), V);
  }
}

template <bool streamed, class V>
INLINE void leave(void* to, V value) {
  if constexpr (streamed)
    stream(to, value);
  else
    put(to, value);
}

template <class R, Kind kind, bool streamed = false>
INLINE void write(char* to, typename Lanes<R>::Vector value) {
  using L = Lanes<R>;
  if constexpr (kind == Kind::bf16) {
    if constexpr (sizeof(R) == 4)
      leave<streamed>(to, narrow<L>(value));
    else
      leave<streamed>(to, narrow<L>(__builtin_convertvector(value, typename L::Narrow)));
  } else if constexpr (kind == Kind::f32) {
    if constexpr (sizeof(R) == 4)
      leave<streamed>(to, value);
    else
      leave<streamed>(to, __builtin_convertvector(value, typename L::Narrow));
  } else {
    if constexpr (sizeof(R) == 8)
      leave<streamed>(to, value);
    else
      leave<streamed>(to, __builtin_convertvector(value, typename L::Wide));
  }
}

// The last elements of a strip go through a full vector on the stack: no loop has a second, scalar form.
template <class R, Kind kind>
INLINE typename Lanes<R>::Vector read_some(const char* from, int64_t count) {
  char room[Lanes<R>::width * 8] = {};
  __builtin_memcpy(room, from, count * bytes(kind));
  return read<R, kind>(room);
}

template <class R, Kind kind>
INLINE void write_some(char* to, typename Lanes<R>::Vector value, int64_t count) {
  char room[Lanes<R>::width * 8];
  write<R, kind>(room, value);
  __builtin_memcpy(to, room, count * bytes(kind));
}

// Calls `body(integral constant of the kind)`.
template <class Body>
INLINE void with_kind(Kind kind, Body body) {
  switch (kind) {
    case Kind::f32: return body(std::integral_constant<Kind, Kind::f32>{});
    case Kind::bf16: return body(std::integral_constant<Kind, Kind::bf16>{});
    case Kind::f64: return body(std::integral_constant<Kind, Kind::f64>{});
  }
}

// Calls `body(index, vector read from the strip, lanes in use)`.
template <class R, class Body>
INLINE void each(Strip strip, int64_t count, Body body) {
  with_kind(strip.kind, [&](auto kind) INLINE_LAMBDA {
    constexpr int64_t width = Lanes<R>::width;
    const char* from = static_cast<const char*>(strip.data);
    int64_t i = 0;
    for (; i + width <= count; i += width) body(i, read<R, kind()>(from + i * bytes(kind())), width);
    if (i < count) body(i, read_some<R, kind()>(from + i * bytes(kind()), count - i), count - i);
  });
}

// Writes `body(index)` for every full or partial vector of the strip.
template <class R, class Body>
INLINE void fill(Strip strip, int64_t count, Body body) {
  with_kind(strip.kind, [&](auto kind) INLINE_LAMBDA {
    constexpr int64_t width = Lanes<R>::width;
    char* to = static_cast<char*>(strip.data);
    int64_t i = 0;
    for (; i + width <= count; i += width) write<R, kind()>(to + i * bytes(kind()), body(i));
    if (i < count) write_some<R, kind()>(to + i * bytes(kind()), body(i), count - i);
  });
}

template <class R>
INLINE R sum_of(typename Lanes<R>::Vector v) {
  for (int64_t half = Lanes<R>::width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class R>
INLINE R max_of(typename Lanes<R>::Vector v) {
  R largest = v[0];
  for (int64_t i = 1; i < Lanes<R>::width; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// A sum of vectors, in blocks: thousands of like values, one after the other, would be off by 1e-4 in float32.
template <class R>
class BlockSum {
  using V = typename Lanes<R>::Vector;
  static constexpr int64_t block = 64 * Lanes<R>::width;
  V now_ = {};
  double whole_ = 0;

 public:
  // `i` counts elements, a vector at a time.
  INLINE void add(int64_t i, V v) {
    now_ += v;
    if (i % block == block - Lanes<R>::width) {
      whole_ += sum_of<R>(now_);
      now_ = V{};
    }
  }
  INLINE R value() const { return R(whole_ + sum_of<R>(now_)); }
};

template <class R>
INLINE R sum_of_exp(const R* values, int64_t padded, R largest, R factor) {
  using V = typename Lanes<R>::Vector;
  BlockSum<R> total;
  for (int64_t i = 0; i < padded; i += Lanes<R>::width)
    total.add(i, Lanes<R>::exp2((take<V>(values + i) - largest) * factor));
  return total.value();
}

template <class R>
INLINE R exp2_of(R x) {
  typename Lanes<R>::Vector v = {};
  return Lanes<R>::exp2(v + x)[0];
}

// e^x = 2^(x log2(e)): every factor of an exponent carries this one.
template <class R>
constexpr R log2e = R(1.442695040888963407359924681);

// Scores of a strip, -inf beyond its end up to a whole vector; returns the largest. A NaN is never larger.
template <class R>
INLINE R load_scores(const Scores<R>& row, R* out) {
  using V = typename Lanes<R>::Vector;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  V largest = V{} + lowest;
  each<R>(row.logits, row.count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
    for (int64_t j = used; j < Lanes<R>::width; ++j) v[j] = lowest;
    largest = v > largest ? v : largest;
    put(out + i, v);
  });
  if (!row.noise && !row.top_k) return max_of<R>(largest);
  if (row.noise)
    each<R>(row.noise, row.count, [&](int64_t i, V v, int64_t) INLINE_LAMBDA { put(out + i, take<V>(out + i) + v); });
  if (row.top_k)
    for (int64_t i = 0; i < row.count; ++i)  // written so that a NaN is kept
      if (out[i] < row.threshold || (out[i] == row.threshold && row.first + i > row.cut)) out[i] = lowest;
  R most = lowest;
  for (int64_t i = 0; i < row.count; ++i) most = out[i] > most ? out[i] : most;
  return most;
}

template <class R>
void scores(const Scores<R>& row, R* out) {
  load_scores(row, out);
}

template <class R>
INLINE Scores<R> logits_of(const Scores<R>& row) {
  Scores<R> plain = row;
  plain.noise = {};
  plain.top_k = false;
  return plain;
}

template <class R>
R advance(const Scores<R>& row, RowState<R>& state, bool separate, int64_t oracle, Strip weights, R* buffer) {
  using V = typename Lanes<R>::Vector;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  constexpr int64_t width = Lanes<R>::width;
  const int64_t padded = (row.count + width - 1) / width * width;
  const bool holds_oracle = oracle >= row.first && oracle < row.first + row.count;
  if (separate || holds_oracle) {
    const R largest = load_scores(logits_of(row), buffer), before = state.logit_max;
    if (holds_oracle) state.logit_of_oracle = buffer[oracle - row.first];
    if (separate) {
      const R best = largest > before ? largest : before;
      state.logit_sum = state.logit_sum * (largest > before ? exp2_of<R>((before - best) * log2e<R>) : R(1)) +
                        sum_of_exp(buffer, padded, best == lowest ? R(0) : best, log2e<R>);
      state.logit_max = best;
    }
  }
  const R largest = load_scores(row, buffer), before = state.score_max;
  if (largest > before) {
    state.score_max = largest;
    for (int64_t i = 0;; ++i)
      if (buffer[i] == largest) {
        state.best = row.first + i;
        break;
      }
  }
  // Nothing but -inf so far: exp(0 - 0) would count it. A NaN still reaches the sum.
  const R shift = state.score_max == lowest ? R(0) : state.score_max, factor = row.inverse_temperature * log2e<R>;
  R total;
  if (weights) {
    BlockSum<R> sum;
    fill<R>(weights, row.count, [&](int64_t i) INLINE_LAMBDA {
      const V weight = Lanes<R>::exp2((take<V>(buffer + i) - shift) * factor);
      sum.add(i, weight);
      return weight;
    });
    total = sum.value();
  } else {
    total = sum_of_exp(buffer, padded, shift, factor);
  }
  const R rescale = largest > before ? exp2_of<R>((before - largest) * factor) : R(1);
  state.score_sum = state.score_sum * rescale + total;
  return rescale;
}

// One vector of the gradients; `used` lanes of it are in the strip.
template <class R, Kind kind, Kind weights_kind>
struct Differentiate {
  using L = Lanes<R>;
  using V = typename L::Vector;
  const Scores<R>& row;
  const RowGradient<R>& g;
  Strip product, logits, noise, weights;
  const R* scores;  // null: the logits
  bool stream;      // the gradient of the logits past the caches
  const int64_t at = g.oracle >= row.first && g.oracle < row.first + row.count ? g.oracle - row.first : -1;
  const bool labelled = g.oracle >= 0 && g.nll != R(0);
  const R own = labelled && !g.separate ? g.nll : R(0);  // the logits' own probabilities are those of the scores
  const R factor = row.inverse_temperature * log2e<R>;
  const R kept = (R(1) - g.share) * row.inverse_temperature;
  const R offset = g.offset * row.inverse_temperature + own;
  mutable BlockSum<R> inner;

  static INLINE char* place(Strip strip, int64_t i, Kind of) { return static_cast<char*>(strip.data) + i * bytes(of); }

  template <Kind of, bool whole>
  static INLINE void leave_at(Strip strip, int64_t i, V value, int64_t used) {
    if constexpr (whole)
      write<R, of>(place(strip, i, of), value);
    else
      write_some<R, of>(place(strip, i, of), value, used);
  }

  template <bool whole>
  INLINE void step(int64_t i, int64_t used) const {
    constexpr Kind real = sizeof(R) == 4 ? Kind::f32 : Kind::f64;
    const auto read_at = [&](Strip strip, auto of) INLINE_LAMBDA {
      return whole ? read<R, of()>(place(strip, i, of())) : read_some<R, of()>(place(strip, i, of()), used);
    };
    const V raw = read_at(row.logits, std::integral_constant<Kind, kind>{});
    const V score = scores ? take<V>(scores + i) : raw;
    const V p = L::exp2((score - g.score_max) * factor - g.score_log_sum * log2e<R>);
    const bool here = at >= i && at < i + L::width;
    if (weights) {
      V v = p * (R(1) - g.share);
      if (here) v[at - i] += g.share;
      leave_at<weights_kind, whole>(weights, i, v, used);
    }
    if (!logits && !noise) return;
    V gradient = p * offset;
    if (product) {
      const V of_action = read_at(product, std::integral_constant<Kind, real>{});
      if constexpr (kind == real) inner.add(i, whole ? V(p * of_action) : some_of(p * of_action, used));
      gradient = p * ((of_action - g.inner) * kept + offset);
    }
    if (noise)
      with_kind(noise.kind, [&](auto of) INLINE_LAMBDA { leave_at<of(), whole>(noise, i, gradient, used); });
    if (!logits) return;
    if (labelled && g.separate) gradient += g.nll * L::exp2(((raw - g.logit_max) - g.logit_log_sum) * log2e<R>);
    if (labelled && here) gradient[at - i] -= g.nll;
    // Of the logits' kind, or, where a head made those, of the head's.
    with_kind(logits.kind, [&](auto of) INLINE_LAMBDA {
      if constexpr (whole) {
        if (stream) return write<R, of(), true>(place(logits, i, of()), gradient);
      }
      leave_at<of(), whole>(logits, i, gradient, used);
    });
  }

  static INLINE V some_of(V v, int64_t used) {
    for (int64_t j = used; j < L::width; ++j) v[j] = R(0);
    return v;
  }

  INLINE R all() const {
    int64_t i = 0;
    for (; i + L::width <= row.count; i += L::width) step<true>(i, L::width);
    if (i < row.count) step<false>(i, row.count - i);
    return inner.value();
  }
};

template <class R>
R differentiate(const Scores<R>& row, const RowGradient<R>& g, Strip product, Strip logits, Strip noise,
                Strip weights, R* buffer, bool stream) {
  const R* scores = nullptr;
  R inner = 0;
  stream = stream && reinterpret_cast<uintptr_t>(logits.data) % 64 == 0;
  if (row.noise || row.top_k) {
    load_scores(row, buffer);
    scores = buffer;
  }
  with_kind(row.logits.kind, [&](auto kind) INLINE_LAMBDA {
    with_kind(weights ? weights.kind : kind(), [&](auto weights_kind) INLINE_LAMBDA {
      inner = Differentiate<R, kind(), weights_kind()>{row, g, product, logits, noise, weights, scores, stream}.all();
    });
  });
  return inner;
}

// One row after the other: processors fetch ahead along a single stream, and four rows at a time took twice as long.
template <class R>
void sum_rows(R* total, Strip first, int64_t step, const int64_t* ids, int64_t num_rows, int64_t count) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t width = Lanes<R>::width;
  for (int64_t i = 0; i < count; i += width) put(total + i, V{});
  with_kind(first.kind, [&](auto kind) INLINE_LAMBDA {
    const char* row = static_cast<const char*>(first.data);
    for (int64_t t = 0; t < num_rows; ++t, row += step * bytes(kind())) {
      if (ids[t] < 0) continue;
      const auto add = [&](int64_t i) INLINE_LAMBDA {
        put(total + i, take<V>(total + i) + read<R, kind()>(row + i * bytes(kind())));
      };
      int64_t i = 0;
      for (; i + 2 * width <= count; i += 2 * width) {
        add(i);
        add(i + width);
      }
      for (; i + width <= count; i += width) add(i);
      if (i < count) put(total + i, take<V>(total + i) + read_some<R, kind()>(row + i * bytes(kind()), count - i));
    }
  });
}

template <class R>
void accumulate(double* sum, const R* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += values[i];
}

template <class R, Kind kind, bool streamed>
INLINE void add_strips(Strip x, Strip plan, const R* gate, Strip out, int64_t count) {
  using V = typename Lanes<R>::Vector;
  each<R>(plan, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
    const char* from = static_cast<const char*>(x.data) + i * bytes(kind);
    char* to = static_cast<char*>(out.data) + i * bytes(kind);
    if (used == Lanes<R>::width) {
      if (gate) v = v * take<V>(gate + i);
      write<R, kind, streamed>(to, read<R, kind>(from) + v);
    } else {
      if (gate)
        for (int64_t j = 0; j < used; ++j) v[j] *= gate[i + j];
      write_some<R, kind>(to, read_some<R, kind>(from, used) + v, used);
    }
  });
}

// bf16 + bf16, 32 at a time. A 32-bit word holds two values, each of which is a float32 once the other half is zero: no
// value has to change lanes.
template <bool streamed>
INLINE void add_halves(Strip x, Strip plan, Strip out, int64_t count) {
  using L = Lanes<float>;
  const char* from = static_cast<const char*>(x.data);
  const char* added = static_cast<const char*>(plan.data);
  char* to = static_cast<char*>(out.data);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const auto a = take<L::Bits>(from + 2 * i), b = take<L::Bits>(added + 2 * i);
    const auto lower = (L::Vector)(a << 16) + (L::Vector)(b << 16);
    const auto upper = (L::Vector)(a & 0xffff0000u) + (L::Vector)(b & 0xffff0000u);
    const auto low = to_upper_half((L::Bits)lower) >> 16, high = to_upper_half((L::Bits)upper) & 0xffff0000u;
    leave<streamed>(to + 2 * i, low | high);
  }
  if (i < count) add_strips<float, Kind::bf16, false>(x + i, plan + i, nullptr, out + i, count - i);
}

template <class R>
void add(Strip x, Strip plan, const R* gate, Strip out, int64_t count, bool stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  if constexpr (sizeof(R) == 4) {
    if (x.kind == Kind::bf16 && plan.kind == Kind::bf16 && !gate)
      return stream && aligned ? add_halves<true>(x, plan, out, count) : add_halves<false>(x, plan, out, count);
  }
  with_kind(x.kind, [&](auto kind) INLINE_LAMBDA {
    if (stream && aligned)
      add_strips<R, kind(), true>(x, plan, gate, out, count);
    else
      add_strips<R, kind(), false>(x, plan, gate, out, count);
  });
}

template <class R>
void store(const R* values, const R* gate, Strip strip, int64_t count) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t width = Lanes<R>::width;
  with_kind(strip.kind, [&](auto kind) INLINE_LAMBDA {
    char* to = static_cast<char*>(strip.data);
    int64_t i = 0;
    for (; i + width <= count; i += width) {
      V v = take<V>(values + i);
      if (gate) v *= take<V>(gate + i);
      write<R, kind()>(to + i * bytes(kind()), v);
    }
    if (i == count) return;
    V v = {};
    for (int64_t j = 0; i + j < count; ++j) v[j] = gate ? values[i + j] * gate[i + j] : values[i + j];
    write_some<R, kind()>(to + i * bytes(kind()), v, count - i);
  });
}

template <class R>
R dot(Strip a, Strip b, int64_t count) {
  using V = typename Lanes<R>::Vector;
  V total = {};
  with_kind(a.kind, [&](auto kind) INLINE_LAMBDA {
    each<R>(a, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
      const char* from = static_cast<const char*>(b.data) + i * bytes(kind());
      total += v * (used == Lanes<R>::width ? read<R, kind()>(from) : read_some<R, kind()>(from, used));
    });
  });
  return sum_of<R>(total);
}

inline void pack(const void* from, int64_t step, void* to, int64_t depth, int64_t width) {
  const auto* row = static_cast<const uint16_t*>(from);
  auto* out = static_cast<uint32_t*>(to);
  for (int64_t k = 0; k < depth; k += 2, row += 2 * step, out += width)
    for (int64_t n = 0; n < width; ++n) out[n] = uint32_t(row[n]) | uint32_t(row[n + step]) << 16;
}

// Eight words of each, in turns, from word `o` on.
#if defined(__clang__)
#define ZIP(a, b, o)                                                                                           \
  __builtin_shufflevector(a, b, o, o + 16, o + 1, o + 17, o + 2, o + 18, o + 3, o + 19, o + 4, o + 20, o + 5, \
                          o + 21, o + 6, o + 22, o + 7, o + 23)
#else
#define ZIP(a, b, o)                                                                                                \
  __builtin_shuffle(a, b, (Lanes<float>::Bits){o, o + 16, o + 1, o + 17, o + 2, o + 18, o + 3, o + 19, o + 4, o + 20, \
                                               o + 5, o + 21, o + 6, o + 22, o + 7, o + 23})
#endif

// 16 rows of 16 words, `step` bytes apart, written as 16 columns, `width` words apart: four times the first half of the
// rows is dealt out between the second.
INLINE void transpose(const char* from, int64_t step, uint32_t* to, int64_t width) {
  using Bits = Lanes<float>::Bits;
  Bits now[16], next[16];
  for (int i = 0; i < 16; ++i) now[i] = take<Bits>(from + i * step);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = ZIP(now[i], now[i + 8], 0);
      next[2 * i + 1] = ZIP(now[i], now[i + 8], 8);
    }
    for (int i = 0; i < 16; ++i) now[i] = next[i];
  }
  for (int i = 0; i < 16; ++i) put(to + i * width, now[i]);
}

inline void pack_transposed(const void* from, int64_t step, void* to, int64_t depth, int64_t width) {
  const auto* row = static_cast<const char*>(from);
  auto* out = static_cast<uint32_t*>(to);
  const int64_t pairs = depth / 2;
  for (int64_t n = 0; n < width; n += 16)
    for (int64_t k = 0; k < pairs; k += 16)
      if (n + 16 <= width && k + 16 <= pairs)
        transpose(row + n * step * 2 + k * 4, step * 2, out + k * width + n, width);
      else
        for (int64_t i = n; i < n + 16 && i < width; ++i)
          for (int64_t j = k; j < k + 16 && j < pairs; ++j) out[j * width + i] = take<uint32_t>(row + i * step * 2 + j * 4);
}

template <class R>
R cross_entropy(Strip logits, int64_t count, int64_t target) {
  using V = typename Lanes<R>::Vector;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  V most = V{} + lowest, total = {};
  R wanted = 0;
  each<R>(logits, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
    for (int64_t j = used; j < Lanes<R>::width; ++j) v[j] = lowest;
    most = v > most ? v : most;
    if (target >= i && target < i + used) wanted = v[target - i];
  });
  const R largest = max_of<R>(most);
  each<R>(logits, count, [&](int64_t, V v, int64_t used) INLINE_LAMBDA {
    for (int64_t j = used; j < Lanes<R>::width; ++j) v[j] = lowest;
    total += Lanes<R>::exp2((v - largest) * log2e<R>);
  });
  const R log_sum = std::log(sum_of<R>(total));
  with_kind(logits.kind, [&](auto kind) INLINE_LAMBDA {
    each<R>(logits, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
      V gradient = Lanes<R>::exp2(((v - largest) - log_sum) * log2e<R>);
      if (target >= i && target < i + used) gradient[target - i] -= R(1);
      char* to = static_cast<char*>(logits.data) + i * bytes(kind());
      if (used == Lanes<R>::width)
        write<R, kind()>(to, gradient);
      else
        write_some<R, kind()>(to, gradient, used);
    });
  });
  return (largest - wanted) + log_sum;
}

// GELU is x s(x) with s = 1 / (1 + 2^-t), t = 2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3): tanh(u) = 2 / (1 + e^-2u) - 1.
template <class R>
constexpr R gelu_scale = R(2.302208198144325);  // 2 log2(e) sqrt(2 / pi)
template <class R>
constexpr R gelu_cubic = R(0.044715);

// s, and in `rest` 1 - s, neither by a difference; the exponential is of what is not positive.
template <class R, class V = typename Lanes<R>::Vector>
INLINE V gelu_share(V& x, V& rest) {
  // Beyond this s is 0 or 1, and a cube of it would be infinite.
  constexpr R far = R(1e6);
  x = x > far ? V{} + far : x < -far ? V{} - far : x;
  const V t = x * gelu_scale<R> * (gelu_cubic<R> * x * x + R(1));
  const V e = Lanes<R>::exp2(t > R(0) ? -t : t);
  const V large = R(1) / (e + R(1)), small = e * large;
  rest = t > R(0) ? small : large;
  return t > R(0) ? large : small;
}

template <class R>
void gelu(Strip x, Strip out, int64_t count) {
  using V = typename Lanes<R>::Vector;
  with_kind(x.kind, [&](auto kind) INLINE_LAMBDA {
    each<R>(x, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
      V rest, near = v;
      const V value = v * gelu_share<R>(near, rest);
      char* to = static_cast<char*>(out.data) + i * bytes(kind());
      if (used == Lanes<R>::width)
        write<R, kind()>(to, value);
      else
        write_some<R, kind()>(to, value, used);
    });
  });
}

template <class R>
void gelu_slope(Strip x, Strip grad, Strip out, int64_t count) {
  using V = typename Lanes<R>::Vector;
  with_kind(x.kind, [&](auto kind) INLINE_LAMBDA {
    each<R>(x, count, [&](int64_t i, V v, int64_t used) INLINE_LAMBDA {
      constexpr R ln2 = R(0.6931471805599453);
      const char* from = static_cast<const char*>(grad.data) + i * bytes(kind());
      const V g = used == Lanes<R>::width ? read<R, kind()>(from) : read_some<R, kind()>(from, used);
      V rest;
      const V share = gelu_share<R>(v, rest);  // leaves in v what has a finite cube
      const V inner = v * (gelu_scale<R> * ln2) * (R(3) * gelu_cubic<R> * v * v + R(1));
      const V value = g * (share + share * rest * inner);
      char* to = static_cast<char*>(out.data) + i * bytes(kind());
      if (used == Lanes<R>::width)
        write<R, kind()>(to, value);
      else
        write_some<R, kind()>(to, value, used);
    });
  });
}

// Zeroes the elements of a strip that no whole vector from `begin` to `end` covers.
template <class R>
INLINE void clear_outside(Strip strip, int64_t begin, int64_t end, int64_t count) {
  char* to = static_cast<char*>(strip.data);
  const int64_t size = bytes(strip.kind);
  __builtin_memset(to, 0, begin * size);
  if (end < count) __builtin_memset(to + end * size, 0, (count - end) * size);
}

template <class R>
R soften(R* scores, int64_t count, int64_t begin, int64_t end, R factor, R& largest, R& sum, Strip weights) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t width = Lanes<R>::width;
  constexpr R lowest = -std::numeric_limits<R>::infinity();
  if (begin >= end) {
    clear_outside<R>(weights, 0, 0, count);
    return R(1);
  }
  const int64_t from = begin / width * width, to = (end + width - 1) / width * width;
  for (int64_t i = from; i < begin; ++i) scores[i] = lowest;
  for (int64_t i = end; i < to; ++i) scores[i] = lowest;
  V most = V{} + lowest;
  for (int64_t i = from; i < to; i += width) {
    const V v = take<V>(scores + i);
    most = v > most ? v : most;
  }
  const R before = largest, found = max_of<R>(most);
  if (found > before) largest = found;
  const R shift = largest == lowest ? R(0) : largest;  // only NaN or -inf: NaN still reaches the sum
  V total = {};
  with_kind(weights.kind, [&](auto kind) INLINE_LAMBDA {
    char* out = static_cast<char*>(weights.data);
    for (int64_t i = from; i < to; i += width) {
      const V weight = Lanes<R>::exp2((take<V>(scores + i) - shift) * factor);
      total += weight;
      write<R, kind()>(out + i * bytes(kind()), weight);
    }
  });
  clear_outside<R>(weights, from, to, count);
  const R rescale = found > before ? exp2_of<R>((before - found) * factor) : R(1);
  sum = sum * rescale + sum_of<R>(total);
  return rescale;
}

template <class R>
void slope(const R* scores, const R* products, const R* log_sums, const R* inner, int64_t count, int64_t begin,
           int64_t end, R factor, R scale, Strip weights, Strip slopes) {
  using V = typename Lanes<R>::Vector;
  constexpr int64_t width = Lanes<R>::width;
  const int64_t from = begin / width * width, to = begin < end ? (end + width - 1) / width * width : from;
  with_kind(weights.kind, [&](auto kind) INLINE_LAMBDA {
    char* of_weights = static_cast<char*>(weights.data);
    char* of_slopes = static_cast<char*>(slopes.data);
    for (int64_t i = from; i < to; i += width) {
      V weight = Lanes<R>::exp2(take<V>(scores + i) * factor - take<V>(log_sums + i));
      V slope = weight * (take<V>(products + i) - take<V>(inner + i)) * scale;
      if (i < begin || i + width > end)
        for (int64_t j = 0; j < width; ++j)
          if (i + j < begin || i + j >= end) weight[j] = slope[j] = R(0);
      write<R, kind()>(of_weights + i * bytes(kind()), weight);
      write<R, kind()>(of_slopes + i * bytes(kind()), slope);
    }
  });
  clear_outside<R>(weights, from, to, count);
  clear_outside<R>(slopes, from, to, count);
}

template <class R>
const Rows<R>& table() {
  static const Rows<R> loops{advance<R>, differentiate<R>, scores<R>, sum_rows<R>,     accumulate<R>,    add<R>,    fence,
                             store<R>,   pack,             pack_transposed, cross_entropy<R>,
                             gelu<R>,    gelu_slope<R>, soften<R>, slope<R>, dot<R>};
  return loops;
}
