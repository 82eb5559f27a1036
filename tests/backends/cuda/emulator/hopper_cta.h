// A thread block of capability 9.0 on the host: the context of csrc/cuda/sm90/product_body.h. It models what the PTX
// ISA and the CUDA driver's documentation say of barriers, TMA and wgmma, on its own: nothing of it comes from the
// kernels.
//
//   barriers   arrivals and bytes are counted by phase
//   TMA        a box is poisoned when its load is issued, and filled at a random time until somebody needs it; only
//              after that its bytes are counted. Coordinates outside the tensor give zeros. Maps are checked against
//              the driver's limits, and addresses in shared memory against the swizzle's
//   wgmma      operands are read as late as allowed, when a thread waits for the group, or with odd seeds as early,
//              when it issues it; operands that ordinary stores wrote must have been published. All threads of a
//              warpgroup must issue the same operations
//              stores read their boxes as late as allowed, or with odd seeds as early
//   the kernel before ends when nobody can go on without it; until then its results are not there, and what is written
//              is lost
//   blocks     of a launch run together, and those of a cluster send each other words and boxes; a block
//              must not end before its cluster's other block has done with its memory
#pragma once
#include <cstring>
#include <map>

#include "common/cta.h"
#include "cuda/sm90/tensor_map.h"
#include "fibers.h"

// The tests are compiled without optimisation, because most of their time is the compiler's; not so these functions.
#if defined(__GNUC__) && !defined(__clang__)
#define MODIFF_HOT __attribute__((optimize("O2")))
#else
#define MODIFF_HOT
#endif

namespace modiff::cuda::sm90 {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// What the documentation of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col does not allow, for bytes, or null.
inline const char* map_problem(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) return "TMA: the base is not aligned";
  const int rank = map.im2col ? 4 : 2;
  for (int i = 0; i < rank; ++i) {
    if (map.dims[i] <= 0 || map.dims[i] > int64_t{1} << 32) return "TMA: extents";
  }
  for (int i = 0; i < rank - 1; ++i) {
    if (map.strides[i] % 16 != 0 || map.strides[i] >= int64_t{1} << 40) return "TMA: strides";
  }
  if (map.box[0] % 16 != 0 || map.box[0] > 256) return "TMA: bytes of a box";
  if (map.swizzle != 0 && map.box[0] > map.swizzle) return "TMA: a box is wider than the swizzle";
  if (map.box[1] <= 0 || map.box[1] > (map.im2col ? 1024 : 256)) return "TMA: rows of a box";
  for (int i = 0; map.im2col && i < 2; ++i) {
    if (map.lower[i] < -128 || map.lower[i] > 127 || map.upper[i] < -128 || map.upper[i] > 127) return "TMA: corners";
    if (map.element_strides[i] < 1 || map.element_strides[i] > 8) return "TMA: element strides";
  }
  return nullptr;
}

class HopperCta {
 public:
  // The fibers first_fiber, ... are the block's threads. `shared`: of `size` bytes, aligned to 1024.
  HopperCta(WaitingFibers& fibers, int first_fiber, int threads, int64_t block, int blocks, uint32_t seed,
            uint8_t* shared, size_t size)
      : fibers_(fibers),
        first_fiber_(first_fiber),
        block_(block),
        blocks_(blocks),
        shared_(shared),
        size_(size),
        unpublished_(size, 0),
        warps_(static_cast<size_t>(threads / kWarp)),
        threads_(threads),
        all_{threads},
        pair_{2 * threads},
        groups_(static_cast<size_t>(threads)),
        issued_(static_cast<size_t>(threads / kWarpgroup)),
        early_(seed % 2 != 0),
        random_(seed) {}

  // At the end of the block.
  void require_finished() const {
    require(loads_.empty() && sent_.empty(), "a load is under way at the end of the block");
    for (const auto& [address, barrier] : barriers_) require(barrier.bytes == 0, "bytes are missing at the end");
    for (const auto& groups : groups_) require(groups.empty(), "a wgmma is under way at the end of its thread");
    for (const auto& [thread, groups] : store_groups_) require(groups.empty(), "a store is under way at the end");
  }

