// Products of a few rows of x with weights in blocks of 8 or 4 bits, or in bfloat16:
// `gptjax.ops.quantized` has the equations.
//
// Kernels for several instruction sets are here, and the best that the processor has is chosen when
// the library is loaded. All of them give the same bits, however many rows or threads there are:
// sums within a block are of integers, and an output's sum over blocks is in their order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int kRows = 8;          // outputs whose weights lie interleaved: a panel
constexpr int kBlock = 32;        // inputs that share a scale
constexpr int kLanes = 16;        // partial sums of a product with a row of bfloat16
constexpr int kMostTogether = 4;  // rows of x that a kernel takes at a time with a panel
constexpr int kMostWithTwo = 8;   // and with two panels
constexpr int64_t kPieceBytes = 1 << 14;   // of weights in a piece, unless two panels have more
constexpr int64_t kRun = 64;               // pieces that a thread takes at a time, at most
constexpr int64_t kCachedBytes = 1 << 17;  // of x, that stay in a core's cache
constexpr int64_t kBytesAhead = 1 << 13;   // of weights: a core's 40 GB/s for the 200 ns of memory

enum Kind { kQ8_0, kQ4_0, kQ4_1, kKinds, kBFloat16 = kKinds };
constexpr int64_t kTileBytes[kKinds] = {256, 128, 128};

// Weights of 8 outputs: for each block a tile of 8 x 32, where the same 4 inputs of all outputs
// lie side by side, and 8 scales and minima in half precision. In 4 bits, the low halves of a
// tile's bytes are a block's first 16 inputs.
struct Panel {
  const uint8_t* q;
  const uint16_t *scale, *minimum;
  int64_t blocks;
};

// Rows of x in blocks of 8 bits, with each block's scale and the sum of its integers.
struct Rows {
  const int8_t* q;
  const float* scale;
  const int32_t* sum;
};

// y[r][0..8) of up to kMostTogether rows r; or, with the panel after it, y[r][0..16) of up to
// kMostWithTwo.
using PanelProduct = void (*)(const Panel&, const Rows&, int64_t together, float* y);
// Products of one row of weights with up to kMostTogether rows of x.
using RowProduct = void (*)(const uint16_t* w, const float* x, int64_t inputs, int64_t together,
                            float* y);
using Quantizer = void (*)(const float* x, int64_t inputs, int8_t* q, float* scale, int32_t* sum);

struct Kernels {
  const char* name;
  PanelProduct panel[kKinds];
  PanelProduct two_panels[kKinds];  // null if there is none
  RowProduct row;
  Quantizer quantize;
};

// Keeps the compiler from summing in an order that needs more registers than there are.
#define IN_ORDER(vector) asm("" : "+x"(vector))

// --- Common to all instruction sets ---

#define ALWAYS_INLINE __attribute__((always_inline)) inline

ALWAYS_INLINE float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

ALWAYS_INLINE uint32_t ToBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

constexpr float kTiny = 0x1p-90f;      // whose products would leave float32's normal range
constexpr float kRounder = 0x1.8p23f;  // added to a number below 2^22, leaves an integer in its bits

// Each block as multiples of its largest magnitude / 127. A block with a number that is not finite
// gets a scale of NaN, one of tiny numbers the scale 0.
ALWAYS_INLINE void QuantizeBlocks(const float* x, int64_t inputs, int8_t* q, float* scale,
                                  int32_t* sum) {
  for (int64_t b = 0; b * kBlock < inputs; ++b) {
    float v[kBlock] = {};
    std::memcpy(v, x + b * kBlock, sizeof(float) * std::min<int64_t>(kBlock, inputs - b * kBlock));
    int32_t largest_bits = 0;  // as integers, since NaN is the largest of those
    for (float f : v) {
      largest_bits = std::max(largest_bits, static_cast<int32_t>(ToBits(f) & 0x7fffffff));
    }
    const float largest = FromBits(largest_bits);
    const bool finite = largest <= std::numeric_limits<float>::max(), tiny = largest < kTiny;
    const float inverse = finite && !tiny ? 127 / largest : 0;
    int32_t total = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float steps = (finite ? v[i] : 0) * inverse + kRounder;
      const int32_t whole = static_cast<int32_t>(ToBits(steps) - ToBits(kRounder));
      q[b * kBlock + i] = static_cast<int8_t>(whole);
      total += whole;
    }
    scale[b] = finite ? (tiny ? 0 : largest / 127) : std::numeric_limits<float>::quiet_NaN();
    sum[b] = total;
  }
}

