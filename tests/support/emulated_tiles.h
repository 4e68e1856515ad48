// The tile instructions of AMX as plain loops, for a loop that is built with `-include` of this file on any processor
// with products of bfloat16 in pairs. A tile that is used without a shape ends the process, as it would on AMX.
#define EMULATED_TILES
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

static thread_local struct {
  float x[8][16][16];
  unsigned char shape[64];
} emulated;

static void require_shape(int tile) {
  if (emulated.shape[0] != 1 || emulated.shape[16 + 2 * tile] != 64 || emulated.shape[48 + tile] != 16) abort();
}

static void emulated_load(int tile, const void* from, long stride) {
  require_shape(tile);
  for (int r = 0; r < 16; r++) memcpy(emulated.x[tile][r], static_cast<const char*>(from) + r * stride, 64);
}

static void emulated_store(int tile, void* to, long stride) {
  require_shape(tile);
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, emulated.x[tile][r], 64);
}

// Subnormal numbers count as 0
static float emulated_half(float word, bool upper) {
  uint32_t bits;
  memcpy(&bits, &word, 4);
  bits = upper ? bits & 0xffff0000u : bits << 16;
  if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// c + a b: the first and the second halves of pairs are summed up apart
static void emulated_products(int c, int a, int b) {
  for (int tile : {c, a, b}) require_shape(tile);
  for (int r = 0; r < 16; r++) {
    float sums[2][16] = {};
    for (int k = 0; k < 16; k++)
      for (int half = 0; half < 2; half++) {
        const float left = emulated_half(emulated.x[a][r][k], half);
        for (int n = 0; n < 16; n++) sums[half][n] += left * emulated_half(emulated.x[b][k][n], half);
      }
    for (int n = 0; n < 16; n++) emulated.x[c][r][n] += sums[0][n] + sums[1][n];
  }
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) memcpy(emulated.shape, from, 64)
#define _tile_storeconfig(to) memcpy(to, emulated.shape, 64)
#define _tile_release() memset(emulated.shape, 0, 64)
#define _tile_zero(tile) memset(emulated.x[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) emulated_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated_products(c, a, b)
