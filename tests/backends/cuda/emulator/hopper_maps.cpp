// How csrc/cuda/sm90 cuts and walks a call, for tests/backends/cuda/test_hopper_maps.py, which calls it through ctypes.
#include "cuda/sm90/product_body.h"
#include "hopper_cta.h"

using namespace modiff;
using namespace modiff::cuda;

namespace {

ProductCall call_of(const int64_t* geometry, int bits) {
  ProductCall call{};
  ConvProblem& p = call.problem;
  set_geometry(p, geometry);
  p.codes = reinterpret_cast<const int8_t*>(uintptr_t{4096});
  p.weight = p.codes;
  call.weight_bits = bits;
  return call;
}

template <class Body>
void shape(int32_t* out) {
  const int32_t values[] = {Body::kBits,
                            Body::kRows,
                            Body::kColumns,
                            Body::kStages,
                            static_cast<int32_t>(sizeof(typename Body::Shared)),
                            Body::kThreads,
                            Body::kBlocks,
                            Body::kProducerRegisters,
                            Body::kUnpackerRegisters,
                            Body::kConsumerRegisters};
  for (const int32_t value : values) *out++ = value;
}

}  // namespace

extern "C" {

// row_tile, column_tile, first_step, end_step, tile of every unit.
void units(int row_tiles, int column_tiles, int splits, int steps, int32_t* out) {
  const sm90::Schedule schedule{row_tiles, column_tiles, splits, steps};
  for (int i = 0; i < sm90::unit_count(schedule); ++i) {
    const sm90::Unit u = sm90::unit_of(schedule, i);
    for (const int value : {u.row_tile, u.column_tile, u.first_step, u.end_step, u.tile}) *out++ = value;
  }
}

// channel, offset_h, offset_w, code of every box of the steps; returns the codes of a box.
int boxes(const int64_t* geometry, int bits, int32_t* out, int64_t* count) {
  const sm90::Window window = sm90::window_of(call_of(geometry, bits).problem, bits);
  *count = sm90::step_count(window) * (sm90::kStep / window.span);
  for (int i = 0; out != nullptr && i < *count; ++i) {
    const sm90::Box box = sm90::box_of(window, i);
    for (const int value : {box.channel, box.offset_h, box.offset_w, box.code}) *out++ = value;
  }
  return window.span;
}

// w, h, n of every output pixel.
void corners(const int64_t* geometry, int32_t* out) {
  const ConvProblem p = call_of(geometry, 8).problem;
  const sm90::Image image = sm90::image_of(p);
  for (int64_t row = 0; row < p.samples * p.out_h * p.out_w; ++row) {
    const sm90::Corner corner = sm90::corner_of(image, static_cast<int>(row));
    for (const int value : {corner.w, corner.h, corner.n}) *out++ = value;
  }
}

void swizzle(int span, uint32_t* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = sm90::swizzled(static_cast<uint32_t>(i), span);
}

// row, column of every register of the threads of a warpgroup.
void fragment(int columns, int32_t* out) {
  for (int thread = 0; thread < sm90::kWarpgroup; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      *out++ = sm90::sum_row(thread, i);
      *out++ = sm90::sum_column(thread, i);
    }
  }
}

// tile, rows and columns of it, row_tiles, column_tiles, splits, steps; bytes of scratch.
int64_t plan(const int64_t* geometry, int bits, int multiprocessors, int32_t* out) {
  const ProductCall call = call_of(geometry, bits);
  const sm90::Plan plan = sm90::plan_of(call, multiprocessors);
  const sm90::Schedule& s = plan.schedule;
  const sm90::Tile tile = sm90::kTiles[plan.tile];
  for (const int value : {plan.tile, tile.rows, tile.columns, s.row_tiles, s.column_tiles, s.splits, s.steps})
    *out++ = value;
  return sm90::scratch_of(call, plan, 0).words * 4;
}

const char* limit(const int64_t* geometry, int bits, int codes_offset, int weight_offset) {
  ProductCall call = call_of(geometry, bits);
  call.problem.codes += codes_offset;
  call.problem.weight += weight_offset;
  return sm90::limit_of(call);
}

// What TMA does not allow in the maps of a call, with any tile, or null.
const char* problem_of_maps(const int64_t* geometry, int bits) {
  const ProductCall call = call_of(geometry, bits);
  for (int tile = 0; tile < sm90::kTileCount; ++tile) {
    const auto args = sm90::product_args(call, sm90::plan_of_tile(call, tile, 1), 0);
    for (const sm90::TensorMap* map : {&args.codes, &args.weight, bits == 3 ? &args.high_plane : &args.weight}) {
      if (const char* problem = sm90::map_problem(*map)) return problem;
    }
  }
  return nullptr;
}

// bits, rows, columns, stages, bytes of shared memory, threads, blocks of 64 rows, registers of the roles.
int kernels(int32_t* out) {
  shape<sm90::Product<8, 2, 160>>(out);
  shape<sm90::Product<8, 1, 256>>(out + 10);
  shape<sm90::Product<8, 1, 128>>(out + 20);
  shape<sm90::Product<8, 1, 64>>(out + 30);
  shape<sm90::Product<4, 2, 160>>(out + 40);
  shape<sm90::Product<4, 1, 64>>(out + 50);
  shape<sm90::Product<3, 2, 160>>(out + 60);
  shape<sm90::Product<3, 1, 64>>(out + 70);
  return 8;
}
}
