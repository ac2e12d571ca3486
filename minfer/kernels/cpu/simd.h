// One vector of floats per instruction set, and the few operations on it that plain operators don't give.
//
// `Vec` is a GCC/Clang vector, so + - * / and comparisons work as they stand and the portable build needs no intrinsics.
// Arithmetic is float32; bfloat16 and float16 exist in memory only. fma() is always a function call in the source, never a
// compiler's choice, and reductions have one fixed order: the same row gives the same bits wherever it stands.
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(MINFER_ISA_avx512) || defined(MINFER_ISA_avx2)
#include <immintrin.h>
#endif

namespace minfer {
namespace MINFER_ISA {

#if defined(MINFER_ISA_avx512)
constexpr int kLanes = 16;
#elif defined(MINFER_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return x - Vec{}; }  // x - 0: keeps the sign of a zero, unlike 0 + x

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(MINFER_ISA_avx512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(MINFER_ISA_avx2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// mask ? a : b, lane by lane; comparisons of vectors give the mask.
inline Vec select(IntVec mask, Vec a, Vec b) { return mask ? a : b; }
inline IntVec select(IntVec mask, IntVec a, IntVec b) { return mask ? a : b; }

// a > b ? a : b and a < b ? a : b: b where one of them is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(MINFER_ISA_avx512)
  return _mm512_max_ps(a, b);
#elif defined(MINFER_ISA_avx2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec min(Vec a, Vec b) {
#if defined(MINFER_ISA_avx512)
  return _mm512_min_ps(a, b);
#elif defined(MINFER_ISA_avx2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// 16-bit lanes to 32 bits, filled up with zeros. GCC 12 makes three instructions a half of the plain conversion.
inline UintVec widen(HalfVec h) {
#if defined(MINFER_ISA_avx512)
  return bit_cast<UintVec>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)));
#else
  return __builtin_convertvector(h, UintVec);
#endif
}

// ---- float16 in software, for the portable build and for scalars ----

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float tiny = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
  return (sign != 0) ? -tiny : tiny;
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

// ---- memory <-> Vec ----

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec>(widen(h) << 16);
}

inline Vec load(const Float16* p) {
#if defined(MINFER_ISA_avx512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MINFER_ISA_avx2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline HalfVec to_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
  return bit_cast<HalfVec>(_mm512_cvtneps_pbh(v));
#else
  const UintVec bits = bit_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const UintVec quiet = bits >> 16 | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
#endif
}

inline void store(BFloat16* p, Vec v) {
  const HalfVec h = to_bfloat16(v);
  std::memcpy(p, &h, sizeof h);
}

inline void store(Float16* p, Vec v) {
#if defined(MINFER_ISA_avx512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(MINFER_ISA_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The first n < kLanes elements; the other lanes read as zero and are not written.
template <class T>
inline Vec load_some(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* p, Vec v, int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// The value that a store and a load would give back.
template <class T>
inline Vec round_to(Vec v) {
  T rounded[kLanes];
  store(rounded, v);
  return load(rounded);
}
template <>
inline Vec round_to<float>(Vec v) {
  return v;
}

// ---- reductions, always as the same tree of halves ----

inline float sum(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

inline float max_lane(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x within 2 units in the last place; below -87.3 it may be 0 or subnormal, below -104 it is 0; infinity above 88.73, NaN for NaN.
inline Vec exp(Vec x) {
#if defined(MINFER_ISA_avx512)  // vscalefps overflows, underflows and keeps a NaN by itself
  const Vec clamped = max(broadcast(-104.0f), min(broadcast(89.0f), x));
#else
  const Vec clamped = min(x, broadcast(88.72f));
#endif
  // Adding 1.5 x 2^23 rounds to the nearest whole number and leaves it in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = fma(clamped, broadcast(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
#if defined(MINFER_ISA_avx512)
  return _mm512_scalef_ps(p, n);
#else
  // Unsigned, because far below -104 the sum wraps around; the result is left out then.
  const Vec scaled = bit_cast<Vec>(bit_cast<UintVec>(p) + (bit_cast<UintVec>(shifted) << 23));
  const Vec finite = select(x > broadcast(88.72f), broadcast(__builtin_inff()), scaled);
  return select(x < broadcast(-87.3f), Vec{}, select(x == x, finite, x));
#endif
}

// Calls body with a value of the C++ type that `dtype` names. Python has checked that it is one of the three.
template <class Body>
inline void with_float_type(int64_t dtype, const Body& body) {
  switch (dtype) {
    case kFloat32:
      return body(float{});
    case kBFloat16:
      return body(BFloat16{});
    default:
      return body(Float16{});
  }
}

}  // namespace MINFER_ISA
}  // namespace minfer
