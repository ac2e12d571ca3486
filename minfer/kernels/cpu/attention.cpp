// Causal attention of new tokens over paged K and V: ragged, grouped-query, with window, soft cap and sinks.
//
// Prefill, chunks, decode and verification are this one op. A request with few query rows is split over its context (each
// piece of work is some tiles of one KV head, shared by all query heads of the group); one with many is split over blocks
// of query rows, which walk the context themselves. attention_tile.h defines the arithmetic and why both agree bit by bit.
#include "attention_tile.h"

#include "abi.h"
#include "pool.h"
#include "simd.h"

namespace minfer {
namespace MINFER_ISA {
namespace {

struct AttentionArgs {
  const void* q;        // [T, heads, dim], tokens q_stride elements apart
  const void* k_cache;  // [blocks, kv_heads, block_size, width]
  const void* v_cache;
  const BFloat16* k_scale;  // [blocks, kv_heads, block_size], where the cache is quantised
  const BFloat16* v_scale;
  void* out;                    // [T, heads, dim]
  const int32_t* query_start;   // [requests + 1]
  const int32_t* seq_lens;      // [requests]
  const int32_t* block_tables;  // [requests, ...], rows table_stride apart
  const int64_t* tails;         // [requests, ...], rows tail_stride apart: a position, and the slots of the keys from there on; or null
  const float* sinks;           // [heads]: a score that joins the denominator; or null
  int64_t requests, heads, kv_heads, dim, block_size, q_stride, table_stride, tail_stride, dtype, cache_dtype;
  int64_t window;  // 0: none
  double scale;
  double softcap;  // 0: none
};

constexpr int64_t kFewRows = 32;          // up to here keys fill the lanes, above it query rows do
constexpr int64_t kTogether = 8;          // of few rows, those that one micro-kernel call computes
constexpr int64_t kPanel = 2 * kLanes;    // query rows that one micro-kernel call computes
constexpr int64_t kPanels = 4;            // panels that share one pass over the context

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte aligned pieces of a scratch buffer; run once without a buffer to learn the size.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// One request seen from one KV head. Query rows are numbered token by token, the heads of the group within a token.
struct Head {
  const AttentionArgs& a;
  int64_t request, kv_head, group, first_token, tokens, seq_len;
  const int64_t* tail;  // slots of the keys from position `trunk` on, which don't lie where the block table says
  int64_t trunk;

  Head(const AttentionArgs& args, int64_t request, int64_t kv_head)
      : a(args),
        request(request),
        kv_head(kv_head),
        group(args.heads / args.kv_heads),
        first_token(args.query_start[request]),
        tokens(args.query_start[request + 1] - first_token),
        seq_len(args.seq_lens[request]),
        tail(args.tails ? args.tails + request * args.tail_stride + 1 : nullptr),
        trunk(tail ? tail[-1] : INT64_MAX) {}

  int64_t rows() const { return tokens * group; }
  int64_t position(int64_t row) const { return seq_len - tokens + row / group; }
  int64_t first_key(int64_t row) const { return a.window > 0 ? larger(0, position(row) - a.window + 1) : 0; }
  int64_t query_head(int64_t row) const { return kv_head * group + row % group; }

  // Where a key of this head lies in the caches, in rows.
  int64_t row_of(int64_t key) const {
    const bool listed = key >= trunk;
    const int64_t slot = listed ? tail[key - trunk] : key;
    const int64_t block = slot / a.block_size, within = slot - block * a.block_size;
    return ((listed ? block : a.block_tables[request * a.table_stride + block]) * a.kv_heads + kv_head) * a.block_size + within;
  }

  // How many keys from this one on lie row by row behind it.
  int64_t run_of(int64_t key) const {
    return key >= trunk ? 1 : smaller(a.block_size - key % a.block_size, trunk - key);
  }
};

// ---- everything below is compiled for one kind of words, query type and cache type (uint8_t: codes) ----

template <class Words, class Q, class C>
struct Attention {
  static constexpr int kStep = Words::kStep;
  static constexpr bool kCoded = sizeof(C) == 1;
  const AttentionArgs& a;
  int64_t words, channels;  // words of a row of q or k; channels padded to whole vectors
  Coding coding{};          // of a quantised cache
  int64_t width;            // elements of a row of the cache

