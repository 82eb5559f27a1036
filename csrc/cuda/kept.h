// What the host keeps of calls that come again and again: results which are cheap to keep and dear to make.
#pragma once
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace modiff::cuda {

// make(), or what it gave for the same key before: of every place of a table the last one is kept, by each thread for
// itself. Each caller (its lambda) has its own table. The reference holds until the caller's next call. No key is all
// zeros.
template <class Value, size_t count, class Make>
const Value& kept(const std::array<int64_t, count>& key, const Make& make) {
  uint64_t hash = 0;
  for (const int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 0x9E3779B97F4A7C15u;
  thread_local std::vector<std::pair<std::array<int64_t, count>, Value>> table(1024);
  auto& [of, value] = table[hash >> 54];
  if (of != key) {
    value = make();
    of = key;
  }
  return value;
}

}  // namespace modiff::cuda
