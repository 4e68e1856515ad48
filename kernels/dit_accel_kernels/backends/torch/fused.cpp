// Block-sparse attention on a CPU in one loop: two products and an online softmax of a query tile, all in its caches.
//
// Queries, keys, values and output are float32 or bfloat16, where the caller has them. bfloat16 is multiplied in pairs
// or tiles of AMX where the processor does that, and as float32 elsewhere; all else is float32. Logits are in log2 units. Keys and values
// are packed in panels, which a product reads in sequence, zero where padded or masked: keys of a tile
// [columns / PANEL][D][PANEL], values [D / PANEL][columns][PANEL]. Of pairs a panel has half as many rows: each of its
// 32-bit words holds two numbers that follow each other along D or the columns. AMX reads the same panels, 16 rows at once.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "products.h"

constexpr long CHUNK = 512;   // columns of logits that are kept at a time
constexpr long SUMMED = 128;  // of float32 weights that are summed up in one go
constexpr float LN_2 = 0.6931471805599453f;

extern "C" struct Call {
  const void *q, *k, *v;                           // [B, H, S_q, D], [B, HK, S_k, D], [B, HK, S_k, DV], by their strides
  void *out;                                       // [B, H, S_q, DV], likewise
  float *keys, *values;                            // panels of the key tiles of all batches and key heads
  const float *key_means, *value_means, *lengths;  // [B * HK * NK, D], [.., DV] and log2 of lengths; null: no pooled
  const uint8_t *valid;                            // [B, S_k], keys that are not masked; null: all
  const float *head_scale;                         // [B * H]; null: 1
  const float *decay, *mean_decay;                 // [F + 2, NK * columns] and [F + 2, NK]; null: none
  const int64_t *frames;                           // [NQ * rows], rows of `decay`
  const int32_t *exact_offsets, *exact, *pooled_offsets, *pooled;  // [groups, NQ + 1], and key tiles of a head
  const int32_t *mask_ids, *mask_bits;             // [exact tiles], -1: none; [masks, rows, words of columns]; null: none
  uint8_t *odd;                                    // [B * HK * NK], tiles with values that are no finite numbers; with masks
  const int64_t *evidence_starts;                  // [B * H * NQ], where a query tile's `evidence` begins
  float *lse, *evidence;                           // [B * H, S_q]; [exact tiles, rows]; null: unused
  void *parallel;                                  // GOMP_parallel of the threads that torch keeps; null: start some
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];  // of batch, head and token, in numbers
  int64_t batch, heads, key_heads, groups, num_q, num_k, rows, columns, dim, value_dim, by_mass, narrow, pairs;
  int64_t team, threads, next, end;                // torch's threads, those that may work; pieces from `next` to `end` are still to be done
  double scale, seconds;
};

static inline long at(const int64_t* strides, long batch, long head, long token) {
  return batch * strides[0] + head * strides[1] + token * strides[2];
}

// One token's numbers: floats, or as they are to be multiplied in pairs
static void fetch(float* to, const void* x, long from, long n, bool half, bool pairs) {
  if (!half) {
    memcpy(to, static_cast<const float*>(x) + from, n * sizeof(float));
  } else if (pairs) {
    memcpy(to, static_cast<const uint16_t*>(x) + from, n * sizeof(uint16_t));
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(x) + from;
    Bits* words = reinterpret_cast<Bits*>(to);
    for (long i = 0; i < n; i++) words[i] = static_cast<Bits>(row[i]) << 16;
  }
}

// Rows [columns, K] of words to panels of keys, [columns / PANEL][K][PANEL]
static void to_key_panels(float* to, const float* rows, long columns, long K) {
  for (long n = 0; n < columns; n += PANEL, to += K * PANEL)
    for (long k = 0; k < K; k++)
      for (long c = 0; c < PANEL; c++) to[k * PANEL + c] = rows[(n + c) * K + k];
}

// One row [up(D, PANEL)] of values, the k-th of K, to its panels [D / PANEL][K][PANEL]
static void to_value_panels(float* to, const float* row, long k, long K, long wide_dim) {
  for (long n = 0; n < wide_dim; n += PANEL) memcpy(to + n * K + k * PANEL, row + n, PANEL * sizeof(float));
}