  explicit Attention(const AttentionArgs& args)
      : a(args), words(args.dim / kStep), channels(round_up(args.dim, larger(kLanes, 8))), width(args.dim) {
    if (kCoded) {
      coding = Coding::of<Words>(args.cache_dtype);
      width /= coding.planes;
    }
  }
  bool rotated() const { return kCoded && coding.rotated; }

  // Keys of one tile as the products want them.
  struct Tile {
    int64_t first, count;   // keys
    Word* k;                // [kTile, words], only where the cache can't be read as it is
    const char* keys[kTile];
    const C* values[kTile];
    Word* v;                // [kTile / kStep, channels]
    float* k_scale;         // [kTile] of a quantised cache: what a product becomes a score by
    float* v_scale;         // [kTile]: what a probability is multiplied by before it meets v
  };

  void carve(Carver& carver, Tile& tile) const {
    tile.k = carver.take<Word>(kReadsCache ? 0 : kTile * words);
    tile.v = carver.take<Word>(kTile / kStep * channels);
    tile.k_scale = carver.take<float>(kCoded ? kTile : 0);
    tile.v_scale = carver.take<float>(kCoded ? kTile : 0);
  }

  static constexpr bool kReadsCache = kStep * sizeof(C) == sizeof(Word);

  // Asks for the rows of a tile a few at a time, between the work on another: blocks lie anywhere in memory, in runs too
  // short for the hardware to guess the next, and all at once would only stand in the way of the loads that are due.
  struct Ahead {
    const Head* head = nullptr;
    const C* cache = nullptr;
    const BFloat16* scales = nullptr;
    int64_t width = 0, key = 0, end = 0;
    const char* row = nullptr;  // where `key` lies, once it was looked up
    int64_t left = 0;           // keys that lie behind it

    void rows(int64_t count) {
      const int64_t bytes = width * static_cast<int64_t>(sizeof(C));
      for (; count > 0 && key < end; --count, ++key, --left, row += bytes) {
        if (left == 0) {
          const int64_t at = head->row_of(key);
          row = reinterpret_cast<const char*>(cache + at * width);
          left = head->run_of(key);
          if (kCoded) __builtin_prefetch(scales + at);
        }
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte);
      }
    }
  };

  Ahead ahead(const Head& head, const void* cache, const BFloat16* scales, int64_t first) const {
    Ahead ahead;
    ahead.head = &head;
    ahead.cache = static_cast<const C*>(cache);
    ahead.scales = scales;
    ahead.width = width;
    ahead.key = first;
    ahead.end = smaller(first + kTile, head.seq_len);
    return ahead;
  }

  void read_tile(const Head& head, int64_t first, Tile& tile) const {
    read_keys(head, first, tile);
    read_values(tile, ahead(head, a.k_cache, a.k_scale, head.seq_len));
  }

  void read_keys(const Head& head, int64_t first, Tile& tile) const {
    tile.first = first;
    tile.count = smaller(kTile, head.seq_len - first);
    const C* k_cache = static_cast<const C*>(a.k_cache);
    const C* v_cache = static_cast<const C*>(a.v_cache);
    const C* rows[kTile];
    for (int64_t j = 0, at = 0, left = 0; j < tile.count; ++j, ++at, --left) {
      if (left == 0) {
        at = head.row_of(first + j);
        left = head.run_of(first + j);
      }
      tile.values[j] = v_cache + at * width;
      rows[j] = k_cache + at * width;
      tile.keys[j] = reinterpret_cast<const char*>(kReadsCache ? rows[j] : static_cast<const void*>(tile.k + j * words));
    }
    if constexpr (kCoded) {
      coding.rows(rows, tile.count, a.dim, tile.k, words);
      read_scales(head, tile);
    } else if constexpr (!kReadsCache) {
      for (int64_t j = 0; j < tile.count; ++j) Words::from_row(rows[j], a.dim, tile.k + j * words);
    }
    // Whole vectors and micro-kernel rows read past the last key; what they read is masked or dropped, but must be there.
    for (int64_t j = tile.count; j < kTile; ++j) tile.keys[j] = tile.keys[0];
  }

