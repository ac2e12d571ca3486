// y[rows, n] = x[rows, k] @ W.T + bias for W of 4-bit codes, 8-bit codes, 4-bit codes that index a table of 16
// values, or 8-bit floats.
//
// Left out: splitting K over threads. Panels of 32 columns are plenty of work for the cores this is meant for.
#include "abi.h"
#include "linear_args.h"
#include "linear_rows.h"
#include "linear_split.h"
#include "linear_tile.h"
#include "linear_weight.h"
#include "pool.h"

namespace minfer::MINFER_ISA {
namespace {

struct Product {
  const QuantizedWeight& w;
  Rows rows;
  int64_t count;  // rows
  Output out;
};

// One register tile: kRows rows x kTileVectors vectors of columns.
template <class Path, int kBits, bool kMin, int kUnit, int kRows>
void tile(const Product& p, const Source<Path, kBits, kMin, kUnit>& source, int64_t row, int64_t column, Ahead& ahead) {
  Floats totals[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVectors; ++c) totals[r][c] = zeros();
  }
  const Rows rows = {p.rows.values + row * p.rows.stride, p.rows.stride, p.rows.stats + row * p.rows.stats_stride,
                     p.rows.stats_stride};
  accumulate(source, rows, p.w.k / kUnit, ahead, totals);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVectors; ++c) p.out.store(row + r, column + c * kVector, totals[r][c]);
  }
}

template <class Path, int kBits, bool kMin, int kUnit, int kRows = kTileRows>
void tile_of(int64_t rows, const Product& p, const Source<Path, kBits, kMin, kUnit>& source, int64_t row, int64_t column,
             Ahead& ahead) {
  if (rows == kRows) {
    tile<Path, kBits, kMin, kUnit, kRows>(p, source, row, column, ahead);
  } else if constexpr (kRows > 1) {
    tile_of<Path, kBits, kMin, kUnit, kRows - 1>(rows, p, source, row, column, ahead);
  }
}

template <class Path, int kBits, bool kMin, int kUnit>
void run(const Product& p, Pool& pool) {
  const QuantizedWeight& w = p.w;
  const int64_t panels = (w.n + kPanel - 1) / kPanel, bytes = w.panel_bytes();
  const int64_t scale_dtype = w.half_scales ? kFloat16 : kFloat32;
  int64_t shift = 0;
  while (w.unit << shift < w.group) ++shift;
  const Expander<Path, kBits> expand(w);
  const RowBlocks blocks(p.count, p.rows.stride, kTileRows);
  split(pool, panels * blocks.count, [&](int64_t item, bool more) {
    const int64_t panel = item % panels, first = item / panels * blocks.rows, count = at_most(blocks.rows, p.count - first);
    const char* codes = w.panels + panel * bytes;
    const char* scales = codes + w.code_bytes();
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    const int64_t fetches = tiles * (2 / kTileVectors) * (w.k / kUnit) * (kBits * kUnit / 32);  // the loads of a group
    Ahead ahead = {codes + bytes, codes + bytes * (more ? 2 : 1), (bytes / 64 + fetches - 1) / fetches};
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
      for (int64_t c = 0; c < 2; c += kTileVectors) {
        const Source<Path, kBits, kMin, kUnit> source = {codes + c * 64, scales + c * kVector * size_of(scale_dtype),
                                                  scale_dtype, shift, expand};
        tile_of(end - begin, p, source, first + begin, panel * kPanel + c * kVector, ahead);
      }
    }
  });
}

template <class Path, int kBits>
void run_codes(const Product& p, Pool& pool) {
  if (p.w.unit == 32) {
    p.w.has_min ? run<Path, kBits, true, 32>(p, pool) : run<Path, kBits, false, 32>(p, pool);
  } else {
    p.w.has_min ? run<Path, kBits, true, 16>(p, pool) : run<Path, kBits, false, 16>(p, pool);
  }
}

void run_path(const Product& p, Pool& pool) {
  const bool four = p.w.bits == 4;
  if (p.w.mantissa != 0) {  // weights.py gives these no minima and units of 32
    p.w.value_dtype == kBFloat16 ? run<SmallFloats<BrainPath>, 8, false, 32>(p, pool)
                                 : run<SmallFloats<FloatPath>, 8, false, 32>(p, pool);
  } else if (p.w.value_dtype == kInt8) {
    if (!four) {
      run_codes<Int8Path<8>, 8>(p, pool);
    } else {
      p.w.table != nullptr ? run_codes<Int8Path<8>, 4>(p, pool) : run_codes<Int8Path<4>, 4>(p, pool);
    }
  } else if (p.w.value_dtype == kBFloat16) {
    four ? run_codes<BrainPath, 4>(p, pool) : run_codes<BrainPath, 8>(p, pool);
  } else {
    four ? run_codes<FloatPath, 4>(p, pool) : run_codes<FloatPath, 8>(p, pool);
  }
}

RowFormat format_of(const QuantizedWeight& w, int64_t dtype) {
  const uint8_t* order = nullptr;
  if (w.value_dtype == kBFloat16) order = w.bits == 4 ? kBrainOrder4 : kBrainOrder8;
  if (w.value_dtype == kFloat32) order = w.bits == 4 ? kFloatOrder4 : kFloatOrder8;
  return {dtype, w.value_dtype, order, static_cast<int32_t>(w.offset), w.order};
}

Rows prepare(const LinearQuantizedArgs& args, Pool& pool) {
  const QuantizedWeight& w = *args.weight;
  const int64_t value_bytes = w.value_dtype == kInt8 ? 1 : size_of(w.value_dtype);
  // Whole cache lines, and one more: rows a power of two apart would all compete for the same places in a cache.
  const int64_t stride = round_up(w.k * value_bytes, 64) + 64, stats_stride = w.k / w.unit;
  char* values = static_cast<char*>(
      pool.shared_scratch(args.rows * (stride + stats_stride * static_cast<int64_t>(sizeof(GroupStats)))));
  GroupStats* stats = reinterpret_cast<GroupStats*>(values + args.rows * stride);
  const RowFormat format = format_of(w, args.dtype);
  const char* x = static_cast<const char*>(args.x);
  const int64_t x_stride = args.x_stride * size_of(args.dtype);
  const int64_t each = at_least(1, kSerialValues / w.k);
  pool.parallel_for((args.rows + each - 1) / each, [&](int64_t chunk, int) {
    for (int64_t r = chunk * each; r < at_most(args.rows, (chunk + 1) * each); ++r) {
      const auto prepare_one = w.unit == 32 ? prepare_row<32> : prepare_row<16>;
      prepare_one(format, x + r * x_stride, w.k, values + r * stride, stats + r * stats_stride);
    }
  });
  return {values, stride, stats, stats_stride};
}

void linear_quantized(const LinearQuantizedArgs& args, Pool& pool) {
  const QuantizedWeight& w = *args.weight;
  if (args.rows <= 0) return;
  const Output out = {static_cast<char*>(args.y), args.y_stride * size_of(args.dtype), static_cast<const char*>(args.bias),
                      args.dtype, w.n};
  run_path({w, prepare(args, pool), args.rows, out}, pool);
}

Stream panels_of(const LinearQuantizedArgs& args) {
  return {args.weight->panels, (args.weight->n + kPanel - 1) / kPanel, args.weight->panel_bytes()};
}

}  // namespace

MINFER_OPS(linear_quantized)
MINFER_STREAMING_OP(linear_quantized, LinearQuantizedArgs, panels_of), MINFER_OPS_END

}  // namespace minfer::MINFER_ISA
