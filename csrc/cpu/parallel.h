// Threads: the kernels run on torch's own intra-op pool, reached through one function that the binding file defines.
#pragma once
#include <atomic>
#include <cstdint>

namespace modiff::cpu {

int64_t num_threads();

// Calls body(begin, end, context) on disjoint ranges that cover [0, count). The body must not throw.
void parallel_for_raw(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

// Runs task(i) for i in [0, count), handing tasks to whichever thread is free (cores are shared with other work, so
// equal shares are not equal times).
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  struct Context {
    const Task* task;
    std::atomic<int64_t> next;
    int64_t count;
  } context{&task, {0}, count};
  if (count == 1) {
    task(int64_t{0});
    return;
  }
  const int64_t workers = count < num_threads() ? count : num_threads();
  parallel_for_raw(
      workers,
      [](int64_t begin, int64_t end, void* raw) {
        auto* c = static_cast<Context*>(raw);
        (void)begin;
        (void)end;
        for (int64_t i = c->next.fetch_add(1); i < c->count; i = c->next.fetch_add(1)) (*c->task)(i);
      },
      &context);
}

// Scratch memory of the calling thread, kept between calls and grown on demand; 64-byte aligned. `slot` separates the
// uses that are live at the same time.
void* thread_scratch(int slot, int64_t bytes);

}  // namespace modiff::cpu
