// Block-sparse attention on a CPU in one loop: two products and an online softmax of a query tile, all in its caches.
//
// In float32; queries, keys, values and output may be bfloat16. Logits are in log2 units. Keys and values come packed in
// panels, which a product reads in sequence: keys of a tile [columns / PANEL][D][PANEL], values
// [D / PANEL][columns][PANEL], zero where padded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 12;  // of 32 registers 24 hold sums
#else
constexpr int WIDTH = 8, ROWS = 6;
#endif
constexpr int PANEL = 2 * WIDTH;
constexpr long CHUNK = 512;  // columns of logits that are kept at a time
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LN_2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((may_alias));

static inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
static inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }
static inline Vec all(float x) { return x - Vec{}; }  // adding 0 would be an instruction
static inline long up(long x, long to) { return (x + to - 1) / to * to; }

// n numbers from `at` on; `room` holds them where they were bfloat16
static const float* floats(const void* x, bool narrow, long at, long n, std::vector<float>& room) {
  if (!narrow) return static_cast<const float*>(x) + at;
  room.resize(n);
  const uint16_t* from = static_cast<const uint16_t*>(x) + at;
  Bits* to = reinterpret_cast<Bits*>(room.data());
  for (long i = 0; i < n; i++) to[i] = static_cast<Bits>(from[i]) << 16;
  return room.data();
}

// To the nearest bfloat16, of two the even one
static void round_to(uint16_t* to, const float* x, long n) {
  const Bits* from = reinterpret_cast<const Bits*>(x);
  for (long i = 0; i < n; i++) to[i] = x[i] != x[i] ? 0x7fc0 : (from[i] + 0x7fff + (from[i] >> 16 & 1)) >> 16;
}

extern "C" struct Call {
  const void *q;                                          // [B * H * NQ, rows, D]
  const float *keys, *values;                             // panels of the key tiles
  const float *key_means, *value_means, *lengths;         // [B * HK * NK, D] twice and log2 of lengths; null: no pooled
  const float *absent;                                    // [B * HK * NK, columns], 0 or -inf; null: none is masked
  const float *decay, *mean_decay;                        // [F + 2, NK * columns] and [F + 2, NK]; null: none
  const int64_t *frames;                                  // [NQ * rows], rows of `decay`
  const int64_t *exact_starts, *exact_counts, *pooled_starts, *pooled_counts;  // [B * H * NQ]
  const int32_t *exact, *pooled;                          // key tiles of a head
  const int64_t *heads;                                   // [B * H], first of its key tiles among all
  const int64_t *evidence_starts;                         // [B * H * NQ], where a query tile's `evidence` begins
  void *out;                                              // as q
  float *lse, *evidence;                                  // [B * H * NQ, rows]; [exact tiles, rows]; null: unused
  int64_t query_tiles, key_tiles, rows, columns, dim, last_columns, by_mass, narrow_q, narrow_out;
  double scale;
};