  void read_scales(const Head& head, Tile& tile) const {
    const float k_factor = coding.unit * static_cast<float>(a.scale), v_factor = coding.unit;
    for (int64_t j = 0, run; j < tile.count; j += run) {
      const int64_t at = head.row_of(tile.first + j);
      run = smaller(tile.count - j, head.run_of(tile.first + j));
      for (int64_t i = 0; i < run; ++i) {
        tile.k_scale[j + i] = bit_cast<float>(static_cast<uint32_t>(a.k_scale[at + i].bits) << 16) * k_factor;
        tile.v_scale[j + i] = bit_cast<float>(static_cast<uint32_t>(a.v_scale[at + i].bits) << 16) * v_factor;
      }
    }
    for (int64_t j = tile.count; j < kTile; ++j) tile.k_scale[j] = tile.v_scale[j] = 0;
  }

  void read_values(Tile& tile, Ahead next) const {
    if constexpr (kCoded) {
      for (int64_t j = 0; j < tile.count; j += kLanes) {
        next.rows(kLanes);
        Word* out = tile.v + j / kStep * channels;
        coding.keys(tile.values + j, smaller(kLanes, tile.count - j), a.dim, out, channels);
        for (int64_t i = 0; i < kLanes / kStep; ++i) {
          for (int64_t d = a.dim; d < channels; ++d) out[i * channels + d] = 0;
        }
      }
    } else {
      read_plain_values(tile, next);
    }
  }

  void read_plain_values(Tile& tile, Ahead next) const {
    alignas(64) static const C zeros[kMaxHeadDim] = {};
    for (int64_t j = 0; j < tile.count; j += kStep) {
      next.rows(kStep);
      Word* out = tile.v + j / kStep * channels;
      Words::from_keys(tile.values[j], j + 1 < tile.count ? tile.values[j + 1] : zeros, a.dim, out);
      for (int64_t d = a.dim; d < channels; ++d) out[d] = 0;
    }
  }

  Vec score(Vec product, Vec factor) const {
    const Vec s = product * factor;
    return a.softcap > 0 ? soft_cap(s, static_cast<float>(a.softcap)) : s;
  }

  const Q* query(const Head& head, int64_t row) const {
    return static_cast<const Q*>(a.q) + (head.first_token + row / head.group) * a.q_stride + head.query_head(row) * a.dim;
  }

  // A row of q as words, rotated as the keys are. `line` holds dim floats.
  void query_words(const Head& head, int64_t row, float* line, Word* out) const {
    const Q* q = query(head, row);
    if (!rotated()) return Words::from_row(q, a.dim, out);
    Singles::from_row(q, a.dim, reinterpret_cast<Word*>(line));
    hadamard(line, a.dim);
    int64_t d = 0;
    for (; d + kLanes <= a.dim; d += kLanes) Words::store_row(out, d, load(line + d), kLanes);
    if (d < a.dim) Words::store_row(out, d, load_some(line + d, a.dim - d), a.dim - d);
  }

  // Writes o / l of one query row, which lies in o with `stride` floats between channels. m is what l's exponentials are over.
  void write(const Head& head, int64_t row, const float* o, int64_t stride, float m, float l, float* line) const {
    if (a.sinks) l += std::exp(a.sinks[head.query_head(row)] - m);
    for (int64_t d = 0; d < a.dim; ++d) line[d] = o[d * stride];
    if (rotated()) hadamard(line, a.dim);
    Q* out = static_cast<Q*>(a.out) + ((head.first_token + row / head.group) * a.heads + head.query_head(row)) * a.dim;
    const Vec factor = broadcast(1.0f / l);
    int64_t d = 0;
    for (; d + kLanes <= a.dim; d += kLanes) store(out + d, load(line + d) * factor);
    if (d < a.dim) store_some(out + d, load_some(line + d, a.dim - d) * factor, a.dim - d);
  }

