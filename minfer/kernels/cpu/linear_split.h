// How a product is cut: panels of columns, and blocks of rows where there are many, handed to threads.
//
// Each thread begins with a stretch of its own, so that it knows what it reads next and can fetch ahead, and helps with the
// others' when it is done, so that a thread that lost its core to a neighbour delays nobody.
#pragma once

#include <atomic>
#include <cstdint>

#include "linear_rows.h"
#include "pool.h"

namespace minfer::MINFER_ISA {
namespace {

constexpr int64_t kSerialValues = 4 * 1024;  // that one thread prepares faster than two could agree on
constexpr int64_t kMaxStretches = 64;

// Runs body(item, more) for every item; `more` says that the same thread most likely does item + 1 next.
template <class Body>
void split(Pool& pool, int64_t items, const Body& body) {
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Stretch stretches[kMaxStretches];
  const int64_t count = at_most(at_most(pool.workers(), kMaxStretches), items);
  for (int64_t s = 0; s < count; ++s) {
    stretches[s].next.store(items * s / count, std::memory_order_relaxed);
    stretches[s].end = items * (s + 1) / count;
  }
  pool.parallel_for(count, [&](int64_t own, int) {
    for (int64_t i = 0; i < count; ++i) {
      Stretch& stretch = stretches[(own + i) % count];
      for (;;) {
        const int64_t item = stretch.next.fetch_add(1, std::memory_order_relaxed);
        if (item >= stretch.end) break;
        body(item, item + 1 < stretch.end);
      }
    }
  });
}

// Rows of x in blocks that stay in the second-level cache while all panels pass by.
struct RowBlocks {
  int64_t rows, count;
  RowBlocks(int64_t total, int64_t row_bytes, int64_t tile_rows) {
    constexpr int64_t kBytes = 384 * 1024, kMost = 512;
    const int64_t wanted = at_most(kMost, at_least(kBytes / row_bytes, 4 * tile_rows));
    count = (total + wanted - 1) / wanted;
    rows = round_up((total + count - 1) / count, tile_rows);
    count = (total + rows - 1) / rows;
  }
};

}  // namespace
}  // namespace minfer::MINFER_ISA