  // Two neighbours are a cluster.
  void join(HopperCta& peer) { peer_ = &peer; }
  void leave() { ++left_; }
  void cluster_sync() { fibers_.meet(cluster()); }
  void arrive_at_peer(uint64_t* barrier) { peer().arrive(at_peer(barrier)); }
  void wait_for_peer(uint64_t* barrier, uint32_t parity) { wait(barrier, parity); }
  void send(uint8_t* to, uint64_t* barrier, const int32_t* words) {
    Sent sent{at_peer(to), at_peer(barrier), {}};
    std::memcpy(sent.words, words, sizeof(sent.words));
    peer().require_published(shared_address(to) - kBase, 16, "words are sent where stores were not published");
    std::memset(sent.to, 0x5A, sizeof(sent.words));
    peer_->sent_.push_back(sent);
  }
  // Words that came are to be published like stores, by who reads them.
  void load_received(int32_t (&words)[4], const uint8_t* p) {
    std::memcpy(words, p, sizeof(words));
    require(unpublished_[shared_address(p) - kBase] == kReceived, "words are read that were not sent");
    note_store(p);
  }

  void begin_before_the_end_of(const bool& kernel_before) { ended_before_ = &kernel_before; }
  void wait_for_kernels_before() {
    fibers_.wait([this] { return *ended_before_; });
  }
  void prefetch_map(const TensorMap& map) const { require(map_problem(map) == nullptr, "a map that is none"); }

  int thread() const { return fibers_.current() - first_fiber_; }
  int64_t block() const { return block_; }
  int blocks() const { return blocks_; }
  void sync() { fibers_.meet(all_); }
  void warp_sync() { fibers_.meet(warps_[static_cast<size_t>(thread() / kWarp)]); }
  void consumers_sync() { fibers_.meet(consumers_); }
  int uniform(int value) const { return value; }
  bool elect() const { return thread() % kWarp == 31; }  // any one

  void exchange(uint32_t (&values)[4], int mask) {
    Warp& warp = warps_[static_cast<size_t>(thread() / kWarp)];
    const int lane = thread() % kWarp;
    std::memcpy(warp.values[lane], values, sizeof(values));
    fibers_.meet(warp);
    std::memcpy(values, warp.values[lane ^ mask], sizeof(values));
    fibers_.meet(warp);
  }

  // Shared memory begins at an address that is not 0.
  uint32_t shared_address(const void* p) const {
    const auto offset = static_cast<const uint8_t*>(p) - shared_;
    require(offset >= 0 && static_cast<size_t>(offset) < size_, "an address outside of shared memory");
    return static_cast<uint32_t>(offset) + kBase;
  }

  void barrier_init(uint64_t* barrier, int arrivals) { barriers_[barrier] = {arrivals, arrivals, 0, 0}; }
  void barriers_ready() {}
  void arrive(uint64_t* barrier) {
    Barrier& b = at(barrier);
    require(b.pending > 0, "more arrivals than the barrier was made for");
    --b.pending;
    complete(b);
  }
  void arrive_expecting(uint64_t* barrier, int bytes) {
    at(barrier).bytes += bytes;
    arrive(barrier);
  }
  void wait(uint64_t* barrier, uint32_t parity) {
    const Barrier& b = at(barrier);
    fibers_.wait([&b, parity] { return b.phase % 2 != parity; });
  }

  void load_matrix(const TensorMap& map, uint8_t* to, uint64_t* barrier, int x, int y, bool both = false) {
    require(!map.im2col, "a tiled load with a map for im2col");
    Load load = issue(map, to, barrier);
    load.x = x;
    load.y = y;
    loads_.push_back(load);
    if (both) peer().load_matrix(map, at_peer(to), at_peer(barrier), x, y);
  }
  void load_pixels(const TensorMap& map, uint8_t* to, uint64_t* barrier, int channel, const Corner& corner,
                   int offset_w, int offset_h, bool both) {
    require(map.im2col, "a load of pixels with a map for tiles");
    require(offset_w >= 0 && offset_w < 256 && offset_h >= 0 && offset_h < 256, "TMA: offsets");
    Load load = issue(map, to, barrier);
    load.x = channel;
    load.corner = corner;
    load.offset_w = offset_w;
    load.offset_h = offset_h;
    loads_.push_back(load);
    if (both) peer().load_pixels(map, at_peer(to), at_peer(barrier), channel, corner, offset_w, offset_h, false);
  }

