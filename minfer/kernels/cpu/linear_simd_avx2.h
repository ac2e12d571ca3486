// Sixteen columns as two 256-bit halves with AVX2, FMA and F16C. linear_simd.h says what each function means.
#pragma once

#include <immintrin.h>

namespace minfer::MINFER_ISA {
namespace {

constexpr int kTileRows = 3;  // 3 rows x 1 vector of two halves: what 16 registers hold
constexpr int kTileVectors = 1;
constexpr int kBrainTileRows = kTileRows;

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };
using Brains = Bytes;

#define MINFER_INLINE inline __attribute__((always_inline))

MINFER_INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
MINFER_INLINE Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
MINFER_INLINE Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
MINFER_INLINE Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
MINFER_INLINE Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
MINFER_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
MINFER_INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

MINFER_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
MINFER_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
MINFER_INLINE void store128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

MINFER_INLINE Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MINFER_INLINE void store_floats(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MINFER_INLINE Floats load_halves(const uint16_t* p) {
  return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
MINFER_INLINE void store_halves(uint16_t* p, Floats x) {
  store128(p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  store128(p + 8, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MINFER_INLINE __m256 brains_to_floats(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
MINFER_INLINE Floats load_brains(const uint16_t* p) {
  return {brains_to_floats(load128(p)), brains_to_floats(load128(p + 8))};
}
MINFER_INLINE __m128i floats_to_brains(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
MINFER_INLINE void store_brains(uint16_t* p, Floats x) {
  store128(p, floats_to_brains(x.a));
  store128(p + 8, floats_to_brains(x.b));
}

MINFER_INLINE Bytes load_bytes(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
MINFER_INLINE void store_bytes(void* p, Bytes x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
}
MINFER_INLINE __m256i low_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
MINFER_INLINE Bytes low_nibbles(Bytes x) { return {low_nibbles(x.a), low_nibbles(x.b)}; }
MINFER_INLINE Bytes high_nibbles(Bytes x) {
  return {low_nibbles(_mm256_srli_epi16(x.a, 4)), low_nibbles(_mm256_srli_epi16(x.b, 4))};
}
MINFER_INLINE Bytes byte_table(const uint8_t* entries) {
  const __m256i table = _mm256_broadcastsi128_si256(load128(entries));
  return {table, table};
}
MINFER_INLINE Bytes look_up(Bytes table, Bytes nibbles) {
  return {_mm256_shuffle_epi8(table.a, nibbles.a), _mm256_shuffle_epi8(table.b, nibbles.b)};
}

template <int kBits>
struct Dots;

// Codes up to 15: sums of eight steps stay below 15 * 127 * 2 * 8 = 30,480 and fit 16 bits.
template <>
struct Dots<4> {
  __m256i a, b;
  MINFER_INLINE void start(int32_t) { a = b = _mm256_setzero_si256(); }
  MINFER_INLINE void step(Bytes codes, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(codes.a, xs));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(codes.b, xs));
  }
  MINFER_INLINE Ints total(int32_t correction) const {
    const __m256i ones = _mm256_set1_epi16(1), start = _mm256_set1_epi32(correction);
    return {_mm256_add_epi32(_mm256_madd_epi16(a, ones), start), _mm256_add_epi32(_mm256_madd_epi16(b, ones), start)};
  }
};

// Codes up to 255: the pair sums of maddubs would saturate, so the sign moves from the code to x. |code - 128| <= 128 and
// |x| <= 127 keep a pair below 32,768. The codes' offset of 128 is gone here, so the correction for it isn't added.
template <>
struct Dots<8> {
  __m256i a, b;
  MINFER_INLINE void start(int32_t) { a = b = _mm256_setzero_si256(); }
  MINFER_INLINE static __m256i products(__m256i codes, __m256i xs) {
    const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xs, w)), _mm256_set1_epi16(1));
  }
  MINFER_INLINE void step(Bytes codes, int32_t x) {
    const __m256i xs = _mm256_set1_epi32(x);
    a = _mm256_add_epi32(a, products(codes.a, xs));
    b = _mm256_add_epi32(b, products(codes.b, xs));
  }
  MINFER_INLINE Ints total(int32_t) const { return {a, b}; }
};

// A look-up in sixteen floats is two permutations of eight and a choice by bit 3.
struct FloatTable {
  __m256 low, high;
  explicit MINFER_INLINE FloatTable(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}
  MINFER_INLINE __m256 operator()(__m256i index) const {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), bit3);
  }
};
// The two bytes of a bfloat16 are looked up apart.
struct BrainTable {
  __m256i low, high;
  explicit MINFER_INLINE BrainTable(const float* values) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      bytes[0][i] = reinterpret_cast<const uint8_t*>(values + i)[2];
      bytes[1][i] = reinterpret_cast<const uint8_t*>(values + i)[3];
    }
    low = _mm256_broadcastsi128_si256(load128(bytes[0]));
    high = _mm256_broadcastsi128_si256(load128(bytes[1]));
  }
  // index: one nibble in the low bits of every 16-bit word, zero above it.
  MINFER_INLINE __m256i operator()(__m256i index) const {
    const __m256i low_bytes = _mm256_and_si256(_mm256_shuffle_epi8(low, index), _mm256_set1_epi16(0xff));
    return _mm256_or_si256(low_bytes, _mm256_slli_epi16(_mm256_shuffle_epi8(high, index), 8));
  }
};

