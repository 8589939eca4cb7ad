// AdamW on all tensors of a model in one pass over memory. The docstring of
// gptjax.train.optimizer.fused_update has the equations.
//
// Arguments: eight scalars, then every parameter, first moment, second moment and gradient, each list in one order.
// Results: the parameters, first and second moments, in the memory of their arguments.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 1 << 15;  // elements that a thread takes at a time

struct Scalars {
  float beta1, scale1, beta2, scale2, correction1, correction2, learning_rate, finite;
};

struct Tensor {
  float *p, *m, *v;
  const float* g;
  int64_t size;
  float weight_decay;
};

// The elements [at, at + n) of a tensor.
__attribute__((always_inline)) inline void UpdateElements(const Scalars& s, float eps, const Tensor& t, int64_t at,
                                                          int64_t n) {
  float *__restrict p = t.p + at, *__restrict m = t.m + at, *__restrict v = t.v + at;
  const float* __restrict g = t.g + at;
  const float weight_decay = t.weight_decay;
  for (int64_t i = 0; i < n; ++i) {
    const float first = s.beta1 * m[i] + s.scale1 * g[i];
    const float scaled = s.scale2 * g[i];
    const float second = s.beta2 * v[i] + scaled * scaled;
    const float direction = first * s.correction1 / (std::sqrt(second * s.correction2) + eps);
    m[i] = first;
    v[i] = second;
    p[i] -= s.learning_rate * (direction + weight_decay * p[i]);
  }
}

void UpdateAnywhere(const Scalars& s, float eps, const Tensor& t, int64_t at, int64_t n) {
  UpdateElements(s, eps, t, at, n);
}

FOR_AVX2 void UpdateWithAvx2(const Scalars& s, float eps, const Tensor& t, int64_t at, int64_t n) {
  UpdateElements(s, eps, t, at, n);
}

const bool kAvx2 = gptjax::UseAvx2();

// The memory that a result and its argument share.
ffi::ErrorOr<float*> Overwritten(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, size_t i) {
  auto from = args.get<ffi::Buffer<ffi::F32>>(i);
  if (!from.has_value()) return ffi::Unexpected(from.error());
  auto to = rets.get<ffi::Buffer<ffi::F32>>(i);
  if (!to.has_value()) return ffi::Unexpected(to.error());
  if ((*to)->typed_data() != from->typed_data()) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("adamw: a result is not in the memory of its argument"));
  }
  return from->typed_data();
}

ffi::Error Update(ffi::ThreadPool pool, ffi::BufferR1<ffi::F32> scalars, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const float> weight_decay, float eps) {
  const size_t n = weight_decay.size();
  if (scalars.element_count() != sizeof(Scalars) / sizeof(float) || args.size() != 4 * n || rets.size() != 3 * n) {
    return ffi::Error::InvalidArgument("adamw: wrong number of arguments or results");
  }
  Scalars s;
  std::memcpy(&s, scalars.typed_data(), sizeof(s));
  std::vector<Tensor> tensors;
  std::vector<int64_t> first_block;  // of each tensor
  int64_t blocks = 0;
  for (size_t i = 0; i < n; ++i) {
    auto p = Overwritten(args, rets, i), m = Overwritten(args, rets, n + i), v = Overwritten(args, rets, 2 * n + i);
    auto g = args.get<ffi::Buffer<ffi::F32>>(3 * n + i);
    for (const auto* found : {&p, &m, &v}) {
      if (!found->has_value()) return found->error();
    }
    if (!g.has_value()) return g.error();
    const int64_t size = g->element_count();
    tensors.push_back({*p, *m, *v, g->typed_data(), size, weight_decay[i]});
    first_block.push_back(blocks);
    blocks += (size + kBlock - 1) / kBlock;
  }
  if (s.finite == 0) return ffi::Error::Success();
  gptjax::ParallelFor(pool, blocks, 1, [&](int64_t block) {
    const size_t i = std::upper_bound(first_block.begin(), first_block.end(), block) - first_block.begin() - 1;
    const int64_t at = (block - first_block[i]) * kBlock, left = tensors[i].size - at;
    (kAvx2 ? UpdateWithAvx2 : UpdateAnywhere)(s, eps, tensors[i], at, std::min(kBlock, left));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(adamw, Update,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const float>>("weight_decay")
                                  .Attr<float>("eps"));
