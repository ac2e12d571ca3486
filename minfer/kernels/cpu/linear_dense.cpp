// y[rows, n] = x[rows, k] @ W.T + bias for W in x's own type: bfloat16, float16 or float32.
//
// Layout (linear_pack.cpp): panels of 32 columns, [N/32][K/step][2][16 columns][step inputs], step 2 for bfloat16, else 1.
// Sums are float32 in an order fixed by k alone, so a row's result doesn't depend on its tile. bfloat16 makes one chain of
// them; the wider types add up runs of kStretch inputs, because one long chain would lose more than half a digit of float32.
#include "abi.h"
#include "linear_args.h"
#include "linear_rows.h"
#include "linear_split.h"
#include "linear_tile.h"
#include "pool.h"

namespace minfer::MINFER_ISA {
namespace {

constexpr int kStretch = 16;  // steps between fetches ahead
// Where a panel is used once, nothing but memory matters: each load asks for what lies this many bytes on. Asking for as much
// in one go every kStretch steps fills the queue of outstanding misses and costs a seventh of the speed.
constexpr int64_t kRollingBytes = 4096;

struct BrainWeights {
  static constexpr int kStep = 2, kVectorBytes = 64, kRows = kBrainTileRows;
  static constexpr bool kInRuns = false;
  MINFER_INLINE static Floats step(Floats sum, Brains w, int32_t x) { return dot_brains(sum, w, x); }
  MINFER_INLINE static Brains load(const char* p) {
    Brains w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
};

struct WideWeights {
  static constexpr int kStep = 1, kRows = kTileRows;
  static constexpr bool kInRuns = true;
  MINFER_INLINE static Floats step(Floats sum, Floats w, int32_t x) {
    float value;
    std::memcpy(&value, &x, 4);
    return fma(w, broadcast(value), sum);
  }
};
struct HalfWeights : WideWeights {
  static constexpr int kVectorBytes = 32;
  MINFER_INLINE static Floats load(const char* p) { return load_halves(reinterpret_cast<const uint16_t*>(p)); }
};
struct FloatWeights : WideWeights {
  static constexpr int kVectorBytes = 64;
  MINFER_INLINE static Floats load(const char* p) { return load_floats(reinterpret_cast<const float*>(p)); }
};

// Rows of x as steps of 4 bytes: pairs of bfloat16, or one float.
struct Product {
  const char* weight;
  const char* x;
  int64_t x_stride;  // bytes
  int64_t rows, steps, n;
  Output out;
};

// One register tile: kRows rows x kTileVectors vectors of columns. kOnce: no other tile uses this panel.
template <class W, bool kOnce, int kRows>
void tile(const Product& p, const char* weight, int64_t row, int64_t column, Ahead& ahead) {
  Floats totals[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVectors; ++c) totals[r][c] = zeros();
  }
  const char* x = p.x + row * p.x_stride;
  for (int64_t stretch = 0; stretch < p.steps; stretch += kStretch) {
    if (!kOnce) ahead.fetch();
    Floats run[kRows][kTileVectors];
    auto& sums = W::kInRuns ? run : totals;
    if constexpr (W::kInRuns) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < kTileVectors; ++c) run[r][c] = zeros();
      }
    }
    const int64_t end = at_most(stretch + kStretch, p.steps);
#pragma GCC unroll 4
    for (int64_t s = stretch; s < end; ++s) {
      decltype(W::load(weight)) w[kTileVectors];
#pragma GCC unroll 2
      for (int c = 0; c < kTileVectors; ++c) {
        const char* from = weight + (s * 2 + c) * W::kVectorBytes;
        if (kOnce) __builtin_prefetch(from + kRollingBytes, 0, 3);
        w[c] = W::load(from);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int32_t value = four_bytes(x + r * p.x_stride + s * 4);
#pragma GCC unroll 2
        for (int c = 0; c < kTileVectors; ++c) sums[r][c] = W::step(sums[r][c], w[c], value);
      }
    }
    if constexpr (W::kInRuns) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int c = 0; c < kTileVectors; ++c) totals[r][c] = add(totals[r][c], run[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileVectors; ++c) p.out.store(row + r, column + c * kVector, totals[r][c]);
  }
}

