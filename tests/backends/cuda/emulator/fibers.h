// Threads that wait for each other in any way: fibers with a condition to go on. By a seed, orders of turns are random
// and warps stall for a while. If nobody can go on and nothing is under way, the threads hang, which is an error.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace modiff {

// Where `members` threads wait for each other, again and again.
struct Meeting {
  int members, there = 0;
  uint64_t generation = 0;
};

class WaitingFibers {
 public:
  explicit WaitingFibers(int threads) : fibers_(static_cast<size_t>(threads)) {}

  // body(fiber) in every fiber, to its end. deliver(all): lets some (or all) of what is under way happen; false if
  // nothing is.
  void run(const std::function<void(int)>& body, const std::function<bool(bool)>& deliver, uint32_t seed) {
    body_ = &body;
    std::mt19937 random(seed);
    const int threads = static_cast<int>(fibers_.size());
    std::vector<int> stalls(fibers_.size() / 32);  // turns for which a warp has still none
    for (int thread = 0; thread < threads; ++thread) prepare(thread);
    for (int left = threads; left > 0;) {
      for (int& stall : stalls)
        stall = stall > 0 ? stall - 1 : random() % 32 == 0 ? static_cast<int>(random() % 32) : 0;
      bool moved = false, stalled = false;
      // Forwards, backwards, and across warps: primes that divide no number of threads here.
      const int strides[] = {1, 1009, 2003, 5003, 7919, threads - 1};
      const int64_t first = random() % fibers_.size(), stride = strides[random() % 6];
      for (int i = 0; i < threads; ++i) {
        current_ = static_cast<int>((first + i * stride) % threads);
        Fiber& fiber = fibers_[static_cast<size_t>(current_)];
        if (fiber.done || (fiber.ready && !fiber.ready())) continue;
        if (stalls[static_cast<size_t>(current_ / 32)] > 0) {
          stalled = true;
          continue;
        }
        fiber.ready = nullptr;
        swapcontext(&scheduler_, &fiber.context);
        moved = true;
        left -= fiber.done;
      }
      if (!deliver(false) && !moved && !stalled && left > 0 && !deliver(true)) {
        std::fprintf(stderr, "%d of %d threads hang, thread %d among them\n", left, threads, waiting());
        std::abort();
      }
    }
  }

  int current() const { return current_; }

  // Until `ready` holds; others have their turn in any case.
  void wait(std::function<bool()> ready) {
    Fiber& fiber = fibers_[static_cast<size_t>(current_)];
    fiber.ready = std::move(ready);
    swapcontext(&fiber.context, &scheduler_);
  }

  void meet(Meeting& meeting) {
    const uint64_t generation = meeting.generation;
    if (++meeting.there == meeting.members) {
      meeting.there = 0;
      ++meeting.generation;
    }
    wait([&meeting, generation] { return meeting.generation != generation; });
  }

 private:
  static constexpr size_t kStack = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;
    bool done = false;
  };

  int waiting() const {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      if (!fibers_[i].done) return static_cast<int>(i);
    }
    return -1;
  }

  void prepare(int thread) {
    Fiber& fiber = fibers_[static_cast<size_t>(thread)];
    fiber.done = false;
    fiber.ready = nullptr;
    getcontext(&fiber.context);
    if (fiber.stack == nullptr) fiber.stack = std::unique_ptr<char[]>(new char[kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&WaitingFibers::enter), 3,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), thread);
  }

  static void enter(unsigned high, unsigned low, int thread) {
    auto* self = reinterpret_cast<WaitingFibers*>(static_cast<uintptr_t>(high) << 32 | low);
    (*self->body_)(thread);
    self->fibers_[static_cast<size_t>(thread)].done = true;
  }

  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  int current_ = 0;
  const std::function<void(int)>* body_ = nullptr;
};

}  // namespace modiff
