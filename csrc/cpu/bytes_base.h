// Byte and bit work in plain C++ (little-endian). bytes_avx2.h defines the same names.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bit streams assume little-endian words");

COMPRESS_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t x;
  memcpy(&x, p, 8);
  return x;
}

// Low `width` bits of every `every` bits.
COMPRESS_INLINE uint64_t fields(int width, int every) {
  const uint64_t repeat = every == 16   ? 0x0001000100010001u
                          : every == 32 ? 0x0000000100000001u
                                        : 1u;
  return ((1ull << width) - 1) * repeat;
}

// Eight codes, one a byte, to 8 * bits bits, and back: fields are joined pairwise, three times.
COMPRESS_INLINE uint64_t join_codes(uint64_t x, int bits) {
  x &= ((1u << bits) - 1) * 0x0101010101010101u;
  for (int width = bits, every = 16; every <= 64; width *= 2, every *= 2) {
    const uint64_t low = fields(width, every);
    x = (x & low) | ((x >> (every / 2 - width)) & (low << width));
  }
  return x;
}
COMPRESS_INLINE uint64_t split_codes(uint64_t x, int bits) {
  for (int width = 4 * bits, every = 64; every >= 16; width /= 2, every /= 2) {
    const uint64_t low = fields(width, every);
    x = (x & low) | ((x & (low << width)) << (every / 2 - width));
  }
  return x;
}

// Whole blocks of a row, as many as the instruction set likes; return the codes done (a multiple
// of eight). The base set leaves all of them to the caller's loop over eight codes.
COMPRESS_INLINE size_t pack_blocks(const uint8_t*, size_t, int, uint8_t*) {
  return 0;
}
COMPRESS_INLINE size_t unpack_blocks(const uint8_t*, size_t, int, uint8_t*) {
  return 0;
}

// One bit for each of 32 bytes that is not zero.
COMPRESS_INLINE uint32_t nonzero32(const uint8_t* p) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t x = load_u64(p + 8 * i);
    const uint64_t low = 0x7F7F7F7F7F7F7F7Fu;
    const uint64_t high = (((x & low) + low) | x) & ~low;
    out |= (uint32_t)(((high >> 7) * 0x0102040810204080u) >> 56) << (8 * i);
  }
  return out;
}

// 32 weights: out = 1 where the magnitude exceeds `key`; the result has a bit where it equals it.
template <bool Wide>
COMPRESS_INLINE uint32_t compare_keys(const uint8_t* w, uint32_t key, uint8_t* out) {
  uint32_t equal = 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, w + i * (Wide ? 4 : 2), Wide ? 4 : 2);
    bits &= Wide ? 0x7FFFFFFFu : 0x7FFFu;
    out[i] = bits > key;
    equal |= (uint32_t)(bits == key) << i;
  }
  return equal;
}

// 32 float32 weights: a bit where the top 15 magnitude bits equal `prefix`.
COMPRESS_INLINE uint32_t prefix_bits(const uint8_t* w, uint32_t prefix) {
  uint32_t equal = 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    memcpy(&bits, w + 4 * i, 4);
    equal |= (uint32_t)(((bits >> 16) & 0x7FFFu) == prefix) << i;
  }
  return equal;
}

// Eight items: kept ones to the front of `out` (may write all eight), or back to their places.
template <size_t Item>
COMPRESS_INLINE void gather8(const uint8_t* values, uint32_t bits, uint8_t* out) {
  for (; bits; bits &= bits - 1, out += Item) {
    memcpy(out, values + Item * (size_t)__builtin_ctz(bits), Item);
  }
}
template <size_t Item>
COMPRESS_INLINE void scatter8(const uint8_t* kept, uint32_t bits, const uint8_t* fill,
                              uint8_t* out) {
  for (int i = 0; i < 8; ++i, out += Item) {
    const bool taken = (bits >> i) & 1;
    memcpy(out, taken ? kept : fill, Item);
    kept += taken ? Item : 0;
  }
}
