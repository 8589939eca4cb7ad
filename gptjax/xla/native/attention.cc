// Attention of a few new positions to a cache of keys and values: `gptjax.ops.kv_cache` has the
// equations.
//
// The keys that a query sees are taken in chunks, whose softmaxes are joined at the end; heads that
// share keys read them together. Each query sums in one order, so its bits depend neither on the
// others nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 8;    // numbers of a vector
constexpr int kChunk = 64;   // keys
constexpr int kHeads = 4;    // that are read together, at most
constexpr int kKeys = 4;     // whose products are added up together
constexpr int kVectors = 4;  // of a value that are added up together
constexpr int kAhead = 16;   // keys between the one that is read and the one prefetched
constexpr float kNone = -std::numeric_limits<float>::infinity();

#define ALWAYS_INLINE __attribute__((always_inline)) inline

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
enum class Half : uint16_t {};         // a number in half precision
enum class HalfForF16c : uint16_t {};  // the same, where an instruction converts 8 of them

#if defined(__x86_64__) && (!defined(__clang__) || __clang_major__ >= 15)
#define HAS_F16C
#endif

struct Shape {
  int64_t B, T, H, K, S, D;
};

// Keys and values are float or Half.
template <class Number>
struct Arrays {
  const float* q;                 // (B, T, H, D): the new positions
  const Number *k, *v;            // (B, T, K, D)
  const Number *past_k, *past_v;  // (B, K, S, D)
  const int32_t* begin;           // (B,): each row's first slot
  int64_t slot;                   // of the first new position
  float* o;                       // (B, T, H, D)
};

// The softmax over a chunk of a query's keys: the largest score, the sum of e^(score - largest), and
// o, the sum of the values with those weights. Chunks beyond the keys that a query sees are neither
// written nor read.
struct Parts {
  int64_t chunks;
  std::unique_ptr<float[]> largest, sum, o;  // (B, T, H, chunks), the last with D numbers each
};

ALWAYS_INLINE Lanes All(float x) { return Lanes{x, x, x, x, x, x, x, x}; }

ALWAYS_INLINE Lanes Load(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof(lanes));
  return lanes;
}

ALWAYS_INLINE Lanes FromBits(Ints bits) {
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof(lanes));
  return lanes;
}

ALWAYS_INLINE Lanes Load(const Half* x) {
  Ints half;
  for (int l = 0; l < kLanes; ++l) half[l] = static_cast<uint16_t>(x[l]);
  const Ints rest = half & 0x7fff;
  const Lanes normal = FromBits((rest << 13) + (112 << 23));
  const Lanes subnormal = __builtin_convertvector(rest, Lanes) * 0x1p-24f;
  const Lanes not_finite = FromBits((rest << 13) | 0x7f800000);
  const Lanes magnitude = rest < 0x400 ? subnormal : rest < 0x7c00 ? normal : not_finite;
  Ints bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  return FromBits(bits | (half & 0x8000) << 16);
}

#if defined(HAS_F16C)
ALWAYS_INLINE Lanes Load(const HalfForF16c* x) {
#if defined(__clang__)
  _Float16 __attribute__((vector_size(2 * kLanes))) halves;
  std::memcpy(&halves, x, sizeof(halves));
  return __builtin_convertvector(halves, Lanes);
#else  // GCC would convert them one by one
  using Eight = uint16_t __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  Lanes lanes;
  asm("vcvtph2ps %1, %0" : "=x"(lanes) : "m"(*reinterpret_cast<const Eight*>(x)));
  return lanes;
#endif
}
#endif

ALWAYS_INLINE void Store(float* x, Lanes lanes) { std::memcpy(x, &lanes, sizeof(lanes)); }

// Not inlined: only the last numbers of an odd size come here.
__attribute__((noinline)) void Copy(void* to, const void* x, int64_t bytes) {
  std::memcpy(to, x, bytes);
}

// Each by itself, so that the compiler keeps them in registers.
template <int N, int V>
ALWAYS_INLINE void SetToZero(Lanes (&sum)[N][V]) {
  for (auto& row : sum) {
    for (Lanes& lanes : row) lanes = Lanes{};
  }
}

// The first n numbers; zeros after them.
template <class Number>
ALWAYS_INLINE Lanes Load(const Number* x, int64_t n) {
  if (n == kLanes) return Load(x);
  Number part[kLanes] = {};
  Copy(part, x, sizeof(Number) * n);
  return Load(part);
}

ALWAYS_INLINE void Store(float* x, Lanes lanes, int64_t n) {
  if (n == kLanes) return Store(x, lanes);
  float part[kLanes];
  Store(part, lanes);
  Copy(x, part, sizeof(float) * n);
}

