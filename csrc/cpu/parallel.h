// Threads: the kernels run on torch's own intra-op pool, reached through one function that the binding file defines.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace modiff::cpu {

int64_t num_threads();

// Calls body(begin, end, context) on disjoint ranges that cover [0, count). The body must not throw.
void parallel_for_raw(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

constexpr int64_t kMaxWorkers = 256;

// Runs task(i) for i in [0, count) on at most `most_workers` threads. Every thread begins with an equal share of
// consecutive tasks, the same in every call with this count, so that what a task leaves in the caches of its core is
// read there by the next kernel; a thread that is done takes over what others have not begun (cores are shared with
// other work, so equal shares are not equal times).
template <class Task>
void parallel_tasks(int64_t count, int64_t most_workers, const Task& task) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    const Task* task;
    int64_t workers;
    Share* shares;
  };
  const int64_t workers = std::min({count, num_threads(), most_workers, kMaxWorkers});
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  Share shares[kMaxWorkers];
  for (int64_t w = 0; w < workers; ++w) {
    shares[w].next.store(w * count / workers, std::memory_order_relaxed);
    shares[w].end = (w + 1) * count / workers;
  }
  Context context{&task, workers, shares};
  parallel_for_raw(
      workers,
      [](int64_t begin, int64_t end, void* raw) {
        auto* c = static_cast<Context*>(raw);
        for (int64_t own = begin; own < end; ++own)
          for (int64_t k = 0; k < c->workers; ++k) {
            Share& share = c->shares[(own + k) % c->workers];
            for (int64_t i = share.next.fetch_add(1); i < share.end; i = share.next.fetch_add(1)) (*c->task)(i);
          }
      },
      &context);
}

template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  parallel_tasks(count, kMaxWorkers, task);
}

// Scratch memory of the calling thread, kept between calls and grown on demand; 64-byte aligned. `index` separates the
// uses that are live at the same time.
void* thread_scratch(int index, int64_t bytes);

}  // namespace modiff::cpu
