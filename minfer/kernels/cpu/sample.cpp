// One token for each row of logits, without sorting the row: the most likely one, a draw from all, or a draw from what top-k,
// top-p and min-p leave.
//
// A first pass takes the maximum of every 64 neighbours. Those few maxima answer most of what follows: the k-th largest of
// them is a lower bound of the k-th largest logit, so only blocks that reach it are looked into. A draw from all adds up
// exp((x - best) / temperature) block by block and looks entry by entry at the one block in which it falls. Top-p searches
// the weight above which enough of the mass lies by halving, each time with one pass over the weights. What passes is
// sorted, by (logit falling, id rising), and drawn from in that order.
//
// A row is one thread's work from end to end, so its token doesn't depend on the rows beside it, and the random number that it is
// drawn with is made of its own seed and position (philox.h). Weights are float32, their sums float64. Left out: typical-p, which the
// sampler does in torch.
//
// `likeliest` is the first of these three with the probability of what it takes, which is what a drafting head wants to know.
#include <algorithm>
#include <cmath>
#include <limits>

#include "abi.h"
#include "philox.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

struct SampleArgs {
  const float* logits;   // [rows, width], rows x_stride elements apart
  // [rows, 6]: the seed's lower and upper 32 bits, temperature (0: the most likely), top-k (0: all), top-p (1: all), min-p
  const double* wishes;
  const void* positions;  // [rows], int32 or int64, of the newest tokens
  int64_t* out;           // [rows]; -1 where a row has no distribution: a NaN, +inf, or nothing above -inf
  int64_t rows, width, x_stride, position_dtype;
};

// The numbers alone that `sample` draws with: what a test compares to the last bit.
struct UniformsArgs {
  const double* wishes;
  const void* positions;
  double* out;  // [rows]
  int64_t rows, position_dtype;
};

struct LikeliestArgs {
  const float* logits;  // [rows, width], rows x_stride elements apart
  int64_t* tokens;      // [rows]; -1 where a row has no distribution
  float* chances;       // [rows]; NaN there
  int64_t rows, width, x_stride;
};

constexpr int64_t kBlock = 64;
constexpr float kLeast = -std::numeric_limits<float>::infinity();
constexpr float kNear = 1.2f;  // top-p's cut is searched to within this factor: the few candidates too many are sorted away

// Functors of this file's own, so that no other instruction set's copy of a standard algorithm can take their place.
struct Falling {
  bool operator()(float a, float b) const { return a > b; }
};
struct Rising {
  bool operator()(uint64_t a, uint64_t b) const { return a < b; }
};

constexpr int64_t kWishes = 6;

// What the token behind the row's newest one is drawn with.
double uniform_of(const double* wishes, const void* positions, int64_t dtype, int64_t row) {
  const double* wish = wishes + row * kWishes;
  const int64_t newest = dtype == kInt64 ? static_cast<const int64_t*>(positions)[row] : static_cast<const int32_t*>(positions)[row];
  return philox_uniform(static_cast<uint32_t>(wish[0]), static_cast<uint32_t>(wish[1]), static_cast<uint64_t>(newest + 1));
}

struct Row {
  const float* x;
  int64_t width, blocks;
  double uniform = 0, temperature = 0, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  float best = kLeast, inverse = 0;
  // scratch
  float* maxima;     // [blocks]
  float* copy;       // [blocks]
  double* sums;      // [blocks]
  float* weights;    // [width, in whole blocks]
  uint64_t* ranked;  // [width]

  static int64_t scratch_bytes(int64_t blocks) { return blocks * (2 * 4 + 8 + kBlock * (4 + 8)); }

  Row(const float* x, int64_t width, void* scratch) : x(x), width(width), blocks((width + kBlock - 1) / kBlock) {
    ranked = static_cast<uint64_t*>(scratch);
    sums = reinterpret_cast<double*>(ranked + blocks * kBlock);
    weights = reinterpret_cast<float*>(sums + blocks);
    maxima = weights + blocks * kBlock;
    copy = maxima + blocks;
  }