// The sum over the lanes: the upper half of them added to the lower, until one is left.
ALWAYS_INLINE float Sum(Lanes lanes) {
  float x[kLanes];
  Store(x, lanes);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) x[l] += x[l + half];
  }
  return x[0];
}

// `Sum` of each.
ALWAYS_INLINE void Sums(const Lanes (&of)[kKeys], float* sums) {
#if defined(__x86_64__)
  static_assert(kKeys == 4);
  __m128 x[kKeys];
  for (int k = 0; k < kKeys; ++k) {
    __m128 halves[2];
    std::memcpy(halves, &of[k], sizeof(halves));
    x[k] = _mm_add_ps(halves[0], halves[1]);
  }
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(x[0], x[2]), _mm_add_ps(x[1], x[3])));
#else
  for (int k = 0; k < kKeys; ++k) sums[k] = Sum(of[k]);
#endif
}

// A key or a value that will be read. Beyond the array this does no harm.
template <class Number>
ALWAYS_INLINE void Prefetch(const Number* x, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(Number);
  for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(x + d);
}

// e^x for x <= 0, to 2e-7 of it; 0 below -87. A NaN stays one.
ALWAYS_INLINE Lanes Exp(Lanes x) {
  constexpr float kRounder = 0x1.8p23f;  // leaves an integer in the low bits of a sum
  const Lanes least = All(-87.0f), bounded = x < least ? least : x;
  const Lanes steps = bounded * 1.44269504f + kRounder, n = steps - kRounder;
  const Lanes r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Lanes p = All(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  Ints bits;
  std::memcpy(&bits, &steps, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) * (1 << 23);
  Lanes power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < least ? All(0.0f) : p * power;
}

// The largest score, or a number that can be subtracted if there is none.
ALWAYS_INLINE float Base(float largest) { return largest == kNone ? 0 : largest; }

// p = q k for each of N queries and `count` keys. Prefetches the values, too.
template <int N, class Key, class Value>
ALWAYS_INLINE void Scores(const float* q, Key key, Value value, int64_t count, int64_t D,
                          float (&p)[kHeads][kChunk]) {
  for (int64_t i = 0; i < count; i += kKeys) {
    decltype(key(0)) k[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      const int64_t at = std::min(i + j, count - 1);
      k[j] = key(at);
      Prefetch(k[j] + kAhead * D, D);
      Prefetch(value(at), D);
    }
    Lanes sum[N][kKeys];
    SetToZero(sum);
    const auto add = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
      for (int h = 0; h < N; ++h) {
        const Lanes x = Load(q + h * D + d, n);
        for (int j = 0; j < kKeys; ++j) sum[h][j] += x * Load(k[j] + d, n);
      }
    };
    const int64_t whole = D / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) add(d, kLanes);
    if (whole < D) add(whole, D - whole);
    for (int h = 0; h < N; ++h) Sums(sum[h], p[h] + i);
  }
}

// o = sum of p v for each of N queries, over `count` values: V of their vectors from
// number d on, the last with `last` numbers.
template <int N, int V, class Value>
ALWAYS_INLINE void WeightedSums(const float (&p)[kHeads][kChunk], Value value, int64_t count,
                                int64_t d, int64_t last, float* o, int64_t stride) {
  const auto numbers = [=](int vector) { return vector < V - 1 ? kLanes : last; };
  Lanes sum[N][V];
  SetToZero(sum);
  for (int64_t i = 0; i < count; ++i) {
    const auto* v = value(i) + d;
    Lanes part[V];
    for (int c = 0; c < V; ++c) part[c] = Load(v + c * kLanes, numbers(c));
    for (int h = 0; h < N; ++h) {
      for (int c = 0; c < V; ++c) sum[h][c] += p[h][i] * part[c];
    }
  }
  for (int h = 0; h < N; ++h) {
    for (int c = 0; c < V; ++c) {
      Store(o + h * stride + d + c * kLanes, sum[h][c], numbers(c));
    }
  }
}

// The keys that position t of row b sees, those in the cache first: key i is in slot begin + i, or,
// from i = past, the new one first_new + i - past.
struct Seen {
  int64_t begin, past, first_new, count;

  template <class Number>
  ALWAYS_INLINE Seen(const Arrays<Number>& x, int64_t b, int64_t t)
      : begin(std::max<int64_t>(x.begin[b], 0)),
        past(std::max<int64_t>(x.slot - begin, 0)),
        // A position in the padding sees itself alone
        first_new(std::min(t, std::max<int64_t>(begin - x.slot, 0))),
        count(past + t + 1 - first_new) {}
};

