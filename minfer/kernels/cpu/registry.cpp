// The exported C functions: pools, op look-up by name and instruction set, single calls, graphs.
#include <cstring>

#include "abi.h"
#include "graph.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// tables.inc is written by CMake: one TABLE(isa, file) per compiled kernel file and instruction set.
namespace minfer {
#define TABLE(isa, file)         \
  namespace isa {                \
  extern const Op file##_ops[];  \
  }
#include "tables.inc"
#undef TABLE
}  // namespace minfer

namespace {

struct NamedTable {
  const char* isa;
  const minfer::Op* ops;
};

const NamedTable kTables[] = {
#define TABLE(isa, file) {#isa, minfer::isa::file##_ops},
#include "tables.inc"
#undef TABLE
};

bool cpu_runs(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return true;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (std::strcmp(isa, "avx512vnni") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && cpu_runs("avx2");
  }
  if (std::strcmp(isa, "avx512") == 0) return cpu_runs("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

}  // namespace

// 1 if the library holds kernels for this instruction set and the CPU runs them, else 0.
EXPORT int64_t minfer_has_isa(const char* isa) {
  for (const NamedTable& table : kTables) {
    if (std::strcmp(table.isa, isa) == 0) return cpu_runs(isa);
  }
  return 0;
}

// The op of this name, or nullptr.
EXPORT const minfer::Op* minfer_find_op(const char* isa, const char* name) {
  for (const NamedTable& table : kTables) {
    if (std::strcmp(table.isa, isa) != 0) continue;
    for (const minfer::Op* op = table.ops; op->name != nullptr; ++op) {
      if (std::strcmp(op->name, name) == 0) return op;
    }
  }
  return nullptr;
}

EXPORT int64_t minfer_op_args_size(const minfer::Op* op) { return op->args_size; }

EXPORT minfer::Pool* minfer_pool_create(int64_t workers) { return new minfer::Pool(static_cast<int>(workers)); }
EXPORT void minfer_pool_destroy(minfer::Pool* pool) { delete pool; }

EXPORT void minfer_call(const minfer::Op* op, const void* args, minfer::Pool* pool) {
  minfer::Pool::Use use(*pool);
  op->run(args, *pool);
}

EXPORT minfer::Graph* minfer_graph_create() { return new minfer::Graph; }
EXPORT void minfer_graph_destroy(minfer::Graph* graph) { delete graph; }
EXPORT void minfer_graph_add(minfer::Graph* graph, const minfer::Op* op, const void* args) {
  graph->add(*op, args);
}
EXPORT void minfer_graph_bind(minfer::Graph* graph, int64_t field_offset, int64_t variable) {
  graph->bind(field_offset, variable);
}
EXPORT void minfer_graph_run(minfer::Graph* graph, const int64_t* variables, minfer::Pool* pool) {
  minfer::Pool::Use use(*pool);
  graph->run(variables, *pool);
}