// What the loop makes of a call's sizes
struct Sizes {
  const Call& call;
  const long rows, columns, dim, wide, wide_dim, query_tiles, key_tiles;  // `wide`: columns with padding
  const bool pairs;
  const Kind kind;                        // of products with keys and values
  const long depth, value_depth, padded;  // rows of a panel of keys and of values, and of a query tile
  explicit Sizes(const Call& c)
      : call(c), rows(c.rows), columns(c.columns), dim(c.dim), wide(up(c.columns, PANEL)), wide_dim(up(c.value_dim, PANEL)),
        query_tiles((c.num_q + c.rows - 1) / c.rows), key_tiles((c.num_k + c.columns - 1) / c.columns),
        pairs(c.pairs != 0), kind(pairs ? has_tiles() ? TILES : PAIRS : FLOATS),
        depth(kind == TILES ? up(c.dim / 2, 16) : pairs ? c.dim / 2 : c.dim),
        value_depth(kind == TILES ? wide / 2 : pairs ? (c.columns + 1) / 2 : c.columns),
        padded(kind == TILES ? up(c.rows, 32) : c.rows) {}

  bool absent(long batch, long token) const {
    return token >= call.num_k || (call.valid && !call.valid[batch * call.num_k + token]);
  }
};

// Packs the keys and values of a key tile
struct Pack : Sizes {
  std::vector<float> tile, row;
  explicit Pack(const Call& c) : Sizes(c), tile(wide * depth), row(wide_dim) {}

  void run(long key_tile) {
    const long of = key_tile / key_tiles, batch = of / call.key_heads, head = of % call.key_heads;
    const long first = key_tile % key_tiles * columns;
    for (long c = 0; c < columns; c++) {
      float* to = &tile[c * depth];
      if (absent(batch, first + c)) std::fill(to, to + depth, 0.0f);
      else fetch(to, call.k, at(call.k_strides, batch, head, first + c), dim, call.narrow, pairs);
    }
    to_key_panels(call.keys + key_tile * wide * depth, tile.data(), wide, depth);
    float* values = call.values + key_tile * value_depth * wide_dim;
    bool odd = false;
    for (long k = 0; k < value_depth; k++) {
      std::fill(row.begin(), row.end(), 0.0f);
      for (long one = 0; one < (pairs ? 2 : 1); one++) {
        const long token = first + (pairs ? 2 * k + one : k);
        if (token >= first + columns || absent(batch, token)) continue;
        const long from = at(call.v_strides, batch, head, token);
        if (!pairs) {
          fetch(row.data(), call.v, from, call.value_dim, call.narrow, false);
          continue;
        }
        const uint16_t* halves = static_cast<const uint16_t*>(call.v) + from;
        Bits* both = reinterpret_cast<Bits*>(row.data());
        for (long d = 0; d < call.value_dim; d++) both[d] |= static_cast<Bits>(halves[d]) << 16 * one;
      }
      Bits* words = reinterpret_cast<Bits*>(row.data());
      for (long d = 0; call.odd && d < call.value_dim; d++)
        for (const Bits half : {0x7f800000u, 0x7f80u}) {  // an exponent of ones
          if ((words[d] & half) != half || (half == 0x7f80u && !pairs)) continue;
          odd = true;
          words[d] &= pairs ? (half == 0x7f80u ? 0xffff0000u : 0xffffu) : 0;
        }
      to_value_panels(values, row.data(), k, value_depth, wide_dim);
    }
    if (call.odd) call.odd[key_tile] = odd;
  }
};

// Attends from a query tile; what one thread needs for it
struct Attend : Sizes {
  // columns of a row of logits, and floats from one row to the next: by a power of 2 all fall into few sets of a cache
  const long step, ld;
  Floats logits, out, queries;
  std::vector<float> peak, sum, bias, masked, decay, gathered, packed_keys, packed_values, peaks, plain;
  const float* panels[CHUNK / PANEL];
  std::vector<uint8_t> seen;  // rows that have seen a key
  const Tiles tiles_of_thread;
  long batch = 0, head = 0, key_head = 0, first_row = 0, live = 0;  // of the query tile; its rows that are queries
  long tiles_before = 0, tiles_of_head = 0;  // where its lists are, and the key head's first key tile
  double scale = 1;