// N queries from head h on, which share the keys of a head, over a chunk.
template <int N, class Number>
ALWAYS_INLINE void Attend(const Shape& n, const Arrays<Number>& x, const Parts& to, int64_t b, int64_t t,
                          int64_t h, int64_t chunk) {
  const Seen seen(x, b, t);
  const int64_t D = n.D, head = h / (n.H / n.K), first = chunk * kChunk;
  const int64_t count = std::min<int64_t>(seen.count - first, kChunk);
  if (count <= 0) return;
  const int64_t row = (b * n.K + head) * n.S + seen.begin, new_row = b * n.T * n.K + head;
  const auto at = [&](const Number* past, const Number* new_ones, int64_t i) {
    i += first;
    return i < seen.past ? past + (row + i) * D
                         : new_ones + (new_row + (seen.first_new + i - seen.past) * n.K) * D;
  };
  const auto key = [&](int64_t i) { return at(x.past_k, x.k, i); };
  const auto value = [&](int64_t i) { return at(x.past_v, x.v, i); };
  const int64_t query = (b * n.T + t) * n.H + h;
  float p[kHeads][kChunk];
  Scores<N>(x.q + query * D, key, value, count, D, p);
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  for (int k = 0; k < N; ++k) {
    const int64_t part = (query + k) * to.chunks + chunk;
    std::fill(p[k] + count, p[k] + whole, kNone);
    Lanes most = All(kNone), sum = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Lanes score = Load(p[k] + i) * scale;
      Store(p[k] + i, score);
      most = score > most ? score : most;
    }
    float largest[kLanes];
    Store(largest, most);
    to.largest[part] = *std::max_element(largest, largest + kLanes);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Lanes weight = Exp(Load(p[k] + i) - Base(to.largest[part]));
      Store(p[k] + i, weight);
      sum += weight;
    }
    to.sum[part] = Sum(sum);
  }
  float* const o = &to.o[(query * to.chunks + chunk) * D];
  const int64_t stride = to.chunks * D;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= D; d += kVectors * kLanes) {
    WeightedSums<N, kVectors>(p, value, count, d, kLanes, o, stride);
  }
  for (; d < D; d += kLanes) {
    WeightedSums<N, 1>(p, value, count, d, std::min<int64_t>(kLanes, D - d), o, stride);
  }
}

// All queries of row b whose heads share the keys of a head, over a chunk. Up to kHeads of them read
// the keys together.
template <class Number>
ALWAYS_INLINE void AttendInGroups(const Shape& n, const Arrays<Number>& x, const Parts& to, int64_t b,
                                  int64_t head, int64_t chunk) {
  const int64_t end = (head + 1) * (n.H / n.K);
  for (int64_t t = 0; t < n.T; ++t) {
    for (int64_t h = head * (n.H / n.K); h < end; h += kHeads) {
      switch (std::min<int64_t>(end - h, kHeads)) {
        case 1: Attend<1>(n, x, to, b, t, h, chunk); break;
        case 2: Attend<2>(n, x, to, b, t, h, chunk); break;
        case 3: Attend<3>(n, x, to, b, t, h, chunk); break;
        default: Attend<kHeads>(n, x, to, b, t, h, chunk);
      }
    }
  }
}

// The softmax over all chunks of a query.
template <class Number>
ALWAYS_INLINE void Join(const Shape& n, const Arrays<Number>& x, const Parts& from, int64_t b, int64_t t,
                        int64_t h) {
  const int64_t query = (b * n.T + t) * n.H + h, part = query * from.chunks, D = n.D;
  const int64_t chunks = (Seen(x, b, t).count + kChunk - 1) / kChunk;
  const float* of = &from.largest[part];
  const float largest = Base(*std::max_element(of, of + chunks));
  float* o = x.o + query * D;
  float sum = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const float weight = Exp(All(of[c] - largest))[0];
    sum += weight * from.sum[part + c];
    const float* more = &from.o[(part + c) * D];
    for (int64_t d = 0; d < D; ++d) o[d] = (c ? o[d] : 0) + weight * more[d];
  }
  for (int64_t d = 0; d < D; ++d) o[d] /= sum;
}

template <class Number>
void AttendAnywhere(const Shape& n, const Arrays<Number>& x, const Parts& to, int64_t b, int64_t head,
                    int64_t chunk) {
  if constexpr (!std::is_same_v<Number, HalfForF16c>) {
    const int64_t group = n.H / n.K;
    for (int64_t t = 0; t < n.T; ++t) {
      for (int64_t h = head * group; h < (head + 1) * group; ++h) {
        Attend<1>(n, x, to, b, t, h, chunk);
      }
    }
  }
}

