// A quantised matrix as the kernels see it. weights.py owns one of these, and the memory it points at, for each matrix.
#pragma once

#include <cstdint>

namespace minfer::MINFER_ISA {
namespace {

// A weight is  scale * level(code) + min,  where level(code) is levels[code] for 4-bit codes and 8-bit floats, and code - offset for
// 8-bit integers.
struct QuantizedWeight {
  const char* panels;    // layout: linear_tile.h
  const float* levels;   // [16] for 4 bits, [256] for 8-bit floats
  const uint8_t* table;  // [16] levels + 128, where int8 dots must look codes up; null where level = code - offset
  const int32_t* order;  // [k]: which of x's inputs meets each column of codes, -1 for none; null where they are x's own
  int64_t n, k;          // k: columns of codes, a multiple of the unit
  int64_t inputs;        // of x: k, unless there is an order
  int64_t bits;          // 4 or 8
  int64_t mantissa;      // of 8-bit floats: 3 for e4m3, 2 for e5m2; 0 for integers and tables
  int64_t unit;          // inputs whose activations share a scale: 32, or 16 where weight groups are finer
  int64_t group;         // inputs with one scale: the unit times a power of two
  int64_t offset;        // what int8 dots have in their codes beyond the level: 0, 8 or 128
  int64_t has_min;
  int64_t half_scales;  // scales and minima are float16 rather than float32
  int64_t value_dtype;  // of x inside the product: kInt8, kBFloat16 or kFloat32

  int64_t code_bytes() const { return k * 32 * bits / 8; }
  int64_t panel_bytes() const { return code_bytes() + k / group * (has_min ? 2 : 1) * 32 * (half_scales ? 2 : 4); }
};

}  // namespace
}  // namespace minfer::MINFER_ISA
