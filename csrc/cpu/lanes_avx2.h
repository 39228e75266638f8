// Sixteen float lanes as two AVX2 registers. See lanes_base.h for what each name means.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct F {
  __m256 a, b;
};
struct U {
  __m256i a, b;
};

constexpr int kTogether = 2;

COMPRESS_INLINE F set1(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
COMPRESS_INLINE U set1u(uint32_t x) {
  return {_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)};
}
COMPRESS_INLINE F load(const void* p) {
  const float* f = (const float*)p;
  return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
COMPRESS_INLINE void store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
COMPRESS_INLINE F add(F x, F y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
COMPRESS_INLINE F sub(F x, F y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
COMPRESS_INLINE F mul(F x, F y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
COMPRESS_INLINE F sub_exact(F x, F y, F z) {
  return {_mm256_fnmadd_ps(y.a, z.a, x.a), _mm256_fnmadd_ps(y.b, z.b, x.b)};
}
COMPRESS_INLINE F div(F x, F y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
COMPRESS_INLINE F min_(F x, F y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
COMPRESS_INLINE F max_(F x, F y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
// As integers, floats of one sign are in order: these three take any of four ports, where a float
// minimum would share two with every addition.
COMPRESS_INLINE __m256 raise_half(__m256 high, __m256 x) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(high), _mm256_castps_si256(x)));
}
COMPRESS_INLINE F raise(F high, F x) {
  return {raise_half(high.a, x.a), raise_half(high.b, x.b)};
}
COMPRESS_INLINE __m256 lower_half(__m256 low, __m256 x) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(low), _mm256_castps_si256(x)));
}
COMPRESS_INLINE F lower(F low, F x) {
  return {lower_half(low.a, x.a), lower_half(low.b, x.b)};
}
COMPRESS_INLINE __m256 clip_half(__m256 x, __m256 low, __m256 high) {
  const __m256i raised = _mm256_min_epu32(_mm256_castps_si256(x), _mm256_castps_si256(low));
  return _mm256_castsi256_ps(_mm256_min_epi32(raised, _mm256_castps_si256(high)));
}
COMPRESS_INLINE F clip(F x, F low, F high) {
  return {clip_half(x.a, low.a, high.a), clip_half(x.b, low.b, high.b)};
}
COMPRESS_INLINE F rint_(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
COMPRESS_INLINE U abs_bits(F x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), magnitude),
          _mm256_and_si256(_mm256_castps_si256(x.b), magnitude)};
}
COMPRESS_INLINE U umax(U x, U y) {
  return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)};
}

COMPRESS_INLINE F load_bf16(const void* p) {
  const __m128i* half = (const __m128i*)p;
  const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(half));
  const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
COMPRESS_INLINE F load_f16(const void* p) {
  const __m128i* half = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
COMPRESS_INLINE F load_u8(const void* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
COMPRESS_INLINE void store_u8(uint8_t* p, F v) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words),
                                                 _mm256_extracti128_si256(words, 1)));
}
COMPRESS_INLINE __m256i shifted_words(F x, int zero) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  return _mm256_add_epi16(words, _mm256_set1_epi16((short)zero));
}
COMPRESS_INLINE void store_u8_pair(uint8_t* p, F x, F y, int zero) {
  const __m256i bytes = _mm256_packus_epi16(shifted_words(x, zero), shifted_words(y, zero));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
}
COMPRESS_INLINE U pruned_lanes(const uint8_t* mask) {
  const __m128i pruned = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i*)mask), _mm_setzero_si128());
  return {_mm256_cvtepi8_epi32(pruned), _mm256_cvtepi8_epi32(_mm_srli_si128(pruned, 8))};
}
COMPRESS_INLINE F keep(F v, const uint8_t* mask) {
  const U pruned = pruned_lanes(mask);
  return {_mm256_andnot_ps(_mm256_castsi256_ps(pruned.a), v.a),
          _mm256_andnot_ps(_mm256_castsi256_ps(pruned.b), v.b)};
}
COMPRESS_INLINE F drop(F v, const uint8_t* mask) {
  const U pruned = pruned_lanes(mask);
  return {_mm256_and_ps(_mm256_castsi256_ps(pruned.a), v.a),
          _mm256_and_ps(_mm256_castsi256_ps(pruned.b), v.b)};
}

COMPRESS_INLINE F round_f16(F v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(v.a, mode)), _mm256_cvtph_ps(_mm256_cvtps_ph(v.b, mode))};
}
COMPRESS_INLINE __m256 round_bf16_half(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32((int)0xFFFF0000u)));
}
COMPRESS_INLINE F round_bf16(F v) {
  return {round_bf16_half(v.a), round_bf16_half(v.b)};
}
COMPRESS_INLINE __m256 lift_half(__m256 v, float tiny) {
  const __m256 sign = _mm256_and_ps(v, _mm256_set1_ps(-0.0f));
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
  return _mm256_or_ps(sign, _mm256_max_ps(_mm256_set1_ps(tiny), magnitude));
}
COMPRESS_INLINE F lift(F v, float tiny) {
  return {lift_half(v.a, tiny), lift_half(v.b, tiny)};
}

COMPRESS_INLINE float reduce_add(F v) {
  const __m256 eight = _mm256_add_ps(v.a, v.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
COMPRESS_INLINE uint32_t reduce_umax(U v) {
  const __m256i eight = _mm256_max_epu32(v.a, v.b);
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return (uint32_t)_mm_cvtsi128_si32(m);
}