ALWAYS_INLINE float BFloat16(uint16_t x) { return FromBits(static_cast<uint32_t>(x) << 16); }

// The sum of the lanes, in a fixed order, and of the products that fill no 16 lanes.
ALWAYS_INLINE float SumOfLanes(const float* lanes, const uint16_t* w, const float* x, int64_t rest) {
  float part[kLanes];
  std::memcpy(part, lanes, sizeof(part));
  for (int64_t i = 0; i < rest; ++i) part[i] += BFloat16(w[i]) * x[i];
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// --- Kernels for any processor ---

namespace portable {

float Half(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return FromBits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return FromBits(sign | ToBits(static_cast<float>(rest) * 0x1p-24f));
  return FromBits(sign | ((rest << 13) + (112u << 23)));
}

template <Kind kKind>
void PanelTimesRows(const Panel& w, const Rows& x, int64_t together, float* y) {
  std::fill(y, y + together * kRows, 0.0f);
  for (int64_t b = 0; b < w.blocks; ++b) {
    const uint8_t* q = w.q + b * kTileBytes[kKind];
    for (int64_t r = 0; r < together; ++r) {
      const int64_t at = r * w.blocks + b;
      const int8_t* xq = x.q + at * kBlock;
      int32_t sum[kRows] = {};
      for (int64_t j = 0; j < kTileBytes[kKind] / 32; ++j) {
        for (int o = 0; o < kRows; ++o) {
          for (int c = 0; c < 4; ++c) {
            const uint8_t byte = q[32 * j + 4 * o + c];
            if constexpr (kKind == kQ8_0) {
              sum[o] += static_cast<int8_t>(byte) * xq[4 * j + c];
            } else {
              sum[o] += (byte & 15) * xq[4 * j + c] + (byte >> 4) * xq[4 * j + c + 16];
            }
          }
        }
      }
      for (int o = 0; o < kRows; ++o) {
        if constexpr (kKind == kQ4_0) sum[o] -= 8 * x.sum[at];
        float part = static_cast<float>(sum[o]) * (Half(w.scale[kRows * b + o]) * x.scale[at]);
        if constexpr (kKind == kQ4_1) {
          const float xsum = x.scale[at] * static_cast<float>(x.sum[at]);
          part += Half(w.minimum[kRows * b + o]) * xsum;
        }
        y[kRows * r + o] += part;
      }
    }
  }
}

void RowTimesRows(const uint16_t* w, const float* x, int64_t inputs, int64_t together, float* y) {
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t r = 0; r < together; ++r, x += inputs) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += BFloat16(w[i + k]) * x[i + k];
    }
    y[r] = SumOfLanes(lanes, w + whole, x + whole, inputs - whole);
  }
}

void Quantize(const float* x, int64_t inputs, int8_t* q, float* scale, int32_t* sum) {
  QuantizeBlocks(x, inputs, q, scale, sum);
}

}  // namespace portable

// --- Kernels for x86 ---

#define KERNELS(isa, ...)                                                                        \
  {#isa,                                                                                         \
   {isa::PanelTimesRows<kQ8_0>, isa::PanelTimesRows<kQ4_0>, isa::PanelTimesRows<kQ4_1>},         \
   {__VA_ARGS__},                                                                                \
   isa::RowTimesRows,                                                                            \
   isa::Quantize}

#if defined(__x86_64__)

#define ISA avx2
#define TARGET "avx2,f16c"
#include "product_x86.inc"
#undef ISA
#undef TARGET

#define ISA avx512vnni
#define TARGET "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni"
#define DPBUSD _mm256_dpbusd_epi32
#include "product_x86.inc"
#include "product_avx512.inc"
#undef ISA
#undef TARGET
#undef DPBUSD

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_AVXVNNI
#define ISA avxvnni
#define TARGET "avx2,f16c,avxvnni"
#define DPBUSD _mm256_dpbusd_avx_epi32
#include "product_x86.inc"
#undef ISA
#undef TARGET
#undef DPBUSD
#endif

struct Processor {
  bool avx2 = false, avxvnni = false, avx512vnni = false;

  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    if (!(c >> 27 & 1) || !(c >> 28 & 1) || !(c >> 29 & 1)) return;  // OSXSAVE, AVX, F16C
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = b >> 5 & 1;
    const bool wide = (low & 0xe6) == 0xe6 && b >> 16 & 1 && b >> 30 & 1 && b >> 31 & 1;
    avx512vnni = avx2 && wide && c >> 11 & 1;
    const bool more = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avxvnni = avx2 && more && a >> 4 & 1;
  }
};

