// Sixteen columns in the compiler's own vector types: any CPU that GCC or Clang targets. linear_simd.h says what each
// function means. Conversions are written out bit by bit; they are not on the hot path, the dot products are.
#pragma once

#include <cmath>
#include <cstring>

namespace minfer::MINFER_ISA {
namespace {

constexpr int kTileRows = 2;
constexpr int kTileVectors = 1;
constexpr int kBrainTileRows = kTileRows;

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = int16_t __attribute__((vector_size(64)));
using UWords = uint16_t __attribute__((vector_size(64)));
using UInts = uint32_t __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));
using Brains = UInts;

#define MINFER_INLINE inline __attribute__((always_inline))

template <class To, class From>
MINFER_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

MINFER_INLINE Floats zeros() { return Floats{}; }
MINFER_INLINE Floats broadcast(float value) { return Floats{} + value; }
MINFER_INLINE Ints broadcast_int(int32_t value) { return Ints{} + value; }
MINFER_INLINE Floats mul(Floats a, Floats b) { return a * b; }
MINFER_INLINE Floats add(Floats a, Floats b) { return a + b; }
// Two roundings: a CPU without a fused multiply-add would emulate one at a hundred times the cost.
MINFER_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
MINFER_INLINE Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }

MINFER_INLINE Floats load_floats(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
MINFER_INLINE void store_floats(float* p, Floats a) { std::memcpy(p, &a, sizeof(a)); }

MINFER_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude < 0x0400) {  // zero or subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;  // infinity and NaN keep theirs
  return bits_as<float>(sign | ((magnitude << 13) + exponent_shift));
}
MINFER_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) return sign | static_cast<uint16_t>(std::nearbyintf(bits_as<float>(magnitude) * 0x1p24f));
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
MINFER_INLINE Floats load_halves(const uint16_t* p) {
  Floats a;
  for (int i = 0; i < 16; ++i) a[i] = half_to_float(p[i]);
  return a;
}
MINFER_INLINE void store_halves(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a[i]);
}
MINFER_INLINE Floats load_brains(const uint16_t* p) {
  UInts a;
  for (int i = 0; i < 16; ++i) a[i] = static_cast<uint32_t>(p[i]) << 16;
  return bits_as<Floats>(a);
}
MINFER_INLINE void store_brains(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = bits_as<uint32_t>(static_cast<float>(a[i]));
    p[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

MINFER_INLINE Bytes load_bytes(const void* p) {
  Bytes a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
MINFER_INLINE void store_bytes(void* p, Bytes a) { std::memcpy(p, &a, sizeof(a)); }
MINFER_INLINE Bytes low_nibbles(Bytes a) { return a & 15; }
MINFER_INLINE Bytes high_nibbles(Bytes a) { return a >> 4; }
MINFER_INLINE Bytes byte_table(const uint8_t* entries) {
  Bytes a;
  for (int i = 0; i < 64; ++i) a[i] = entries[i % 16];
  return a;
}
__attribute__((noinline)) void look_up_bytes(const uint8_t* table, const uint8_t* nibbles, uint8_t* out) {
  for (int i = 0; i < 64; ++i) out[i] = table[nibbles[i]];
}
MINFER_INLINE Bytes look_up(Bytes table, Bytes nibbles) {
  Bytes out;
  look_up_bytes(reinterpret_cast<const uint8_t*>(&table), reinterpret_cast<const uint8_t*>(&nibbles),
                reinterpret_cast<uint8_t*>(&out));
  return out;
}

template <int kBits>
struct Dots;

// Codes up to 15, in 16-bit lanes that hold inputs (0, 1) and (2, 3) of a step: 15 * 127 * 2 * 8 steps fit.
template <>
struct Dots<4> {
  Words sums;
  MINFER_INLINE void start(int32_t) { sums = Words{}; }
  MINFER_INLINE void step(Bytes codes, int32_t x) {
    const UWords w = bits_as<UWords>(codes);
    int8_t q[4];
    std::memcpy(q, &x, 4);
    const Ints even = Ints{} + (q[0] & 0xffff) + q[2] * 0x10000, odd = Ints{} + (q[1] & 0xffff) + q[3] * 0x10000;
    sums += bits_as<Words>(w & 0xff) * bits_as<Words>(even) + bits_as<Words>(w >> 8) * bits_as<Words>(odd);
  }
  MINFER_INLINE Ints total(int32_t correction) const {
    const Ints pairs = bits_as<Ints>(sums);
    return (pairs << 16 >> 16) + (pairs >> 16) + correction;
  }
};

template <>
struct Dots<8> {
  Ints sums;
  MINFER_INLINE void start(int32_t correction) { sums = Ints{} + correction; }
  MINFER_INLINE void step(Bytes codes, int32_t x) {
    const Ints w = bits_as<Ints>(codes);
    int8_t q[4];
    std::memcpy(q, &x, 4);
    sums += (w & 255) * q[0] + (w >> 8 & 255) * q[1] + (w >> 16 & 255) * q[2] + (w >> 24 & 255) * q[3];
  }
  MINFER_INLINE Ints total(int32_t) const { return sums; }
};

struct FloatTable {
  const float* entries;
  explicit MINFER_INLINE FloatTable(const float* values) : entries(values) {}
};
using BrainTable = FloatTable;

// A call: unrolled into every tile, these look-ups would be most of the library.
__attribute__((noinline)) void look_up_nibbles(const char* raw, const float* entries, float* out) {
  for (int lane = 0; lane < 16; ++lane) {
    uint32_t codes;
    std::memcpy(&codes, raw + lane * 4, 4);
    for (int i = 0; i < 8; ++i) out[i * 16 + lane] = entries[codes >> 4 * i & 15];
  }
}
MINFER_INLINE void expand_nibbles(Bytes raw, const FloatTable& table, Floats (&out)[8]) {
  look_up_nibbles(reinterpret_cast<const char*>(&raw), table.entries, reinterpret_cast<float*>(out));
}
MINFER_INLINE void expand_bytes(Bytes raw, Floats (&out)[4]) {
  const Ints codes = bits_as<Ints>(raw ^ 0x80);
  out[0] = to_floats(codes << 24 >> 24);
  out[1] = to_floats(codes << 16 >> 24);
  out[2] = to_floats(codes << 8 >> 24);
  out[3] = to_floats(codes >> 24);
}
MINFER_INLINE Brains upper_halves(Floats even, Floats odd) {
  return bits_as<UInts>(even) >> 16 | (bits_as<UInts>(odd) & 0xffff0000u);
}
MINFER_INLINE void expand_nibbles(Bytes raw, const FloatTable& table, Brains (&out)[4]) {
  Floats f[8];
  expand_nibbles(raw, table, f);
  for (int i = 0; i < 4; ++i) out[i] = upper_halves(f[i], f[i + 4]);
}
MINFER_INLINE void expand_bytes(Bytes raw, Brains (&out)[2]) {
  Floats f[4];
  expand_bytes(raw, f);
  for (int i = 0; i < 2; ++i) out[i] = upper_halves(f[i], f[i + 2]);
}
__attribute__((noinline)) void look_up_all(const float* levels, const uint8_t* raw, float* out) {
  for (int i = 0; i < 64; ++i) out[i % 4 * 16 + i / 4] = levels[raw[i]];
}
MINFER_INLINE void look_up_floats(Bytes raw, const float* levels, Floats (&out)[4]) {
  look_up_all(levels, reinterpret_cast<const uint8_t*>(&raw), reinterpret_cast<float*>(out));
}
struct SmallFloatTable {
  const float* levels;
  MINFER_INLINE SmallFloatTable(const float* values, int64_t) : levels(values) {}
};
MINFER_INLINE void expand_small_floats(Bytes raw, const SmallFloatTable& table, Brains (&out)[2]) {
  Floats f[4];
  look_up_floats(raw, table.levels, f);
  for (int i = 0; i < 2; ++i) out[i] = upper_halves(f[i], f[i + 2]);
}
MINFER_INLINE Floats dot_brains(Floats sum, Brains w, int32_t pair) {
  const Floats even = bits_as<Floats>(w << 16), odd = bits_as<Floats>(w & 0xffff0000u);
  const uint32_t xs = static_cast<uint32_t>(pair);
  return sum + even * bits_as<float>(xs << 16) + odd * bits_as<float>(xs & 0xffff0000u);
}

MINFER_INLINE Ints abs_bits(Floats x) { return bits_as<Ints>(x) & 0x7fffffff; }
MINFER_INLINE Ints max_int(Ints a, Ints b) { return a > b ? a : b; }
MINFER_INLINE int32_t largest(Ints a) {
  int32_t most = a[0];
  for (int i = 1; i < 16; ++i) most = a[i] > most ? a[i] : most;
  return most;
}
MINFER_INLINE int32_t sum_of(Ints a, Ints b) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[i] + b[i];
  return sum;
}
MINFER_INLINE Ints quantize(Floats x, float inverse, int8_t* out) {
  Ints q;
  for (int i = 0; i < 16; ++i) {
    const float scaled = x[i] * inverse;
    // NaN and infinity have no integer; the group's scale carries them to the result.
    q[i] = scaled >= -127.5f && scaled <= 127.5f ? static_cast<int32_t>(std::nearbyintf(scaled)) : -127;
    out[i] = static_cast<int8_t>(q[i]);
  }
  return q;
}

}  // namespace
}  // namespace minfer::MINFER_ISA
