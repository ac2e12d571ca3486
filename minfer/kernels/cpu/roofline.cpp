// The machine's ceilings, measured by the plainest loops that reach them: reading memory, and multiplying in registers.
//
// `minfer.kernels.bench` states every kernel's time as a share of these. The arithmetic loops keep twelve independent
// accumulators, enough to cover the latency of every unit they run on.
#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

constexpr int64_t kPiece = 128 * 1024;  // bytes read per chunk: long enough for the prefetchers, short enough to share out
constexpr int kChains = 12;

struct ReadArgs {
  const char* data;
  int64_t* out;  // a checksum per chunk, so that no read can be dropped: bytes / kPiece entries
  int64_t bytes;
};

void read_memory(const ReadArgs& a, Pool& pool) {
  pool.parallel_for(a.bytes / kPiece, [&](int64_t chunk, int) {
    UintVec sums[4] = {};
    const char* p = a.data + chunk * kPiece;
    for (int64_t i = 0; i < kPiece; i += 4 * static_cast<int64_t>(sizeof(UintVec))) {
      for (int n = 0; n < 4; ++n) {
        UintVec v;
        std::memcpy(&v, p + i + n * sizeof v, sizeof v);
        sums[n] ^= v;
      }
    }
    const UintVec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    a.out[chunk] = all[0];
  });
}

struct PeakArgs {
  double* operations;  // out: how many were done; 0 where this instruction set has no such unit
  int64_t rounds;
};

template <class Step>
void run_chains(const PeakArgs& a, Pool& pool, int64_t operations_per_step, const Step& step) {
  const int64_t chunks = 4 * pool.workers();
  float* sink = static_cast<float*>(pool.shared_scratch(chunks * sizeof(float)));
  pool.parallel_for(chunks, [&](int64_t chunk, int) {
    Vec chains[kChains];
    // Different starts: of chains that begin alike, a compiler computes only one.
    for (int i = 0; i < kChains; ++i) chains[i] = broadcast(static_cast<float>(chunk + i));
    const Vec seed = broadcast(1e-9f * static_cast<float>(chunk));
    for (int64_t round = 0; round < a.rounds; ++round) {
      for (int i = 0; i < kChains; ++i) chains[i] = step(chains[i], seed);
    }
    Vec all{};
    for (int i = 0; i < kChains; ++i) all += chains[i];
    sink[chunk] = all[0];
  });
  *a.operations = static_cast<double>(chunks * a.rounds * kChains * operations_per_step);
}

void peak_float32(const PeakArgs& a, Pool& pool) {
  run_chains(a, pool, 2 * kLanes, [](Vec sum, Vec x) { return fma(x, x, sum); });
}

void peak_bfloat16(const PeakArgs& a, Pool& pool) {
#if defined(__AVX512BF16__)
  run_chains(a, pool, 4 * kLanes, [](Vec sum, Vec x) -> Vec {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(x), bit_cast<__m512bh>(x));
  });
#else
  (void)pool;
  *a.operations = 0;
#endif
}

void peak_int8(const PeakArgs& a, Pool& pool) {
#if defined(MINFER_ISA_avx512)
  run_chains(a, pool, 8 * kLanes, [](Vec sum, Vec x) -> Vec {
    return bit_cast<Vec>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(x), bit_cast<__m512i>(x)));
  });
#elif defined(MINFER_ISA_avx2)
  run_chains(a, pool, 8 * kLanes, [](Vec sum, Vec x) -> Vec {
    const __m256i pairs = _mm256_maddubs_epi16(bit_cast<__m256i>(sum), bit_cast<__m256i>(x));  // of the sum: not to be hoisted
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return bit_cast<Vec>(_mm256_add_epi32(bit_cast<__m256i>(sum), fours));
  });
#else
  (void)pool;
  *a.operations = 0;
#endif
}

}  // namespace

MINFER_OPS(roofline)
MINFER_OP(read_memory, ReadArgs), MINFER_OP(peak_float32, PeakArgs), MINFER_OP(peak_bfloat16, PeakArgs),
    MINFER_OP(peak_int8, PeakArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