template <class W, bool kOnce, int kRows = W::kRows>
void tile_of(int64_t rows, const Product& p, const char* weight, int64_t row, int64_t column, Ahead& ahead) {
  if (rows == kRows) {
    tile<W, kOnce, kRows>(p, weight, row, column, ahead);
  } else if constexpr (kRows > 1) {
    tile_of<W, kOnce, kRows - 1>(rows, p, weight, row, column, ahead);
  }
}

template <class W>
void run(const Product& p, Pool& pool) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, bytes = p.steps * 2 * W::kVectorBytes;
  const RowBlocks blocks(p.rows, p.steps * 4, W::kRows);
  split(pool, panels * blocks.count, [&](int64_t item, bool more) {
    const int64_t panel = item % panels, first = item / panels * blocks.rows, count = at_most(blocks.rows, p.rows - first);
    const char* weight = p.weight + panel * bytes;
    const int64_t tiles = (count + W::kRows - 1) / W::kRows;
    const int64_t fetches = tiles * (2 / kTileVectors) * ((p.steps + kStretch - 1) / kStretch);
    Ahead ahead = {weight + bytes, weight + bytes * (more ? 2 : 1), (bytes / 64 + fetches - 1) / fetches};
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
      for (int64_t c = 0; c < 2; c += kTileVectors) {
        const auto compute = tiles == 1 ? tile_of<W, true> : tile_of<W, false>;
        compute(end - begin, p, weight + c * W::kVectorBytes, first + begin, panel * kPanel + c * kVector, ahead);
      }
    }
  });
}

// x as float32, or as bfloat16 padded to whole pairs, in scratch.
void copy_rows(const LinearDenseArgs& args, Product& p, Pool& pool) {
  const bool brain = args.dtype == kBFloat16;
  const char* x = p.x;
  const int64_t x_stride = p.x_stride, stride = p.steps * 4;
  char* rows = static_cast<char*>(pool.shared_scratch(args.rows * stride + 64));
  const int64_t each = at_least(1, kSerialValues / args.k);
  pool.parallel_for((args.rows + each - 1) / each, [&](int64_t chunk, int) {
    for (int64_t r = chunk * each; r < at_most(args.rows, (chunk + 1) * each); ++r) {
      const char* from = x + r * x_stride;
      char* to = rows + r * stride;
      if (brain) {
        std::memset(to + stride - 4, 0, 4);
        std::memcpy(to, from, args.k * 2);
        continue;
      }
      int64_t i = 0;
      for (; i + kVector <= args.k; i += kVector) {
        store_floats(reinterpret_cast<float*>(to) + i, load_values(from + i * 2, args.dtype));
      }
      uint16_t tail[kVector] = {};
      alignas(64) float wide[kVector];
      std::memcpy(tail, from + i * 2, (args.k - i) * 2);
      store_floats(wide, load_halves(tail));
      std::memcpy(to + i * 4, wide, (args.k - i) * 4);
    }
  });
  p.x = rows;
  p.x_stride = stride;
}

void linear_dense(const LinearDenseArgs& args, Pool& pool) {
  if (args.rows <= 0) return;
  const int64_t size = size_of(args.dtype);
  const Output out = {static_cast<char*>(args.y), args.y_stride * size, static_cast<const char*>(args.bias), args.dtype, args.n};
  Product p = {static_cast<const char*>(args.weight), static_cast<const char*>(args.x), args.x_stride * size, args.rows,
               args.dtype == kBFloat16 ? (args.k + 1) / 2 : args.k, args.n, out};
  if (args.dtype == kFloat16 || (args.dtype == kBFloat16 && args.k % 2 != 0)) copy_rows(args, p, pool);
  if (args.dtype == kBFloat16) {
    run<BrainWeights>(p, pool);
  } else {
    args.dtype == kFloat16 ? run<HalfWeights>(p, pool) : run<FloatWeights>(p, pool);
  }
}

Stream panels_of(const LinearDenseArgs& args) {
  const int64_t step_bytes = args.dtype == kFloat32 ? 4 : args.dtype == kBFloat16 ? 4 : 2;
  const int64_t steps = args.dtype == kBFloat16 ? (args.k + 1) / 2 : args.k;
  return {static_cast<const char*>(args.weight), (args.n + kPanel - 1) / kPanel, steps * step_bytes * kPanel};
}

}  // namespace

MINFER_OPS(linear_dense)
MINFER_STREAMING_OP(linear_dense, LinearDenseArgs, panels_of), MINFER_OPS_END

}  // namespace minfer::MINFER_ISA
