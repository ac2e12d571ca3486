// The C ABI between Python and the kernels, and the rules that every kernel file follows.
//
// An op is a plain function `void op(const Args&, Pool&)`. Its arguments are one struct whose fields are all 8 bytes wide
// (int64_t, double, pointer), so that the ctypes mirror on the Python side can't disagree about padding. The struct is
// copied when a graph is recorded, so it may point at tensors but never at temporaries.
//
// Fields named `rows` or `requests` are run-time quantities: a recorded graph rewrites them before each replay. Whatever
// depends on them (which kernel, how work is cut) is therefore decided here, in C++, and never in Python.
//
// Each kernel source is compiled once per instruction set, with MINFER_ISA as the name of an inner namespace, and ends in a
// table of its ops. Everything in it lives in minfer::MINFER_ISA or has internal linkage: a plain inline function or an STL
// container would be merged by the linker across instruction sets, and the survivor may be the one this CPU can't run. For
// the same reason there are no static initialisers.
#pragma once

#include <cstdint>

namespace minfer {

class Pool;

// Must agree with DTYPES in library.py.
enum DType : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat8E4m3 = 6,
  kFloat8E5m2 = 7,
  kUint8 = 8,
};

using OpFunction = void (*)(const void* args, Pool& pool);

// Memory that an op reads whatever its inputs are: its weights. Worker w of n begins with item (items * w / n).
struct Stream {
  const char* memory;
  int64_t items, item_bytes;
};

struct Op {
  const char* name;  // nullptr ends a table
  OpFunction run;
  int64_t args_size;  // compared with the ctypes mirror when the op is looked up
  Stream (*stream)(const void* args);  // nullptr for an op without weights
};

// Turns `void kernel(const Args&, Pool&)` into a table entry.
template <class Args, void (*kernel)(const Args&, Pool&)>
static void op_entry(const void* args, Pool& pool) {
  kernel(*static_cast<const Args*>(args), pool);
}

#define MINFER_OP(name, Args) \
  { #name, &op_entry<Args, name>, sizeof(Args), nullptr }

// The same for an op with weights, which `stream(const Args&)` tells.
template <class Args, Stream (*stream)(const Args&)>
static Stream stream_entry(const void* args) {
  return stream(*static_cast<const Args*>(args));
}
#define MINFER_STREAMING_OP(name, Args, stream) \
  { #name, &op_entry<Args, name>, sizeof(Args), &stream_entry<Args, stream> }

// Opens and closes the table of the kernel file FILE.cpp: `MINFER_OPS(FILE) MINFER_OP(a, AArgs), ... MINFER_OPS_END`.
#define MINFER_OPS(file)           \
  extern const Op file##_ops[];    \
  const Op file##_ops[] = {
#define MINFER_OPS_END             \
  { nullptr, nullptr, 0, nullptr } \
  }                                \
  ;

}  // namespace minfer
