// A persistent pool of threads that run parallel loops with a join of about a microsecond.
//
//   pool.parallel_for(chunks, [&](int64_t chunk, int worker) { ... });
//
// Chunks are claimed one by one from a shared ticket, so a core that a neighbour is using simply takes fewer of them, and a
// worker that was put to sleep between chunks delays nobody: the loop is over when every chunk is done, not when every
// worker has reported. The calling thread works too (as worker 0). Which worker runs a chunk is unspecified: results must
// not depend on it, nor on the number of workers.
//
// Workers spin briefly for the next loop, then park. While they spin they fetch the weights that they will need next, if
// they were told which (`expect`): between two products memory would otherwise lie idle, for as long as the small ops take
// and for the first few hundred nanoseconds of the product. A loop inside a loop is not allowed. One thread at a time may use a
// pool; `Pool::Use` is the lock for that.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "abi.h"

namespace minfer {

class Pool {
 public:
  explicit Pool(int workers);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int workers() const { return workers_; }

  // Runs body(chunk, worker) for every chunk in [0, chunks), in any order, and returns when all have finished.
  template <class Body>
  void parallel_for(int64_t chunks, const Body& body) {
    if (workers_ == 1 || chunks <= 1) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk, 0);
      return;
    }
    run([](const void* context, int64_t chunk, int worker) { (*static_cast<const Body*>(context))(chunk, worker); }, &body,
        chunks);
  }

  // Tells the workers what the next op with weights will read; nothing at all if `stream` is empty.
  void expect(const Stream& stream);

  // Scratch memory of one worker, 64-byte aligned, kept between calls and grown on demand; its contents are unspecified.
  // Worker w may only ask for its own, from inside a loop; outside of loops the caller may ask for any.
  void* scratch(int worker, size_t bytes);

  // Scratch memory that all workers share, to be asked for outside of loops: for what one loop leaves to the next.
  void* shared_scratch(size_t bytes) { return scratch(workers_, bytes); }

  // Held by whoever runs ops, so that two threads with one pool take turns.
  struct Use {
    explicit Use(Pool& pool) : lock(pool.use_) {}
    std::lock_guard<std::mutex> lock;
  };

 private:
  using Call = void (*)(const void* context, int64_t chunk, int worker);
  struct Threads;
  struct Scratch;

  // What one worker is told to expect, and how far it has come. The caller's thread writes begin and end, the worker the rest:
  // a worker that meets one of them old and the other new fetches something useless, once.
  struct alignas(64) Expected {
    std::atomic<const char*> begin{nullptr}, end{nullptr};
    const char* seen = nullptr;  // the begin that `next` counts from
    const char* next = nullptr;
  };

  void wait(int worker);
  void run(Call call, const void* context, int64_t chunks);
  void work(int worker, uint64_t ticket);
  void loop(int worker);
  void start();

  // A ticket is (loop number << 32 | chunks left to claim). A claim is a compare-and-swap on all of it, so a late worker
  // that still holds an old ticket can't take a chunk of the next loop, and it counts down, so that a finished loop's ticket
  // reads "nothing left" whatever the next loop has already written beside it.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Call> call_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> chunks_{0};
  alignas(64) std::atomic<int> parked_{0};
  std::atomic<bool> stop_{false};

  int workers_;
  int fork_generation_ = 0;
  Threads* threads_ = nullptr;
  Scratch* scratch_ = nullptr;
  Expected* expected_ = nullptr;  // [workers]
  std::mutex use_;
};

}  // namespace minfer
