// The two ends of a product: rows of x made ready to multiply, and finished columns of y written out.
#pragma once

#include "abi.h"
#include "linear_tile.h"

namespace minfer::MINFER_ISA {
namespace {

MINFER_INLINE void store_values(char* p, int64_t dtype, Floats a) {
  if (dtype == kFloat32) return store_floats(reinterpret_cast<float*>(p), a);
  uint16_t* half = reinterpret_cast<uint16_t*>(p);
  dtype == kBFloat16 ? store_brains(half, a) : store_halves(half, a);
}

// y[rows, n]: adds the bias, rounds once, and leaves out the columns that only fill the last panel.
struct Output {
  char* y;
  int64_t stride;  // bytes
  const char* bias;
  int64_t dtype;
  int64_t n;

  MINFER_INLINE void store(int64_t row, int64_t column, Floats total) const {
    const int64_t size = size_of(dtype), columns = at_most(n - column, kVector);
    if (columns <= 0) return;
    char* to = y + row * stride + column * size;
    if (columns == kVector) {
      if (bias != nullptr) total = add(total, load_values(bias + column * size, dtype));
      store_values(to, dtype, total);
      return;
    }
    alignas(64) char whole[64];
    if (bias != nullptr) {
      std::memset(whole, 0, sizeof whole);
      std::memcpy(whole, bias + column * size, columns * size);
      total = add(total, load_values(whole, dtype));
    }
    store_values(whole, dtype, total);
    std::memcpy(to, whole, columns * size);
  }
};

// One group of a row to int8: scale = largest |x| / 127. NaN and infinity turn the scale, and so the result, into themselves.
MINFER_INLINE GroupStats quantize_group(const char* x, int64_t dtype, int32_t offset, int8_t* out) {
  const Floats first = load_values(x, dtype), second = load_values(x + kVector * size_of(dtype), dtype);
  const int32_t bits = largest(max_int(abs_bits(first), abs_bits(second)));
  float most;
  std::memcpy(&most, &bits, 4);
  // Below 1e-30 the inverse could overflow; such a group is as good as zero.
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f, scale = most * (1.0f / 127.0f);
  const Ints a = quantize(first, inverse, out), b = quantize(second, inverse, out + kVector);
  const int32_t sum = sum_of(a, b);
  // Unsigned: sums of the integers that NaN turns into wrap around, harmlessly.
  const uint32_t correction = 0u - static_cast<uint32_t>(offset) * static_cast<uint32_t>(sum);
  return {scale, scale * static_cast<float>(sum), static_cast<int32_t>(correction)};
}

// The sum of a group as the float paths use it: one order, whatever the tile.
MINFER_INLINE float sum_of_group(const char* x, int64_t dtype) {
  alignas(64) float lanes[kVector];
  store_floats(lanes, add(load_values(x, dtype), load_values(x + kVector * size_of(dtype), dtype)));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// How one kind of product wants its rows.
struct RowFormat {
  int64_t dtype;         // of x
  int64_t value_dtype;   // kInt8 (quantised), kBFloat16 or kFloat32
  const uint8_t* order;  // of every eight inputs, for float values
  int32_t offset;        // of the weight codes
};

inline void prepare_row(const RowFormat& format, const char* x, int64_t k, char* values, GroupStats* stats) {
  const int64_t size = size_of(format.dtype);
  for (int64_t g = 0; g < k / kGroup; ++g) {
    const char* from = x + g * kGroup * size;
    if (format.value_dtype == kInt8) {
      stats[g] = quantize_group(from, format.dtype, format.offset, reinterpret_cast<int8_t*>(values) + g * kGroup);
      continue;
    }
    stats[g] = {1.0f, sum_of_group(from, format.dtype), 0};
    if (format.value_dtype == kBFloat16) {
      uint16_t source[kGroup], *out = reinterpret_cast<uint16_t*>(values) + g * kGroup;
      std::memcpy(source, from, sizeof source);
      for (int i = 0; i < kGroup; ++i) out[i] = source[(i & ~7) + format.order[i & 7]];
    } else {
      float source[kGroup], *out = reinterpret_cast<float*>(values) + g * kGroup;
      for (int i = 0; i < kGroup; i += kVector) store_floats(source + i, load_values(from + i * size, format.dtype));
      for (int i = 0; i < kGroup; ++i) out[i] = source[(i & ~7) + format.order[i & 7]];
    }
  }
}

}  // namespace
}  // namespace minfer::MINFER_ISA