template <class Number>
FOR_AVX2 void AttendWithAvx2(const Shape& n, const Arrays<Number>& x, const Parts& to, int64_t b,
                             int64_t head, int64_t chunk) {
  AttendInGroups(n, x, to, b, head, chunk);
}

template <class Number>
FOR_AVX512 void AttendWithAvx512(const Shape& n, const Arrays<Number>& x, const Parts& to, int64_t b,
                                 int64_t head, int64_t chunk) {
  AttendInGroups(n, x, to, b, head, chunk);
}

template <class Number>
void JoinAnywhere(const Shape& n, const Arrays<Number>& x, const Parts& from, int64_t b, int64_t t,
                  int64_t h) {
  Join(n, x, from, b, t, h);
}

template <class Number>
FOR_AVX2 void JoinWithAvx2(const Shape& n, const Arrays<Number>& x, const Parts& from, int64_t b,
                           int64_t t, int64_t h) {
  Join(n, x, from, b, t, h);
}

const bool kAvx2 = gptjax::UseAvx2(), kAvx512 = gptjax::UseAvx512();

template <class Number>
void AttendToAll(ffi::ThreadPool& pool, const Shape& n, const Arrays<Number>& x) {
  const auto attend = kAvx512 ? AttendWithAvx512<Number>
                      : kAvx2 ? AttendWithAvx2<Number>
                              : AttendAnywhere<Number>;
  const auto join = kAvx2 ? JoinWithAvx2<Number> : JoinAnywhere<Number>;
  const int64_t chunks = (x.slot + n.T + kChunk - 1) / kChunk, parts = n.B * n.T * n.H * chunks;
  const Parts between{chunks, std::unique_ptr<float[]>(new float[parts]),
                      std::unique_ptr<float[]>(new float[parts]),
                      std::unique_ptr<float[]>(new float[parts * n.D])};
  // A thread takes a head's keys at most, since texts differ in length
  gptjax::ParallelFor(pool, n.B * n.K * chunks, chunks, [&](int64_t piece) {
    attend(n, x, between, piece / chunks / n.K, piece / chunks % n.K, piece % chunks);
  });
  gptjax::ParallelFor(pool, n.B * n.T, 1, [&](int64_t piece) {
    for (int64_t h = 0; h < n.H; ++h) join(n, x, between, piece / n.T, piece % n.T, h);
  });
}

using F32x4 = ffi::BufferR4<ffi::F32>;

ffi::Error Attention(ffi::ThreadPool pool, F32x4 q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::AnyBuffer past_k, ffi::AnyBuffer past_v, ffi::BufferR0<ffi::S32> of,
                     ffi::BufferR1<ffi::S32> begin, ffi::BufferR0<ffi::S32> slot,
                     ffi::Result<F32x4> o) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_past = past_k.dimensions();
  const auto type = k.element_type();
  bool fits = of_k.size() == 4 && of_past.size() == 5 && (type == ffi::F32 || type == ffi::F16);
  for (const auto* other : {&v, &past_k, &past_v}) fits &= other->element_type() == type;
  const Shape n{of_q[0], of_q[1], of_q[2], fits ? of_k[2] : 0, fits ? of_past[3] : 0, of_q[3]};
  const int64_t layer = of.typed_data()[0], at = slot.typed_data()[0];
  fits = fits && of_k[0] == n.B && of_k[1] == n.T && of_k[3] == n.D && n.K > 0 && n.H % n.K == 0 &&
         layer >= 0 && layer < of_past[0] && of_past[1] == n.B && of_past[2] == n.K &&
         of_past[4] == n.D && v.dimensions() == of_k && past_v.dimensions() == of_past &&
         begin.element_count() == static_cast<size_t>(n.B) && o->dimensions() == of_q && at >= 0 &&
         at <= n.S;
  if (!fits) return ffi::Error::InvalidArgument("attention: the arrays do not fit together");
  const auto attend = [&](auto number) {
    using Number = decltype(number);
    const auto numbers = [](ffi::AnyBuffer of) { return static_cast<Number*>(of.untyped_data()); };
    const int64_t before = layer * n.B * n.K * n.S * n.D;
    const Arrays<Number> x{q.typed_data(),           numbers(k),        numbers(v),
                           numbers(past_k) + before, numbers(past_v) + before,
                           begin.typed_data(),       at,                o->typed_data()};
    AttendToAll(pool, n, x);
  };
  if (type == ffi::F32) {
    attend(float());
#if defined(HAS_F16C)
  } else if (kAvx2) {
    attend(HalfForF16c());
#endif
  } else {
    attend(Half());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x4>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<F32x4>());
