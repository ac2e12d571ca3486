// What LoRA adapters add to a product, row by row: y += scale (x a^T) b, each row with matrices of its own adapter.
//
//   lora_shrink   x [rows, width]    ->  t [rows, parts x rank] float32    dots along the inputs
//   lora_expand   t                  ->  y [rows, columns] +=              rows of b, each times one number
//
// Rows come sorted by adapter and cut into tiles (`LoraRows` of batch.py), so a matrix is read once for a tile. A row is always added
// up in the same order, whoever stands beside it. The scale is applied in float32, behind both: the matrices stay as they were trained.
//
// At decode a tile is a row or a few, and the work some ten thousand multiplications a product: it is cut so that a chunk is worth
// handing to another thread. Prompts have tiles of many rows, where four rows share each load of a weight.
#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

constexpr int64_t kOutputs = 16;   // of t, in one chunk; ranks are stored in multiples of it
constexpr int64_t kColumns = 512;  // of y, in one chunk
constexpr int kRows = 4;           // that share a load of a weight

struct Tile {
  int32_t adapter, first, count;
};

// ---- lora_shrink ----

struct LoraShrinkArgs {
  const void* x;         // [rows, width], rows x_stride elements apart
  const int32_t* index;  // numbers of rows, by adapter
  const Tile* tiles;     // [lora_tiles]
  const void* a;         // [adapters, parts * rank, width]
  const int32_t* ranks;  // [adapters, parts], at most rank
  float* t;              // [rows, parts * rank]; row i is that of index[i]
  int64_t lora_tiles, width, x_stride, parts, rank, dtype;
};

// t[i][j] = x[i] . a[j] for Rows rows and four outputs.
template <int Rows, class T>
void dots(const T* const* x, const T* a, int64_t width, float* t, int64_t t_stride) {
  Vec acc[Rows][4] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Vec weight = load(a + j * width + k);
      for (int i = 0; i < Rows; ++i) acc[i][j] = fma(load(x[i] + k), weight, acc[i][j]);
    }
  }
  if (k < width) {
    for (int j = 0; j < 4; ++j) {
      const Vec weight = load_some(a + j * width + k, width - k);
      for (int i = 0; i < Rows; ++i) acc[i][j] = fma(load_some(x[i] + k, width - k), weight, acc[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) t[i * t_stride + j] = sum(acc[i][j]);
  }
}

void lora_shrink(const LoraShrinkArgs& args, Pool& pool) {
  const int64_t outputs = args.parts * args.rank, chunks = outputs / kOutputs;
  with_float_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    pool.parallel_for(args.lora_tiles * chunks, [&](int64_t chunk, int) {
      const Tile tile = args.tiles[chunk / chunks];
      const int64_t begin = chunk % chunks * kOutputs, part = begin / args.rank;
      if (tile.adapter == 0) return;
      const int64_t adapter = tile.adapter - 1;
      const int64_t left = args.ranks[adapter * args.parts + part] - begin % args.rank;
      const int64_t end = begin + (left < kOutputs ? left : kOutputs);  // what is behind the adapter's own rank, nobody reads
      const T* a = static_cast<const T*>(args.a) + adapter * outputs * args.width;
      for (int64_t i = 0; i < tile.count; i += kRows) {
        const int64_t rows = tile.count - i < kRows ? tile.count - i : kRows;
        const T* x[kRows];
        for (int64_t n = 0; n < rows; ++n) {
          x[n] = static_cast<const T*>(args.x) + args.index[tile.first + i + n] * args.x_stride;
        }
        for (int64_t j = begin; j < end; j += 4) {
          float* t = args.t + (tile.first + i) * outputs + j;
          if (rows == kRows) {
            dots<kRows>(x, a + j * args.width, args.width, t, outputs);
          } else {
            for (int64_t n = 0; n < rows; ++n) dots<1>(x + n, a + j * args.width, args.width, t + n * outputs, outputs);
          }
        }
      }
    });
  });
}

// ---- lora_expand ----

struct LoraExpandArgs {
  const float* t;         // as lora_shrink left it
  const int32_t* index;   // as there
  const Tile* tiles;      // as there
  const void* b;          // [adapters, rank, columns]
  const float* scales;    // [adapters, parts]
  const int32_t* ranks;   // [adapters, parts]
  const int32_t* bounds;  // [parts + 1]: part p has the columns bounds[p] .. bounds[p + 1]
  void* y;                // [rows, columns], rows y_stride elements apart; added to
  int64_t lora_tiles, parts, rank, columns, y_stride, dtype;
};