  void shared_store(uint8_t* p, const uint32_t* words) {
    std::memcpy(p, words, 16);
    note_store(p);
  }

  // Stores by TMA are as late as allowed, when their thread waits for the group, or as early.
  void store_matrix(const TensorMap& map, const uint8_t* from, int x, int y) {
    if (const char* problem = map_problem(map)) fail(problem);
    const uint32_t address = shared_address(from);
    require(!map.im2col && address % static_cast<uint32_t>(8 * most(16, map.swizzle)) == 0, "TMA: source");
    require_published(address - kBase, map.box[0] * map.box[1], "TMA reads what was not published");
    stores_[thread()].push_back({&map, address, x, y});
    if (early_) write(stores_[thread()].back());
  }
  void store_commit() { store_groups_[thread()].push_back(std::move(stores_[thread()])); }
  template <size_t pending>
  void store_wait() {
    fibers_.wait(nullptr);
    auto& groups = store_groups_[thread()];
    for (; groups.size() > pending; groups.erase(groups.begin())) {
      for (const Store& store : groups.front())
        if (!early_) write(store);
    }
  }

  // Lane i has of matrix m the pair i % 4 of the row that lane 8 * m + i / 4 names.
  void load_matrices(uint32_t (&words)[4], const uint8_t* row) {
    uint32_t* const rows = exchange_rows(row);
    for (int m = 0; m < 4; ++m) std::memcpy(&words[m], pair_of(rows, m), 4);
    warp_sync();
  }
  void store_matrices(uint8_t* row, const uint32_t (&words)[4]) {
    uint32_t* const rows = exchange_rows(row);
    for (int m = 0; m < 4; ++m) std::memcpy(pair_of(rows, m), &words[m], 4);
    note_store(row);
    warp_sync();
  }
  void publish_stores() {
    for (const uint32_t offset : stored_[thread()]) {
      for (uint32_t i = 0; i < 16; ++i) {
        uint16_t& owner = unpublished_[offset + i];
        if (owner == thread() + 1) owner = 0;
      }
    }
    stored_[thread()].clear();
  }

  void mma_begin() {}
  template <int columns>
  void mma(int32_t (&sums)[columns / 2], uint64_t codes, uint64_t weight, bool accumulate) {
    auto& issued = issued_[static_cast<size_t>(thread() / kWarpgroup)];
    const size_t mine = static_cast<size_t>(counts_[thread()]++);
    if (mine == issued.size()) issued.push_back({codes, weight, accumulate});
    const Issued& first = issued[mine];
    require(first.codes == codes && first.weight == weight && first.accumulate == accumulate,
            "threads of a warpgroup issue different wgmma");
    const Mma mma{codes, weight, accumulate, sums, columns};
    if (early_) return multiply(mma);
    open_[thread()].push_back(mma);
  }
  void mma_commit() {
    groups_[static_cast<size_t>(thread())].push_back(open_[thread()]);
    open_[thread()].clear();
  }
  template <int pending, int blocks, int count>
  void mma_wait(int32_t (&)[blocks][count]) {
    fibers_.wait(nullptr);  // others go on while the group is under way
    auto& groups = groups_[static_cast<size_t>(thread())];
    while (groups.size() > pending) {
      for (const Mma& mma : groups.front()) multiply(mma);
      groups.erase(groups.begin());
    }
    warp_sync();  // wgmma.wait_group is one instruction of the whole warp
  }

  void add(int32_t* p, int32_t value) { *p += value; }
  void add_is_visible() {}
  uint32_t count_arrival(uint32_t* p) { return (*p)++; }
  int32_t load_sum(const int32_t* p) { return *p; }

