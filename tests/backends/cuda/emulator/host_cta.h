// A thread block on the host: every thread is a fiber that runs until the next barrier or warp operation. Bodies of
// common/cta.h run here unchanged, under the sanitizers. Found besides what those see:
//
//   - a barrier that some threads leave out: an error;
//   - a missing barrier: a warp runs up to the next barrier of the block before the next warp begins, and warps, and
//     threads between two operations of their warp, take turns in rising or in falling order, so that results of the
//     two differ;
//   - shared memory that is read before it is written: it begins as NaN.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "common/cta.h"

namespace modiff {

class Fibers {
 public:
  explicit Fibers(int threads) : fibers_(static_cast<size_t>(threads)) {}

  // body(thread) in every fiber, to its end.
  template <class Body>
  void run(const Body& body, bool falling) {
    call_ = [](const void* context, int thread) { (*static_cast<const Body*>(context))(thread); };
    context_ = &body;
    const int threads = static_cast<int>(fibers_.size()), warps = threads / kWarp;
    for (int thread = 0; thread < threads; ++thread) prepare(thread);
    for (int finished = 0; finished < threads;) {
      finished = 0;
      for (int i = 0; i < warps; ++i) finished += run_warp(falling ? warps - 1 - i : i, falling);
      if (finished != 0 && finished != threads) {
        std::fprintf(stderr, "%d of %d threads left the kernel while the others wait at a barrier\n", finished,
                     threads);
        std::abort();
      }
    }
  }

  int current() const { return current_; }
  void pause() { stop(Stop::kBlock); }  // until all threads of the block are here
  void pause_warp() { stop(Stop::kWarp); }

 private:
  static constexpr size_t kStack = 128 << 10;
  enum class Stop { kNone, kWarp, kBlock, kEnd };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Stop at = Stop::kNone;
  };

  // The threads of a warp up to the next barrier of the block, or their end; how many of them ended.
  int run_warp(int warp, bool falling) {
    for (;;) {
      int at[4] = {};
      for (int i = 0; i < kWarp; ++i) {
        current_ = warp * kWarp + (falling ? kWarp - 1 - i : i);
        Fiber& fiber = fibers_[static_cast<size_t>(current_)];
        swapcontext(&scheduler_, &fiber.context);
        ++at[static_cast<int>(fiber.at)];
      }
      const int ended = at[static_cast<int>(Stop::kEnd)];
      if (at[static_cast<int>(Stop::kBlock)] == kWarp || ended == kWarp) return ended;
      if (at[static_cast<int>(Stop::kWarp)] != kWarp) {
        std::fprintf(stderr, "of warp %d, %d threads wait for the warp, %d for the block, and %d left the kernel\n",
                     warp, at[static_cast<int>(Stop::kWarp)], at[static_cast<int>(Stop::kBlock)], ended);
        std::abort();
      }
    }
  }

  void stop(Stop where) {
    Fiber& fiber = fibers_[static_cast<size_t>(current_)];
    fiber.at = where;
    swapcontext(&fiber.context, &scheduler_);
  }

  void prepare(int thread) {
    Fiber& fiber = fibers_[static_cast<size_t>(thread)];
    fiber.at = Stop::kNone;
    getcontext(&fiber.context);
    if (fiber.stack == nullptr) fiber.stack = std::unique_ptr<char[]>(new char[kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 3, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self), thread);
  }

  static void enter(unsigned high, unsigned low, int thread) {
    auto* self = reinterpret_cast<Fibers*>(static_cast<uintptr_t>(high) << 32 | low);
    self->call_(self->context_, thread);
    self->fibers_[static_cast<size_t>(thread)].at = Stop::kEnd;
  }

  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  int current_ = 0;
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
};

// Shuffles are a store, a barrier of the warp and a load.
class HostCta {
 public:
  HostCta(Fibers& fibers, int threads, int64_t block, [[maybe_unused]] bool falling)
      : fibers_(fibers), block_(block), lanes_(static_cast<size_t>(threads)) {}

  int thread() const { return fibers_.current(); }
  int64_t block() const { return block_; }
  void sync() { fibers_.pause(); }
  void sync_warp() { fibers_.pause_warp(); }

  uint32_t warp_max(uint32_t value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value = most(value, shuffle_xor(value, lane));
    return value;
  }
  float warp_sum(float value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2)
      value = add_rn(value, bits_to_float(shuffle_xor(float_to_bits(value), lane)));
    return value;
  }
  int32_t warp_sum(int32_t value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2)
      value += static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(value), lane));
    return value;
  }
  void atomic_max(uint32_t* address, uint32_t value) { *address = most(*address, value); }

 private:
  uint32_t shuffle_xor(uint32_t value, int lane) {
    lanes_[static_cast<size_t>(thread())] = value;
    fibers_.pause_warp();
    const uint32_t other = lanes_[static_cast<size_t>(thread() ^ lane)];
    fibers_.pause_warp();
    return other;
  }

  Fibers& fibers_;
  int64_t block_;
  std::vector<uint32_t> lanes_;
};

// Launches for quantize_launch.h and its like. `falling`: threads and blocks in falling order.
template <class Cta>
struct HostLaunch {
  bool falling = false;

  template <class Body>
  void run(int64_t blocks, const typename Body::Args& args) {
    Fibers& fibers = fibers_.try_emplace(Body::kThreads, Body::kThreads).first->second;
    for (int64_t i = 0; i < blocks; ++i) {
      Cta cta(fibers, Body::kThreads, falling ? blocks - 1 - i : i, falling);
      auto shared = std::make_unique<typename Body::Shared>();
      std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof(*shared));
      fibers.run([&](int) { Body::run(cta, *shared, args); }, falling);
    }
  }

  void clear(void* words, int64_t count) { std::memset(words, 0, static_cast<size_t>(count) * 4); }

 private:
  std::map<int, Fibers> fibers_;  // by number of threads: their stacks are kept
};

}  // namespace modiff
