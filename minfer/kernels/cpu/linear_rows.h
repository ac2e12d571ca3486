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
template <int kUnit>
MINFER_INLINE GroupStats quantize_group(const char* x, int64_t dtype, int32_t offset, int8_t* out) {
  constexpr int kLast = kUnit - kVector;  // of a group of 16 the second half is the first
  const Floats first = load_values(x, dtype), second = load_values(x + kLast * size_of(dtype), dtype);
  const int32_t bits = largest(max_int(abs_bits(first), abs_bits(second)));
  float most;
  std::memcpy(&most, &bits, 4);
  // Below 1e-30 the inverse could overflow; such a group is as good as zero.
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f, scale = most * (1.0f / 127.0f);
  const Ints a = quantize(first, inverse, out), b = kLast > 0 ? quantize(second, inverse, out + kLast) : broadcast_int(0);
  const int32_t sum = sum_of(a, b);
  // Unsigned: sums of the integers that NaN turns into wrap around, harmlessly.
  const uint32_t correction = 0u - static_cast<uint32_t>(offset) * static_cast<uint32_t>(sum);
  return {scale, scale * static_cast<float>(sum), static_cast<int32_t>(correction)};
}

// The sum of a group as the float paths use it: one order, whatever the tile.
template <int kUnit>
MINFER_INLINE float sum_of_group(const char* x, int64_t dtype) {
  alignas(64) float lanes[kVector];
  Floats values = load_values(x, dtype);
  if (kUnit > kVector) values = add(values, load_values(x + kVector * size_of(dtype), dtype));
  store_floats(lanes, values);
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
  const int32_t* inputs;  // which input of x each value is, -1 for zero; null where they are in order
};

// Some inputs of a row in another order.
template <class Value>
MINFER_INLINE void pick(const char* x, const int32_t* inputs, int count, char* out) {
  for (int i = 0; i < count; ++i) {
    Value value = 0;
    if (inputs[i] >= 0) std::memcpy(&value, x + inputs[i] * static_cast<int64_t>(sizeof value), sizeof value);
    std::memcpy(out + i * sizeof value, &value, sizeof value);
  }
}

template <int kUnit>
inline void prepare_row(const RowFormat& format, const char* x, int64_t k, char* values, GroupStats* stats) {
  const int64_t size = size_of(format.dtype);
  alignas(64) char picked[kUnit * 4];
  for (int64_t g = 0; g < k / kUnit; ++g) {
    const char* from = x + g * kUnit * size;
    if (format.inputs != nullptr) {
      const int32_t* inputs = format.inputs + g * kUnit;
      size == 4 ? pick<uint32_t>(x, inputs, kUnit, picked) : pick<uint16_t>(x, inputs, kUnit, picked);
      from = picked;
    }
    if (format.value_dtype == kInt8) {
      stats[g] = quantize_group<kUnit>(from, format.dtype, format.offset, reinterpret_cast<int8_t*>(values) + g * kUnit);
      continue;
    }
    stats[g] = {1.0f, sum_of_group<kUnit>(from, format.dtype), 0};
    if (format.value_dtype == kBFloat16) {
      uint16_t source[kUnit], *out = reinterpret_cast<uint16_t*>(values) + g * kUnit;
      std::memcpy(source, from, sizeof source);
      for (int i = 0; i < kUnit; ++i) out[i] = source[(i & ~7) + format.order[i & 7]];
    } else {
      float source[kUnit], *out = reinterpret_cast<float*>(values) + g * kUnit;
      for (int i = 0; i < kUnit; i += kVector) store_floats(source + i, load_values(from + i * size, format.dtype));
      for (int i = 0; i < kUnit; ++i) out[i] = source[(i & ~7) + format.order[i & 7]];
    }
  }
}

}  // namespace
}  // namespace minfer::MINFER_ISA
