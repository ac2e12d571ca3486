// The inner loop of every product by a quantised matrix, written once for codes of 4 and 8 bits and for int8, bfloat16 and
// float32 activations.
//
//   y[row, n] = sum over groups g of 32 (or 16) inputs:  scale[n, g] * dot(codes[n, g], x[row, g])  +  min[n, g] * sum(x[row, g])
//
// The dot is exact in int8 mode (integers) and has one order of additions in the others; groups are added in order, each with
// the same two fused multiply-adds. So a row's result is the same bits in every tile, at every batch size.
//
// Codes are unpacked in registers at every use, whatever the number of rows: a tile of six rows leaves the logic units idle
// enough that unpacking once into cache, as most engines do for prompts, was measured to be no faster, only more code.
//
// Packed layout (linear_pack.cpp makes it): panels of 32 columns, each one stretch of memory, codes first, then scales.
//   4 bits: [K/8][2][16 columns][4 bytes]; byte i of a column holds input i in its low and input 4 + i in its high nibble
//   8 bits: [K/4][2][16 columns][4 bytes]; signed codes plus 128, or the bit patterns of 8-bit floats
//   scales: [K/group][1 or 2: scale, min][32 columns], float16 where that is exact, otherwise float32
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"
#include "linear_simd.h"
#include "linear_weight.h"