  // Fills some boxes that are under way, or all; false if none is.
  bool deliver(bool all) {
    if (loads_.empty() && sent_.empty()) return false;
    std::vector<Sent> later_sent;
    for (const Sent& sent : sent_) {
      if (!all && random_() % 2 == 0) {
        later_sent.push_back(sent);
        continue;
      }
      require(left_ < threads_, "words are sent to a block that has ended");
      std::memcpy(sent.to, sent.words, sizeof(sent.words));
      std::fill_n(unpublished_.begin() + shared_address(sent.to) - kBase, sizeof(sent.words), kReceived);
      Barrier& b = at(sent.barrier);
      b.bytes -= static_cast<int>(sizeof(sent.words));
      complete(b);
    }
    sent_.swap(later_sent);
    std::vector<Load> later;
    for (const Load& load : loads_) {
      if (!all && random_() % 2 == 0) {
        later.push_back(load);
        continue;
      }
      fill(load);
      Barrier& b = at(load.barrier);
      b.bytes -= load.map->box[0] * load.map->box[1];
      complete(b);
    }
    loads_.swap(later);
    return true;
  }

  template <int registers>
  void limit_registers() {}
  template <int registers>
  void claim_registers() {}

 private:
  static constexpr uint32_t kBase = 7 << 10;
  static constexpr uint16_t kReceived = 0xFFFF;  // in the place of a thread
  struct Barrier {
    int arrivals, pending, bytes;
    uint32_t phase;
  };
  struct Warp : Meeting {
    Warp() : Meeting{kWarp} {}
    uint32_t values[kWarp][4], rows[kWarp];
  };
  struct Load {
    const TensorMap* map;
    uint8_t* to;
    uint64_t* barrier;
    int x, y;
    Corner corner;
    int offset_w, offset_h;
  };
  struct Store {
    const TensorMap* map;
    uint32_t address;
    int x, y;
  };
  struct Sent {
    uint8_t* to;
    uint64_t* barrier;
    int32_t words[4];
  };
  struct Mma {
    uint64_t codes, weight;
    bool accumulate;
    int32_t* sums;
    int columns;
  };
  struct Issued {
    uint64_t codes, weight;
    bool accumulate;
  };

  Meeting& cluster() { return peer_ == nullptr ? all_ : block_ % 2 == 0 ? pair_ : peer_->pair_; }
  HopperCta& peer() {
    require(peer_ != nullptr && cluster().generation > 0, "the cluster has no other block, or it may not have begun");
    require(peer_->left_ < threads_, "the other block has ended");
    return *peer_;
  }
  template <class T>
  T* at_peer(T* p) {
    return reinterpret_cast<T*>(peer().shared_ + (shared_address(p) - kBase));
  }

  // Bytes that TMA and wgmma do not see before they are published.
  void note_store(const uint8_t* p) {
    const uint32_t offset = shared_address(p) - kBase;
    require(offset % 16 == 0, "a store of 16 bytes is not aligned");
    std::fill_n(unpublished_.begin() + offset, 16, static_cast<uint16_t>(thread() + 1));
    stored_[thread()].push_back(offset);
  }

  // Where the 32 rows of four matrices are in shared memory, as every lane named one.
  uint32_t* exchange_rows(const uint8_t* row) {
    Warp& warp = warps_[static_cast<size_t>(thread() / kWarp)];
    warp.rows[thread() % kWarp] = shared_address(row) - kBase;
    require(warp.rows[thread() % kWarp] % 16 == 0, "a row of a matrix is not aligned");
    fibers_.meet(warp);
    return warp.rows;
  }
  uint8_t* pair_of(const uint32_t* rows, int m) {
    const int lane = thread() % kWarp;
    return shared_ + rows[8 * m + lane / 4] + lane % 4 * 4;
  }

  Barrier& at(uint64_t* barrier) {
    const auto found = barriers_.find(barrier);
    require(found != barriers_.end(), "a barrier is used before it is made");
    return found->second;
  }
  void complete(Barrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.arrivals;
    ++b.phase;
  }