  explicit Attend(const Call& c)
      : Sizes(c), step(std::max(CHUNK / wide * wide, wide)), ld(std::max(step, CHUNK) + 16), logits(padded * ld),
        out(padded * wide_dim), queries(padded * depth), peak(rows), sum(rows), bias(ld), masked(ld), decay(ld), seen(rows),
        tiles_of_thread(kind == TILES) {}

  // A row's largest logit so far, of which all is relative: none so far counts as 0
  static float base_of(float largest) { return largest == NONE ? 0 : largest; }

  // Takes in a row's next weights, relative to its largest logit `now`, by their sum: what was before is brought down
  void raise(long r, bool first, float now, float added) {
    const float factor = first || peak[r] == NONE ? 0 : std::exp2(peak[r] - base_of(now));
    float* row = out.begin() + r * wide_dim;
    if (!first && factor != 1)
      for (long d = 0; d < wide_dim; d += WIDTH) store(row + d, load(row + d) * all(factor));
    sum[r] = (first ? 0 : sum[r] * factor) + added;
    peak[r] = now;
  }

  // As `weigh`, where nothing but a scale above 0 changes logits and no votes go by them: two passes, of which one stores
  template <bool P>
  void weigh_plain(long n, bool first, float most, float rest) {
    for (long r = 0; r < live; r++) {
      float* x = logits.begin() + r * ld;
      Vec top = all(NONE), other = top;
      for (long c = 0; c < n; c += PANEL) top = larger(top, load(x + c)), other = larger(other, load(x + c + WIDTH));
      const float now = std::max(first ? NONE : peak[r], fold(larger(top, other), Larger()) * most), base = base_of(now);
      const auto weight = [&](const float* from) {
        const Vec raw = load(from), value = raw * all(most) - all(base);
        return exp2_of<P>(P ? value : raw * all(rest) + value);
      };
      Vec added = Vec{}, more = added;
      for (long c = 0; c < n; c += PANEL) {
        const Vec a = weight(x + c), b = weight(x + c + WIDTH);
        added += a, more += b;
        if (P) store_halves(x, c, a, b);
        else store(x + c, a), store(x + c + WIDTH, b);
      }
      raise(r, first, now, fold(added + more, Plus()));
    }
  }

  // Logits [live, n] to weights: `first` says that nothing came before; `tiles`: the exact ones, 0 for pooled ones;
  // `ids`: their masks, null where none has one
  void weigh(long n, bool biased, bool first, long tiles, const int32_t* listed, long slot, const int32_t* ids) {
    const bool decayed = call.decay != nullptr;
    // a float alone would err in every logit the same way; what it lacks has its sign, and so has infinity times that
    float most = static_cast<float>(scale);
    if (std::abs(most) > std::abs(scale)) most = std::nextafter(most, 0.0f);
    const float lacking = static_cast<float>(scale - most);
    const float left = lacking || !most ? lacking : std::copysign(1e-38f, most);
    if (most > 0 && tiles && !biased && !decayed && !call.evidence)
      return pairs ? weigh_plain<true>(n, first, most, left) : weigh_plain<false>(n, first, most, left);
    const Vec first_part = all(most), rest = all(left);
    int64_t frame = -1;
    for (long r = 0; r < live; r++) {
      float* x = logits.begin() + r * ld;
      if (decayed) {
        const int64_t own = call.frames[first_row + r];
        if (own != frame) gather_decay(frame = own, n, tiles, listed);
      }
      if (ids) mask_row(r, tiles, ids);
      const float* absent = ids ? masked.data() : bias.data();
      Vec top = all(NONE);
      for (long c = 0; c < n; c += WIDTH) {
        const Vec raw = load(x + c);
        Vec value = raw * first_part + raw * rest;
        if (decayed) {
          const Vec less = value * load(decay.data() + c);
          value = value < less ? value : less;
        }
        if (biased) {  // what is absent is so whatever its logit, which is NaN where the query is
          const Vec more = load(absent + c);
          value = more > all(NONE) ? value + more : more;
        }
        store(x + c, value);
        top = larger(top, value);
      }
      const float now = std::max(first ? NONE : peak[r], fold(top, Larger())), base = base_of(now);
      float* evidence = call.evidence && tiles ? call.evidence + slot * rows + r : nullptr;
      if (evidence && !call.by_mass)
        for (long j = 0; j < tiles; j++) evidence[j * rows] = fold(x + j * wide, wide, Larger());
      Vec added = Vec{};
      for (long c = 0; c < n; c += WIDTH) {
        const Vec p = exp2_of<false>(load(x + c) - all(base));
        store(x + c, p);
        added += p;
      }
      if (evidence && call.by_mass) {
        for (long j = 0; j < tiles; j++) evidence[j * rows] = fold(x + j * wide, wide, Plus());
        peaks.push_back(now);
      }
      raise(r, first, now, fold(added, Plus()));
      for (long c = 0; c < n && tiles && pairs; c += PANEL) store_halves(x, c, load(x + c), load(x + c + WIDTH));
    }
  }

