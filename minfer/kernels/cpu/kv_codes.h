// Quantised rows of the KV cache: what minfer/kvcache.py defines, as conversions between codes and vectors of floats.
//
// A row is one token's K or V of one head: codes, and one bfloat16 scale that lies in a tensor of its own. Reading never
// applies the scale: it is folded into the score after q . code, and into the probability before p . code, so all that is
// left to do is to make codes words that the micro-kernel multiplies. Every code is a bfloat16 number exactly, so nothing is
// lost between the cache and the product. e4m3 is read as 1/256 of its value, which saves an operation; `unit` makes up for it.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace minfer {
namespace MINFER_ISA {

constexpr int64_t kMaxHeadDim = 1024;  // rows are converted in buffers of this length

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));

// ---- bytes <-> lanes ----

inline UintVec load_bytes(const uint8_t* p) {
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
#if defined(MINFER_ISA_avx512)
  return bit_cast<UintVec>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bytes)));
#elif defined(MINFER_ISA_avx2)
  return bit_cast<UintVec>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(bytes))));
#else
  return __builtin_convertvector(bytes, UintVec);
#endif
}

inline void store_bytes(uint8_t* p, UintVec v) {
  const ByteVec bytes = __builtin_convertvector(v, ByteVec);
  std::memcpy(p, &bytes, sizeof bytes);
}

inline Vec to_floats(IntVec v) { return __builtin_convertvector(v, Vec); }

// The nearest whole number, ties to even; |v| below 2^22.
inline IntVec nearest(Vec v) { return bit_cast<IntVec>(v + broadcast(12582912.0f)) - 0x4b400000; }

inline Vec clamp(Vec v, float low, float high) { return min(max(v, broadcast(low)), broadcast(high)); }

// ---- the formats: kPlanes vectors of numbers lie in a vector of bytes; plane n holds the n-th part of the channels ----
// kRotated: rows are multiplied by a Hadamard matrix first. kScales: how many scales are tried for a row.

struct Int8Codes {
  static constexpr int kPlanes = 1;
  static constexpr bool kRotated = false;
  static constexpr int kScales = 1;
  static constexpr float kUnit = 1.0f;
  static void load(const uint8_t* p, Vec* planes) {
    planes[0] = to_floats(bit_cast<IntVec>(load_bytes(p) << 24) >> 24);
  }
  static constexpr float kLimit = 127.0f;
  static UintVec encode(Vec v) { return bit_cast<UintVec>(nearest(clamp(v, -127.0f, 127.0f))) & 255u; }
};

struct Int4Codes {
  static constexpr int kPlanes = 2;
  static constexpr bool kRotated = true;
  static constexpr int kScales = 1;
  static constexpr float kUnit = 1.0f;
  static void load(const uint8_t* p, Vec* planes) {
    const IntVec bytes = bit_cast<IntVec>(load_bytes(p));
    planes[0] = to_floats((bytes & 15) - 8);
    planes[1] = to_floats((bytes >> 4) - 8);
  }
  static constexpr float kLimit = 8.0f;
  static UintVec encode(Vec v) { return bit_cast<UintVec>(nearest(clamp(v, -8.0f, 7.0f)) + 8); }
};

// An 8-bit float with kMantissa bits of mantissa and this exponent bias, for numbers within its finite range.
template <int kMantissa, int kBias>
inline UintVec encode_small_float(Vec v) {
  constexpr int kDropped = 23 - kMantissa;
  const UintVec bits = bit_cast<UintVec>(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  const UintVec normal = ((magnitude + ((1u << (kDropped - 1)) - 1) + (magnitude >> kDropped & 1u)) >> kDropped) -
                         (static_cast<uint32_t>(127 - kBias) << kMantissa);
  // Below the smallest normal number codes are multiples of one step, which stand in the low bits after this addition.
  const Vec magic = broadcast(bit_cast<float>(static_cast<uint32_t>(127 + 23 + 1 - kBias - kMantissa) << 23));
  const UintVec subnormal = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + magic) - bit_cast<UintVec>(magic);
  const IntVec tiny = bit_cast<Vec>(magnitude) < broadcast(bit_cast<float>(static_cast<uint32_t>(127 + 1 - kBias) << 23));
  return sign | (tiny ? subnormal : normal);
}

// The lower 16 bits of each lane as a float16.
inline Vec halves_to_floats(UintVec bits) {
#if defined(MINFER_ISA_avx512)
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#else
  const HalfVec halves = __builtin_convertvector(bits, HalfVec);
  return load(reinterpret_cast<const Float16*>(&halves));
#endif
}

struct E4m3Codes {
  static constexpr int kPlanes = 1;
  static constexpr bool kRotated = true;
  static constexpr int kScales = 8;
  static constexpr float kUnit = 256.0f;
  static void load(const uint8_t* p, Vec* planes) {  // the same fields in float16, whose exponent has a bias 8 higher
    const UintVec bytes = load_bytes(p);
    planes[0] = halves_to_floats((bytes & 0x80u) << 8 | (bytes & 0x7fu) << 7);
  }
  static constexpr float kLimit = 448.0f;
  static UintVec encode(Vec v) { return encode_small_float<3, 7>(clamp(v, -448.0f, 448.0f)); }
};

struct E5m2Codes {
  static constexpr int kPlanes = 1;
  static constexpr bool kRotated = true;
  static constexpr int kScales = 8;
  static constexpr float kUnit = 1.0f;
  static void load(const uint8_t* p, Vec* planes) { planes[0] = halves_to_floats(load_bytes(p) << 8); }
  static constexpr float kLimit = 57344.0f;
  static UintVec encode(Vec v) { return encode_small_float<2, 15>(clamp(v, -57344.0f, 57344.0f)); }
};

// Calls body with a value of the codes' type that `dtype` names.
template <class Body>
void with_codes(int64_t dtype, const Body& body) {
  switch (dtype) {
    case kFloat8E4m3:
      return body(E4m3Codes{});
    case kFloat8E5m2:
      return body(E5m2Codes{});
    case kInt8:
      return body(Int8Codes{});
    default:
      return body(Int4Codes{});
  }
}

inline bool is_quantised(int64_t dtype) {
  return dtype == kFloat8E4m3 || dtype == kFloat8E5m2 || dtype == kInt8 || dtype == kUint8;
}

// ---- rotation ----

// x times the orthogonal Walsh-Hadamard matrix along runs of n channels, n the power of two in `dim`; its own inverse.
inline void hadamard(float* x, int64_t dim) {
  const int64_t n = dim & -dim;
  int64_t span = 1;
  for (; span < n && span < kLanes; span *= 2) {
    for (int64_t i = 0; i < dim; i += 2 * span) {
      for (int64_t j = i; j < i + span; ++j) {
        const float a = x[j], b = x[j + span];
        x[j] = a + b;
        x[j + span] = a - b;
      }
    }
  }
  for (; span < n; span *= 2) {
    for (int64_t i = 0; i < dim; i += 2 * span) {
      for (int64_t j = i; j < i + span; j += kLanes) {
        const Vec a = load(x + j), b = load(x + j + span);
        store(x + j, a + b);
        store(x + j + span, a - b);
      }
    }
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
}

}  // namespace MINFER_ISA
}  // namespace minfer
