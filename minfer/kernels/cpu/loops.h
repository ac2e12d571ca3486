// Loops of the small ops over rows and lanes, and the gate of a SwiGLU block, which two of them share.
#pragma once

#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

// Elements worth handing to another thread: one or two microseconds of work, against the same for waking and joining.
constexpr int64_t kGrain = 8192;

template <class Body>
void for_rows(Pool& pool, int64_t rows, int64_t width, const Body& body) {
  const int64_t grain = width >= kGrain ? 1 : kGrain / width;
  const int64_t chunks = (rows + grain - 1) / grain;
  pool.parallel_for(chunks, [&](int64_t chunk, int) {
    const int64_t end = (chunk + 1) * grain < rows ? (chunk + 1) * grain : rows;
    for (int64_t row = chunk * grain; row < end; ++row) body(row);
  });
}

// Calls body(i, load, store) style loops over `width` elements: full vectors, then one partial.
template <class Full, class Partial>
inline void for_lanes(int64_t width, const Full& full, const Partial& partial) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) full(i);
  if (i < width) partial(i, width - i);
}

inline Vec silu(Vec x) { return x / (broadcast(1.0f) + exp(-x)); }

// x[2 * width], gate | up -> out[width]
template <class T>
void silu_mul_row(const T* gate, T* out, int64_t width) {
  const T* up = gate + width;
  for_lanes(
      width, [&](int64_t i) { store(out + i, silu(load(gate + i)) * load(up + i)); },
      [&](int64_t i, int64_t n) { store_some(out + i, silu(load_some(gate + i, n)) * load_some(up + i, n), n); });
}

}  // namespace
}  // namespace MINFER_ISA
}  // namespace minfer