  // Whether a row sees a key of a tile by the tile's mask, if any
  bool sees(int32_t id, long row, long c) const {
    return id < 0 || (c < columns && call.mask_bits[(id * rows + row) * ((columns + 31) / 32) + c / 32] >> c % 32 & 1);
  }

  // What a row of some tiles sees by their masks too, in `masked`
  void mask_row(long row, long tiles, const int32_t* ids) {
    for (long j = 0; j < tiles; j++)
      for (long c = j * wide; c < (j + 1) * wide; c++) masked[c] = sees(ids[j], row, c - j * wide) ? bias[c] : NONE;
    seen[row] |= fold(masked.data(), tiles * wide, Larger()) > NONE;
  }

  // Values that are no finite numbers, which are packed as 0, to the rows that see them: 0 times them would not be 0
  void add_odd(long tile, int32_t id) {
    std::vector<float> row(call.value_dim);
    for (long c = 0; c < columns; c++) {
      if (absent(batch, tile * columns + c)) continue;
      fetch(row.data(), call.v, at(call.v_strides, batch, key_head, tile * columns + c), call.value_dim, call.narrow, false);
      for (long d = 0; d < call.value_dim; d++)
        for (long r = 0; r < live && !(std::abs(row[d]) <= std::numeric_limits<float>::max()); r++)
          if (sees(id, r, c)) out.begin()[r * wide_dim + d] += row[d];
    }
  }

  void gather_decay(int64_t frame, long n, long tiles, const int32_t* listed) {
    if (tiles == 0) {
      for (long c = 0; c < n; c++) decay[c] = listed[c] < 0 ? 1 : call.mean_decay[frame * key_tiles + listed[c]];
      return;
    }
    for (long j = 0; j < tiles; j++) {
      memcpy(&decay[j * wide], call.decay + (frame * key_tiles + listed[j]) * columns, columns * sizeof(float));
      std::fill(&decay[j * wide + columns], &decay[j * wide] + wide, 1.0f);
    }
  }

