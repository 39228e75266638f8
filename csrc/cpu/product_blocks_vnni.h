// Sums over a block with AVX-512 VNNI: one register is a step of a tile. See
// product_blocks_base.h for what each name means.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef __m512i I;

constexpr size_t kMaxPlanes = 8;

constexpr bool uses_words(int, bool, size_t) {
  return false;
}

COMPRESS_INLINE I i_zero_point(const uint8_t* zero) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zero));
}
COMPRESS_INLINE I i_set(int32_t x) {
  return _mm512_set1_epi32(x);
}
COMPRESS_INLINE I i_add(I x, I y) {
  return _mm512_add_epi32(x, y);
}
COMPRESS_INLINE I i_join(I high, I low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
COMPRESS_INLINE I i_subtract_product(I x, I y, I z) {
  return _mm512_sub_epi32(x, _mm512_mullo_epi32(y, z));
}
COMPRESS_INLINE F i_to_float(I x) {
  return _mm512_cvtepi32_ps(x);
}
COMPRESS_INLINE I i_from_float(F x) {
  return _mm512_cvtps_epi32(x);
}
COMPRESS_INLINE int32_t i_reduce_add(I x) {
  return _mm512_reduce_add_epi32(x);
}
COMPRESS_INLINE void i_store_plane(I x, int8_t* out) {
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(x));
}
COMPRESS_INLINE void i_store_planes(I x, int8_t* high, int8_t* low) {
  const I up = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
  i_store_plane(up, high);
  i_store_plane(_mm512_sub_epi32(x, _mm512_slli_epi32(up, 8)), low);
}
COMPRESS_INLINE void i_store_words(I, int16_t*) {}

template <int Bits, bool, int Planes>
COMPRESS_INLINE void block_sums(const uint8_t* codes, const int8_t* x, size_t stride,
                                size_t columns, I* sums) {
  constexpr size_t fields = 8 / Bits, step = 4 * fields;
  const __m512i low = _mm512_set1_epi8((char)((1 << Bits) - 1));
  // Two chains of sums a plane where there are few: vpdpbusd takes five cycles.
  constexpr int chains = Planes <= 4 ? 2 : 1;
  I partial[Planes][chains];
  for (int p = 0; p < Planes; ++p) {
    for (int c = 0; c < chains; ++c) partial[p][c] = i_set(0);
  }
  for (size_t k = 0; k < columns; k += step, codes += 64) {
    if (Planes <= 2) __builtin_prefetch(codes + 2048);
    const __m512i word = _mm512_loadu_si512(codes);
    for (size_t field = 0; field < fields; ++field) {
      const __m512i shifted = Bits == 8 ? word : _mm512_srli_epi16(word, (int)field * Bits);
      const __m512i c = Bits == 8 ? shifted : _mm512_and_si512(shifted, low);
      for (int p = 0; p < Planes; ++p) {
        int32_t four;
        memcpy(&four, x + (size_t)p * stride + k + 4 * field, 4);
        I& sum = partial[p][(fields == 1 ? k / step : field) % chains];
        sum = _mm512_dpbusd_epi32(sum, c, _mm512_set1_epi32(four));
      }
    }
  }
  for (int p = 0; p < Planes; ++p) {
    sums[p] = chains == 2 ? i_add(partial[p][0], partial[p][chains - 1]) : partial[p][0];
  }
}
