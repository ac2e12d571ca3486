#include "graph.h"

#include <cstring>

#include "pool.h"

namespace minfer {

void Graph::add(OpFunction function, const void* args, int64_t args_size) {
  const int64_t first = static_cast<int64_t>(words_.size());
  steps_.push_back({function, first});
  words_.resize(first + args_size / 8);
  std::memcpy(words_.data() + first, args, args_size);
}

void Graph::bind(int64_t field_offset, int64_t variable) {
  bindings_.push_back({steps_.back().args + field_offset / 8, variable});
}

void Graph::run(const int64_t* variables, Pool& pool) {
  for (const Binding& binding : bindings_) words_[binding.word] = variables[binding.variable];
  for (const Step& step : steps_) step.function(words_.data() + step.args, pool);
}

}  // namespace minfer
