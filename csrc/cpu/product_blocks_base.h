// Sums of codes times activations over one block of one tile, in plain loops.
//
// All product_blocks_*.h define the same names; the sums are integers, so all agree to the bit.
// A block of codes is a row of steps of 64 bytes. Byte 4 * row + j of a step holds, from its low
// bits up, the codes of columns j, 4 + j, 8 + j ... of the step: so a 4-byte lane is a row, and
// shifts give four consecutive columns in it.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Sixteen int32 lanes, one a row of the tile.
struct I {
  int32_t v[16];
};

constexpr size_t kMaxPlanes = 4;  // planes of activations that one sweep serves

// Whether activations are int16 words instead of int8 planes.
constexpr bool uses_words(int, bool, size_t) {
  return false;
}

COMPRESS_INLINE I i_zero_point(const uint8_t* zero) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = zero[i];
  return r;
}
COMPRESS_INLINE I i_set(int32_t x) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
// high * 256 + low, modulo 2^32.
COMPRESS_INLINE I i_join(I high, I low) {
  for (int i = 0; i < 16; ++i) {
    low.v[i] = (int32_t)((uint32_t)high.v[i] * 256u + (uint32_t)low.v[i]);
  }
  return low;
}
// x - y * z, modulo 2^32.
COMPRESS_INLINE I i_subtract_product(I x, I y, I z) {
  for (int i = 0; i < 16; ++i) {
    x.v[i] = (int32_t)((uint32_t)x.v[i] - (uint32_t)y.v[i] * (uint32_t)z.v[i]);
  }
  return x;
}
COMPRESS_INLINE F i_to_float(I x) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = (float)x.v[i];
  return load(out);
}
// Rounds to nearest even; |x| < 2^16.
COMPRESS_INLINE I i_from_float(F x) {
  float in[16];
  store(in, rint_(x));
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = (int32_t)in[i];
  return r;
}
COMPRESS_INLINE I i_add(I x, I y) {
  for (int i = 0; i < 16; ++i) x.v[i] += y.v[i];
  return x;
}
COMPRESS_INLINE int32_t i_reduce_add(I x) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += x.v[i];
  return sum;
}
// Integers of 8 bits to one plane.
COMPRESS_INLINE void i_store_plane(I x, int8_t* out) {
  for (int i = 0; i < 16; ++i) out[i] = (int8_t)x.v[i];
}
// Integers of 16 bits to two planes: x = high * 256 + low.
COMPRESS_INLINE void i_store_planes(I x, int8_t* high, int8_t* low) {
  for (int i = 0; i < 16; ++i) {
    const int32_t up = (x.v[i] + 128) >> 8;
    high[i] = (int8_t)up;
    low[i] = (int8_t)(x.v[i] - up * 256);
  }
}
COMPRESS_INLINE void i_store_words(I, int16_t*) {}

// sums[p] = sums over `columns` (a multiple of 16) of codes times plane p of the activations,
// whose planes lie `stride` bytes apart.
template <int Bits, bool, int Planes>
COMPRESS_INLINE void block_sums(const uint8_t* codes, const int8_t* x, size_t stride,
                                size_t columns, I* sums) {
  constexpr int fields = 8 / Bits, top = (1 << Bits) - 1;
  for (int p = 0; p < Planes; ++p) sums[p] = i_set(0);
  for (size_t k = 0; k < columns; k += 4 * fields, codes += 64) {
    for (int field = 0; field < fields; ++field) {
      for (int p = 0; p < Planes; ++p) {
        const int8_t* a = x + (size_t)p * stride + k + 4 * field;
        for (int row = 0; row < 16; ++row) {
          int32_t sum = 0;
          for (int j = 0; j < 4; ++j) {
            sum += (codes[4 * row + j] >> (Bits * field) & top) * a[j];
          }
          sums[p].v[row] += sum;
        }
      }
    }
  }
}