  // ---- few rows: keys in the lanes ----

  // A partial result of one query row over one tile.
  struct Partial {
    float m, l;
    float unused[14];  // o starts on a cache line
  };
  int64_t partial_floats() const { return static_cast<int64_t>(sizeof(Partial) / sizeof(float)) + channels; }

  struct FewRows {
    Tile tile;
    Word* q;       // [kFewRows, words]
    Word* k;       // [words, kTile]
    float* s;      // [kFewRows, kTile]
    Word* p;       // [kFewRows, kTile / kStep]
  };

  void carve(Carver& carver, FewRows& w) const {
    carve(carver, w.tile);
    w.q = carver.take<Word>(kFewRows * words);
    w.k = carver.take<Word>(words * kTile);
    w.s = carver.take<float>(kFewRows * kTile);
    w.p = carver.take<Word>(kFewRows * kTile / kStep);
  }

  // Tiles [first, first + count) of a request for all its query rows; out: [rows, tiles] partials.
  void few_rows(const Head& head, int64_t first, int64_t count, int64_t tiles, float* out, FewRows& w) const {
    const int64_t rows = head.rows();
    for (int64_t row = 0; row < round_up(rows, kTogether); ++row) query_words(head, smaller(row, rows - 1), w.s, w.q + row * words);
    for (int64_t t = first; t < first + count; ++t) {
      read_keys(head, t * kTile, w.tile);
      Ahead values = ahead(head, a.v_cache, a.v_scale, t * kTile);
      for (int64_t j = 0; j < w.tile.count; j += kLanes) {
        values.rows(kLanes);
        transpose(w.tile.keys + j, words, w.k + j, kTile);
      }
      for (int64_t row = 0; row < rows; row += kTogether) {
        switch (rows - row) {
          case 1: tile_of_rows<1>(w, row); break;
          case 2: tile_of_rows<2>(w, row); break;
          case 3: tile_of_rows<3>(w, row); break;
          case 4: tile_of_rows<4>(w, row); break;
          default: tile_of_rows<kTogether>(w, row);
        }
      }
      for (int64_t row = 0; row < rows; ++row) softmax_row(head, row, w, out + (row * tiles + t) * partial_floats());
      read_values(w.tile, ahead(head, a.k_cache, a.k_scale, (t + 1 < first + count ? t + 1 : tiles) * kTile));
      values_of_rows(rows, w, out + t * partial_floats() + sizeof(Partial) / sizeof(float), tiles * partial_floats());
    }
  }

  template <int I>
  void tile_of_rows(FewRows& w, int64_t row) const {
    constexpr int N = I <= 4 ? 4 : 2;
    const char* q[I];
    for (int i = 0; i < I; ++i) q[i] = reinterpret_cast<const char*>(w.q + (row + i) * words);
    float* s = w.s + row * kTile;
    for (int64_t j = 0; j < w.tile.count; j += N * kLanes) multiply<Words, I, N>(q, 1, w.k + j, kTile, words, s + j, kTile);
  }

  // s -> p in place of one row, and m and l of its partial.
  void softmax_row(const Head& head, int64_t row, FewRows& w, float* partial) const {
    const int64_t last = head.position(row) - w.tile.first, begin = head.first_key(row) - w.tile.first;
    float* s = w.s + row * kTile;
    IntVec key;
    for (int i = 0; i < kLanes; ++i) key[i] = i;
    Vec m = broadcast(kMinusInfinity);
    for (int64_t j = 0; j < w.tile.count; j += kLanes, key += kLanes) {
      const IntVec visible = (key <= static_cast<int32_t>(smaller(last, kTile))) & (key >= static_cast<int32_t>(larger(begin, 0)));
      const Vec factor = kCoded ? load(w.tile.k_scale + j) : broadcast(static_cast<float>(a.scale));
      const Vec v = select(visible, score(load(s + j), factor), broadcast(kMinusInfinity));
      store(s + j, v);
      m = max(v, m);
    }
    const float top = max_lane(m);
    const Vec subtract = finite_maximum(broadcast(top));
    Vec l{};
    for (int64_t j = 0; j < w.tile.count; j += kLanes) {
      const Vec p = exp(load(s + j) - subtract);
      l += p;
      Words::store_probabilities(w.p + row * (kTile / kStep), j, kCoded ? p * load(w.tile.v_scale + j) : p);
    }
    partial[0] = top;
    partial[1] = sum(l);
  }

