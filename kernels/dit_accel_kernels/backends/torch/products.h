// Products of rows with panels: of floats, of pairs of bfloat16, and of such pairs by the tiles of AMX.
#pragma once

#include "vectors.h"

#if defined(EMULATED_TILES) && defined(__AVX512BF16__)  // a header that brings the instructions as plain loops
#define WITH_TILES
#define FOR_TILES
static bool has_tiles() { return true; }
#elif defined(__AVX512BF16__) && defined(__linux__) && !defined(NO_TILES) && (__GNUC__ > 10 || __clang_major__ > 11)
#define WITH_TILES
#define FOR_TILES __attribute__((target("amx-tile,amx-bf16")))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
// Whether the processor has them, and the system lets this process use them, which it must be asked for
static bool has_tiles() {
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & d >> 24 & 1;  // for bfloat16, and at all
    return there && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  }();
  return allowed;
}
#endif

#if defined(WITH_TILES)
// A thread's tiles, 16 rows of 64 bytes each; what it had before comes back. gcc does not know that these instructions
// read and write memory.
struct Tiles {
  struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  const bool there;
  Shape before;
  FOR_TILES explicit Tiles(bool wanted) : there(wanted) {
    const Shape shape;
    if (!there) return;
    _tile_storeconfig(&before);
    asm volatile("" ::"r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  FOR_TILES ~Tiles() {
    if (!there) return;
    asm volatile("" ::"r"(&before) : "memory");
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
};

// As `multiply` in pairs, 32 rows and a panel at a time; what is past M in A and C is read and written
FOR_TILES static void multiply_tiles(const float* a, long lda, long next, const float* const* b, long parts, float* c,
                                     long ldc, long M, long N, long K, bool add) {
  for (long n = 0; n < N / PANEL; n++)
    for (long m = 0; m < M; m += 32) {
      float *upper = c + m * ldc + n * PANEL, *lower = upper + 16 * ldc;
      asm volatile("" ::: "memory");
      if (add) {
        _tile_loadd(0, upper, 4 * ldc);
        _tile_loadd(1, upper + 16, 4 * ldc);
        _tile_loadd(2, lower, 4 * ldc);
        _tile_loadd(3, lower + 16, 4 * ldc);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (long part = 0; part < parts; part++) {
        const float *left = a + m * lda + part * next, *panel = b[part] + n * K * PANEL;
        for (long k = 0; k < K; k += 16, left += 16, panel += 16 * PANEL) {
          _tile_loadd(4, left, 4 * lda);
          _tile_loadd(6, panel, 4 * PANEL);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, panel + 16, 4 * PANEL);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, left + 16 * lda, 4 * lda);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, upper, 4 * ldc);
      _tile_stored(1, upper + 16, 4 * ldc);
      _tile_stored(2, lower, 4 * ldc);
      _tile_stored(3, lower + 16, 4 * ldc);
    }
}
#else
static bool has_tiles() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
static void multiply_tiles(const float*, long, long, const float* const*, long, float*, long, long, long, long, bool) {}
#endif

// C [R, PANEL] = (C +) A [R, K] B [K, PANEL], summed up before it is added: a sum over all tiles would round at its size.
// A and B come in parts: A `next` words apart, B the n-th panel of each part; K, lda and next count words.
template <int R, bool P>
static inline void product(const float* a, long lda, long next, const float* const* b, long parts, long n, float* c,
                           long ldc, long K, bool add) {
  Vec sum[R][2];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) sum[r][j] = Vec{};
  for (long part = 0; part < parts; part++, a += next) {
    const float* panel = b[part] + n * K * PANEL;
    for (long k = 0; k < K; k++, panel += PANEL) {
      const Vec left = load(panel), right = load(panel + WIDTH);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        if (P) {
          const Vec x = (Vec)(reinterpret_cast<const Word*>(a)[r * lda + k] - Ints{});
          sum[r][0] = add_pairs(sum[r][0], x, left);
          sum[r][1] = add_pairs(sum[r][1], x, right);
        } else {
          const Vec x = all(a[r * lda + k]);
          sum[r][0] += x * left;
          sum[r][1] += x * right;
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) store(c + r * ldc + j * WIDTH, add ? load(c + r * ldc + j * WIDTH) + sum[r][j] : sum[r][j]);
}

// C [M, N] = (C +) A [M, K] B of parts, each of N / PANEL panels
template <bool P>
static void multiply(const float* a, long lda, long next, const float* const* b, long parts, float* c, long ldc, long M,
                     long N, long K, bool add) {
  for (long n = 0; n < N / PANEL; n++, c += PANEL) {
    long m = 0;
    for (; m + ROWS <= M; m += ROWS) product<ROWS, P>(a + m * lda, lda, next, b, parts, n, c + m * ldc, ldc, K, add);
    for (; m + 4 <= M; m += 4) product<4, P>(a + m * lda, lda, next, b, parts, n, c + m * ldc, ldc, K, add);
    for (; m < M; m++) product<1, P>(a + m * lda, lda, next, b, parts, n, c + m * ldc, ldc, K, add);
  }
}

enum Kind { FLOATS, PAIRS, TILES };

static void multiply(Kind kind, const float* a, long lda, long next, const float* const* b, long parts, float* c, long ldc,
                     long M, long N, long K, bool add) {
  if (kind == TILES) multiply_tiles(a, lda, next, b, parts, c, ldc, M, N, K, add);
  else if (kind == PAIRS) multiply<true>(a, lda, next, b, parts, c, ldc, M, N, K, add);
  else multiply<false>(a, lda, next, b, parts, c, ldc, M, N, K, add);
}
