// AdamW on all tensors of a model in one pass over memory. The docstring of
// gptjax.train.optimizer.fused_update has the equations.
//
// Arguments: eight scalars, then every parameter, first moment, second moment and gradient, each list in one order.
// Results: the parameters, first and second moments, in the memory of their arguments.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

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

void UpdateBlock(const Scalars& s, float eps, float weight_decay, int64_t n, float* __restrict p, float* __restrict m,
                 float* __restrict v, const float* __restrict g) {
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

// The work, shared by the threads that do it; the last of them to let go of it frees it.
struct Work {
  Scalars scalars;
  float eps;
  std::vector<Tensor> tensors;
  std::vector<int64_t> first_block;  // of each tensor
  int64_t blocks = 0;
  std::atomic<int64_t> next{0};
  int64_t done = 0;
  std::mutex mutex;
  std::condition_variable all_done;

  void Run() {
    int64_t mine = 0;
    for (int64_t block; (block = next.fetch_add(1)) < blocks; ++mine) {
      const size_t i = std::upper_bound(first_block.begin(), first_block.end(), block) - first_block.begin() - 1;
      const Tensor& t = tensors[i];
      const int64_t at = (block - first_block[i]) * kBlock;
      UpdateBlock(scalars, eps, t.weight_decay, std::min(kBlock, t.size - at), t.p + at, t.m + at, t.v + at, t.g + at);
    }
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == blocks) all_done.notify_all();
  }
};

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
  auto work = std::make_shared<Work>();
  std::memcpy(&work->scalars, scalars.typed_data(), sizeof(Scalars));
  work->eps = eps;
  for (size_t i = 0; i < n; ++i) {
    auto p = Overwritten(args, rets, i), m = Overwritten(args, rets, n + i), v = Overwritten(args, rets, 2 * n + i);
    auto g = args.get<ffi::Buffer<ffi::F32>>(3 * n + i);
    for (const auto* found : {&p, &m, &v}) {
      if (!found->has_value()) return found->error();
    }
    if (!g.has_value()) return g.error();
    const int64_t size = g->element_count();
    work->tensors.push_back({*p, *m, *v, g->typed_data(), size, weight_decay[i]});
    work->first_block.push_back(work->blocks);
    work->blocks += (size + kBlock - 1) / kBlock;
  }
  if (work->scalars.finite == 0) return ffi::Error::Success();
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, work->blocks - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->done == work->blocks; });
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
