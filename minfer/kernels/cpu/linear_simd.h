// The vector vocabulary of the matrix products, one header for each instruction set: sixteen columns of the result at a time.
//
//   Floats, Ints   one float or int32 for each column
//   Bytes          64 bytes: the codes of 16 columns x 4 inputs, or the nibbles of 16 columns x 8 inputs
//   Brains         bfloat16 of 16 columns x 2 inputs
//   Dots<bits>     a running sum of code * x over the 32 inputs of a group, exact: unsigned codes below 2^bits, signed x
//     start(c)       c is what the whole group's sum begins with
//     step(w, x)     adds four inputs: w as Bytes, x as four int8 in one int32
//     total(c)       the sum, c included (an instruction set adds it at the start or at the end, whichever is free)
//   expand_*       codes to numbers; the order in which inputs come out is that of kInputOrder in linear_tile.h
//   look_up_floats the same through 256 floats; expand_small_floats: 8-bit floats to bfloat16, by the format's mantissa bits
//   dot_brains     sum + w * x for two inputs
//   abs_bits, max_int, largest, quantize, sum_of    finding a group's largest |x| (as bits, so that NaN wins) and rounding it
//
// kTileRows x kTileVectors is the register tile: as many rows and vectors of columns as one pass multiplies.
//
// simd.h serves the other kernels: there a vector is as wide as the machine's, here sixteen columns are the unit on all of
// them, because the packed layout is the same for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the machine's are only passed to inlined functions
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own _mm512_undefined_*
#endif

#if defined(MINFER_ISA_avx512)
#include "linear_simd_avx512.h"
#elif defined(MINFER_ISA_avx2)
#include "linear_simd_avx2.h"
#else
#include "linear_simd_portable.h"
#endif
