#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace minfer {
namespace {

// Some 200 microseconds of pauses: longer than the host takes between a step, its head and the next one, shorter than anyone
// would notice. A worker that has parked takes tens of microseconds to come back.
constexpr int kSpins = 12000;
// A caller whose workers were put to sleep with a chunk in hand lets others have the core.
constexpr int kSpinsBeforeYield = 2000;

// Of what lies ahead each worker fetches at most this much: a part of the second-level cache of a small core.
constexpr int64_t kExpectedBytes = 128 * 1024;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr uint64_t loop_of(uint64_t ticket) { return ticket >> 32; }
constexpr int64_t left_of(uint64_t ticket) { return static_cast<int64_t>(ticket & 0xffffffffu); }

// fork() copies a pool without its threads; the child must notice and start its own.
std::atomic<int> fork_generation{0};
void count_fork() { fork_generation.fetch_add(1); }

}  // namespace

struct Pool::Threads {
  std::vector<std::thread> list;
  std::mutex mutex;
  std::condition_variable wake;
};

struct Pool::Scratch {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
  };
  std::vector<Buffer> buffers;
};

Pool::Pool(int workers) : workers_(workers < 1 ? 1 : workers) {
  static const int registered = pthread_atfork(nullptr, nullptr, count_fork);
  (void)registered;
  scratch_ = new Scratch;
  scratch_->buffers.resize(workers_ + 1);
  expected_ = new Expected[workers_];
  start();
}

Pool::~Pool() {
  if (threads_ != nullptr && fork_generation_ == fork_generation.load()) {
    {
      std::lock_guard<std::mutex> lock(threads_->mutex);
      stop_.store(true);
    }
    threads_->wake.notify_all();
    for (auto& thread : threads_->list) thread.join();
    delete threads_;
  }
  for (auto& buffer : scratch_->buffers) std::free(buffer.data);
  delete scratch_;
  delete[] expected_;
}

void Pool::start() {
  // After a fork the old Threads stays behind unfreed: its handles name threads that this process doesn't have.
  fork_generation_ = fork_generation.load();
  parked_.store(0);
  threads_ = new Threads;
  for (int worker = 1; worker < workers_; ++worker) {
    threads_->list.emplace_back([this, worker] { loop(worker); });
  }
}

void* Pool::scratch(int worker, size_t bytes) {
  auto& buffer = scratch_->buffers[worker];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) throw std::bad_alloc();
  }
  return buffer.data;
}

void Pool::expect(const Stream& stream) {
  for (int worker = 0; worker < workers_; ++worker) {
    const char* begin = stream.memory + stream.items * worker / workers_ * stream.item_bytes;
    const char* end = stream.memory + stream.items * (worker + 1) / workers_ * stream.item_bytes;
    expected_[worker].end.store(end - begin > kExpectedBytes ? begin + kExpectedBytes : end, std::memory_order_relaxed);
    expected_[worker].begin.store(begin, std::memory_order_relaxed);
  }
}

// One turn of a spin: two cache lines of what is expected, or else a pause.
void Pool::wait(int worker) {
  Expected& expected = expected_[worker];
  const char* begin = expected.begin.load(std::memory_order_relaxed);
  if (begin != expected.seen) expected.seen = expected.next = begin;
  if (expected.next < expected.end.load(std::memory_order_relaxed)) {
    __builtin_prefetch(expected.next, 0, 2);
    __builtin_prefetch(expected.next + 64, 0, 2);
    expected.next += 128;
  } else {
    relax();
  }
}

void Pool::run(Call call, const void* context, int64_t chunks) {
  if (fork_generation_ != fork_generation.load(std::memory_order_relaxed)) start();
  call_.store(call, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  chunks_.store(chunks, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  const uint64_t ticket = (loop_of(ticket_.load(std::memory_order_relaxed)) + 1) << 32 | static_cast<uint32_t>(chunks);
  ticket_.store(ticket);  // sequentially consistent, as is the worker's side: either it sees this ticket or we see it parked
  if (parked_.load() > 0) {
    std::lock_guard<std::mutex> lock(threads_->mutex);
    threads_->wake.notify_all();
  }
  work(0, ticket);
  for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins < kSpinsBeforeYield) {
      wait(0);
    } else {
      sched_yield();
    }
  }
}

// Claims and runs chunks of the loop that `ticket` belongs to until none is left.
void Pool::work(int worker, uint64_t ticket) {
  const uint64_t loop = loop_of(ticket);
  while (loop_of(ticket) == loop && left_of(ticket) > 0) {
    // Read before the claim that proves them right: if it succeeds, this loop was still the current one.
    const Call call = call_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    const int64_t chunk = chunks_.load(std::memory_order_relaxed) - left_of(ticket);
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    call(context, chunk, worker);
    done_.fetch_add(1, std::memory_order_release);
    ticket = ticket_.load(std::memory_order_acquire);
  }
}

void Pool::loop(int worker) {
  uint64_t seen = 0;
  for (;;) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (int spins = 0; loop_of(ticket) == seen && spins < kSpins; ++spins) {
      wait(worker);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    if (loop_of(ticket) == seen) {
      std::unique_lock<std::mutex> lock(threads_->mutex);
      parked_.fetch_add(1);
      threads_->wake.wait(lock, [&] { return stop_.load() || loop_of(ticket = ticket_.load()) != seen; });
      parked_.fetch_sub(1);
      if (stop_.load()) return;
    }
    seen = loop_of(ticket);
    work(worker, ticket);
  }
}

}  // namespace minfer
