// What LoRA adapters add to a product, row by row: y += scale (x a^T) b, each row with matrices of its own adapter.
//
//   lora_shrink   x [rows, width]    ->  t [rows, parts x rank] float32    dots along the inputs
//   lora_expand   t                  ->  y [rows, columns] +=              rows of b, each times one number; b in panels of 64 columns,
//                                                                          so that it is read from front to back
//
// Rows come sorted by adapter and cut into tiles (`LoraRows` of batch.py), so a matrix is read once for a tile. A row is always added
// up in the same order, whoever stands beside it. The scale is applied in float32, behind both: the matrices stay as they were trained.
//
// At decode a tile is a row or a few, and the work some ten thousand multiplications a product: it is cut so that a chunk is worth
// handing to another thread. Prompts have tiles of many rows, where four rows share each load of a weight.
#include <type_traits>

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

constexpr int64_t kOutputs = 16;   // of t, in one chunk; ranks are stored in multiples of it
constexpr int64_t kPanel = 64;     // columns of b that are stored together
constexpr int64_t kPanels = 8;     // in one chunk
constexpr int64_t kRows = 4;       // that share a load of a weight

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

// As sum() of simd.h. Dots are short here, and that loop over lanes would take as long as the products.
inline float total(Vec v) {
#if defined(MINFER_ISA_avx512)
  return _mm512_reduce_add_ps(v);
#else
  return sum(v);
#endif
}

// t[i][j] = x[i] . a[j] for Rows rows and four outputs.
template <int Rows, class T>
void dots(const T* const* x, const T* a, int64_t width, float* t, int64_t t_stride) {
  Vec acc[Rows][4] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    Vec in[Rows];
    for (int i = 0; i < Rows; ++i) in[i] = load(x[i] + k);
    for (int j = 0; j < 4; ++j) {
      const Vec weight = load(a + j * width + k);
      for (int i = 0; i < Rows; ++i) acc[i][j] = fma(in[i], weight, acc[i][j]);
    }
  }
  if (k < width) {
    for (int j = 0; j < 4; ++j) {
      const Vec weight = load_some(a + j * width + k, width - k);
      for (int i = 0; i < Rows; ++i) acc[i][j] = fma(load_some(x[i] + k, width - k), weight, acc[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) t[i * t_stride + j] = total(acc[i][j]);
  }
}

// Calls body with the number of rows, 1 to kRows, as a constant.
template <class Body>
inline void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    default:
      return body(std::integral_constant<int, 4>());
  }
}

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

void lora_shrink(const LoraShrinkArgs& args, Pool& pool) {
  const int64_t outputs = args.parts * args.rank, chunks = outputs / kOutputs;
  with_float_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    pool.parallel_for(args.lora_tiles * chunks, [&](int64_t chunk, int) {
      const Tile tile = args.tiles[chunk / chunks];
      const int64_t begin = chunk % chunks * kOutputs, part = begin / args.rank;
      if (tile.adapter == 0) return;
      const int64_t adapter = tile.adapter - 1;
      // What is behind the adapter's own rank, nobody reads.
      const int64_t end = begin + at_most(args.ranks[adapter * args.parts + part] - begin % args.rank, kOutputs);
      const T* a = static_cast<const T*>(args.a) + adapter * outputs * args.width;
      for (int64_t i = 0; i < tile.count; i += kRows) {
        const T* x[kRows];
        const int64_t rows = at_most(tile.count - i, kRows);
        for (int64_t n = 0; n < rows; ++n) {
          x[n] = static_cast<const T*>(args.x) + args.index[tile.first + i + n] * args.x_stride;
        }
        with_rows(rows, [&](auto count) {
          for (int64_t j = begin; j < end; j += 4) {
            dots<count>(x, a + j * args.width, args.width, args.t + (tile.first + i) * outputs + j, outputs);
          }
        });
      }
    });
  });
}

// ---- lora_expand ----