  void ask(const double* wish, double number) {
    uniform = number, temperature = wish[2], top_p = wish[4], min_p = wish[5];
    top_k = wish[3] < static_cast<double>(width) ? static_cast<int64_t>(wish[3]) : 0;
  }

  int64_t entries(int64_t block) const { return std::min(kBlock, width - block * kBlock); }

  // Maxima of the blocks and of the row. False where there is nothing to draw from.
  bool find_best() {
    IntVec missing{};
    bool bad = false;
    for (int64_t b = 0; b < blocks; ++b) {
      const float* from = x + b * kBlock;
      float most = kLeast;
      if (entries(b) == kBlock) {
        Vec m = load(from);
        missing |= m != m;
        for (int64_t i = kLanes; i < kBlock; i += kLanes) {
          const Vec v = load(from + i);
          missing |= v != v;
          m = max(v, m);
        }
        most = max_lane(m);
      } else {
        for (int64_t i = 0; i < entries(b); ++i) {
          bad = bad || from[i] != from[i];
          most = from[i] > most ? from[i] : most;
        }
      }
      maxima[b] = most;
      best = most > best ? most : best;
    }
    for (int i = 0; i < kLanes; ++i) bad = bad || missing[i] != 0;
    return !bad && best > kLeast && best < -kLeast;
  }

  int64_t most_likely() const {
    for (int64_t b = 0;; ++b) {
      if (maxima[b] != best) continue;
      for (int64_t i = b * kBlock;; ++i) {
        if (x[i] == best) return i;
      }
    }
  }

  Vec weight(Vec v) const { return exp((v - broadcast(best)) * broadcast(inverse)); }

