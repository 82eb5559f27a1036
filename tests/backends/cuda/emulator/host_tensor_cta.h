// The context of cuda/sm80/tensor_cta.h on the host, with fragments as the PTX ISA draws them. Copies arrive at one of
// the two ends of the time that a GPU has for them: when they are issued (odd seeds), which shows in a place that is
// still read, or when they are waited for (even seeds), which shows where a wait or a barrier is missing.
#pragma once
#include <array>
#include <deque>

#include "cuda/sm80/tensor_cta.h"
#include "host_cta.h"

namespace modiff {

// What the threads of a warp pass on to each other in a collective operation.
struct Message {
  std::array<uintptr_t, 32> words;
};

// The word of a warp's fragments that holds bytes 4 * quad to + 3 of a row of a, or of a column of b; whose and which.
struct FragmentPlace {
  int lane, index;
};
inline FragmentPlace place_in_a(int row, int quad) { return {row % 8 * 4 + quad % 4, row / 8 + quad / 4 * 2}; }
inline FragmentPlace place_in_b(int column, int quad) { return {column * 4 + quad % 4, quad / 4}; }

// sums[m][n][4] of a lane for the fragments a[m][4], b[n][2] in the messages of its warp. Most of the time of a test is
// spent here: optimised, and left alone by the sanitizers.
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) inline void multiply_fragments(
    const Message* warp, int lane, int m_count, int n_count, bool nibbles, int32_t* sums) {
  const auto codes_of = [&](FragmentPlace place, int begin, int8_t* codes) {
    const auto word = static_cast<uint32_t>(warp[place.lane].words[static_cast<size_t>(begin + place.index)]);
    for (int i = 0; i < 8; ++i) {
      codes[i] = nibbles ? static_cast<int8_t>(static_cast<int8_t>(word >> (4 * i) << 4) >> 4)
                         : static_cast<int8_t>(i < 4 ? word >> (8 * i) : 0);
    }
  };
  for (int m = 0; m < m_count; ++m) {
    int8_t a[2][64], b[2][64];
    for (int i = 0; i < 2; ++i) {
      for (int quad = 0; quad < 8; ++quad) codes_of(place_in_a(lane / 4 + 8 * i, quad), m * 4, a[i] + 8 * quad);
    }
    for (int n = 0; n < n_count; ++n, sums += 4) {
      for (int i = 0; i < 2; ++i) {
        const int column = 2 * (lane % 4) + i;
        for (int quad = 0; quad < 8; ++quad) codes_of(place_in_b(column, quad), m_count * 4 + n * 2, b[i] + 8 * quad);
      }
      for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 64; ++k) sums[i] += a[i / 2][k] * b[i % 2][k];
      }
    }
  }
}

class HostTensorCta : public HostCta {
 public:
  HostTensorCta(WaitingFibers& fibers, int threads, int64_t block, uint32_t seed)
      : HostCta(fibers, threads, block, seed), early_(seed % 2 != 0), threads_(static_cast<size_t>(threads)) {}

  template <int kBytes>
  void copy_async(void* to, const void* from, bool there) {
    const Copy copy{to, from, kBytes, there};
    if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
      std::fprintf(stderr, "cp.async of %d bytes at an address that is no multiple of them\n", kBytes);
      std::abort();
    }
    if (early_) return carry_out(copy);
    own().open.push_back(copy);
  }
  void commit() {
    own().groups.push_back(std::move(own().open));
    own().open.clear();
  }
  template <int kLeft>
  void wait() {
    for (auto& groups = own().groups; groups.size() > kLeft; groups.pop_front()) {
      for (const Copy& copy : groups.front()) carry_out(copy);
    }
  }

  void load_matrices(const void* row, uint32_t (&r)[4]) {
    const auto& warp = exchange({reinterpret_cast<uintptr_t>(row)});
    for (int i = 0; i < 4; ++i) {
      const auto* from = reinterpret_cast<const uint8_t*>(warp[first_lane() + 8 * i + lane() / 4].words[0]);
      std::memcpy(&r[i], from + 4 * (lane() % 4), 4);
    }
  }

  template <bool kS4, int kM, int kN>
  void multiply(int32_t (&sums)[kM][kN][4], const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][2]) {
    static_assert(kM * 4 + kN * 2 <= 32, "fragments fit into a message");
    Message message{};
    for (int m = 0; m < kM; ++m) std::copy(a[m], a[m] + 4, &message.words[static_cast<size_t>(m * 4)]);
    for (int n = 0; n < kN; ++n) std::copy(b[n], b[n] + 2, &message.words[static_cast<size_t>(kM * 4 + n * 2)]);
    multiply_fragments(exchange(message).data() + first_lane(), lane(), kM, kN, kS4, &sums[0][0][0]);
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool there;
  };
  struct Thread {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    int exchanges = 0;
  };

  static void carry_out(const Copy& copy) {
    if (copy.there) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }

  int lane() const { return thread() % kWarp; }
  size_t first_lane() const { return static_cast<size_t>(thread() / kWarp * kWarp); }
  Thread& own() { return threads_[static_cast<size_t>(thread())]; }

  // What the threads of a warp say, by two boards in turn: nobody writes on one while another thread still reads it.
  const std::vector<Message>& exchange(const Message& message) {
    auto& board = boards_[static_cast<size_t>(own().exchanges++ % 2)];
    if (board.empty()) board.resize(threads_.size());
    board[static_cast<size_t>(thread())] = message;
    sync_warp();
    return board;
  }

  bool early_;
  std::vector<Thread> threads_;
  std::array<std::vector<Message>, 2> boards_;
};

}  // namespace modiff