namespace minfer::MINFER_ISA {
namespace {

constexpr int64_t kPanel = 32;   // columns
constexpr int64_t kVector = 16;  // columns of one vector

// What a group of one row of x adds to the formula beside its values.
struct GroupStats {
  float scale;         // of int8 values
  float sum;           // of x as the product sees it, for the minimum
  int32_t correction;  // -offset * sum(codes of x), for weight codes stored with an offset
};

// Rows of x as the product wants them: each value or pair or quadruple that is multiplied at one time as 4 bytes.
struct Rows {
  const char* values;
  int64_t stride;  // bytes
  const GroupStats* stats;
  int64_t stats_stride;  // groups
};

MINFER_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
MINFER_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
MINFER_INLINE int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

MINFER_INLINE int64_t size_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

MINFER_INLINE Floats load_values(const char* p, int64_t dtype) {
  if (dtype == kFloat32) return load_floats(reinterpret_cast<const float*>(p));
  const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
  return dtype == kBFloat16 ? load_brains(half) : load_halves(half);
}

MINFER_INLINE int32_t four_bytes(const char* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// How codes and x meet. kStep: inputs multiplied at one time. Vector: 16 columns of them. Sum: their dot over a group.
template <int kBits>
struct Int8Path {
  static constexpr int kStep = 4;
  using Vector = Bytes;
  using Sum = Dots<kBits>;
  MINFER_INLINE static void start(Sum& sum, const GroupStats& stats) { sum.start(stats.correction); }
  MINFER_INLINE static void step(Sum& sum, Vector w, int32_t x) { sum.step(w, x); }
  MINFER_INLINE static Floats finish(const Sum& sum, const GroupStats& stats, Floats scale, Floats total) {
    return fma(to_floats(sum.total(stats.correction)), mul(scale, broadcast(stats.scale)), total);
  }
};

struct BrainPath {
  static constexpr int kStep = 2;
  using Vector = Brains;
  using Sum = Floats;
  MINFER_INLINE static void start(Sum& sum, const GroupStats&) { sum = zeros(); }
  MINFER_INLINE static void step(Sum& sum, Vector w, int32_t x) { sum = dot_brains(sum, w, x); }
  MINFER_INLINE static Floats finish(const Sum& sum, const GroupStats&, Floats scale, Floats total) {
    return fma(sum, scale, total);
  }
};

// The same activations against 8-bit floats, whose bits are widened in registers.
template <class Base>
struct SmallFloats : Base {};

struct FloatPath {
  static constexpr int kStep = 1;
  using Vector = Floats;
  using Sum = Floats;
  MINFER_INLINE static void start(Sum& sum, const GroupStats&) { sum = zeros(); }
  MINFER_INLINE static void step(Sum& sum, Vector w, int32_t x) {
    float value;
    std::memcpy(&value, &x, 4);
    sum = fma(w, broadcast(value), sum);
  }
  MINFER_INLINE static Floats finish(const Sum& sum, const GroupStats&, Floats scale, Floats total) {
    return fma(sum, scale, total);
  }
};

// The order in which expansion brings out the inputs of a 64-byte vector; float rows are laid out in it.
constexpr uint8_t kBrainOrder4[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr uint8_t kBrainOrder8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
constexpr uint8_t kFloatOrder4[8] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr uint8_t kFloatOrder8[8] = {0, 1, 2, 3, 4, 5, 6, 7};

// Unpacks one 64-byte vector into Path's vectors, by the weight's levels (float paths) or its table (int8 path).
template <class Path, int kBits>
struct Expander;

template <>
struct Expander<Int8Path<4>, 4> {
  static constexpr int kVectors = 2;
  explicit MINFER_INLINE Expander(const QuantizedWeight&) {}
  MINFER_INLINE void operator()(Bytes raw, Bytes (&out)[2]) const {
    out[0] = low_nibbles(raw);
    out[1] = high_nibbles(raw);
  }
};
template <>
struct Expander<Int8Path<8>, 4> {
  static constexpr int kVectors = 2;
  Bytes table;
  explicit MINFER_INLINE Expander(const QuantizedWeight& w) : table(byte_table(w.table)) {}
  MINFER_INLINE void operator()(Bytes raw, Bytes (&out)[2]) const {
    out[0] = look_up(table, low_nibbles(raw));
    out[1] = look_up(table, high_nibbles(raw));
  }
};
template <>
struct Expander<Int8Path<8>, 8> {
  static constexpr int kVectors = 1;
  explicit MINFER_INLINE Expander(const QuantizedWeight&) {}
  MINFER_INLINE void operator()(Bytes raw, Bytes (&out)[1]) const { out[0] = raw; }
};
template <>
struct Expander<BrainPath, 4> {
  static constexpr int kVectors = 4;
  BrainTable table;
  explicit MINFER_INLINE Expander(const QuantizedWeight& w) : table(w.levels) {}
  MINFER_INLINE void operator()(Bytes raw, Brains (&out)[4]) const { expand_nibbles(raw, table, out); }
};
template <>
struct Expander<BrainPath, 8> {
  static constexpr int kVectors = 2;
  explicit MINFER_INLINE Expander(const QuantizedWeight&) {}
  MINFER_INLINE void operator()(Bytes raw, Brains (&out)[2]) const { expand_bytes(raw, out); }
};
template <>
struct Expander<FloatPath, 4> {
  static constexpr int kVectors = 8;
  FloatTable table;
  explicit MINFER_INLINE Expander(const QuantizedWeight& w) : table(w.levels) {}
  MINFER_INLINE void operator()(Bytes raw, Floats (&out)[8]) const { expand_nibbles(raw, table, out); }
};
template <>
struct Expander<FloatPath, 8> {
  static constexpr int kVectors = 4;
  explicit MINFER_INLINE Expander(const QuantizedWeight&) {}
  MINFER_INLINE void operator()(Bytes raw, Floats (&out)[4]) const { expand_bytes(raw, out); }
};

template <>
struct Expander<SmallFloats<BrainPath>, 8> {
  static constexpr int kVectors = 2;
  SmallFloatTable table;
  explicit MINFER_INLINE Expander(const QuantizedWeight& w) : table(w.levels, w.mantissa) {}
  MINFER_INLINE void operator()(Bytes raw, Brains (&out)[2]) const { expand_small_floats(raw, table, out); }
};
template <>
struct Expander<SmallFloats<FloatPath>, 8> {
  static constexpr int kVectors = 4;
  const float* levels;
  explicit MINFER_INLINE Expander(const QuantizedWeight& w) : levels(w.levels) {}
  MINFER_INLINE void operator()(Bytes raw, Floats (&out)[4]) const { look_up_floats(raw, levels, out); }
};

// A panel's memory, as linear_weight.h lays it out.
template <class Path, int kBits, bool kMin, int kUnit>
struct Source {
  using Expand = Expander<Path, kBits>;
  const char* codes;
  const char* scales;
  int64_t scale_dtype;  // kFloat16 or kFloat32: a branch for each group costs nothing, a template would double the code
  int64_t group_shift;  // log2 of weight group / unit
  Expand expand;

  MINFER_INLINE void load(int64_t group, int i, int c, typename Path::Vector (&out)[Expand::kVectors]) const {
    expand(load_bytes(codes + ((group * (kBits * kUnit / 32) + i) * 2 + c) * 64), out);
  }
  // kind: 0 for the scale, 1 for the minimum.
  MINFER_INLINE Floats scale(int64_t group, int c, int kind) const {
    const int64_t at = ((group >> group_shift) * (kMin ? 2 : 1) + kind) * kPanel + c * kVector;
    return load_values(scales + at * size_of(scale_dtype), scale_dtype);
  }
};

// Memory that is wanted soon, fetched a few cache lines at a time between the multiplications. Without it a thread would wait
// for the first tile of a panel and leave the memory idle in the others. Few lines at a time: a burst fills the queue of
// outstanding misses, and the loads that are due wait behind it.
struct Ahead {
  const char* next;
  const char* end;
  int64_t lines;  // per call

  MINFER_INLINE void fetch() {
    for (int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 3);
  }
};

// Adds `groups` groups of kRows rows x kVecs vectors of columns to `totals`.
template <class Path, int kBits, bool kMin, int kUnit, int kRows, int kVecs>
MINFER_INLINE void accumulate(const Source<Path, kBits, kMin, kUnit>& source, const Rows& rows, int64_t groups, Ahead& ahead,
                              Floats (&totals)[kRows][kVecs]) {
  constexpr int kExpanded = Expander<Path, kBits>::kVectors;
  constexpr int kLoads = kUnit / Path::kStep / kExpanded;
  for (int64_t group = 0; group < groups; ++group) {
    typename Path::Sum sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kVecs; ++c) Path::start(sums[r][c], rows.stats[r * rows.stats_stride + group]);
    }
    const char* x = rows.values + group * (kUnit / Path::kStep) * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i) {
      ahead.fetch();
      typename Path::Vector w[kVecs][kExpanded];
#pragma GCC unroll 2
      for (int c = 0; c < kVecs; ++c) source.load(group, i, c, w[c]);
#pragma GCC unroll 8
      for (int e = 0; e < kExpanded; ++e) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const int32_t value = four_bytes(x + r * rows.stride + (i * kExpanded + e) * 4);
#pragma GCC unroll 2
          for (int c = 0; c < kVecs; ++c) Path::step(sums[r][c], w[c][e], value);
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < kVecs; ++c) {
      const Floats scale = source.scale(group, c, 0);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const GroupStats& stats = rows.stats[r * rows.stats_stride + group];
        totals[r][c] = Path::finish(sums[r][c], stats, scale, totals[r][c]);
      }
      if (kMin) {
        const Floats min = source.scale(group, c, 1);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          totals[r][c] = fma(min, broadcast(rows.stats[r * rows.stats_stride + group].sum), totals[r][c]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace minfer::MINFER_ISA