  // The weights of all entries, zeros behind the last, and the running sums of the blocks. Returns their total.
  double weigh() {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) float padded[kBlock];
      const float* from = x + b * kBlock;
      if (entries(b) < kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) padded[i] = i < entries(b) ? from[i] : kLeast;
        from = padded;
      }
      Vec sum{};
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Vec w = weight(load(from + i));
        store(weights + b * kBlock + i, w);
        sum += w;
      }
      total += minfer::MINFER_ISA::sum(sum);
      sums[b] = total;
    }
    return total;
  }

  int64_t draw_from_all() {
    const double target = uniform * weigh();
    int64_t block = 0;
    while (block + 1 < blocks && sums[block] <= target) ++block;
    while (block > 0 && sums[block] == sums[block - 1]) --block;  // rounding put the target past the end
    double sum = block > 0 ? sums[block - 1] : 0;
    int64_t last = block * kBlock;
    for (int64_t i = block * kBlock; i < block * kBlock + entries(block); ++i) {
      if (weights[i] == 0) continue;
      last = i;
      sum += weights[i];
      if (sum > target) break;
    }
    return last;
  }

  double mass_from(float least) const {
    double mass = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      Vec sum{};
      for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes) {
        const Vec w = load(weights + i);
        sum += select(w >= broadcast(least), w, Vec{});
      }
      mass += minfer::MINFER_ISA::sum(sum);
    }
    return mass;
  }

  // A weight that all tokens of the nucleus reach, of which `share` is the mass.
  float nucleus_weight(double share) const {
    float reached = 0, missed = 1;
    while (missed > reached * kNear && missed > 1e-30f) {
      const float middle = reached > 0 ? std::sqrt(reached * missed) : missed * 0.0625f;  // weights spread over many decades
      (mass_from(middle) >= share ? reached : missed) = middle;
    }
    return reached;
  }

  // A logit that everything which the filters look at reaches. After top-k, top-p's share is of all k, so min-p is no bound there.
  float least_logit() {
    if (top_k > blocks) return kLeast;
    if (top_k > 0) {
      std::copy_n(maxima, blocks, copy);
      std::nth_element(copy, copy + top_k - 1, copy + blocks, Falling{});
      return copy[top_k - 1];
    }
    if (min_p <= 0) return kLeast;
    const double gap = std::max(temperature, 1e-30) * std::log(min_p), size = std::fabs(static_cast<double>(best));
    return static_cast<float>(best + gap - 1e-5 * (1 + size - gap));
  }

  // Tokens from `least` up and, unless it is null, of at least `weight_from`, as one integer each that grows as the rank does.
  int64_t rank(float least, const float* weight_from) {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (maxima[b] < least || maxima[b] == kLeast) continue;
      for (int64_t i = b * kBlock; i < b * kBlock + entries(b); ++i) {
        if (x[i] < least || x[i] == kLeast || (weight_from != nullptr && weights[i] < *weight_from)) continue;
        const uint32_t bits = bit_cast<uint32_t>(x[i] + 0.0f);  // + 0: both zeros are equal here
        const uint32_t falling = (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
        ranked[count++] = static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(i);
      }
    }
    std::sort(ranked, ranked + count, Rising{});
    return top_k > 0 && top_k < count ? top_k : count;
  }

  int64_t draw_from_some() {
    double mass = 0;
    int64_t count;
    if (top_p < 1 && top_k == 0) {
      mass = weigh();
      const float from = nucleus_weight(top_p * mass);
      count = rank(least_logit(), &from);
    } else {
      count = rank(least_logit(), nullptr);
    }
    for (int64_t i = 0; i < count; i += kLanes) {  // into the place of the weights: in rank order now
      alignas(64) float values[kLanes] = {};
      for (int64_t j = 0; j < std::min<int64_t>(kLanes, count - i); ++j) values[j] = x[ranked[i + j] & 0xffffffffu];
      store(weights + i, weight(load(values)));
    }
    if (top_k > 0) {
      for (int64_t i = 0; i < count; ++i) mass += weights[i];
    }
    double before = 0, kept = 0;
    int64_t left = 0;
    for (; left < count; ++left) {
      if ((top_p < 1 && before >= top_p * mass && left > 0) || weights[left] < min_p) break;
      before += weights[left];
    }
    kept = before;
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < left && weights[i] > 0; ++i) {
      last = i;
      sum += weights[i];
      if (sum > uniform * kept) break;
    }
    return static_cast<int64_t>(ranked[last] & 0xffffffffu);
  }

  int64_t token() {
    if (!find_best()) return -1;
    if (temperature == 0) return most_likely();
    inverse = static_cast<float>(1.0 / std::max(temperature, 1e-30));
    return top_k > 0 || top_p < 1 || min_p > 0 ? draw_from_some() : draw_from_all();
  }
};

int64_t scratch_bytes(int64_t width) { return Row::scratch_bytes((width + kBlock - 1) / kBlock); }

void sample(const SampleArgs& a, Pool& pool) {
  const int64_t bytes = scratch_bytes(a.width);
  pool.parallel_for(a.rows, [&](int64_t index, int worker) {
    Row row(a.logits + index * a.x_stride, a.width, pool.scratch(worker, bytes));
    row.ask(a.wishes + index * kWishes, uniform_of(a.wishes, a.positions, a.position_dtype, index));
    a.out[index] = row.token();
  });
}

void uniforms(const UniformsArgs& a, Pool&) {
  for (int64_t row = 0; row < a.rows; ++row) a.out[row] = uniform_of(a.wishes, a.positions, a.position_dtype, row);
}

void likeliest(const LikeliestArgs& a, Pool& pool) {
  const int64_t bytes = scratch_bytes(a.width);
  pool.parallel_for(a.rows, [&](int64_t index, int worker) {
    Row row(a.logits + index * a.x_stride, a.width, pool.scratch(worker, bytes));
    const bool found = row.find_best();
    row.inverse = 1;
    a.tokens[index] = found ? row.most_likely() : -1;
    a.chances[index] = found ? static_cast<float>(1 / row.weigh()) : std::numeric_limits<float>::quiet_NaN();
  });
}

}  // namespace

MINFER_OPS(sample)
MINFER_OP(sample, SampleArgs), MINFER_OP(uniforms, UniformsArgs), MINFER_OP(likeliest, LikeliestArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