  void exact(long query_tile, bool& first) {
    const long begin = call.exact_offsets[tiles_before], count = call.exact_offsets[tiles_before + 1] - begin;
    const int32_t* listed = call.exact + begin;
    const long group = step / wide, slot = call.evidence ? call.evidence_starts[query_tile] : 0;
    const long last = call.num_k - (key_tiles - 1) * columns;
    peaks.clear();
    for (long at = 0; at < count; at += group) {
      const long tiles = std::min(group, count - at);
      bool biased = call.valid != nullptr || wide != columns;
      for (long j = 0; j < tiles; j++) {
        const long tile = listed[at + j];
        const float* keys = call.keys + (tiles_of_head + tile) * wide * depth;
        multiply(kind, queries.begin(), depth, 0, &keys, 1, logits.begin() + j * wide, ld, live, wide, depth, false);
        biased |= tile == key_tiles - 1 && last < columns;
      }
      const int32_t* ids = call.mask_ids ? call.mask_ids + begin + at : nullptr;
      if (ids && *std::max_element(ids, ids + tiles) < 0) ids = nullptr;
      biased |= ids != nullptr;
      for (long j = 0; biased && j < tiles; j++) {
        const long tile = listed[at + j], here = tile == key_tiles - 1 ? last : columns;
        const uint8_t* valid = call.valid ? call.valid + batch * call.num_k + tile * columns : nullptr;
        for (long c = 0; c < wide; c++) bias[j * wide + c] = c >= here || (valid && !valid[c]) ? NONE : 0;
      }
      if (!ids && (!biased || fold(bias.data(), tiles * wide, Larger()) > NONE)) std::fill(seen.begin(), seen.end(), 1);
      weigh(tiles * wide, biased, first, tiles, listed + at, slot + at, ids);
      const long next = pairs ? wide / 2 : wide;
      for (long j = 0, parts; j < tiles; j += parts, first = false) {
        parts = std::min(tiles - j, pairs ? tiles : std::max(1L, SUMMED / wide));
        for (long part = 0; part < parts; part++)
          panels[part] = call.values + (tiles_of_head + listed[at + j + part]) * value_depth * wide_dim;
        multiply(kind, logits.begin() + j * next, ld, next, panels, parts, out.begin(), wide_dim, live, wide_dim, value_depth, !first);
      }
      for (long j = 0; call.odd && j < tiles; j++)
        if (call.odd[tiles_of_head + listed[at + j]]) add_odd(listed[at + j], ids ? ids[j] : -1);
    }
    if (call.evidence && call.by_mass)  // sums were relative to the largest logit so far
      for (long at = 0, part = 0; at < count; at += group, part++)
        for (long r = 0; r < live; r++) {
          const float then = peaks[part * live + r], factor = then == NONE ? 0 : std::exp2(then - peak[r]);
          for (long j = at; j < std::min(count, at + group); j++) call.evidence[(slot + j) * rows + r] *= factor;
        }
  }

  void pooled(bool& first) {
    const long begin = call.pooled_offsets[tiles_before], count = call.pooled_offsets[tiles_before + 1] - begin;
    const int32_t* listed = call.pooled + begin;
    const float* q = queries.begin();
    if (pairs && count) {  // means are float32
      plain.resize(rows * dim);
      for (long r = 0; r < live; r++)
        fetch(&plain[r * dim], call.q, at(call.q_strides, batch, head, first_row + r), dim, true, false);
      q = plain.data();
    }
    std::vector<int32_t> own(CHUNK);
    for (long from = 0; from < count; from += CHUNK) {
      const long n = std::min(CHUNK, count - from), filled = up(n, PANEL);
      gathered.assign(std::max(filled * dim, wide_dim), 0);
      packed_keys.resize(filled * dim);
      packed_values.resize(n * wide_dim);
      std::fill(own.begin(), own.end(), -1);
      std::copy(listed + from, listed + from + n, own.begin());
      for (long c = 0; c < n; c++)
        memcpy(&gathered[c * dim], call.key_means + (tiles_of_head + own[c]) * dim, dim * sizeof(float));
      to_key_panels(packed_keys.data(), gathered.data(), filled, dim);
      std::fill(gathered.begin(), gathered.begin() + wide_dim, 0.0f);
      for (long c = 0; c < n; c++) {
        memcpy(gathered.data(), call.value_means + (tiles_of_head + own[c]) * call.value_dim, call.value_dim * sizeof(float));
        to_value_panels(packed_values.data(), gathered.data(), c, n, wide_dim);
      }
      for (long c = 0; c < filled; c++) bias[c] = c < n ? call.lengths[tiles_of_head + own[c]] : NONE;
      if (fold(bias.data(), filled, Larger()) > NONE) std::fill(seen.begin(), seen.end(), 1);
      panels[0] = packed_keys.data();
      multiply(FLOATS, q, dim, 0, panels, 1, logits.begin(), ld, live, filled, dim, false);
      weigh(filled, true, first, 0, own.data(), 0, nullptr);
      panels[0] = packed_values.data();
      multiply(FLOATS, logits.begin(), ld, 0, panels, 1, out.begin(), wide_dim, live, wide_dim, n, !first);
      first = false;
    }
  }