  void values_of_rows(int64_t rows, FewRows& w, float* out, int64_t stride) const {
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      const int step = left >= 4 ? 4 : static_cast<int>(left);
      switch (step) {
        case 4: values<4>(w, row, out, stride); break;
        case 3: values<3>(w, row, out, stride); break;
        case 2: values<2>(w, row, out, stride); break;
        default: values<1>(w, row, out, stride);
      }
      row += step;
    }
  }

  template <int I>
  void values(FewRows& w, int64_t row, float* out, int64_t stride) const {
    const char* p[I];
    for (int i = 0; i < I; ++i) p[i] = reinterpret_cast<const char*>(w.p + (row + i) * (kTile / kStep));
    const int64_t steps = (w.tile.count + kStep - 1) / kStep;
    int64_t d = 0;
    for (; d + 4 * kLanes <= channels; d += 4 * kLanes) {
      multiply<Words, I, 4>(p, 1, w.tile.v + d, channels, steps, out + row * stride + d, stride);
    }
    for (; d < channels; d += kLanes) {
      multiply<Words, I, 1>(p, 1, w.tile.v + d, channels, steps, out + row * stride + d, stride);
    }
  }

  // Merges the partials of one query row, tile by tile from `first`, and writes the row.
  void merge_row(const Head& head, int64_t row, int64_t first, int64_t tiles, const float* partials, float* o) const {
    Vec m = broadcast(kMinusInfinity), l{};
    for (int64_t d = 0; d < channels; ++d) o[d] = 0;
    for (int64_t t = first; t < tiles; ++t) {
      const float* partial = partials + t * partial_floats();
      const Vec tile_m = broadcast(partial[0]), merged = max(m, tile_m), subtract = finite_maximum(merged);
      const Vec keep = exp(m - subtract), take = exp(tile_m - subtract);
      l = fma(l, keep, broadcast(partial[1]) * take);
      const float* tile_o = partial + sizeof(Partial) / sizeof(float);
      for (int64_t d = 0; d < channels; d += kLanes) store(o + d, fma(load(o + d), keep, load(tile_o + d) * take));
      m = merged;
    }
    write(head, row, o, 1, m[0], l[0], o);
  }

  // ---- many rows: query rows in the lanes ----

  struct Panel {
    int64_t first, rows;  // query rows
    Word* q;              // [words, kPanel]
    float* o;             // [channels, kPanel]
    Vec m[2], l[2];
    int32_t last[kPanel], begin[kPanel];  // each row's visible keys, both ends included
  };

  struct ManyRows {
    Tile tile;
    Panel panels[kPanels];
    float* s;       // [kTile, kPanel]
    Word* p;        // [kTile / kStep, kPanel]
    float* tile_o;  // [channels, kPanel]
    Word* line;     // one row of q or of the output
  };

  void carve(Carver& carver, ManyRows& w) const {
    carve(carver, w.tile);
    for (Panel& panel : w.panels) {
      panel.q = carver.take<Word>(words * kPanel);
      panel.o = carver.take<float>(channels * kPanel);
    }
    w.s = carver.take<float>(kTile * kPanel);
    w.p = carver.take<Word>(kTile / kStep * kPanel);
    w.tile_o = carver.take<float>(channels * kPanel);
    w.line = carver.take<Word>(channels);
  }