  Load issue(const TensorMap& map, uint8_t* to, uint64_t* barrier) {
    if (const char* problem = map_problem(map)) fail(problem);
    const uint32_t address = shared_address(to);
    require(address % 128 == 0 && address % static_cast<uint32_t>(8 * most(16, map.swizzle)) == 0, "TMA: destination");
    const auto bytes = static_cast<size_t>(map.box[0]) * static_cast<size_t>(map.box[1]);
    require(address - kBase + bytes <= size_, "TMA: a box reaches past shared memory");
    require_published(address - kBase, map.box[0] * map.box[1], "TMA writes where stores were not published");
    std::memset(to, 0x5A, bytes);
    return Load{&map, to, barrier, 0, 0, {}, 0, 0};
  }

  MODIFF_HOT void fill(const Load& load) {
    const TensorMap& map = *load.map;
    const auto* base = static_cast<const uint8_t*>(map.base);
    const uint32_t to = shared_address(load.to);
    Corner pixel = load.corner;
    for (int row = 0; row < map.box[1]; ++row) {
      int64_t outer[3] = {load.y + row, 0, 0};
      if (map.im2col) {
        outer[0] = pixel.w + load.offset_w;
        outer[1] = pixel.h + load.offset_h;
        outer[2] = pixel.n;
        pixel.w += map.element_strides[0];
        if (pixel.w >= map.dims[1] + map.upper[0]) {
          pixel.w = map.lower[0];
          pixel.h += map.element_strides[1];
          if (pixel.h >= map.dims[2] + map.upper[1]) {
            pixel.h = map.lower[1];
            ++pixel.n;
          }
        }
      }
      bool inside = true;
      int64_t from = 0;
      for (int i = 0; i < (map.im2col ? 3 : 1); ++i) {
        inside = inside && outer[i] >= 0 && outer[i] < map.dims[i + 1];
        from += outer[i] * map.strides[i];
      }
      for (int i = 0; i < map.box[0]; ++i) {
        const int64_t x = int64_t{load.x} + i;
        uint8_t byte = 0;
        if (inside && x >= 0 && x < map.dims[0]) byte = base[from + x];
        const uint32_t address = to + static_cast<uint32_t>(row * map.box[0] + i);
        shared_[permuted(address, map.swizzle) - kBase] = byte;
      }
    }
  }

  void require_published(uint32_t offset, int bytes, const char* what) const {
    for (int i = 0; i < bytes; ++i) require(unpublished_[offset + static_cast<uint32_t>(i)] == 0, what);
  }

  MODIFF_HOT void write(const Store& store) const {
    const TensorMap& map = *store.map;
    auto* base = static_cast<uint8_t*>(const_cast<void*>(map.base));
    for (int i = 0; i < map.box[0] * map.box[1]; ++i) {
      const int64_t x = store.x + i % map.box[0], y = store.y + i / map.box[0];
      if (x < 0 || x >= map.dims[0] || y < 0 || y >= map.dims[1]) continue;
      base[y * map.strides[0] + x] = shared_[permuted(store.address + static_cast<uint32_t>(i), map.swizzle) - kBase];
    }
  }

  // Swizzling: the 16-byte chunk in a span is XORed with the number of the 128-byte line, of which a span of 128 bytes
  // takes three bits and one of 64 bytes two.
  MODIFF_HOT static uint32_t permuted(uint32_t address, int swizzle) {
    const uint32_t line = address / 128, chunk = address / 16;
    if (swizzle == 128) return (chunk ^ line % 8) * 16 + address % 16;
    if (swizzle == 64) return (chunk ^ line % 4) * 16 + address % 16;
    return address;
  }

  // 32 bytes of a row of an operand, K-major.
  MODIFF_HOT void read_row(uint64_t descriptor, int row, int8_t (&bytes)[32]) const {
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
    const auto group = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
    const int layout = static_cast<int>(descriptor >> 62);
    require(layout == 1 || layout == 2, "wgmma: a layout that is not modelled");
    require((descriptor >> 49 & 7) == 0, "wgmma: base offsets are not modelled");
    const int swizzle = layout == 1 ? 128 : 64;
    for (uint32_t chunk = 0; chunk < 32; chunk += 16) {
      const uint32_t address =
          start + static_cast<uint32_t>(row / 8) * group + static_cast<uint32_t>(row % 8 * swizzle);
      const uint32_t at = permuted(address + chunk, swizzle) - kBase;
      require(at + 16 <= size_, "wgmma: an operand outside of shared memory");
      const uint16_t* unpublished = unpublished_.data() + at;
      for (uint32_t i = 0; i < 16; ++i) require(unpublished[i] == 0, "wgmma reads what was not published");
      std::memcpy(bytes + chunk, shared_ + at, 16);
    }
  }

