// Sixteen float lanes as one AVX-512 register. See lanes_base.h for what each name means.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef __m512 F;
typedef __m512i U;

constexpr int kTogether = 4;

COMPRESS_INLINE F set1(float x) {
  return _mm512_set1_ps(x);
}
COMPRESS_INLINE U set1u(uint32_t x) {
  return _mm512_set1_epi32((int)x);
}
COMPRESS_INLINE F load(const void* p) {
  return _mm512_loadu_ps(p);
}
COMPRESS_INLINE void store(float* p, F v) {
  _mm512_storeu_ps(p, v);
}
COMPRESS_INLINE F add(F x, F y) {
  return _mm512_add_ps(x, y);
}
COMPRESS_INLINE F sub(F x, F y) {
  return _mm512_sub_ps(x, y);
}
COMPRESS_INLINE F mul(F x, F y) {
  return _mm512_mul_ps(x, y);
}
COMPRESS_INLINE F sub_exact(F x, F y, F z) {
  return _mm512_fnmadd_ps(y, z, x);
}
COMPRESS_INLINE F div(F x, F y) {
  return _mm512_div_ps(x, y);
}
COMPRESS_INLINE F min_(F x, F y) {
  return _mm512_min_ps(x, y);
}
COMPRESS_INLINE F max_(F x, F y) {
  return _mm512_max_ps(x, y);
}
COMPRESS_INLINE F raise(F high, F x) {
  return _mm512_max_ps(high, x);
}
COMPRESS_INLINE F lower(F low, F x) {
  return _mm512_min_ps(low, x);
}
COMPRESS_INLINE F clip(F x, F low, F high) {
  return _mm512_min_ps(_mm512_max_ps(x, low), high);
}
COMPRESS_INLINE F rint_(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
COMPRESS_INLINE U abs_bits(F x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
}
COMPRESS_INLINE U umax(U x, U y) {
  return _mm512_max_epu32(x, y);
}

COMPRESS_INLINE F load_bf16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
COMPRESS_INLINE F load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
COMPRESS_INLINE F load_u8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
COMPRESS_INLINE void store_u8(uint8_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
COMPRESS_INLINE void store_u8_pair(uint8_t* p, F x, F y, int zero) {
  const F z = set1((float)zero);
  store_u8(p, add(x, z));
  store_u8(p + 16, add(y, z));
}
COMPRESS_INLINE __mmask16 kept_lanes(const uint8_t* mask) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)mask);
  return _mm_test_epi8_mask(bytes, bytes);
}
COMPRESS_INLINE F keep(F v, const uint8_t* mask) {
  return _mm512_maskz_mov_ps(kept_lanes(mask), v);
}
COMPRESS_INLINE F drop(F v, const uint8_t* mask) {
  return _mm512_maskz_mov_ps((__mmask16)~kept_lanes(mask), v);
}

COMPRESS_INLINE F round_f16(F v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
COMPRESS_INLINE F round_bf16(F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xFFFF0000u)));
}
COMPRESS_INLINE F lift(F v, float tiny) {
  const __m512 negative_zero = _mm512_set1_ps(-0.0f);
  const __m512 magnitude = _mm512_andnot_ps(negative_zero, v);
  return _mm512_or_ps(_mm512_and_ps(v, negative_zero),
                      _mm512_max_ps(_mm512_set1_ps(tiny), magnitude));
}

COMPRESS_INLINE float reduce_add(F v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
COMPRESS_INLINE uint32_t reduce_umax(U v) {
  return _mm512_reduce_max_epu32(v);
}
