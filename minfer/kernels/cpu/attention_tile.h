// The arithmetic of attention over one tile of kTile keys, in a form that every caller shares.
//
// A query row's result is defined tile by tile. Tiles start at absolute multiples of kTile in the sequence; within one,
//
//     s_j = scale * sum_d q_d k_jd         m = max_j s_j         p_j = exp(s_j - m)
//     l = sum_j p_j                        o_d = sum_j p_j v_jd
//
// (over a quantised cache k_jd and v_jd are codes, scale is one of its own for each key, and p_j takes v's before the product)
// with every sum in one fixed order, and the tiles' (m, l, o) are then merged from the first to the last. None of it depends
// on how many rows are computed together, which thread does it, or how a prompt was cut: chunked prefill, decode and a
// split over threads give the same bits.
//
// Both products run on one micro-kernel that multiplies *words* of 32 bits: a float, or with AVX-512 a pair of bfloat16
// (two neighbours along the summed axis, one vdpbf16ps). One operand is broadcast word by word, the other fills the lanes.
// Many rows (prefill) put query rows in the lanes, so K is broadcast as it lies in the cache and nothing is ever summed
// across lanes. Few rows (decode) would leave most lanes empty, so keys, then channels, fill them, for which K is
// transposed. Which operand is broadcast doesn't change a bit of the sums.
#pragma once

#include <cstdint>

#include "kv_codes.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {

constexpr int64_t kTile = 128;

typedef uint32_t Word;

inline Word load_word(const void* p) {
  Word w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline UintVec load_words(const Word* p) {
  UintVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_words(Word* p, UintVec v) { std::memcpy(p, &v, sizeof v); }

// ---- what a word is ----

// A word is one float: any cache type, converted tile by tile.
struct Singles {
  static constexpr int kStep = 1;
  static Vec multiply_add(UintVec a, UintVec b, Vec c) { return fma(bit_cast<Vec>(a), bit_cast<Vec>(b), c); }

  // Words of `count` neighbours along the channels.
  template <class T>
  static void from_row(const T* row, int64_t count, Word* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_words(out + i, bit_cast<UintVec>(load(row + i)));
    if (i < count) {
      const Vec v = load_some(row + i, count - i);
      std::memcpy(out + i, &v, (count - i) * sizeof(Word));
    }
  }

  // Words that pair kStep keys, channel by channel: here a key stands alone and `second` is never given.
  template <class T>
  static void from_keys(const T* first, const T*, int64_t count, Word* out) {
    from_row(first, count, out);
  }

  // Both for n <= kLanes channels of decoded codes, from `channel` on.
  static void put_row(Word* out, int64_t channel, Vec v, int64_t n) { std::memcpy(out + channel, &v, n * sizeof(Word)); }
  static void put_keys(Word* out, int64_t channel, Vec first, Vec, int64_t n) { put_row(out, channel, first, n); }
  static void store_row(Word* out, int64_t channel, Vec v, int64_t n) { put_row(out, channel, v, n); }

  // The same for probabilities: lanes of rows (kStep vectors into one), or lanes of keys (kLanes keys).
  static UintVec from_probabilities(const Vec* p) { return bit_cast<UintVec>(p[0]); }
  static void store_probabilities(Word* out, int64_t key, Vec p) { store_words(out + key, bit_cast<UintVec>(p)); }
};

#if defined(__AVX512BF16__)
// A word is two bfloat16: for bfloat16 queries over a bfloat16 cache.
struct Pairs {
  static constexpr int kStep = 2;
  static Vec multiply_add(UintVec a, UintVec b, Vec c) {
    return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }

  static void from_row(const BFloat16* row, int64_t count, Word* out) { std::memcpy(out, row, count * sizeof(BFloat16)); }

  static void from_keys(const BFloat16* first, const BFloat16* second, int64_t count, Word* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store_words(out + i, zip(load_half(first + i), load_half(second + i)));
    for (; i < count; ++i) out[i] = first[i].bits | static_cast<Word>(second[i].bits) << 16;
  }

  // A code is a bfloat16 number, so the lower half of its float is zero.
  static void put_row(Word* out, int64_t channel, Vec v, int64_t n) {
    const HalfVec h = __builtin_convertvector(bit_cast<UintVec>(v) >> 16, HalfVec);
    std::memcpy(reinterpret_cast<BFloat16*>(out) + channel, &h, n * sizeof(BFloat16));
  }
  static void store_row(Word* out, int64_t channel, Vec v, int64_t n) {  // any numbers, rounded
    const HalfVec h = to_bfloat16(v);
    std::memcpy(reinterpret_cast<BFloat16*>(out) + channel, &h, n * sizeof(BFloat16));
  }
  static void put_keys(Word* out, int64_t channel, Vec first, Vec second, int64_t n) {
    const UintVec words = bit_cast<UintVec>(first) >> 16 | bit_cast<UintVec>(second);
    std::memcpy(out + channel, &words, n * sizeof(Word));
  }

  static UintVec from_probabilities(const Vec* p) {
    alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1], p[0]));
    return bit_cast<UintVec>(_mm512_permutexvar_epi16(_mm512_load_si512(kZip), halves));
  }
  static void store_probabilities(Word* out, int64_t key, Vec p) { store(reinterpret_cast<BFloat16*>(out) + key, p); }

 private:
  static HalfVec load_half(const BFloat16* p) {
    HalfVec h;
    std::memcpy(&h, p, sizeof h);
    return h;
  }
  static UintVec zip(HalfVec low, HalfVec high) {
    return widen(low) | widen(high) << 16;
  }
};
#endif

