// Vectors of floats: loads, the exponential, sums and largest numbers, rounding to bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 12;  // of 32 registers 24 hold sums
#else
constexpr int WIDTH = 8, ROWS = 6;
#endif
constexpr int PANEL = 2 * WIDTH;
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((may_alias));
typedef int32_t Word __attribute__((may_alias));

// Memory whose rows may begin where a cache line does
struct alignas(64) Line {
  float x[16];
};
struct Floats : std::vector<Line> {
  explicit Floats(long n) : std::vector<Line>((n + 15) / 16) {}
  float* begin() { return data()->x; }
};

static inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
static inline void store(float* x, Vec v) { *reinterpret_cast<Vec*>(x) = v; }
static inline Vec all(float x) { return x - Vec{}; }  // adding 0 would be an instruction
static inline long up(long x, long to) { return (x + to - 1) / to * to; }

// To the nearest bfloat16, of two the even one
static void round_to(uint16_t* to, const float* x, long n) {
  const Bits* from = reinterpret_cast<const Bits*>(x);
  for (long i = 0; i < n; i++) to[i] = x[i] != x[i] ? 0x7fc0 : (from[i] + 0x7fff + (from[i] >> 16 & 1)) >> 16;
}

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
// sum + the products of two pairs, in each of 16 words
static inline Vec add_pairs(Vec sum, Vec a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
// Two vectors to bfloat16, as the c-th to c + 31st that begin at x
static inline void store_halves(float* x, long c, Vec a, Vec b) {
  store(x + c / 2, (Vec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#else
constexpr bool HAS_PAIRS = false;
static inline Vec add_pairs(Vec sum, Vec, Vec) { return sum; }
static inline void store_halves(float*, long, Vec, Vec) {}
#endif

// 2^x for x <= 0, to the last bit or two, or by up to 3e-6 where it is to be rounded to bfloat16 (`rough`); 0 below the
// smallest normal number, NaN of NaN
template <bool rough>
static inline Vec exp2_of(const Vec x) {
  const auto polynomial = [](const Vec f, std::initializer_list<float> factors) {
    const float* factor = factors.begin();
    Vec p = all(*factor);
    while (++factor != factors.end()) p = p * f + all(*factor);
    return p;
  };
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
  const Vec p = rough ? polynomial(f, {0.013534168f, 0.05201146f, 0.24144275f, 0.69300383f, 1.0000026f})
                      : polynomial(f, {2.17022555e-4f, 1.2439688e-3f, 9.67884095e-3f, 5.5483342e-2f, 2.40229836e-1f,
                                       6.93146984e-1f, 1.0f});
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)x);  // times 2^floor(x)
#else
  const Vec low = all(-126.0f), magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to whole numbers
  const Ints kept = x >= low;
  const Vec clamped = x > low ? x : low, shifted = clamped + magic, f = clamped - (shifted - magic);
  Vec p = polynomial(f, {1.5252734e-5f, 1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                         6.9314718e-1f, 1.0f});
  p = reinterpret_cast<Vec>((reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23)) & kept);
  return x == x ? p : x;
#endif
}

// The larger of two, the second one if either is NaN
static inline float larger(float a, float b) { return a > b ? a : b; }
static inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

struct Larger {
  template <class T> T operator()(T a, T b) const { return larger(a, b); }
};
struct Plus {
  template <class T> T operator()(T a, T b) const { return a + b; }
};

// The numbers of a vector, or n of them in a row, made one by an operation on vectors and on floats
template <class F>
static inline float fold(Vec v, F of) {
#if defined(__AVX512F__) && !defined(__clang__)
  for (const Ints& half : {Ints{8, 9, 10, 11, 12, 13, 14, 15}, Ints{4, 5, 6, 7}, Ints{2, 3}, Ints{1}})
    v = of(v, (Vec)__builtin_shuffle(v, half));
  return v[0];
#else
  float x[WIDTH];
  store(x, v);
  for (int w = WIDTH / 2; w; w /= 2)
    for (int c = 0; c < w; c++) x[c] = of(x[c], x[c + w]);
  return x[0];
#endif
}

template <class F>
static float fold(const float* x, long n, F of) {
  Vec v = load(x);
  for (long c = WIDTH; c < n; c += WIDTH) v = of(v, load(x + c));
  return fold(v, of);
}
