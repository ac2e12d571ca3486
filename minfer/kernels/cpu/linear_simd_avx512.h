// Sixteen columns at a time with AVX-512 (F, BW, DQ, VL, VNNI, and BF16 where there is one). linear_simd.h says what each function means.
#pragma once

#include <immintrin.h>

namespace minfer::MINFER_ISA {
namespace {

constexpr int kTileRows = 6;    // 6 rows x 2 vectors: 12 sums and 12 running dots in 32 registers
constexpr int kTileVectors = 2;
// Products by bfloat16 matrices have sums only, no running dots: 16 of them, because 12 don't cover the latency of vdpbf16ps
// (420 against 473 Gop/s on one core of a Zen 5).
constexpr int kBrainTileRows = 8;

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;
using Brains = __m512i;

#define MINFER_INLINE inline __attribute__((always_inline))

MINFER_INLINE Floats zeros() { return _mm512_setzero_ps(); }
MINFER_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
MINFER_INLINE Ints broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
MINFER_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
MINFER_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
MINFER_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
MINFER_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }

MINFER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
MINFER_INLINE void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
MINFER_INLINE Floats load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MINFER_INLINE void store_halves(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
MINFER_INLINE Floats load_brains(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
MINFER_INLINE void store_brains(uint16_t* p, Floats a) {
  // By hand: vcvtneps2bf16 would flush subnormals, and so differ from the other instruction sets and from torch.
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

MINFER_INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
MINFER_INLINE void store_bytes(void* p, Bytes a) { _mm512_storeu_si512(p, a); }
MINFER_INLINE Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
MINFER_INLINE Bytes high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
MINFER_INLINE Bytes byte_table(const uint8_t* entries) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}
MINFER_INLINE Bytes look_up(Bytes table, Bytes nibbles) { return _mm512_shuffle_epi8(table, nibbles); }

template <int kBits>
struct Dots {
  Ints sums;
  MINFER_INLINE void start(int32_t correction) { sums = broadcast_int(correction); }
  MINFER_INLINE void step(Bytes codes, int32_t x) { sums = _mm512_dpbusd_epi32(sums, codes, broadcast_int(x)); }
  MINFER_INLINE Ints total(int32_t) const { return sums; }
};

// Permutations look at the low four (of dwords) or five (of words) bits of an index, so nibbles need no mask.
struct FloatTable {
  __m512 entries;
  explicit MINFER_INLINE FloatTable(const float* values) : entries(_mm512_loadu_ps(values)) {}
};
struct BrainTable {
  __m512i entries;
  explicit MINFER_INLINE BrainTable(const float* values) {
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(values));
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    entries = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
  }
};

MINFER_INLINE void expand_nibbles(Bytes raw, const FloatTable& table, Floats (&out)[8]) {
  out[0] = _mm512_permutexvar_ps(raw, table.entries);
  out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), table.entries);
  out[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 8), table.entries);
  out[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 12), table.entries);
  out[4] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 16), table.entries);
  out[5] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 20), table.entries);
  out[6] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 24), table.entries);
  out[7] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 28), table.entries);
}
MINFER_INLINE void expand_nibbles(Bytes raw, const BrainTable& table, Brains (&out)[4]) {
  // Bit 4 of an index picks the table's second copy: harmless.
  out[0] = _mm512_permutexvar_epi16(raw, table.entries);
  out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4), table.entries);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 8), table.entries);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 12), table.entries);
}
MINFER_INLINE void expand_bytes(Bytes raw, Floats (&out)[4]) {
  const __m512i codes = _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
  out[0] = to_floats(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24), 24));
  out[1] = to_floats(_mm512_srai_epi32(_mm512_slli_epi32(codes, 16), 24));
  out[2] = to_floats(_mm512_srai_epi32(_mm512_slli_epi32(codes, 8), 24));
  out[3] = to_floats(_mm512_srai_epi32(codes, 24));
}
MINFER_INLINE void expand_bytes(Bytes raw, Brains (&out)[2]) {
  Floats f[4];
  expand_bytes(raw, f);  // eight significant bits: the upper half of each float is exact
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(f[i]), 16);
    out[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_castps_si512(f[i + 2]));
  }
}
MINFER_INLINE void look_up_floats(Bytes raw, const float* levels, Floats (&out)[4]) {
  const __m512i byte = _mm512_set1_epi32(255);
  out[0] = _mm512_i32gather_ps(_mm512_and_si512(raw, byte), levels, 4);
  out[1] = _mm512_i32gather_ps(_mm512_and_si512(_mm512_srli_epi32(raw, 8), byte), levels, 4);
  out[2] = _mm512_i32gather_ps(_mm512_and_si512(_mm512_srli_epi32(raw, 16), byte), levels, 4);
  out[3] = _mm512_i32gather_ps(_mm512_srli_epi32(raw, 24), levels, 4);
}

// An 8-bit float's bits are a bfloat16's with fewer bits of exponent. Shifted to their places, with the upper exponent bits set to a
// constant that leaves room for theirs, they are the value times a power of two that `levels` has as well; the few subnormals are
// looked up.
struct SmallFloatTable {
  __m512i shift, kept, exponent, base, subnormals;
  MINFER_INLINE SmallFloatTable(const float* levels, int64_t mantissa)
      : shift(_mm512_set1_epi16(static_cast<int16_t>(mantissa + 1))),
        kept(_mm512_set1_epi16(static_cast<int16_t>(0x8000 | 0x7f << (7 - mantissa)))),
        exponent(_mm512_set1_epi16(static_cast<int16_t>(0x7f << (7 - mantissa) & 0x7f80))),
        base(_mm512_set1_epi16(static_cast<int16_t>(mantissa == 3 ? 0x3800 : 0x3000))) {
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(levels)), 16));
    subnormals = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
  }
  // code: a byte in the upper half of every word, and its low bits at the bottom of `low`.
  MINFER_INLINE __m512i operator()(__m512i code, __m512i low) const {
    const __m512i bits = _mm512_and_si512(_mm512_srav_epi16(code, shift), kept);
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m512i small = _mm512_or_si512(_mm512_permutexvar_epi16(low, subnormals), sign);
    return _mm512_mask_mov_epi16(small, _mm512_test_epi16_mask(bits, exponent), _mm512_or_si512(bits, base));
  }
};
MINFER_INLINE void expand_small_floats(Bytes raw, const SmallFloatTable& table, Brains (&out)[2]) {
  out[0] = table(_mm512_slli_epi16(raw, 8), raw);
  out[1] = table(raw, _mm512_srli_epi16(raw, 8));
}
#if defined(__AVX512BF16__)
MINFER_INLINE Floats dot_brains(Floats sum, Brains w, int32_t pair) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(broadcast_int(pair)));
}
#else
MINFER_INLINE Floats even_floats(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
MINFER_INLINE Floats odd_floats(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
MINFER_INLINE Floats dot_brains(Floats sum, Brains w, int32_t pair) {
  const __m512i xs = broadcast_int(pair);
  return fma(odd_floats(w), odd_floats(xs), fma(even_floats(w), even_floats(xs), sum));
}
#endif

// Sixteen values of x are scaled, rounded to nearest even and stored as int8.
MINFER_INLINE Ints abs_bits(Floats x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
MINFER_INLINE Ints max_int(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
MINFER_INLINE int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a); }
MINFER_INLINE int32_t sum_of(Ints a, Ints b) { return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)); }
MINFER_INLINE Ints quantize(Floats x, float inverse, int8_t* out) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(q));
  return q;
}

}  // namespace
}  // namespace minfer::MINFER_ISA
