// What the products take: for themselves, and for the mixture of experts, which calls them.
#pragma once

#include <cstdint>

#include "linear_weight.h"

namespace minfer::MINFER_ISA {
namespace {

struct LinearDenseArgs {
  const void* x;
  int64_t x_stride;  // elements
  void* y;
  int64_t y_stride;
  const void* bias;  // [n] or null
  int64_t rows;
  int64_t dtype;  // of x, y, bias and W
  const void* weight;
  int64_t n, k;
};

struct LinearQuantizedArgs {
  const void* x;
  int64_t x_stride;  // elements
  void* y;
  int64_t y_stride;
  const void* bias;  // [n] or null
  int64_t rows;
  int64_t dtype;  // of x, y and bias
  const QuantizedWeight* weight;
};

}  // namespace
}  // namespace minfer::MINFER_ISA