  // The part of the result that this thread holds (PTX ISA, fragment D of wgmma.m64nNk32).
  MODIFF_HOT void multiply(const Mma& mma) const {
    const int lane = thread() % 32, warp = thread() % 128 / 32;
    int8_t codes[2][32], weight[32];
    for (int half = 0; half < 2; ++half) read_row(mma.codes, warp * 16 + lane / 4 + half * 8, codes[half]);
    for (int group = 0; group < mma.columns / 8; ++group) {
      for (int i = 0; i < 2; ++i) {
        read_row(mma.weight, group * 8 + lane % 4 * 2 + i, weight);
        for (int half = 0; half < 2; ++half) {
          int32_t sum = 0;
          for (int k = 0; k < 32; ++k) sum += codes[half][k] * weight[k];
          int32_t& total = mma.sums[group * 4 + half * 2 + i];
          total = mma.accumulate ? total + sum : sum;
        }
      }
    }
  }

  WaitingFibers& fibers_;
  int first_fiber_;
  int64_t block_;
  int blocks_;
  uint8_t* shared_;
  size_t size_;
  std::vector<uint16_t> unpublished_;  // the thread, plus one, whose store was not published
  std::vector<Warp> warps_;
  int threads_, left_ = 0;  // that have ended
  Meeting all_, pair_, consumers_{2 * kWarpgroup};
  HopperCta* peer_ = nullptr;
  const bool* ended_before_ = nullptr;
  std::map<const uint64_t*, Barrier> barriers_;
  std::vector<Load> loads_;
  std::vector<Sent> sent_;
  std::map<int, std::vector<uint32_t>> stored_;
  std::map<int, int64_t> counts_;
  std::map<int, std::vector<Mma>> open_;
  std::map<int, std::vector<Store>> stores_;
  std::map<int, std::vector<std::vector<Store>>> store_groups_;
  std::vector<std::vector<std::vector<Mma>>> groups_;
  std::vector<std::vector<Issued>> issued_;
  bool early_;
  std::mt19937 random_;
};

// Runs all blocks of a launch, in clusters of two or each for itself. kernel_before: what is done at its end.
template <class Body, class Args>
void launch_on_host(const Args& args, int blocks, bool clusters, uint32_t seed,
                    const std::function<void()>& kernel_before) {
  using Shared = typename Body::Shared;
  WaitingFibers fibers(blocks * Body::kThreads);
  std::vector<std::unique_ptr<Shared>> shared;
  std::vector<std::unique_ptr<HopperCta>> ctas;
  bool ended_before = false;
  for (int block = 0; block < blocks; ++block) {
    shared.push_back(std::make_unique<Shared>());
    std::memset(static_cast<void*>(shared.back().get()), 0xA5, sizeof(Shared));
    ctas.push_back(std::make_unique<HopperCta>(fibers, block * Body::kThreads, Body::kThreads, block, blocks,
                                               seed + 2 * static_cast<uint32_t>(block),
                                               reinterpret_cast<uint8_t*>(shared.back().get()), sizeof(Shared)));
    ctas.back()->begin_before_the_end_of(ended_before);
  }
  const auto body = [&](int fiber) {
    const auto block = static_cast<size_t>(fiber / Body::kThreads);
    Body::run(*ctas[block], *shared[block], args);
    ctas[block]->leave();
  };
  for (size_t block = 0; clusters && block < ctas.size(); ++block) ctas[block]->join(*ctas[block ^ 1]);
  const auto deliver = [&](bool all) {
    bool any = false;
    for (const auto& cta : ctas) any = cta->deliver(all) || any;
    if (!all || any || ended_before) return any;
    kernel_before();
    return ended_before = true;
  };
  fibers.run(body, deliver, seed);
  for (const auto& cta : ctas) cta->require_finished();
}

}  // namespace modiff::cuda::sm90