// C [R, PANEL] = (C +) A [R, K] B [K, PANEL], summed up before it is added: a sum over all tiles would round at its size
template <int R>
static inline void product(const float* a, long lda, const float* b, float* c, long ldc, long K, bool add) {
  Vec sum[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sum[r][j] = Vec{};
  for (long k = 0; k < K; k++) {
    const Vec left = load(b + k * PANEL), right = load(b + k * PANEL + WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec x = all(a[r * lda + k]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) store(c + r * ldc + j * WIDTH, add ? load(c + r * ldc + j * WIDTH) + sum[r][j] : sum[r][j]);
}

// C [M, N] = (C +) A [M, K] B, with B in N / PANEL panels of `stride` floats
static void multiply(const float* a, long lda, const float* b, long stride, float* c, long ldc, long M, long N, long K,
                     bool add) {
  for (long n = 0; n < N; n += PANEL, b += stride) {
    long m = 0;
    for (; m + ROWS <= M; m += ROWS) product<ROWS>(a + m * lda, lda, b, c + m * ldc + n, ldc, K, add);
    for (; m + 4 <= M; m += 4) product<4>(a + m * lda, lda, b, c + m * ldc + n, ldc, K, add);
    for (; m < M; m++) product<1>(a + m * lda, lda, b, c + m * ldc + n, ldc, K, add);
  }
}

// 2^x for x <= 0, to the last bit or two; 0 below the smallest normal number, NaN of NaN
static inline Vec exp2_of(const Vec given) {
  const Vec low = all(-126.0f), magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to whole numbers
  const Ints kept = given >= low;
  Vec x = given > low ? given : low;
  const Vec shifted = x + magic, f = x - (shifted - magic);
  Vec p = all(1.5252734e-5f);
  p = p * f + all(1.5403530e-4f);
  p = p * f + all(1.3333558e-3f);
  p = p * f + all(9.6181291e-3f);
  p = p * f + all(5.5504109e-2f);
  p = p * f + all(2.4022651e-1f);
  p = p * f + all(6.9314718e-1f);
  p = p * f + all(1.0f);
  p = reinterpret_cast<Vec>((reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23)) & kept);
  return given == given ? p : given;
}

static inline Vec finite(Vec x) {
  const Vec most = all(std::numeric_limits<float>::max());
  x = x < most ? x : most;
  return x > -most ? x : -most;
}

static inline float largest(Vec v) {
  float x = v[0];
  for (int c = 1; c < WIDTH; c++) x = std::max(x, v[c]);
  return x;
}

static inline float total(Vec v) {
  float x = 0;
  for (int c = 0; c < WIDTH; c++) x += v[c];
  return x;
}

static float span_largest(const float* x, long n) {
  Vec top = load(x);
  for (long c = WIDTH; c < n; c += WIDTH) top = top > load(x + c) ? top : load(x + c);
  return largest(top);
}

static float span_total(const float* x, long n) {
  Vec sum = load(x);
  for (long c = WIDTH; c < n; c += WIDTH) sum += load(x + c);
  return total(sum);
}

extern "C" {

int64_t panel() { return PANEL; }

int64_t call_bytes() { return sizeof(Call); }

// Keys [tiles, columns, D] to panels, zero in padding; tiles from `first` to `last`; 1 if memory ran out
int64_t pack_keys(const void* keys, float* out, int64_t first, int64_t last, int64_t columns, int64_t dim, int64_t narrow) try {
  const long wide = up(columns, PANEL);
  std::vector<float> room;
  for (long tile = first; tile < last; tile++)
    for (long n = 0; n < wide; n += PANEL) {
      float* panel = out + (tile * wide + n) * dim;
      const long count = std::max(0L, std::min<long>(PANEL, columns - n));
      const float* from = floats(keys, narrow, (tile * columns + n) * dim, count * dim, room);
      for (long k = 0; k < dim; k++) {
        for (long c = 0; c < count; c++) panel[k * PANEL + c] = from[c * dim + k];
        for (long c = count; c < PANEL; c++) panel[k * PANEL + c] = 0;
      }
    }
  return 0;
} catch (const std::exception&) {
  return 1;
}

// Values [tiles, columns, D] to panels, zero in padding; 1 if memory ran out
int64_t pack_values(const void* values, float* out, int64_t first, int64_t last, int64_t columns, int64_t dim,
                    int64_t narrow) try {
  const long wide = up(dim, PANEL);
  std::vector<float> room;
  for (long tile = first; tile < last; tile++) {
    const float* all_of_it = floats(values, narrow, tile * columns * dim, columns * dim, room);
    for (long n = 0; n < wide; n += PANEL) {
      float* panel = out + (tile * wide + n) * columns;
      const float* from = all_of_it + n;
      const long count = std::min<long>(PANEL, dim - n);
      for (long k = 0; k < columns; k++) {
        memcpy(panel + k * PANEL, from + k * dim, count * sizeof(float));
        memset(panel + k * PANEL + count, 0, (PANEL - count) * sizeof(float));
      }
    }
  }
  return 0;
} catch (const std::exception&) {
  return 1;
}

}  // extern "C"

// What one thread needs for a query tile
struct Work {
  const Call& call;
  const long rows, columns, dim, wide, wide_dim, step;  // `wide`: columns with padding; `step`: of a row of logits
  std::vector<float> logits, out, peak, sum, bias, decay, gathered, packed_keys, packed_values, peaks, queries;
  bool any = false;  // whether the query tile has seen a key

  explicit Work(const Call& c)
      : call(c), rows(c.rows), columns(c.columns), dim(c.dim), wide(up(c.columns, PANEL)), wide_dim(up(c.dim, PANEL)),
        step(std::max(CHUNK / wide * wide, wide)), logits(rows * std::max(step, CHUNK)), out(rows * wide_dim),
        peak(rows), sum(rows), bias(std::max(step, CHUNK)), decay(std::max(step, CHUNK)) {}

  // Logits [rows, n] to weights: `first` says that nothing came before; `tiles`: the exact ones, 0 for pooled ones
  void weigh(long query_tile, long n, long ld, bool biased, bool first, long tiles, const int32_t* listed, long slot) {
    const bool decayed = call.decay != nullptr;
    const long head_tile = query_tile % call.query_tiles;
    const float nearest = static_cast<float>(call.scale);  // a float alone would err in every logit the same way
    const Vec scale = all(nearest), lost = all(static_cast<float>(call.scale - nearest));
    int64_t frame = -1;
    for (long r = 0; r < rows; r++) {
      float* x = logits.data() + r * ld;
      if (decayed) {
        const int64_t own = call.frames[head_tile * rows + r];
        if (own != frame) gather_decay(frame = own, n, tiles, listed);
      }
      Vec top = all(NONE);
      for (long c = 0; c < n; c += WIDTH) {
        const Vec raw = load(x + c);
        Vec value = raw * scale;
        value += finite(raw) * lost;  // infinity times what is lost might be the other infinity
        if (decayed) {
          const Vec less = value * load(decay.data() + c);
          value = value < less ? value : less;
        }
        if (biased) {  // what is absent is so whatever its logit, which is NaN where the query is
          const Vec more = load(bias.data() + c);
          value = more > all(NONE) ? value + more : more;
        }
        store(x + c, value);
        top = top > value ? top : value;
      }
      const float before = first ? NONE : peak[r], now = std::max(before, largest(top));
      const float base = now == NONE ? 0 : now, factor = before == NONE ? 0 : std::exp2(before - base);
      float* evidence = call.evidence && tiles ? call.evidence + slot * rows + r : nullptr;
      if (evidence && !call.by_mass)
        for (long j = 0; j < tiles; j++) evidence[j * rows] = span_largest(x + j * wide, wide);
      Vec added = Vec{};
      for (long c = 0; c < n; c += WIDTH) {
        const Vec p = exp2_of(load(x + c) - all(base));
        store(x + c, p);
        added += p;
      }
      if (evidence && call.by_mass) {
        for (long j = 0; j < tiles; j++) evidence[j * rows] = span_total(x + j * wide, wide);
        peaks.push_back(now);
      }
      sum[r] = (first ? 0 : sum[r] * factor) + total(added);
      if (!first && factor != 1)
        for (long d = 0; d < wide_dim; d += WIDTH) store(&out[r * wide_dim + d], load(&out[r * wide_dim + d]) * all(factor));
      peak[r] = now;
    }
  }

  void gather_decay(int64_t frame, long n, long tiles, const int32_t* listed) {
    if (tiles == 0) {
      for (long c = 0; c < n; c++) decay[c] = listed[c] < 0 ? 1 : call.mean_decay[frame * call.key_tiles + listed[c]];
      return;
    }
    for (long j = 0; j < tiles; j++) {
      memcpy(&decay[j * wide], call.decay + (frame * call.key_tiles + listed[j]) * columns, columns * sizeof(float));
      std::fill(&decay[j * wide + columns], &decay[j * wide] + wide, 1.0f);
    }
  }

  void exact(long query_tile, const float* q, bool& first) {
    const int32_t* listed = call.exact + call.exact_starts[query_tile];
    const long count = call.exact_counts[query_tile], group = step / wide;
    const long head = call.heads[query_tile / call.query_tiles];
    const long slot = call.evidence ? call.evidence_starts[query_tile] : 0;
    peaks.clear();
    for (long at = 0; at < count; at += group) {
      const long tiles = std::min(group, count - at);
      bool biased = call.absent != nullptr || wide != columns;
      for (long j = 0; j < tiles; j++) {
        const long tile = listed[at + j];
        multiply(q, dim, call.keys + (head + tile) * wide * dim, dim * PANEL, &logits[j * wide], step, rows, wide, dim, false);
        biased |= tile == call.key_tiles - 1 && call.last_columns < columns;
      }
      for (long j = 0; biased && j < tiles; j++) {
        const long tile = listed[at + j], valid = tile == call.key_tiles - 1 ? call.last_columns : columns;
        for (long c = 0; c < wide; c++)
          bias[j * wide + c] = c >= valid ? NONE : call.absent ? call.absent[(head + tile) * columns + c] : 0;
      }
      any = any || !biased || span_largest(bias.data(), tiles * wide) > NONE;
      weigh(query_tile, tiles * wide, step, biased, first, tiles, listed + at, slot + at);
      for (long j = 0; j < tiles; j++) {
        multiply(&logits[j * wide], step, call.values + (head + listed[at + j]) * columns * wide_dim, columns * PANEL,
                 out.data(), wide_dim, rows, wide_dim, columns, !first);
        first = false;
      }
    }
    if (call.evidence && call.by_mass)  // sums were relative to the largest logit so far
      for (long at = 0, part = 0; at < count; at += group, part++)
        for (long r = 0; r < rows; r++) {
          const float then = peaks[part * rows + r], factor = then == NONE ? 0 : std::exp2(then - peak[r]);
          for (long j = at; j < std::min(count, at + group); j++) call.evidence[(slot + j) * rows + r] *= factor;
        }
  }

  void pooled(long query_tile, const float* q, bool& first) {
    const int32_t* listed = call.pooled + call.pooled_starts[query_tile];
    const long count = call.pooled_counts[query_tile], head = call.heads[query_tile / call.query_tiles];
    std::vector<int32_t> own(CHUNK);
    for (long at = 0; at < count; at += CHUNK) {
      const long n = std::min(CHUNK, count - at), filled = up(n, PANEL);
      gathered.assign(filled * dim, 0);
      packed_keys.resize(filled * dim);
      packed_values.resize(filled * wide_dim);
      std::fill(own.begin(), own.end(), -1);
      std::copy(listed + at, listed + at + n, own.begin());
      for (long c = 0; c < n; c++) memcpy(&gathered[c * dim], call.key_means + (head + own[c]) * dim, dim * sizeof(float));
      pack_keys(gathered.data(), packed_keys.data(), 0, 1, filled, dim, false);
      for (long c = 0; c < n; c++) memcpy(&gathered[c * dim], call.value_means + (head + own[c]) * dim, dim * sizeof(float));
      pack_values(gathered.data(), packed_values.data(), 0, 1, filled, dim, false);
      for (long c = 0; c < filled; c++) bias[c] = c < n ? call.lengths[head + own[c]] : NONE;
      any = any || span_largest(bias.data(), filled) > NONE;
      multiply(q, dim, packed_keys.data(), dim * PANEL, logits.data(), CHUNK, rows, filled, dim, false);
      weigh(query_tile, filled, CHUNK, true, first, 0, own.data(), 0);
      multiply(logits.data(), CHUNK, packed_values.data(), filled * PANEL, out.data(), wide_dim, rows, wide_dim, n, !first);
      first = false;
    }
  }

  void run(long query_tile) {
    const float* q = floats(call.q, call.narrow_q, query_tile * rows * dim, rows * dim, queries);
    bool first = true;
    any = false;
    // pooled tiles come first, so that what votes ask of exact ones is relative to the largest of all at the end
    if (call.pooled_counts) pooled(query_tile, q, first);
    exact(query_tile, q, first);
    const bool empty = !any;  // no key, which a logit of -infinity is
    for (long r = 0; r < rows; r++) {
      float* row = &out[r * wide_dim];
      const long at = (query_tile * rows + r) * dim;
      const float share = 1 / sum[r];
      for (long d = 0; d < dim; d++) row[d] = empty ? 0 : row[d] * share;
      if (call.narrow_out) round_to(static_cast<uint16_t*>(call.out) + at, row, dim);
      else memcpy(static_cast<float*>(call.out) + at, row, dim * sizeof(float));
      if (call.lse) call.lse[query_tile * rows + r] = empty ? NONE : (peak[r] + std::log2(sum[r])) * LN_2;
    }
  }
};

// Query tiles from `first` to `last`; 1 if memory ran out
extern "C" int64_t attend(const Call* call, int64_t first, int64_t last) try {
  Work work(*call);
  for (long query_tile = first; query_tile < last; query_tile++) work.run(query_tile);
  return 0;
} catch (const std::exception&) {  // an exception must not leave for Python
  return 1;
}
