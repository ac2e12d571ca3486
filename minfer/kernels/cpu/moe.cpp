// A mixture of experts: each token goes through the top_k experts that its router likes best.
//
//   1  every token picks its experts, and their shares of the softmax
//   2  tokens are listed by expert; an expert is met at most once by each
//   3  for each expert that was picked: its tokens' rows gathered, gate and up, silu, down, and the results added where they belong
//
// Products are those of the linear files, called through their op tables with as many rows as an expert has tokens. So a mixture
// multiplies by whatever they multiply by, and a recorded step holds one op whatever the routing of a batch will be.
//
// A token adds up its experts in their order, in float32: its result doesn't depend on who else is in the batch.
//
// Left out: running several experts at the same time. At one token each product is one loop over the pool; that is two joins an
// expert, a microsecond each, where reading its weights takes tens.
#include <cmath>
#include <cstring>
#include <limits>

#include "abi.h"
#include "linear_args.h"
#include "loops.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {

extern const Op linear_dense_ops[];
extern const Op linear_quantized_ops[];

namespace {

// One product of an expert: experts.py lists them.
struct Matrix {
  int64_t quantized;  // which kind `weight` is of
  const void* weight;
  int64_t n, first;  // outputs, and where the first of them stands in the whole product's
};

struct MoeArgs {
  const void* x;            // [rows, width]
  const void* logits;       // [rows, experts], of x's type
  const void* shared;       // [rows, width], what every token adds; or null
  const void* shared_gate;  // [rows, 1]: the sigmoid of it is its share
  void* out;                // [rows, width]
  const Matrix* matrices;   // [experts][up_parts + down_parts]: gate and up, then down
  int32_t* picked;          // scratch [rows, top_k]
  float* shares;            // scratch [rows, top_k]
  int32_t* places;          // scratch [rows * top_k]: row * top_k + place, by expert
  void* inputs;             // scratch [rows, width]
  void* gate_up;            // scratch [rows, 2 * inner]
  void* activated;          // scratch [rows, inner]
  void* outputs;            // scratch [rows, width]
  float* sums;              // scratch [rows, width]
  int64_t rows, width, inner, experts, up_parts, down_parts, top_k, renormalize;
  int64_t x_stride, logits_stride, shared_stride, gate_stride, dtype;
};

constexpr int64_t kMostExperts = 1024;  // MAX_EXPERTS in model_config.py

// The highest of those not taken, of equals the lower number. What isn't a number comes last.
template <class T>
void pick(const T* logits, int64_t experts, int64_t top_k, bool renormalize, int32_t* picked, float* shares) {
  float values[kMostExperts];
  float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t e = 0; e < experts; ++e) {
    values[e] = load_some(logits + e, 1)[0];
    largest = values[e] > largest ? values[e] : largest;
  }
  for (int64_t e = 0; e < experts; ++e) total += std::exp(values[e] - largest);
  bool taken[kMostExperts] = {};
  float own = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!taken[e] && (best < 0 || values[e] > values[best] || (values[best] != values[best] && values[e] == values[e]))) best = e;
    }
    taken[best] = true;
    picked[k] = static_cast<int32_t>(best);
    shares[k] = std::exp(values[best] - largest) / total;
    own += shares[k];
  }
  for (int64_t k = 0; renormalize && k < top_k; ++k) shares[k] /= own;
}

// x[count, k] -> y[count, ...], rows y_stride elements apart.
struct Product {
  const void* x;
  void* y;
  int64_t k, y_stride, count, dtype;
};

template <class Body>
void with_args(const Matrix& matrix, const Product& p, const Body& body) {
  const int64_t size = p.dtype == kFloat32 ? 4 : 2;
  void* y = static_cast<char*>(p.y) + matrix.first * size;
  if (matrix.quantized != 0) {
    const LinearQuantizedArgs args = {p.x, p.k, y, p.y_stride, nullptr, p.count, p.dtype,
                                      static_cast<const QuantizedWeight*>(matrix.weight)};
    body(linear_quantized_ops[0], &args);
  } else {
    const LinearDenseArgs args = {p.x, p.k, y, p.y_stride, nullptr, p.count, p.dtype, matrix.weight, matrix.n, p.k};
    body(linear_dense_ops[0], &args);
  }
}