struct LoraExpandArgs {
  const float* t;         // as lora_shrink left it
  const int32_t* index;   // as there
  const Tile* tiles;      // as there
  const void* b;          // [adapters, panels, rank, kPanel]: the columns of each part in panels, the last one filled up with zeros
  const float* scales;    // [adapters, parts]
  const int32_t* ranks;   // [adapters, parts]
  const int32_t* bounds;  // [parts + 1]: part p has the columns bounds[p] .. bounds[p + 1]
  void* y;                // [rows, bounds[parts]], rows y_stride elements apart; added to
  int64_t lora_tiles, parts, rank, y_stride, dtype;
};

// y[i] += scale * t[i] . b for Rows rows and Vecs vectors of a panel's columns, of which the last `count` may have fewer.
template <int Rows, int Vecs, class T>
void add_columns(const float* t, int64_t t_stride, const T* b, int64_t rank, float scale, T* const* y, int64_t first, int64_t count) {
  Vec acc[Rows][Vecs] = {};
  for (int64_t r = 0; r < rank; ++r) {
    Vec weight[Vecs];
    for (int v = 0; v < Vecs; ++v) weight[v] = load(b + r * kPanel + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = broadcast(t[i * t_stride + r]);
      for (int v = 0; v < Vecs; ++v) acc[i][v] = fma(factor, weight[v], acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vecs; ++v) {
      T* at = y[i] + first + v * kLanes;
      const int64_t left = count - v * kLanes;
      if (left >= kLanes) {
        store(at, fma(acc[i][v], broadcast(scale), load(at)));
      } else if (left > 0) {
        store_some(at, fma(acc[i][v], broadcast(scale), load_some(at, left)), left);
      }
    }
  }
}

void lora_expand(const LoraExpandArgs& args, Pool& pool) {
  const int64_t outputs = args.parts * args.rank;
  int64_t panels = 0, chunks = 0;  // of all parts; a chunk lies within one
  for (int64_t part = 0; part < args.parts; ++part) {
    const int64_t own = (args.bounds[part + 1] - args.bounds[part] + kPanel - 1) / kPanel;
    panels += own;
    chunks += (own + kPanels - 1) / kPanels;
  }
  constexpr int kVecs = kLanes == 16 ? 4 : 2;  // with kRows, as many sums as there are registers for
  with_float_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    pool.parallel_for(args.lora_tiles * chunks, [&](int64_t chunk, int) {
      const Tile tile = args.tiles[chunk / chunks];
      if (tile.adapter == 0) return;
      int64_t part = 0, panel = 0, place = chunk % chunks, own;
      for (;; ++part) {
        own = (args.bounds[part + 1] - args.bounds[part] + kPanel - 1) / kPanel;
        const int64_t here = (own + kPanels - 1) / kPanels;
        if (place < here) break;
        place -= here;
        panel += own;
      }
      const int64_t adapter = tile.adapter - 1, rank = args.ranks[adapter * args.parts + part];
      if (rank == 0) return;
      const float scale = args.scales[adapter * args.parts + part];
      const int64_t end = at_most(place * kPanels + kPanels, own), last = args.bounds[part + 1];
      const T* b = static_cast<const T*>(args.b) + (adapter * panels + panel) * args.rank * kPanel;
      for (int64_t i = 0; i < tile.count; i += kRows) {
        const int64_t rows = at_most(tile.count - i, kRows);
        const float* t = args.t + (tile.first + i) * outputs + part * args.rank;
        T* y[kRows];
        for (int64_t n = 0; n < rows; ++n) y[n] = static_cast<T*>(args.y) + args.index[tile.first + i + n] * args.y_stride;
        with_rows(rows, [&](auto count) {
          for (int64_t p = place * kPanels; p < end; ++p) {
            for (int64_t v = 0; v < kPanel; v += kVecs * kLanes) {
              const int64_t first = args.bounds[part] + p * kPanel + v;
              if (first >= last) break;
              add_columns<count, kVecs>(t, outputs, b + p * args.rank * kPanel + v, rank, scale, y, first, last - first);
            }
          }
        });
      }
    });
  });
}

}  // namespace

MINFER_OPS(lora)
MINFER_OP(lora_shrink, LoraShrinkArgs), MINFER_OP(lora_expand, LoraExpandArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
