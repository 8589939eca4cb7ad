// Attention of a few new positions to a cache of keys and values: `gptjax.ops.kv_cache` has the
// equations.
//
// Each query is computed by itself, in one order of summation, so its bits depend neither on the
// others nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "avx2.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;  // partial sums

#define ALWAYS_INLINE __attribute__((always_inline)) inline

struct Shape {
  int64_t B, T, H, K, S, D;
};

struct Arrays {
  const float *q, *k, *v;          // (B, T, H, D) and (B, T, K, D): the new positions
  const float *past_k, *past_v;    // (B, K, S, D)
  const int32_t* begin;            // (B,): each row's first slot
  int64_t slot;                    // of the first new position
  float* o;                        // (B, T, H, D)
};

ALWAYS_INLINE float Dot(const float* a, const float* b, int64_t n) {
  float lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += a[i] * b[i];
  for (int half = kLanes / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// e^x for x <= 0, to 2e-7 of it; 0 below -87. A NaN stays one.
ALWAYS_INLINE float Exp(float x) {
  constexpr float kRounder = 0x1.8p23f;  // leaves an integer in the low bits of a sum
  const float bounded = x < -87.0f ? -87.0f : x;
  const float steps = bounded * 1.44269504f + kRounder, n = steps - kRounder;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  int32_t bits;
  std::memcpy(&bits, &steps, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) * (1 << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

// One query: the visible slots of the cache, then the new positions up to its own.
ALWAYS_INLINE void Attend(const Shape& n, const Arrays& x, int64_t b, int64_t t, int64_t h,
                          float* p) {
  const int64_t D = n.D, head = h / (n.H / n.K), begin = std::max<int64_t>(x.begin[b], 0);
  const float* q = x.q + ((b * n.T + t) * n.H + h) * D;
  const float *k = x.past_k + (b * n.K + head) * n.S * D, *v = x.past_v + (b * n.K + head) * n.S * D;
  const float *new_k = x.k + (b * n.T * n.K + head) * D, *new_v = x.v + (b * n.T * n.K + head) * D;
  // A position in the padding sees itself alone
  const int64_t first_new = std::min(t, std::max<int64_t>(begin - x.slot, 0));
  const int64_t past = std::max<int64_t>(x.slot - begin, 0), all = past + t + 1 - first_new;
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < all; ++i) {
    const float* key = i < past ? k + (begin + i) * D : new_k + (first_new + i - past) * n.K * D;
    p[i] = scale * Dot(q, key, D);
    largest = p[i] > largest ? p[i] : largest;
  }
  for (int64_t i = 0; i < all; ++i) p[i] = Exp(p[i] - largest);
  float sums[kLanes] = {};
  for (int64_t i = 0; i < all; ++i) sums[i % kLanes] += p[i];
  float sum = 0;
  for (float s : sums) sum += s;
  float* o = x.o + ((b * n.T + t) * n.H + h) * D;
  std::fill(o, o + D, 0.0f);
  for (int64_t i = 0; i < all; ++i) {
    const float* value = i < past ? v + (begin + i) * D : new_v + (first_new + i - past) * n.K * D;
    for (int64_t d = 0; d < D; ++d) o[d] += p[i] * value[d];
  }
  for (int64_t d = 0; d < D; ++d) o[d] /= sum;
}

void AttendAnywhere(const Shape& n, const Arrays& x, int64_t b, int64_t t, int64_t h, float* p) {
  Attend(n, x, b, t, h, p);
}

FOR_AVX2 void AttendWithAvx2(const Shape& n, const Arrays& x, int64_t b, int64_t t, int64_t h,
                             float* p) {
  Attend(n, x, b, t, h, p);
}

const bool kAvx2 = gptjax::UseAvx2();

using F32x4 = ffi::BufferR4<ffi::F32>;
using F32x5 = ffi::Buffer<ffi::F32, 5>;

ffi::Error Attention(ffi::ThreadPool pool, F32x4 q, F32x4 k, F32x4 v, F32x5 past_k, F32x5 past_v,
                     ffi::BufferR0<ffi::S32> of, ffi::BufferR1<ffi::S32> begin,
                     ffi::BufferR0<ffi::S32> slot, ffi::Result<F32x4> o) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_past = past_k.dimensions();
  const Shape n{of_q[0], of_q[1], of_q[2], of_k[2], of_past[3], of_q[3]};
  const int64_t layer = of.typed_data()[0], before = layer * n.B * n.K * n.S * n.D;
  const Arrays x{q.typed_data(),      k.typed_data(),     v.typed_data(),
                 past_k.typed_data() + before, past_v.typed_data() + before, begin.typed_data(),
                 slot.typed_data()[0], o->typed_data()};
  const bool fits = of_k[0] == n.B && of_k[1] == n.T && of_k[3] == n.D && n.K > 0 &&
                    n.H % n.K == 0 && layer >= 0 && layer < of_past[0] && of_past[1] == n.B &&
                    of_past[2] == n.K && of_past[4] == n.D && v.dimensions() == of_k &&
                    past_v.dimensions() == of_past &&
                    begin.element_count() == static_cast<size_t>(n.B) && o->dimensions() == of_q &&
                    x.slot >= 0 && x.slot <= n.S;
  if (!fits) return ffi::Error::InvalidArgument("attention: the arrays do not fit together");
  gptjax::ParallelFor(pool, n.B * n.T * n.H, [=](int64_t piece) {
    const int64_t h = piece % n.H, t = piece / n.H % n.T, b = piece / n.H / n.T;
    std::vector<float> p(x.slot + n.T);
    (kAvx2 ? AttendWithAvx2 : AttendAnywhere)(n, x, b, t, h, p.data());
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32x4>()
                                  .Arg<F32x4>()
                                  .Arg<F32x4>()
                                  .Arg<F32x5>()
                                  .Arg<F32x5>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<F32x4>());
