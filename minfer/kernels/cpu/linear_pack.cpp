// Repacking matrices into the panels of 32 columns that the products read (linear_tile.h, linear_dense.cpp), and picking single
// rows out of them again for embeddings. Plain loops: packing runs once at load, at about the speed of memory.
#include "abi.h"
#include "linear_rows.h"
#include "linear_weight.h"
#include "pool.h"

namespace minfer::MINFER_ISA {
namespace {

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

struct PackCodesArgs {
  const int8_t* codes;  // [n, k] contiguous
  char* out;            // the first panel
  int64_t panel_bytes;  // from one panel to the next
  int64_t n, k, bits;
  int64_t shift;  // added to every code: 8 makes signed 4-bit codes unsigned, 128 signed 8-bit ones
};

void pack_codes(const PackCodesArgs& a, Pool& pool) {
  const int64_t inputs = a.bits == 4 ? 8 : 4;  // of one 64-byte vector
  pool.parallel_for(panels_of(a.n), [&](int64_t panel, int) {
    char* out = a.out + panel * a.panel_bytes;
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t n = panel * kPanel + column;
      char* to = out + column / kVector * 64 + column % kVector * 4;
      for (int64_t k = 0; k < a.k; k += inputs, to += 128) {
        for (int64_t i = 0; i < 4; ++i) {
          if (n >= a.n) {
            to[i] = 0;
            continue;
          }
          const int8_t* code = a.codes + n * a.k + k + i;
          to[i] = static_cast<char>(a.bits == 4 ? ((code[0] + a.shift) & 15) | ((code[4] + a.shift) & 15) << 4
                                                : code[0] + a.shift);
        }
      }
    }
  });
}

struct PackScalesArgs {
  const float* scales;  // [n, groups]
  const float* mins;    // [n, groups] or null
  char* out;            // the first panel's scales
  int64_t panel_bytes;  // from one panel to the next
  int64_t n, groups;
  int64_t repeat;  // how often each scale is written: splits groups that aren't a unit times a power of two
  int64_t half;
};

void pack_scales(const PackScalesArgs& a, Pool& pool) {
  const int64_t kinds = a.mins != nullptr ? 2 : 1, size = a.half ? 2 : 4;
  pool.parallel_for(panels_of(a.n), [&](int64_t panel, int) {
    char* out = a.out + panel * a.panel_bytes;
    for (int64_t g = 0; g < a.groups * a.repeat; ++g) {
      for (int64_t kind = 0; kind < kinds; ++kind) {
        alignas(64) float lanes[kPanel];
        for (int64_t column = 0; column < kPanel; ++column) {
          const int64_t n = panel * kPanel + column;
          lanes[column] = n < a.n ? (kind == 0 ? a.scales : a.mins)[n * a.groups + g / a.repeat] : 0.0f;
        }
        for (int64_t c = 0; c < kPanel; c += kVector, out += kVector * size) {
          store_values(out, a.half ? kFloat16 : kFloat32, load_floats(lanes + c));
        }
      }
    }
  });
}

struct PackDenseArgs {
  const char* weight;  // [n, k] contiguous
  char* out;           // panels * 32 * k (rounded up to whole steps) elements
  int64_t n, k, dtype;
};

void pack_dense(const PackDenseArgs& a, Pool& pool) {
  const int64_t size = size_of(a.dtype), step = a.dtype == kBFloat16 ? 2 : 1, steps = (a.k + step - 1) / step;
  pool.parallel_for(panels_of(a.n), [&](int64_t panel, int) {
    char* out = a.out + panel * steps * step * kPanel * size;
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t n = panel * kPanel + column;
      char* to = out + column * step * size;
      for (int64_t k = 0; k < steps * step; ++k) {
        char* at = to + k / step * step * kPanel * size + k % step * size;
        if (n < a.n && k < a.k) {
          std::memcpy(at, a.weight + (n * a.k + k) * size, size);
        } else {
          std::memset(at, 0, size);
        }
      }
    }
  });
}

// ---- single rows ----

