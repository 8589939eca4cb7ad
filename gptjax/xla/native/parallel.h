// Work shared out over the threads of XLA's own pool, so that no others compete with them.

#ifndef GPTJAX_PARALLEL_H_
#define GPTJAX_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace gptjax {

constexpr int kSpins = 2000;  // looks at whether the others are done before sleeping

template <class F>
struct Work {
  Work(int64_t pieces, int64_t threads, int64_t longest, F piece)
      : pieces(pieces), threads(threads), longest(longest), piece(std::move(piece)) {}

  const int64_t pieces, threads, longest;
  const F piece;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  void Run() {
    int64_t mine = 0;
    for (int64_t begin = next.load(std::memory_order_relaxed); begin < pieces;) {
      const int64_t share = (pieces - begin) / threads;
      const int64_t end = begin + std::clamp<int64_t>(share, 1, longest);
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      for (int64_t i = begin; i < end; ++i) piece(i);
      mine += end - begin;
      begin = next.load(std::memory_order_relaxed);
    }
    if (mine == 0 || done.fetch_add(mine, std::memory_order_acq_rel) + mine < pieces) return;
    std::lock_guard<std::mutex> lock(mutex);
    all_done.notify_all();
  }

  bool Done() const { return done.load(std::memory_order_acquire) == pieces; }
};

// Calls piece(0) to piece(pieces - 1), in any order, on the calling thread and those of the pool
// that are free in time. Each takes runs of neighbours, at most `longest` of them, since memory is
// read fastest from end to end; at the end the runs are short, so that all finish together. Who
// starts too late finds nothing left, and touches nothing but `Work`.
template <class F>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t pieces, int64_t longest, F piece) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, pieces - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
    return;
  }
  auto work = std::make_shared<Work<F>>(pieces, helpers + 1, longest, std::move(piece));
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  for (int i = 0; i < kSpins && !work->Done(); ++i) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
  if (work->Done()) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->Done(); });
}

}  // namespace gptjax

#endif  // GPTJAX_PARALLEL_H_
