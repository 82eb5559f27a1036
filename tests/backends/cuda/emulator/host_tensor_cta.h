// The context of cuda/sm80/tensor_cta.h on the host, with fragments as the PTX ISA draws them. Copies arrive at one of
// the two ends of the time that a GPU has for them: when they are issued (threads in falling order), which shows in a
// place that is still read, or when they are waited for (rising), which shows where a wait or a barrier is missing.
#pragma once
#include <array>
#include <deque>

#include "cuda/sm80/tensor_cta.h"
#include "host_cta.h"

namespace modiff {

// The word of a warp's fragments that holds bytes 4 * quad to + 3 of a row of a, or of a column of b; whose and which.
struct FragmentPlace {
  int lane, index;
};
inline FragmentPlace place_in_a(int row, int quad) { return {row % 8 * 4 + quad % 4, row / 8 + quad / 4 * 2}; }
inline FragmentPlace place_in_b(int column, int quad) { return {column * 4 + quad % 4, quad / 4}; }

// a * b over four bytes of int8, or eight nibbles.
inline int32_t multiply_words(uint32_t a, uint32_t b, bool nibbles) {
  const int bits = nibbles ? 4 : 8;
  int32_t sum = 0;
  for (int shift = 0; shift < 32; shift += bits) {
    const auto code = [&](uint32_t word) { return static_cast<int32_t>(word << (32 - bits - shift)) >> (32 - bits); };
    sum += code(a) * code(b);
  }
  return sum;
}

class HostTensorCta : public HostCta {
 public:
  HostTensorCta(Fibers& fibers, int threads, int64_t block, bool falling)
      : HostCta(fibers, threads, block, falling), early_(falling), threads_(static_cast<size_t>(threads)) {}

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
  void sync_warp() { sync(); }

  void load_matrices(const void* row, uint32_t (&r)[4]) {
    const auto& warp = exchange({reinterpret_cast<uintptr_t>(row)});
    for (int i = 0; i < 4; ++i) {
      const auto* from = reinterpret_cast<const uint8_t*>(warp[first_lane() + 8 * i + lane() / 4].words[0]);
      std::memcpy(&r[i], from + 4 * (lane() % 4), 4);
    }
  }

  template <bool kS4, int kM, int kN>
  void multiply(int32_t (&sums)[kM][kN][4], const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][2]) {
    static_assert(kM * 4 + kN * 2 <= kWords, "fragments fit into a message");
    Message message{};
    for (int m = 0; m < kM; ++m) std::copy(a[m], a[m] + 4, &message.words[static_cast<size_t>(m * 4)]);
    for (int n = 0; n < kN; ++n) std::copy(b[n], b[n] + 2, &message.words[static_cast<size_t>(kM * 4 + n * 2)]);
    const auto& warp = exchange(message);
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
          for (int quad = 0; quad < 8; ++quad) {
            const FragmentPlace in_a = place_in_a(row, quad), in_b = place_in_b(column, quad);
            sums[m][n][i] += multiply_words(word(warp, in_a, m * 4), word(warp, in_b, kM * 4 + n * 2), kS4);
          }
        }
      }
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool there;
  };
  static constexpr int kWords = 24;
  struct Message {
    std::array<uintptr_t, kWords> words;
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

  // What all threads say, by two boards in turn: nobody writes on one while another thread still reads it.
  const std::vector<Message>& exchange(const Message& message) {
    auto& board = boards_[static_cast<size_t>(own().exchanges++ % 2)];
    if (board.empty()) board.resize(threads_.size());
    board[static_cast<size_t>(thread())] = message;
    sync();
    return board;
  }

  uint32_t word(const std::vector<Message>& warp, FragmentPlace place, int begin) const {
    const Message& message = warp[first_lane() + static_cast<size_t>(place.lane)];
    return static_cast<uint32_t>(message.words[static_cast<size_t>(begin + place.index)]);
  }

  bool early_;
  std::vector<Thread> threads_;
  std::array<std::vector<Message>, 2> boards_;
};

}  // namespace modiff