struct GatherQuantizedArgs {
  const void* ids;  // [rows], int32 or int64
  void* y;          // [rows, inputs] contiguous
  int64_t rows;
  int64_t id_dtype, dtype;  // of ids and of y
  const QuantizedWeight* weight;
};

int64_t id_at(const void* ids, int64_t dtype, int64_t row) {
  return dtype == kInt32 ? static_cast<const int32_t*>(ids)[row] : static_cast<const int64_t*>(ids)[row];
}

void dequantize_row(const QuantizedWeight& w, int64_t n, int64_t dtype, char* y) {
  const int64_t kinds = w.has_min ? 2 : 1, column = n % kPanel;
  const char* panel = w.panels + n / kPanel * w.panel_bytes();
  const char* codes = panel + column / kVector * 64 + column % kVector * 4;
  const auto scale_at = [&](int64_t i) {
    const char* scales = panel + w.code_bytes();
    float scale;
    if (!w.half_scales) {
      std::memcpy(&scale, scales + i * 4, 4);
      return scale;
    }
    uint16_t half[kVector] = {};
    alignas(64) float wide[kVector];
    std::memcpy(half, scales + i * 2, 2);
    store_floats(wide, load_halves(half));
    return wide[0];
  };
  for (int64_t k = 0; k < w.k; k += kVector) {
    const int64_t at = k / w.group * kinds * kPanel + column, size = size_of(dtype);
    const float scale = scale_at(at), min = w.has_min ? scale_at(at + kPanel) : 0.0f;
    alignas(64) float values[kVector];
    for (int64_t i = 0; i < kVector; ++i) {
      const int64_t inputs = w.bits == 4 ? 8 : 4, j = (k + i) % inputs;
      const uint8_t byte = static_cast<uint8_t>(codes[(k + i) / inputs * 128 + j % 4]);
      float level = static_cast<float>(byte) - 128.0f;
      if (w.bits == 4) {
        level = w.levels[j < 4 ? byte & 15 : byte >> 4];
      } else if (w.mantissa != 0) {
        level = w.levels[byte];
      }
      values[i] = scale * level + min;
    }
    if (w.order == nullptr) {
      store_values(y + k * size, dtype, load_floats(values));
      continue;
    }
    alignas(64) char rounded[kVector * 4];
    store_values(rounded, dtype, load_floats(values));
    for (int64_t i = 0; i < kVector; ++i) {
      if (w.order[k + i] >= 0) std::memcpy(y + w.order[k + i] * size, rounded + i * size, size);
    }
  }
}

void gather_quantized(const GatherQuantizedArgs& a, Pool& pool) {
  const int64_t row_bytes = a.weight->inputs * size_of(a.dtype);
  pool.parallel_for(a.rows, [&](int64_t row, int) {
    dequantize_row(*a.weight, id_at(a.ids, a.id_dtype, row), a.dtype, static_cast<char*>(a.y) + row * row_bytes);
  });
}

struct GatherDenseArgs {
  const void* ids;  // as above
  void* y;
  int64_t rows;
  int64_t id_dtype, dtype;
  const char* weight;
  int64_t k;
};

void gather_dense(const GatherDenseArgs& a, Pool& pool) {
  const int64_t size = size_of(a.dtype), step = a.dtype == kBFloat16 ? 2 : 1, steps = (a.k + step - 1) / step;
  pool.parallel_for(a.rows, [&](int64_t row, int) {
    const int64_t n = id_at(a.ids, a.id_dtype, row);
    const char* from = a.weight + (n / kPanel * steps * kPanel + n % kPanel) * step * size;
    char* to = static_cast<char*>(a.y) + row * a.k * size;
    for (int64_t k = 0; k < a.k; ++k) std::memcpy(to + k * size, from + (k / step * kPanel * step + k % step) * size, size);
  });
}

}  // namespace

MINFER_OPS(linear_pack)
MINFER_OP(pack_codes, PackCodesArgs), MINFER_OP(pack_scales, PackScalesArgs), MINFER_OP(pack_dense, PackDenseArgs),
    MINFER_OP(gather_quantized, GatherQuantizedArgs), MINFER_OP(gather_dense, GatherDenseArgs), MINFER_OPS_END

}  // namespace minfer::MINFER_ISA
