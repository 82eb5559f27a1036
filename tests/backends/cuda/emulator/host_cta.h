// A thread block on the host: bodies of common/cta.h run here unchanged, under the sanitizers. Found besides what those
// see:
//
//   - a barrier that some threads leave out: they hang, an error;
//   - a missing barrier: threads and warps take turns in orders that a seed draws, so that results are wrong;
//   - shared memory that is read before it is written: it begins as NaN.
#pragma once
#include <cstring>
#include <map>

#include "common/cta.h"
#include "fibers.h"

namespace modiff {

// Shuffles are a store, a barrier of the warp and a load.
class HostCta {
 public:
  HostCta(WaitingFibers& fibers, int threads, int64_t block, [[maybe_unused]] uint32_t seed)
      : fibers_(fibers),
        block_(block),
        lanes_(static_cast<size_t>(threads)),
        warps_(static_cast<size_t>(threads / kWarp), Meeting{kWarp}),
        all_{threads} {}

  int thread() const { return fibers_.current(); }
  int64_t block() const { return block_; }
  void sync() { fibers_.meet(all_); }
  void sync_warp() { fibers_.meet(warps_[static_cast<size_t>(thread() / kWarp)]); }

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
    sync_warp();
    const uint32_t other = lanes_[static_cast<size_t>(thread() ^ lane)];
    sync_warp();
    return other;
  }

  WaitingFibers& fibers_;
  int64_t block_;
  std::vector<uint32_t> lanes_;
  std::vector<Meeting> warps_;
  Meeting all_;
};

// Launches for quantize_launch.h and its like.
template <class Cta>
struct HostLaunch {
  uint32_t seed = 0;

  template <class Body>
  void run(int64_t blocks, const typename Body::Args& args) {
    WaitingFibers& fibers = fibers_.try_emplace(Body::kThreads, Body::kThreads).first->second;
    for (int64_t i = 0; i < blocks; ++i) {
      Cta cta(fibers, Body::kThreads, seed % 2 != 0 ? blocks - 1 - i : i, seed);
      auto shared = std::make_unique<typename Body::Shared>();
      std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof(*shared));
      fibers.run([&](int) { Body::run(cta, *shared, args); }, [](bool) { return false; }, seed);
    }
  }

  void clear(void* words, int64_t count) { std::memset(words, 0, static_cast<size_t>(count) * 4); }

 private:
  std::map<int, WaitingFibers> fibers_;  // by number of threads: their stacks are kept
};

}  // namespace modiff