#endif

// Those that this processor has, the best first. The list is never destroyed: a thread of XLA's may
// still multiply while the process ends.
const std::vector<Kernels>& AllKernels() {
  static const auto& all = *new std::vector<Kernels>([] {
    std::vector<Kernels> found;
#if defined(__x86_64__)
    const Processor has;
    if (has.avx512vnni) {
      using namespace avx512vnni;
      found.push_back(KERNELS(avx512vnni, TwoPanelsTimesRows<kQ8_0>, TwoPanelsTimesRows<kQ4_0>,
                              TwoPanelsTimesRows<kQ4_1>));
    }
#if defined(HAS_AVXVNNI)
    if (has.avxvnni) found.push_back(KERNELS(avxvnni));
#endif
    if (has.avx2) found.push_back(KERNELS(avx2));
#endif
    found.push_back(KERNELS(portable));
    return found;
  }());
  return all;
}

std::atomic<const Kernels*> chosen{&AllKernels().front()};

// --- The call ---

ffi::Error Misfit() { return ffi::Error::InvalidArgument("product: the shapes do not fit"); }

// One matrix and its product: a panel is 8 outputs if it is in blocks, one in bfloat16. A piece
// of the work has `together` panels.
struct Matrix {
  Kind kind;
  const uint8_t* q;
  const uint16_t *scale, *minimum;
  float* y;
  int64_t outputs, panels, panel_bytes, together = 0, first_piece = 0;
};

// x in blocks of 8 bits.
struct Quantized {
  std::unique_ptr<int8_t[]> q;
  std::unique_ptr<float[]> scale;
  std::unique_ptr<int32_t[]> sum;
};

Quantized QuantizeRows(ffi::ThreadPool& pool, const Kernels& kernels, const float* x, int64_t M,
                       int64_t inputs, int64_t blocks) {
  Quantized to{std::unique_ptr<int8_t[]>(new int8_t[M * blocks * kBlock]),
               std::unique_ptr<float[]>(new float[M * blocks]),
               std::unique_ptr<int32_t[]>(new int32_t[M * blocks])};
  const auto quantize = [&](int64_t m) {
    kernels.quantize(x + m * inputs, inputs, &to.q[m * blocks * kBlock], &to.scale[m * blocks],
                     &to.sum[m * blocks]);
  };
  if (M > 2 * kMostTogether) {
    gptjax::ParallelFor(pool, M, kRun, quantize);
  } else {
    for (int64_t m = 0; m < M; ++m) quantize(m);
  }
  return to;
}

// Panels [begin, end) of y = x w^T with w in blocks.
void BlockPanels(const Kernels& kernels, const Matrix& w, const Quantized& x, int64_t M,
                 int64_t blocks, int64_t begin, int64_t end) {
  const int64_t fit = kCachedBytes / std::max<int64_t>(blocks * kBlock, 1);
  const int64_t cached = std::max<int64_t>(1, fit / kMostWithTwo) * kMostWithTwo;
  for (int64_t first = 0; first < M; first += cached) {
    for (int64_t p = begin; p < end;) {
      const bool two = M > kMostTogether && p + 1 < end && kernels.two_panels[w.kind];
      const int64_t panels = two ? 2 : 1, most = two ? kMostWithTwo : kMostTogether;
      const PanelProduct product = two ? kernels.two_panels[w.kind] : kernels.panel[w.kind];
      const int64_t at = p * blocks * kRows, width = panels * kRows;
      const int64_t count = std::min(width, w.outputs - p * kRows);
      const Panel panel{w.q + p * w.panel_bytes, w.scale + at, w.minimum + at, blocks};
      for (int64_t m = first; m < std::min(M, first + cached); m += most) {
        const int64_t n = std::min(most, M - m);
        const Rows rows{&x.q[m * blocks * kBlock], &x.scale[m * blocks], &x.sum[m * blocks]};
        float found[kMostWithTwo * 2 * kRows];
        product(panel, rows, n, found);
        for (int64_t r = 0; r < n; ++r) {
          std::memcpy(w.y + (m + r) * w.outputs + p * kRows, found + r * width,
                      sizeof(float) * count);
        }
      }
      p += panels;
    }
  }
}