// The rows of one expert: `places` names them, and where their shares are.
template <class T>
void run_expert(const MoeArgs& a, const Matrix* matrices, const Matrix* next, const int32_t* places, int64_t count, Pool& pool) {
  const T* x = static_cast<const T*>(a.x);
  T* inputs = static_cast<T*>(a.inputs);
  for_rows(pool, count, a.width, [&](int64_t i) {
    std::memcpy(inputs + i * a.width, x + places[i] / a.top_k * a.x_stride, a.width * sizeof(T));
  });
  const Product up = {inputs, a.gate_up, a.width, 2 * a.inner, count, a.dtype};
  const Product down = {a.activated, a.outputs, a.inner, a.width, count, a.dtype};
  const int64_t parts = a.up_parts + a.down_parts;
  for (int64_t part = 0; part < parts; ++part) {
    if (part == a.up_parts) {
      for_rows(pool, count, 2 * a.inner, [&](int64_t i) {
        silu_mul_row(static_cast<const T*>(a.gate_up) + i * 2 * a.inner, static_cast<T*>(a.activated) + i * a.inner, a.inner);
      });
    }
    // Workers that wait fetch what is read after this product.
    const Matrix* after = part + 1 < parts ? matrices + part + 1 : next;
    Stream stream = {};
    if (after != nullptr) {
      const bool is_down = after != next && part + 1 >= a.up_parts;
      with_args(*after, is_down ? down : up, [&](const Op& op, const void* args) { stream = op.stream(args); });
    }
    pool.expect(stream);
    with_args(matrices[part], part < a.up_parts ? up : down, [&](const Op& op, const void* args) { op.run(args, pool); });
  }
  for_rows(pool, count, a.width, [&](int64_t i) {
    const Vec share = broadcast(a.shares[places[i]]);
    const T* y = static_cast<const T*>(a.outputs) + i * a.width;
    float* sum = a.sums + places[i] / a.top_k * a.width;
    for_lanes(
        a.width, [&](int64_t j) { store(sum + j, fma(load(y + j), share, load(sum + j))); },
        [&](int64_t j, int64_t n) { store_some(sum + j, fma(load_some(y + j, n), share, load_some(sum + j, n)), n); });
  });
}

template <class T>
void run(const MoeArgs& a, Pool& pool) {
  for_rows(pool, a.rows, a.experts * (a.top_k + 16), [&](int64_t row) {  // an exponential is worth some ten comparisons
    pick(static_cast<const T*>(a.logits) + row * a.logits_stride, a.experts, a.top_k, a.renormalize != 0, a.picked + row * a.top_k,
         a.shares + row * a.top_k);
  });
  for_rows(pool, a.rows, a.width, [&](int64_t row) { std::memset(a.sums + row * a.width, 0, a.width * sizeof(float)); });
  int64_t ends[kMostExperts + 1] = {};
  for (int64_t i = 0; i < a.rows * a.top_k; ++i) ++ends[a.picked[i] + 1];
  for (int64_t e = 0; e < a.experts; ++e) ends[e + 1] += ends[e];
  // Filling an expert's list moves its begin to its end: ends[e] is where e's list ends when all are filled.
  for (int64_t i = 0; i < a.rows * a.top_k; ++i) a.places[ends[a.picked[i]]++] = static_cast<int32_t>(i);
  const int64_t parts = a.up_parts + a.down_parts;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int64_t begin = e == 0 ? 0 : ends[e - 1], count = ends[e] - begin;
    if (count == 0) continue;
    int64_t following = e + 1;
    while (following < a.experts && ends[following] == ends[e]) ++following;
    const Matrix* next = following < a.experts ? a.matrices + following * parts : nullptr;
    run_expert<T>(a, a.matrices + e * parts, next, a.places + begin, count, pool);
  }
  for_rows(pool, a.rows, a.width, [&](int64_t row) {
    const float* sum = a.sums + row * a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
    const T* shared = static_cast<const T*>(a.shared) + row * a.shared_stride;
    Vec share{};
    if (a.shared != nullptr) {
      const float gate = load_some(static_cast<const T*>(a.shared_gate) + row * a.gate_stride, 1)[0];
      share = broadcast(1.0f / (1.0f + std::exp(-gate)));
    }
    const auto finish = [&](int64_t j, int64_t n) {
      Vec total = n == kLanes ? load(sum + j) : load_some(sum + j, n);
      if (a.shared != nullptr) total = fma(n == kLanes ? load(shared + j) : load_some(shared + j, n), share, total);
      n == kLanes ? store(out + j, total) : store_some(out + j, total, n);
    };
    for_lanes(a.width, [&](int64_t j) { finish(j, kLanes); }, finish);
  });
}

void moe(const MoeArgs& a, Pool& pool) {
  if (a.rows <= 0) return;
  with_float_type(a.dtype, [&](auto type) { run<decltype(type)>(a, pool); });
}

}  // namespace

MINFER_OPS(moe)
MINFER_OP(moe, MoeArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
