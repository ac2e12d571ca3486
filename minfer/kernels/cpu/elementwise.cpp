// The small ops: norms, rotary embeddings, gated activation, argmax, row selection.
//
// They touch kilobytes at decode, so a handful of rows runs on the calling thread without waking anyone; at prefill they
// are bound by memory, and are cut into chunks of rows. Rounding follows the reference backend where it is visible: an
// rms_norm rounds to the activations' type before it multiplies by the weight, as Llama does.
#include <cmath>
#include <limits>

#include "abi.h"
#include "loops.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

// ---- rms_norm ----

struct RmsNormArgs {
  const void* x;         // [rows, width], rows x_stride elements apart
  const void* residual;  // the same, or nullptr
  const void* weight;    // [width]
  void* out;             // [rows, width], rows out_stride elements apart
  void* sum;             // [rows, width], x + residual; unused without a residual
  int64_t rows, width, x_stride, residual_stride, out_stride, dtype, weight_dtype;
  double eps;
};

template <class T, class W>
void rms_norm_row(const T* x, const T* residual, const W* weight, T* out, T* h, int64_t width, float eps) {
  Vec squares{};
  const auto add = [&](int64_t i, int64_t n) {
    Vec v = n == kLanes ? load(x + i) : load_some(x + i, n);
    if (residual != nullptr) {
      v = round_to<T>(v + (n == kLanes ? load(residual + i) : load_some(residual + i, n)));
      n == kLanes ? store(h + i, v) : store_some(h + i, v, n);
    }
    squares = fma(v, v, squares);
  };
  for_lanes(width, [&](int64_t i) { add(i, kLanes); }, add);
  const Vec scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  const T* in = residual != nullptr ? h : x;
  for_lanes(
      width, [&](int64_t i) { store(out + i, round_to<T>(load(in + i) * scale) * load(weight + i)); },
      [&](int64_t i, int64_t n) { store_some(out + i, round_to<T>(load_some(in + i, n) * scale) * load_some(weight + i, n), n); });
}

void rms_norm(const RmsNormArgs& a, Pool& pool) {
  with_float_type(a.dtype, [&](auto type) {
    with_float_type(a.weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      using W = decltype(weight_type);
      for_rows(pool, a.rows, a.width, [&](int64_t row) {
        const T* residual = static_cast<const T*>(a.residual);
        rms_norm_row(static_cast<const T*>(a.x) + row * a.x_stride,
                     residual == nullptr ? nullptr : residual + row * a.residual_stride, static_cast<const W*>(a.weight),
                     static_cast<T*>(a.out) + row * a.out_stride, static_cast<T*>(a.sum) + row * a.width, a.width,
                     static_cast<float>(a.eps));
      });
    });
  });
}

// ---- qk_norm ----

struct QkNormArgs {
  void* q;  // [rows, q_heads, dim], rows q_stride elements apart; each head normalised in place
  void* k;  // [rows, k_heads, dim]
  const void* q_weight;  // [dim]
  const void* k_weight;
  int64_t rows, q_heads, k_heads, dim, q_stride, k_stride, dtype, weight_dtype;
  double eps;
};

void qk_norm(const QkNormArgs& a, Pool& pool) {
  with_float_type(a.dtype, [&](auto type) {
    with_float_type(a.weight_dtype, [&](auto weight_type) {
      using T = decltype(type);
      using W = decltype(weight_type);
      for_rows(pool, a.rows, (a.q_heads + a.k_heads) * a.dim, [&](int64_t row) {
        const auto normalise = [&](T* x, int64_t heads, const void* weight) {
          for (T* head = x; head < x + heads * a.dim; head += a.dim) {
            rms_norm_row<T, W>(head, nullptr, static_cast<const W*>(weight), head, head, a.dim, static_cast<float>(a.eps));
          }
        };
        normalise(static_cast<T*>(a.q) + row * a.q_stride, a.q_heads, a.q_weight);
        normalise(static_cast<T*>(a.k) + row * a.k_stride, a.k_heads, a.k_weight);
      });
    });
  });
}

// ---- rotary ----

struct RotaryArgs {
  void* q;  // [rows, q_heads, dim], rows q_stride elements apart; rotated in place
  void* k;  // [rows, k_heads, dim]
  const int32_t* positions;
  const float* table;  // [P, dim]: cosines of a position's dim / 2 angles, then the sines
  int64_t rows, q_heads, k_heads, dim, q_stride, k_stride, dtype;
};

template <class T>
void rotate(T* x, const float* cosines, const float* sines, int64_t half) {
  for_lanes(
      half,
      [&](int64_t i) {
        const Vec first = load(x + i), second = load(x + half + i), c = load(cosines + i), s = load(sines + i);
        store(x + i, fma(first, c, -(second * s)));
        store(x + half + i, fma(second, c, first * s));
      },
      [&](int64_t i, int64_t n) {
        const Vec first = load_some(x + i, n), second = load_some(x + half + i, n);
        const Vec c = load_some(cosines + i, n), s = load_some(sines + i, n);
        store_some(x + i, fma(first, c, -(second * s)), n);
        store_some(x + half + i, fma(second, c, first * s), n);
      });
}