// Outputs [begin, end) of y = x w^T with w in bfloat16.
void BFloat16Outputs(const Kernels& kernels, const Matrix& w, const float* x, int64_t M,
                     int64_t inputs, int64_t begin, int64_t end) {
  const auto* rows = reinterpret_cast<const uint16_t*>(w.q);
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t m = 0; m < M; m += kMostTogether) {
      const int64_t n = std::min<int64_t>(kMostTogether, M - m);
      float found[kMostTogether];
      kernels.row(rows + o * inputs, x + m * inputs, inputs, n, found);
      for (int64_t r = 0; r < n; ++r) w.y[(m + r) * w.outputs + o] = found[r];
    }
  }
}

// y = x w^T for each matrix w of one layer; its integers, scales and minima, or its bfloat16
// numbers, are there for all layers.
ffi::Error Product(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR0<ffi::S32> of,
                   ffi::RemainingArgs weights, ffi::RemainingRets results,
                   ffi::Span<const int32_t> kinds) {
  const int64_t M = x.dimensions()[0], inputs = x.dimensions()[1], layer = of.typed_data()[0];
  const int64_t blocks = (inputs + kBlock - 1) / kBlock;
  if (results.size() != kinds.size()) return Misfit();
  std::vector<Matrix> matrices;
  bool any_blocks = false;
  size_t arg = 0;
  // The layer's numbers in the next array, (L, ...), which should have so many bytes a layer; null
  // if it does not
  const auto next = [&](int64_t bytes) -> const uint8_t* {
    const auto stack = weights.get<ffi::AnyBuffer>(arg++);
    if (!stack.has_value() || stack->dimensions().size() == 0) return nullptr;
    const int64_t layers = stack->dimensions()[0], all = stack->size_bytes();
    if (layer < 0 || layer >= layers || all != layers * bytes) return nullptr;
    return static_cast<const uint8_t*>(stack->untyped_data()) + layer * bytes;
  };
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] < 0 || kinds[i] > kBFloat16) return Misfit();
    const Kind kind = static_cast<Kind>(kinds[i]);
    auto y = results.get<ffi::BufferR2<ffi::F32>>(i);
    if (!y.has_value() || (*y)->dimensions()[0] != M) return Misfit();
    const bool in_blocks = kind != kBFloat16;
    const int64_t outputs = (*y)->dimensions()[1];
    const int64_t panels = in_blocks ? (outputs + kRows - 1) / kRows : outputs;
    const int64_t panel_bytes = in_blocks ? blocks * kTileBytes[kind] : 2 * inputs;
    const int64_t scale_bytes = panels * blocks * kRows * sizeof(uint16_t);
    const uint8_t* const q = next(panels * panel_bytes);
    const uint8_t* const scale = in_blocks ? next(scale_bytes) : q;
    const uint8_t* const minimum = kind == kQ4_1 ? next(scale_bytes) : scale;
    if (!q || !scale || !minimum) return Misfit();
    matrices.push_back({kind, q, reinterpret_cast<const uint16_t*>(scale),
                        reinterpret_cast<const uint16_t*>(minimum), (*y)->typed_data(), outputs,
                        panels, panel_bytes});
    any_blocks |= in_blocks;
  }
  if (arg != weights.size()) return Misfit();

  int64_t pieces = 0;
  for (Matrix& w : matrices) {
    w.together = 2 * std::max<int64_t>(1, kPieceBytes / std::max<int64_t>(2 * w.panel_bytes, 1));
    w.first_piece = pieces;
    pieces += (w.panels + w.together - 1) / w.together;
  }
  const Kernels& kernels = *chosen.load(std::memory_order_relaxed);
  const float* from = x.typed_data();
  Quantized quantized;
  if (any_blocks) quantized = QuantizeRows(pool, kernels, from, M, inputs, blocks);
  gptjax::ParallelFor(pool, pieces, kRun, [&](int64_t piece) {
    size_t i = matrices.size() - 1;
    while (matrices[i].first_piece > piece) --i;
    const Matrix& w = matrices[i];
    const int64_t begin = (piece - w.first_piece) * w.together;
    const int64_t end = std::min(w.panels, begin + w.together);
    if (w.kind == kBFloat16) {
      BFloat16Outputs(kernels, w, from, M, inputs, begin, end);
    } else {
      BlockPanels(kernels, w, quantized, M, blocks, begin, end);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

// The names of the instruction sets, the best first; null after the last. The one in use is -1.
extern "C" const char* instruction_set(int index) {
  if (index == -1) return chosen.load()->name;
  const auto& all = AllKernels();
  return index >= 0 && index < static_cast<int>(all.size()) ? all[index].name : nullptr;
}

// Uses that of `instruction_set(index)` from now on.
extern "C" void use_instruction_set(int index) { chosen = &AllKernels().at(index); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("kinds"));