// y[i] += scale * t[i] . b for Rows rows and Vecs vectors of columns; with `some` the one vector has so many columns only.
template <int Rows, int Vecs, class T>
void add_columns(const float* t, int64_t t_stride, const T* b, int64_t b_stride, int64_t rank, float scale, T* const* y, int64_t some) {
  Vec acc[Rows][Vecs] = {};
  for (int64_t r = 0; r < rank; ++r) {
    for (int v = 0; v < Vecs; ++v) {
      const T* at = b + r * b_stride + v * kLanes;
      const Vec weight = some != 0 ? load_some(at, some) : load(at);
      for (int i = 0; i < Rows; ++i) acc[i][v] = fma(broadcast(t[i * t_stride + r]), weight, acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vecs; ++v) {
      T* at = y[i] + v * kLanes;
      const Vec before = some != 0 ? load_some(at, some) : load(at);
      const Vec after = fma(acc[i][v], broadcast(scale), before);
      some != 0 ? store_some(at, after, some) : store(at, after);
    }
  }
}

// The same for any number of columns.
template <int Rows, class T>
void add_row(const float* t, int64_t t_stride, const T* b, int64_t b_stride, int64_t rank, float scale, T* const* y, int64_t count) {
  constexpr int kVecs = Rows == 1 ? 4 : 2;  // enough sums at a time to hide how long one takes
  T* at[Rows];
  int64_t n = 0;
  const auto here = [&]() -> T* const* {
    for (int i = 0; i < Rows; ++i) at[i] = y[i] + n;
    return at;
  };
  for (; n + kVecs * kLanes <= count; n += kVecs * kLanes) {
    add_columns<Rows, kVecs>(t, t_stride, b + n, b_stride, rank, scale, here(), 0);
  }
  for (; n + kLanes <= count; n += kLanes) add_columns<Rows, 1>(t, t_stride, b + n, b_stride, rank, scale, here(), 0);
  if (n < count) add_columns<Rows, 1>(t, t_stride, b + n, b_stride, rank, scale, here(), count - n);
}

void lora_expand(const LoraExpandArgs& args, Pool& pool) {
  const int64_t outputs = args.parts * args.rank;
  int64_t chunks = 0;  // of a tile; each within one part
  for (int64_t part = 0; part < args.parts; ++part) chunks += (args.bounds[part + 1] - args.bounds[part] + kColumns - 1) / kColumns;
  with_float_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    pool.parallel_for(args.lora_tiles * chunks, [&](int64_t chunk, int) {
      const Tile tile = args.tiles[chunk / chunks];
      if (tile.adapter == 0) return;
      int64_t part = 0, place = chunk % chunks;
      for (;; ++part) {
        const int64_t own = (args.bounds[part + 1] - args.bounds[part] + kColumns - 1) / kColumns;
        if (place < own) break;
        place -= own;
      }
      const int64_t adapter = tile.adapter - 1, rank = args.ranks[adapter * args.parts + part];
      if (rank == 0) return;
      const int64_t begin = args.bounds[part] + place * kColumns, rest = args.bounds[part + 1] - begin;
      const int64_t count = rest < kColumns ? rest : kColumns;
      const T* b = static_cast<const T*>(args.b) + adapter * args.rank * args.columns + begin;
      const float scale = args.scales[adapter * args.parts + part];
      for (int64_t i = 0; i < tile.count; i += kRows) {
        const int64_t rows = tile.count - i < kRows ? tile.count - i : kRows;
        const float* t = args.t + (tile.first + i) * outputs + part * args.rank;
        T* y[kRows];
        for (int64_t n = 0; n < rows; ++n) y[n] = static_cast<T*>(args.y) + args.index[tile.first + i + n] * args.y_stride + begin;
        if (rows == kRows) {
          add_row<kRows>(t, outputs, b, args.columns, rank, scale, y, count);
        } else {
          for (int64_t n = 0; n < rows; ++n) add_row<1>(t + n * outputs, outputs, b, args.columns, rank, scale, y + n, count);
        }
      }
    });
  });
}

}  // namespace

MINFER_OPS(lora)
MINFER_OP(lora_shrink, LoraShrinkArgs), MINFER_OP(lora_expand, LoraExpandArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