  void run(long query_tile) {
    const long of = query_tile / query_tiles, tile = query_tile % query_tiles;
    batch = of / call.heads, head = of % call.heads, first_row = tile * rows, live = std::min(rows, call.num_q - first_row);
    key_head = head * call.key_heads / call.heads, tiles_of_head = (batch * call.key_heads + key_head) * key_tiles;
    tiles_before = of % call.groups * (query_tiles + 1) + tile;
    scale = call.scale * (call.head_scale ? call.head_scale[of] : 1);
    for (long r = 0; r < live; r++)
      fetch(queries.begin() + r * depth, call.q, at(call.q_strides, batch, head, first_row + r), dim, call.narrow, pairs);
    bool first = true;
    std::fill(seen.begin(), seen.end(), 0);
    // pooled tiles come first, so that what votes ask of exact ones is relative to the largest of all at the end
    if (call.pooled_offsets) pooled(first);
    exact(query_tile, first);
    for (long r = 0; r < live; r++) {
      const bool empty = !seen[r];  // no key, which a logit of -infinity is
      float* row = out.begin() + r * wide_dim;
      const long to = at(call.out_strides, batch, head, first_row + r);
      const float share = 1 / sum[r];
      for (long d = 0; d < call.value_dim; d++) row[d] = empty ? 0 : row[d] * share;
      if (call.narrow) round_to(static_cast<uint16_t*>(call.out) + to, row, call.value_dim);
      else memcpy(static_cast<float*>(call.out) + to, row, call.value_dim * sizeof(float));
      if (call.lse) call.lse[of * call.num_q + first_row + r] = empty ? NONE : (peak[r] + std::log2(sum[r])) * LN_2;
    }
  }
};

// Run a function on a call's threads at once. Torch's own wait for work for a while after each operation, on the cores
// that threads of ours would need; a smaller team than torch's would have libgomp end the others.
static void on_threads(const Call& call, const std::function<void()>& run) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  if (call.threads > 1 && call.parallel) {
    const auto start = reinterpret_cast<Parallel>(call.parallel);
    start([](void* f) { (*static_cast<const std::function<void()>*>(f))(); }, const_cast<void*>((const void*)&run), call.team, 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t thread = 1; thread < call.threads; thread++) others.emplace_back(run);
  } catch (...) {  // as many as the system gives
  }
  run();
  for (std::thread& other : others) other.join();
}

// Do the pieces of a call, each by whichever thread is free, and take none anew after `seconds`: the caller can be
// interrupted in between. 1 if memory ran out.
template <class Work>
static int64_t share(Call& call) {
  std::atomic<int64_t> next{call.next}, started{0};
  std::atomic<bool> failed{false};
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(call.seconds);
  on_threads(call, [&] {
    try {  // an exception must leave neither a thread nor for Python
      if (started++ >= call.threads || next >= call.end) return;
      Work work(call);
      for (int64_t piece; !failed && (piece = next++) < call.end;) {
        work.run(piece);
        if (std::chrono::steady_clock::now() >= until) return;
      }
    } catch (...) {
      failed = true;
    }
  });
  call.next = std::min<int64_t>(next, call.end);
  return failed;
}

extern "C" {

int64_t panel() { return PANEL; }
int64_t call_bytes() { return sizeof(Call); }
int64_t has_pairs() { return HAS_PAIRS; }
int64_t tile_words() { return has_tiles() ? 16 : 1; }  // that rows of panels of pairs are a multiple of
int64_t pack(Call* call) { return share<Pack>(*call); }
int64_t attend(Call* call) { return share<Attend>(*call); }

}  // extern "C"
