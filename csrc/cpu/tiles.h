// Tile registers of AMX: eight of up to 16 rows of 64 bytes. Included only by files compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace modiff::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

struct TileShape {
  int rows;  // 0: not in use
  int64_t row_bytes;
};

// The shapes of this thread's registers, released at the end: registers in use cost every change of context.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (in_use_) _tile_release();
  }

  void shape(const TileShape (&shapes)[8]) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    static_assert(sizeof(config) == 64);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(shapes[i].rows);
      config.row_bytes[i] = static_cast<uint16_t>(shapes[i].rows == 0 ? 0 : shapes[i].row_bytes);
    }
    _tile_loadconfig(&config);
    in_use_ = true;
  }

 private:
  bool in_use_ = false;
};

}  // namespace
}  // namespace modiff::cpu