  // Query rows [first, first + count) of a request, count <= kPanels * kPanel, over everything they see.
  void many_rows(const Head& head, int64_t first, int64_t count, ManyRows& w) const {
    int panels = 0;
    for (int64_t row = first; row < first + count; row += kPanel) {
      start_panel(head, row, smaller(kPanel, first + count - row), w.panels[panels++], w.line);
    }
    const int64_t begin = head.first_key(first) / kTile * kTile, last = head.position(first + count - 1);
    for (int64_t key = begin; key <= last; key += kTile) {
      read_tile(head, key, w.tile);
      for (int i = 0; i < panels; ++i) panel_over_tile(head, w.panels[i], w);
    }
    for (int i = 0; i < panels; ++i) {
      const Panel& panel = w.panels[i];
      for (int64_t row = 0; row < panel.rows; ++row) {
        write(head, panel.first + row, panel.o + row, kPanel, panel.m[row / kLanes][row % kLanes],
              panel.l[row / kLanes][row % kLanes], reinterpret_cast<float*>(w.line));
      }
    }
  }

  void start_panel(const Head& head, int64_t first, int64_t rows, Panel& panel, Word* line) const {
    panel.first = first;
    panel.rows = rows;
    for (int64_t row = 0; row < kPanel; ++row) {
      const int64_t source = first + smaller(row, rows - 1);  // the last lanes repeat a row that is dropped again
      query_words(head, source, panel.o, line);
      for (int64_t word = 0; word < words; ++word) panel.q[word * kPanel + row] = line[word];
      panel.last[row] = static_cast<int32_t>(head.position(source));
      panel.begin[row] = static_cast<int32_t>(head.first_key(source));
    }
    for (int64_t i = 0; i < channels * kPanel; ++i) panel.o[i] = 0;
    for (int n = 0; n < 2; ++n) {
      panel.m[n] = broadcast(kMinusInfinity);
      panel.l[n] = Vec{};
    }
  }

  void panel_over_tile(const Head&, Panel& panel, ManyRows& w) const {
    const int64_t end = smaller(w.tile.first + w.tile.count, panel.last[panel.rows - 1] + 1), keys = end - w.tile.first;
    if (keys <= 0 || w.tile.first + w.tile.count <= panel.begin[0]) return;
    for (int64_t j = 0; j < keys; j += 8) {
      multiply<Words, 8, 2>(w.tile.keys + j, 1, panel.q, kPanel, words, w.s + j * kPanel, kPanel);
    }
    Vec keep[2], take[2];
    for (int n = 0; n < 2; ++n) softmax_panel(panel, n, keys, w, keep[n], take[n]);
    const int64_t steps = (keys + kStep - 1) / kStep;
    for (int64_t d = 0; d < channels; d += 8) {
      const char* v[8];
      for (int i = 0; i < 8; ++i) v[i] = reinterpret_cast<const char*>(w.tile.v + d + i);
      multiply<Words, 8, 2>(v, channels, w.p, kPanel, steps, w.tile_o + d * kPanel, kPanel);
    }
    for (int64_t d = 0; d < channels; ++d) {
      for (int n = 0; n < 2; ++n) {
        float* o = panel.o + d * kPanel + n * kLanes;
        store(o, fma(load(o), keep[n], load(w.tile_o + d * kPanel + n * kLanes) * take[n]));
      }
    }
  }

