#include "graph.h"

#include <cstring>

#include "pool.h"

namespace minfer {

void Graph::add(const Op& op, const void* args) {
  if (op.stream != nullptr) {
    const Stream stream = op.stream(args);
    for (auto step = steps_.rbegin(); step != steps_.rend() && step->next.memory == nullptr; ++step) step->next = stream;
  }
  const int64_t first = static_cast<int64_t>(words_.size());
  steps_.push_back({op.run, first, {}});
  words_.resize(first + op.args_size / 8);
  std::memcpy(words_.data() + first, args, op.args_size);
}

void Graph::bind(int64_t field_offset, int64_t variable) {
  bindings_.push_back({steps_.back().args + field_offset / 8, variable});
}

void Graph::run(const int64_t* variables, Pool& pool) {
  for (const Binding& binding : bindings_) words_[binding.word] = variables[binding.variable];
  for (const Step& step : steps_) {
    pool.expect(step.next);
    step.function(words_.data() + step.args, pool);
  }
  pool.expect({});
}

}  // namespace minfer