MINFER_INLINE void expand_nibbles(Bytes raw, const FloatTable& table, Floats (&out)[8]) {
  for (int i = 0; i < 8; ++i) out[i] = {table(_mm256_srli_epi32(raw.a, 4 * i)), table(_mm256_srli_epi32(raw.b, 4 * i))};
}
MINFER_INLINE void expand_nibbles(Bytes raw, const BrainTable& table, Brains (&out)[4]) {
  const __m256i mask = _mm256_set1_epi16(15);
  for (int i = 0; i < 4; ++i) {
    out[i] = {table(_mm256_and_si256(_mm256_srli_epi16(raw.a, 4 * i), mask)),
              table(_mm256_and_si256(_mm256_srli_epi16(raw.b, 4 * i), mask))};
  }
}
MINFER_INLINE void expand_bytes(Bytes raw, Floats (&out)[4]) {
  const __m256i flip = _mm256_set1_epi8(-128);
  for (int i = 0; i < 4; ++i) {
    const __m256i a = _mm256_slli_epi32(_mm256_xor_si256(raw.a, flip), 24 - 8 * i);
    const __m256i b = _mm256_slli_epi32(_mm256_xor_si256(raw.b, flip), 24 - 8 * i);
    out[i] = to_floats(Ints{_mm256_srai_epi32(a, 24), _mm256_srai_epi32(b, 24)});
  }
}
MINFER_INLINE __m256i upper_halves(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd), 0xaa);
}
MINFER_INLINE void expand_bytes(Bytes raw, Brains (&out)[2]) {
  Floats f[4];
  expand_bytes(raw, f);
  for (int i = 0; i < 2; ++i) out[i] = {upper_halves(f[i].a, f[i + 2].a), upper_halves(f[i].b, f[i + 2].b)};
}
MINFER_INLINE void look_up_floats(Bytes raw, const float* levels, Floats (&out)[4]) {
  const __m256i byte = _mm256_set1_epi32(255);
  for (int i = 0; i < 4; ++i) {
    out[i] = {_mm256_i32gather_ps(levels, _mm256_and_si256(_mm256_srli_epi32(raw.a, 8 * i), byte), 4),
              _mm256_i32gather_ps(levels, _mm256_and_si256(_mm256_srli_epi32(raw.b, 8 * i), byte), 4)};
  }
}
struct SmallFloatTable {
  const float* levels;
  MINFER_INLINE SmallFloatTable(const float* values, int64_t) : levels(values) {}
};
MINFER_INLINE void expand_small_floats(Bytes raw, const SmallFloatTable& table, Brains (&out)[2]) {
  Floats f[4];
  look_up_floats(raw, table.levels, f);
  for (int i = 0; i < 2; ++i) out[i] = {upper_halves(f[i].a, f[i + 2].a), upper_halves(f[i].b, f[i + 2].b)};
}
MINFER_INLINE __m256 even_floats(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
MINFER_INLINE __m256 odd_floats(__m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
MINFER_INLINE Floats dot_brains(Floats sum, Brains w, int32_t pair) {
  const __m256i xs = _mm256_set1_epi32(pair);
  const __m256 even = even_floats(xs), odd = odd_floats(xs);
  sum.a = _mm256_fmadd_ps(odd_floats(w.a), odd, _mm256_fmadd_ps(even_floats(w.a), even, sum.a));
  sum.b = _mm256_fmadd_ps(odd_floats(w.b), odd, _mm256_fmadd_ps(even_floats(w.b), even, sum.b));
  return sum;
}

MINFER_INLINE Ints abs_bits(Floats x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
MINFER_INLINE Ints max_int(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
MINFER_INLINE int32_t largest(Ints x) {
  const __m256i both = _mm256_max_epi32(x.a, x.b);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
MINFER_INLINE int32_t sum_of(Ints x, Ints y) {
  const __m256i all = _mm256_add_epi32(_mm256_add_epi32(x.a, x.b), _mm256_add_epi32(y.a, y.b));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
MINFER_INLINE Ints quantize(Floats x, float inverse, int8_t* out) {
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(x.a, scale)), b = _mm256_cvtps_epi32(_mm256_mul_ps(x.b, scale));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  store128(out, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  return {a, b};
}

}  // namespace
}  // namespace minfer::MINFER_ISA