void rotary(const RotaryArgs& a, Pool& pool) {
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t half = a.dim / 2;
    for_rows(pool, a.rows, (a.q_heads + a.k_heads) * a.dim, [&](int64_t row) {
      const float* cosines = a.table + a.positions[row] * a.dim;
      T* q = static_cast<T*>(a.q) + row * a.q_stride;
      T* k = static_cast<T*>(a.k) + row * a.k_stride;
      for (int64_t head = 0; head < a.q_heads; ++head) rotate(q + head * a.dim, cosines, cosines + half, half);
      for (int64_t head = 0; head < a.k_heads; ++head) rotate(k + head * a.dim, cosines, cosines + half, half);
    });
  });
}

// ---- act_mul ----

struct ActMulArgs {
  const void* x;  // [rows, 2 * width]: gate | up
  void* out;      // [rows, width]
  int64_t rows, width, x_stride, dtype;
};

void silu_mul(const ActMulArgs& a, Pool& pool) {
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(pool, a.rows, 2 * a.width, [&](int64_t row) {
      silu_mul_row(static_cast<const T*>(a.x) + row * a.x_stride, static_cast<T*>(a.out) + row * a.width, a.width);
    });
  });
}

// ---- argmax ----

struct ArgmaxArgs {
  const void* x;  // [rows, width]
  int64_t* out;   // [rows]
  int64_t rows, width, x_stride, dtype;
};

struct Best {
  float value;
  int64_t index;
};

// torch's order: a NaN beats everything; among equals the lowest index wins.
inline bool beats(float a, float b) { return a > b || (a != a && b == b); }

template <class T>
Best best_of(const T* x, int64_t begin, int64_t end) {
  Vec values = broadcast(-std::numeric_limits<float>::infinity());
  IntVec indices, current;
  for (int i = 0; i < kLanes; ++i) current[i] = static_cast<int32_t>(begin) + i;
  indices = current;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes, current += kLanes) {
    const Vec v = load(x + i);
    const IntVec better = (v > values) | ((v != v) & (values == values));
    values = select(better, v, values);
    indices = select(better, current, indices);
  }
  Best best{-std::numeric_limits<float>::infinity(), begin};
  if (i > begin) {
    best = {values[0], indices[0]};
    for (int lane = 1; lane < kLanes; ++lane) {
      const bool tie = !beats(best.value, values[lane]) && !beats(values[lane], best.value);
      if (beats(values[lane], best.value) || (tie && indices[lane] < best.index)) best = {values[lane], indices[lane]};
    }
  }
  for (; i < end; ++i) {
    const float v = load_some(x + i, 1)[0];
    if (beats(v, best.value)) best = {v, i};
  }
  return best;
}

void argmax(const ArgmaxArgs& a, Pool& pool) {
  const int64_t parts = (a.width + 2 * kGrain - 1) / (2 * kGrain), part = (a.width + parts - 1) / parts;
  Best* best = static_cast<Best*>(pool.shared_scratch(a.rows * parts * sizeof(Best)));
  with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    pool.parallel_for(a.rows * parts, [&](int64_t chunk, int) {
      const int64_t begin = chunk % parts * part, end = begin + part < a.width ? begin + part : a.width;
      best[chunk] = best_of(static_cast<const T*>(a.x) + chunk / parts * a.x_stride, begin, end);
    });
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    Best winner = best[row * parts];
    for (int64_t i = 1; i < parts; ++i) {
      if (beats(best[row * parts + i].value, winner.value)) winner = best[row * parts + i];
    }
    a.out[row] = winner.index;
  }
}

// ---- select_rows ----

struct SelectRowsArgs {
  const char* x;         // rows of row_bytes bytes, stride_bytes apart
  const int64_t* index;  // [rows]
  char* out;             // [rows, row_bytes]
  int64_t rows, row_bytes, stride_bytes;
};

void select_rows(const SelectRowsArgs& a, Pool& pool) {
  for_rows(pool, a.rows, a.row_bytes, [&](int64_t row) {
    std::memcpy(a.out + row * a.row_bytes, a.x + a.index[row] * a.stride_bytes, a.row_bytes);
  });
}

}  // namespace

MINFER_OPS(elementwise)
MINFER_OP(rms_norm, RmsNormArgs), MINFER_OP(qk_norm, QkNormArgs), MINFER_OP(rotary, RotaryArgs),
    MINFER_OP(silu_mul, ActMulArgs), MINFER_OP(argmax, ArgmaxArgs), MINFER_OP(select_rows, SelectRowsArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
