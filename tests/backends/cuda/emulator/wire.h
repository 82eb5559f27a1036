// The other side of tests/backends/cuda/emulation.py: calls come on standard input, answers go to standard output.
// Buffers have their exact sizes, so that the sanitizers find every access beside them.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace modiff {

inline void read_exactly(void* data, size_t size) {
  if (std::fread(data, 1, size, stdin) != size) std::abort();
}

// A buffer as the request has it: its size (-1: null), then its bytes.
struct Buffer {
  std::vector<char> bytes;
  bool there = false;

  void read() {
    int64_t size = 0;
    read_exactly(&size, sizeof(size));
    there = size >= 0;
    if (!there) return;
    bytes = std::vector<char>(static_cast<size_t>(size));
    if (size > 0) read_exactly(bytes.data(), bytes.size());
  }
  void fill(int64_t size) {
    bytes.assign(static_cast<size_t>(size), static_cast<char>(0xFF));
    there = true;
  }
  void write() const {
    if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
  void* data() { return there ? bytes.data() : nullptr; }
};

}  // namespace modiff
