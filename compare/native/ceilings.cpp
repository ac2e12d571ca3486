// What this machine can do at most: bytes read a second, and multiply-add operations a second in fp32, bf16 and int8.
// Every engine's figure is shown as a share of these. Threads are plain; each repeats its loop for about 0.2 s, best of 5.
// Prints one line a figure: NAME VALUE (bytes/s or operations/s; a multiply-add counts as two operations).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float Lanes __attribute__((vector_size(64)));
static std::atomic<uint64_t> sink{0};  // keeps the loops alive

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `work(thread)` on all threads at once; work returns how much it did. Best rate of five rounds.
static double best_rate(int threads, const std::function<double(int)>& work) {
    double best = 0;
    for (int round = 0; round < 5; round++) {
        std::vector<std::thread> pool;
        std::vector<double> done(threads);
        double start = seconds();
        for (int t = 0; t < threads; t++) pool.emplace_back([&, t] { done[t] = work(t); });
        for (auto& thread : pool) thread.join();
        double total = 0;
        for (double d : done) total += d;
        best = std::max(best, total / (seconds() - start));
    }
    return best;
}

static double read_bytes(const std::vector<uint64_t>& data) {
    const int passes = 4;
    uint64_t sums[8] = {0};
    for (int pass = 0; pass < passes; pass++)
        for (size_t i = 0; i + 8 <= data.size(); i += 8)
            for (int lane = 0; lane < 8; lane++) sums[lane] += data[i + lane];
    for (uint64_t s : sums) sink += s;
    return double(passes) * data.size() * sizeof(uint64_t);
}

static const long ROUNDS = 20'000'000;
static const int CHAINS = 12;  // independent accumulators: enough to cover the latency of a fused multiply-add

static double fp32_operations() {
    Lanes sum[CHAINS], a, b;
    for (int l = 0; l < 16; l++) a[l] = 1.0f + l * 1e-7f, b[l] = 1e-9f;
    for (int c = 0; c < CHAINS; c++) sum[c] = b * float(c + 1);  // different starts: of equal chains only one would be computed
    for (long i = 0; i < ROUNDS; i++)
        for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * a + b;
    float out = 0;
    for (auto& s : sum) out += s[0];
    sink += uint64_t(out);
    return double(ROUNDS) * CHAINS * 16 * 2;
}

#if defined(__AVX512BF16__)
static double bf16_operations() {
    __m512 sum[CHAINS];
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_set1_ps(float(c));
    for (long i = 0; i < ROUNDS; i++)
#pragma GCC unroll 16  // rolled, the accumulators would live in memory and its latency would be measured
        for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
    for (auto& s : sum) sink += uint64_t(_mm512_reduce_add_ps(s));
    return double(ROUNDS) * CHAINS * 32 * 2;
}
#endif

#if defined(__AVX512VNNI__)
static double int8_operations() {
    __m512i sum[CHAINS], a = _mm512_set1_epi8(1), b = a;
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_set1_epi32(c);
    for (long i = 0; i < ROUNDS; i++)
#pragma GCC unroll 16  // rolled, the accumulators would live in memory and its latency would be measured
        for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
    for (auto& s : sum) sink += uint64_t(_mm512_reduce_add_epi32(s));
    return double(ROUNDS) * CHAINS * 64 * 2;
}
#endif

int main(int argc, char** argv) {
    int threads = argc > 1 ? std::max(1, atoi(argv[1])) : 1;
    // 256 MiB a thread: far more than any cache, so what is measured is memory.
    std::vector<std::vector<uint64_t>> data(threads);
    for (auto& d : data) d.assign(32u << 20, 1);
    printf("read_bytes_per_s %.6g\n", best_rate(threads, [&](int t) { return read_bytes(data[t]); }));
    printf("fp32_ops_per_s %.6g\n", best_rate(threads, [](int) { return fp32_operations(); }));
#if defined(__AVX512BF16__)
    printf("bf16_ops_per_s %.6g\n", best_rate(threads, [](int) { return bf16_operations(); }));
#endif
#if defined(__AVX512VNNI__)
    printf("int8_ops_per_s %.6g\n", best_rate(threads, [](int) { return int8_operations(); }));
#endif
    return sink == 42;
}
