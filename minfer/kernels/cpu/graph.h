// A recorded step: ops with copies of their arguments, run back to back with no Python in between.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"

namespace minfer {

class Graph {
 public:
  // Appends an op. `args` is copied.
  void add(const Op& op, const void* args);

  // Makes one 8-byte field of the op added last follow `variables[variable]` of each run.
  void bind(int64_t field_offset, int64_t variable);

  void run(const int64_t* variables, Pool& pool);

 private:
  struct Step {
    OpFunction function;
    int64_t args;  // index of the first word
    Stream next;   // weights of the first op after this one that has any
  };
  struct Binding {
    int64_t word;
    int64_t variable;
  };
  std::vector<Step> steps_;
  std::vector<int64_t> words_;
  std::vector<Binding> bindings_;
};

}  // namespace minfer