// ---- quantised rows as words ----

// Calls put(channel, planes of a, planes of b, n) along two rows of codes.
template <class Codes, class Put>
inline void for_codes(const uint8_t* a, const uint8_t* b, int64_t dim, const Put& put) {
  const int64_t plane = dim / Codes::kPlanes;
  Vec first[Codes::kPlanes], second[Codes::kPlanes];
  int64_t i = 0;
  for (; i + kLanes <= plane; i += kLanes) {
    Codes::load(a + i, first);
    Codes::load(b + i, second);
    for (int p = 0; p < Codes::kPlanes; ++p) put(p * plane + i, first[p], second[p], kLanes);
  }
  if (i == plane) return;
  uint8_t padded[2][kLanes] = {};
  std::memcpy(padded[0], a + i, plane - i);
  std::memcpy(padded[1], b + i, plane - i);
  Codes::load(padded[0], first);
  Codes::load(padded[1], second);
  for (int p = 0; p < Codes::kPlanes; ++p) put(p * plane + i, first[p], second[p], plane - i);
}

// Words::from_row of `count` rows of codes; rows of words lie `stride` apart.
template <class Words, class Codes>
void decode_rows(const uint8_t* const* rows, int64_t count, int64_t dim, Word* out, int64_t stride) {
  for (int64_t j = 0; j < count; ++j, out += stride) {
    for_codes<Codes>(rows[j], rows[j], dim, [&](int64_t channel, Vec v, Vec, int64_t n) { Words::put_row(out, channel, v, n); });
  }
}

// Words::from_keys of `count` rows of codes. A key that completes the last pair is multiplied by zero: any will do.
template <class Words, class Codes>
void decode_keys(const uint8_t* const* rows, int64_t count, int64_t dim, Word* out, int64_t stride) {
  for (int64_t j = 0; j < count; j += Words::kStep, out += stride) {
    const uint8_t* second = rows[j + 1 < count ? j + 1 : j];
    for_codes<Codes>(rows[j], second, dim, [&](int64_t channel, Vec a, Vec b, int64_t n) { Words::put_keys(out, channel, a, b, n); });
  }
}

// One kind of codes, chosen at run time: a call a tile costs nothing, where a copy of attention for each would take megabytes.
struct Coding {
  using Decode = void (*)(const uint8_t* const* rows, int64_t count, int64_t dim, Word* out, int64_t stride);
  int64_t planes;
  bool rotated;
  float unit;
  Decode rows, keys;

  template <class Words>
  static Coding of(int64_t dtype) {
    Coding coding{};
    with_codes(dtype, [&](auto codes) {
      using Codes = decltype(codes);
      coding = {Codes::kPlanes, Codes::kRotated, Codes::kUnit, &decode_rows<Words, Codes>, &decode_keys<Words, Codes>};
    });
    return coding;
  }
};

// ---- the micro-kernel ----

// c[i][lane] = sum over steps of a[i][step] * b[step][lane], from the first step to the last, for I rows of words and
// N vectors of lanes. `a[i]` advances by `a_step` words a step, b by `b_stride`; c's rows are `c_stride` floats apart.
template <class Words, int I, int N>
inline void multiply(const char* const* a, int64_t a_step, const Word* b, int64_t b_stride, int64_t steps, float* c,
                     int64_t c_stride) {
  Vec sums[I][N] = {};
  for (int64_t step = 0; step < steps; ++step) {
    UintVec lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = load_words(b + step * b_stride + n * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const UintVec word = UintVec{} + load_word(a[i] + step * a_step * 4);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] = Words::multiply_add(word, lanes[n], sums[i][n]);
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int n = 0; n < N; ++n) store(c + i * c_stride + n * kLanes, sums[i][n]);
  }
}

// ---- softmax pieces ----

// c * tanh(s / c), as 1 - 2 / (e^2x + 1).
inline Vec soft_cap(Vec s, float cap) {
  const Vec one = broadcast(1.0f);
  return broadcast(cap) * (one - broadcast(2.0f) / (exp(s * broadcast(2.0f / cap)) + one));
}

constexpr float kMinusInfinity = -__builtin_inff();

// What to subtract before exp: the maximum, or 0 where a row sees nothing (-inf - -inf would be NaN).
inline Vec finite_maximum(Vec m) { return select(m == broadcast(kMinusInfinity), Vec{}, m); }

// ---- transposing K for decode: out[word][key] from `keys` rows of words ----

#if defined(MINFER_ISA_avx512)
// 16 x 16 words: four rounds that exchange blocks of 1, 2, 4 and 8 rows.
inline void transpose_block(const char* const* rows, Word* out, int64_t stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#else
inline void transpose_block(const char* const* rows, Word* out, int64_t stride) {
  for (int word = 0; word < kLanes; ++word) {
    for (int key = 0; key < kLanes; ++key) out[word * stride + key] = load_word(rows[key] + word * 4);
  }
}
#endif

// `rows` are kLanes pointers to `words` words each.
inline void transpose(const char* const* rows, int64_t words, Word* out, int64_t stride) {
  int64_t word = 0;
  for (; word + kLanes <= words; word += kLanes) {
    const char* shifted[kLanes];
    for (int key = 0; key < kLanes; ++key) shifted[key] = rows[key] + word * 4;
    transpose_block(shifted, out + word * stride, stride);
  }
  for (; word < words; ++word) {
    for (int key = 0; key < kLanes; ++key) out[word * stride + key] = load_word(rows[key] + word * 4);
  }
}

}  // namespace MINFER_ISA
}  // namespace minfer