  // s -> p of kLanes rows of a panel, m and l merged into the panel; keep, take: factors of the old and the tile's o.
  void softmax_panel(Panel& panel, int n, int64_t keys, ManyRows& w, Vec& keep, Vec& take) const {
    IntVec last, begin;
    std::memcpy(&last, panel.last + n * kLanes, sizeof last);
    std::memcpy(&begin, panel.begin + n * kLanes, sizeof begin);
    float* s = w.s + n * kLanes;
    Vec m = broadcast(kMinusInfinity);
    const auto scale_and_mask = [&](auto visible) {
      for (int64_t j = 0; j < keys; ++j) {
        const Vec factor = broadcast(kCoded ? w.tile.k_scale[j] : static_cast<float>(a.scale));
        const Vec v = visible(w.tile.first + j, score(load(s + j * kPanel), factor));
        store(s + j * kPanel, v);
        m = max(v, m);
      }
    };
    // Most tiles of a long prompt lie before all of a panel's rows, and within their window.
    if (panel.last[0] >= w.tile.first + keys - 1 && panel.begin[kPanel - 1] <= w.tile.first) {
      scale_and_mask([](int64_t, Vec v) { return v; });
    } else {
      scale_and_mask([&](int64_t key, Vec v) {
        const int32_t k = static_cast<int32_t>(key);
        return select((last >= k) & (begin <= k), v, broadcast(kMinusInfinity));
      });
    }
    const Vec subtract = finite_maximum(m);
    Vec sums[kLanes] = {};  // by key modulo kLanes, as the other kernel's lanes have them
    const auto add = [&](int64_t j, int lane, int count) {
      Vec p[2] = {};
      for (int i = 0; i < count; ++i) {
        p[i] = exp(load(s + (j + i) * kPanel) - subtract);
        sums[lane + i] += p[i];
        if (kCoded) p[i] *= broadcast(w.tile.v_scale[j + i]);
      }
      store_words(w.p + j / kStep * kPanel + n * kLanes, Words::from_probabilities(p));
    };
    int64_t j = 0;
    for (; j + kLanes <= keys; j += kLanes) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; lane += kStep) add(j + lane, lane, kStep);
    }
    for (int lane = 0; j + lane < keys; lane += kStep) add(j + lane, lane, static_cast<int>(smaller(kStep, keys - j - lane)));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    const Vec merged = max(panel.m[n], m), shift = finite_maximum(merged);
    keep = exp(panel.m[n] - shift);
    take = exp(m - shift);
    panel.l[n] = fma(panel.l[n], keep, sums[0] * take);
    panel.m[n] = merged;
  }

  // ---- cutting a step into work ----

  struct Item {
    int32_t request, kv_head, first, count;  // tiles (few rows) or query rows (many)
    int64_t partials;                        // offset in floats; -1 for many rows
  };

  void run(Pool& pool) const {
    const int64_t group = a.heads / a.kv_heads, block_rows = kPanels * kPanel;
    int64_t items = 0, tiles = 0, floats = 0;
    for (int64_t r = 0; r < a.requests; ++r) {
      const Head head(a, r, 0);
      const int64_t context = (head.seq_len + kTile - 1) / kTile;
      if (head.rows() > kFewRows) {
        items += (head.rows() + block_rows - 1) / block_rows * a.kv_heads;
      } else {
        tiles += context * a.kv_heads;
        floats += context * a.kv_heads * head.rows() * partial_floats();
      }
    }
    // Few rows: some pieces of work for each thread, so that a slow one can be made up for, but each of several tiles, so
    // that one tile's memory can be asked for while another is computed.
    const int64_t tiles_per_item = larger(1, tiles / (3 * pool.workers()));
    Carver carver{static_cast<char*>(pool.shared_scratch(round_up((items + tiles + 64) * sizeof(Item), 64) + floats * 4))};
    Item* list = carver.take<Item>(items + tiles);
    float* partials = carver.take<float>(floats);
    const int64_t count = cut(list, group, block_rows, tiles_per_item);
    pool.parallel_for(count, [&](int64_t i, int worker) { run_item(list[i], partials, pool, worker); });
    merge(partials, floats, pool);
  }

  // Fills the list, long pieces of prompts first: a short one at the end leaves less to wait for.
  int64_t cut(Item* list, int64_t group, int64_t block_rows, int64_t tiles_per_item) const {
    int64_t count = 0, floats = 0;
    for (int64_t r = 0; r < a.requests; ++r) {
      const int64_t rows = Head(a, r, 0).tokens * group;
      if (rows <= kFewRows) continue;
      for (int64_t first = (rows - 1) / block_rows * block_rows; first >= 0; first -= block_rows) {
        for (int64_t h = 0; h < a.kv_heads; ++h) {
          list[count++] = {int32_t(r), int32_t(h), int32_t(first), int32_t(smaller(block_rows, rows - first)), -1};
        }
      }
    }
    for (int64_t r = 0; r < a.requests; ++r) {
      const Head head(a, r, 0);
      if (head.rows() > kFewRows || head.rows() == 0) continue;
      const int64_t tiles = (head.seq_len + kTile - 1) / kTile;
      for (int64_t h = 0; h < a.kv_heads; ++h, floats += tiles * head.rows() * partial_floats()) {
        for (int64_t t = head.first_key(0) / kTile; t < tiles; t += tiles_per_item) {
          list[count++] = {int32_t(r), int32_t(h), int32_t(t), int32_t(smaller(tiles_per_item, tiles - t)), floats};
        }
      }
    }
    return count;
  }

  void run_item(const Item& item, float* partials, Pool& pool, int worker) const {
    const Head head(a, item.request, item.kv_head);
    if (item.partials < 0) {
      ManyRows w;
      carve_scratch(w, pool, worker);
      many_rows(head, item.first, item.count, w);
    } else {
      FewRows w;
      carve_scratch(w, pool, worker);
      few_rows(head, item.first, item.count, (head.seq_len + kTile - 1) / kTile, partials + item.partials, w);
    }
  }

  template <class Workspace>
  void carve_scratch(Workspace& w, Pool& pool, int worker) const {
    Carver size{nullptr};
    carve(size, w);
    Carver carver{static_cast<char*>(pool.scratch(worker, size.used))};
    carve(carver, w);
  }

  void merge(const float* partials, int64_t floats, Pool& pool) const {
    if (floats == 0) return;
    // A few microseconds' worth of merging stays on this thread.
    const bool small = floats < 65536;
    int64_t offset = 0;
    const auto request = [&](int64_t r, int64_t at, int worker) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const Head head(a, r, h);
        const int64_t tiles = (head.seq_len + kTile - 1) / kTile;
        float* o = static_cast<float*>(pool.scratch(worker, channels * sizeof(float)));
        for (int64_t row = 0; row < head.rows(); ++row, at += tiles * partial_floats()) {
          merge_row(head, row, head.first_key(0) / kTile, tiles, partials + at, o);
        }
      }
    };
    const auto size = [&](int64_t r) {
      const Head head(a, r, 0);
      return head.rows() > kFewRows ? 0 : (head.seq_len + kTile - 1) / kTile * head.rows() * a.kv_heads * partial_floats();
    };
    if (small) {
      for (int64_t r = 0; r < a.requests; offset += size(r), ++r) {
        if (size(r) > 0) request(r, offset, 0);
      }
      return;
    }
    pool.parallel_for(a.requests, [&](int64_t r, int worker) {
      if (size(r) == 0) return;
      int64_t at = 0;
      for (int64_t before = 0; before < r; ++before) at += size(before);
      request(r, at, worker);
    });
  }
};

void attention(const AttentionArgs& args, Pool& pool) {
  const bool coded = is_quantised(args.cache_dtype);
#if defined(__AVX512BF16__)
  if (args.dtype == kBFloat16 && args.cache_dtype == kBFloat16) return Attention<Pairs, BFloat16, BFloat16>(args).run(pool);
  if (args.dtype == kBFloat16 && coded) return Attention<Pairs, BFloat16, uint8_t>(args).run(pool);
#endif
  with_float_type(args.dtype, [&](auto type) {
    if (coded) return Attention<Singles, decltype(type), uint8_t>(args).run(pool);
    with_float_type(args.cache_dtype, [&](auto cache_type) {
      Attention<Singles, decltype(type), decltype(cache_type)>(args).run(pool);
    });
  });
}

}  // namespace

MINFER_OPS(attention)
MINFER_OP(attention, AttentionArgs), MINFER_OPS_END

}  // namespace MINFER_ISA
}  // namespace minfer
