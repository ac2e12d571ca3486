// write_kv: a step's keys and values into their slots, converted to the cache's type or quantised row by row.
//
// Which code a number gets is defined in kernels/reference/kv_quant.py, and is the same here to the bit: one maximum, one
// division a number, and sums of the rotation and of errors in one order. A row depends on nothing else, so a token has the same bytes
// whatever step brought it.
#include <cfloat>
#include <cmath>

#include "abi.h"
#include "kv_codes.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

struct WriteKvArgs {
  const void* k;  // [rows, heads, dim], rows k_stride elements apart
  const void* v;
  void* k_cache;      // [blocks, heads, block_size, width]
  void* v_cache;
  uint16_t* k_scale;  // [blocks, heads, block_size] bfloat16, where the cache is quantised
  uint16_t* v_scale;
  const int64_t* slots;
  int64_t rows, heads, dim, block_size, k_stride, v_stride, dtype, cache_dtype;
};

// Tokens that are worth handing to another thread together.
constexpr int64_t kGrain = 8192;

template <class Body>
void for_slots(const WriteKvArgs& a, Pool& pool, const Body& body) {
  const int64_t width = 2 * a.heads * a.dim, grain = width >= kGrain ? 1 : kGrain / width;
  pool.parallel_for((a.rows + grain - 1) / grain, [&](int64_t chunk, int) {
    const int64_t end = (chunk + 1) * grain < a.rows ? (chunk + 1) * grain : a.rows;
    for (int64_t row = chunk * grain; row < end; ++row) {
      const int64_t block = a.slots[row] / a.block_size, offset = a.slots[row] % a.block_size;
      for (int64_t head = 0; head < a.heads; ++head) body(row, head, (block * a.heads + head) * a.block_size + offset);
    }
  });
}

template <class T, class C>
void convert(const T* from, C* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

// The magnitude that the scale must cover: NaN if any number is one.
float outermost(const float* x, int64_t dim) {
  Vec top{};
  IntVec bad{};
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Vec v = load(x + i);
    bad |= v != v;
    top = max(max(v, -v), top);
  }
  return max_lane(top) + sum(select(bad, broadcast(__builtin_nanf("")), Vec{}));
}

// To bfloat16, ties to even; subnormal numbers become zero.
uint16_t rounded_scale(float scale) {
  if (scale != scale) return 0x7fc0;
  if (std::fabs(scale) < FLT_MIN) return 0;
  const uint32_t bits = bit_cast<uint32_t>(scale);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The codes of x[dim] under a scale, and the scale as it is kept.
template <class Codes>
uint16_t encode(const float* x, int64_t dim, float wanted, uint8_t* codes) {
  const uint16_t stored = rounded_scale(wanted);
  const Vec scale = broadcast(bit_cast<float>(static_cast<uint32_t>(stored) << 16));
  for (int64_t i = 0; i < dim; i += kLanes) {
    store_bytes(codes + i, Codes::encode((stored & 0x7fffu) == 0 ? Vec{} : load(x + i) / scale));
  }
  return stored;
}

// The sum of squared errors of x[dim]: the upper half of the numbers added to the lower until one is left.
template <class Codes>
float squared_error(const float* x, int64_t dim, const uint8_t* codes, uint16_t stored) {
  alignas(64) float squares[kMaxHeadDim + kLanes];
  const Vec scale = broadcast(bit_cast<float>(static_cast<uint32_t>(stored) << 16) * Codes::kUnit);
  int64_t width = 1;
  while (width < dim) width *= 2;
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec value{};
    if (i < dim) Codes::load(codes + i, &value);
    const Vec difference = i < dim ? value * scale - load(x + i) : Vec{};
    store(squares + i, difference * difference);
  }
  while (width > 1) {
    width /= 2;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(squares + i, load(squares + i) + load(squares + width + i));
    for (; i < width; ++i) squares[i] += squares[width + i];
  }
  return squares[0];
}

// x[dim], padded with zeros to whole vectors, is used up.
template <class Codes>
uint16_t quantise(float* x, int64_t dim, uint8_t* out) {
  if (Codes::kRotated) hadamard(x, dim);
  float top = outermost(x, dim);
  if (Codes::kPlanes == 2) {  // the sign that gives the outermost number, the first among equals, the code -8
    for (int64_t i = 0; i < dim; ++i) {
      if (std::fabs(x[i]) == top) {
        top = -x[i];
        break;
      }
    }
  }
  uint8_t codes[kMaxHeadDim + kLanes];
  uint16_t stored = encode<Codes>(x, dim, top / Codes::kLimit, codes);
  if constexpr (Codes::kScales > 1) {
    float best = squared_error<Codes>(x, dim, codes, stored);
    uint8_t others[kMaxHeadDim + kLanes];
    for (int n = 1; n < Codes::kScales; ++n) {
      const float wanted = top / Codes::kLimit * (static_cast<float>(Codes::kScales + n) / Codes::kScales);
      const uint16_t other = encode<Codes>(x, dim, wanted, others);
      const float error = squared_error<Codes>(x, dim, others, other);
      if (error < best) {
        best = error;
        stored = other;
        std::memcpy(codes, others, dim);
      }
    }
  }
  if (Codes::kPlanes == 1) {
    std::memcpy(out, codes, dim);
  } else {
    for (int64_t i = 0; i < dim / 2; ++i) out[i] = static_cast<uint8_t>(codes[i] | codes[i + dim / 2] << 4);
  }
  return stored;
}

template <class T, class Codes>
void write_quantised(const WriteKvArgs& a, Pool& pool) {
  const int64_t width = a.dim / Codes::kPlanes;
  const auto write = [&](const void* rows, int64_t stride, int64_t row, int64_t head, int64_t at, void* cache, uint16_t* scales) {
    float x[kMaxHeadDim + kLanes];
    const int64_t whole = a.dim / kLanes * kLanes;
    const T* from = static_cast<const T*>(rows) + row * stride + head * a.dim;
    convert(from, x, whole);
    if (whole < a.dim) store(x + whole, load_some(from + whole, a.dim - whole));
    scales[at] = quantise<Codes>(x, a.dim, static_cast<uint8_t*>(cache) + at * width);
  };
  for_slots(a, pool, [&](int64_t row, int64_t head, int64_t at) {
    write(a.k, a.k_stride, row, head, at, a.k_cache, a.k_scale);
    write(a.v, a.v_stride, row, head, at, a.v_cache, a.v_scale);
  });
}

template <class T, class C>
void write_converted(const WriteKvArgs& a, Pool& pool) {
  for_slots(a, pool, [&](int64_t row, int64_t head, int64_t at) {
    convert(static_cast<const T*>(a.k) + row * a.k_stride + head * a.dim, static_cast<C*>(a.k_cache) + at * a.dim, a.dim);
    convert(static_cast<const T*>(a.v) + row * a.v_stride + head * a.dim, static_cast<C*>(a.v_cache) + at * a.dim, a.dim);
  });
}

void write_kv(const WriteKvArgs& a, Pool& pool) {
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_quantised(a.cache_dtype)) {
      with_codes(a.cache_dtype, [&](auto codes) { write_quantised<T, decltype(codes)>(a, pool); });
    } else {
      with_float_type(a.cache_dtype, [&](auto cache_type) { write_converted<T, decltype(cache_type)>(a, pool); });
    }
  });
}

}  // namespace

MINFER_OPS(kv_write)
MINFER_OP(write_kv, WriteKvArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
