// Stored values to lanes with AVX-512: sixteen floats a register. See product_expand_base.h for
// what each name means.
//
// Kept values are widened where they lie and then spread by their mask (vexpandps), so that every
// dtype takes the same way. It needs no more than AVX512F; an expansion of bytes or words (VBMI2)
// before widening would be as many instructions.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef __m512 V;

constexpr size_t kStep = 16;
constexpr int kDenseRows = 4;
constexpr int kBatchAtOnce = 4;

COMPRESS_INLINE V v_zero() {
  return _mm512_setzero_ps();
}
COMPRESS_INLINE V v_load(const float* p) {
  return _mm512_loadu_ps(p);
}
COMPRESS_INLINE void v_store(float* p, V v) {
  _mm512_storeu_ps(p, v);
}
COMPRESS_INLINE V v_set1(float x) {
  return _mm512_set1_ps(x);
}
COMPRESS_INLINE V v_add(V x, V y) {
  return _mm512_add_ps(x, y);
}
COMPRESS_INLINE V v_mul(V x, V y) {
  return _mm512_mul_ps(x, y);
}
COMPRESS_INLINE V v_fma(V x, V y, V sum) {
  return _mm512_fmadd_ps(x, y, sum);
}
COMPRESS_INLINE float v_sum(V v) {
  return reduce_add(v);
}
COMPRESS_INLINE void v_keep(V&) {}

COMPRESS_INLINE float widen_f16(uint16_t half) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

template <int K>
COMPRESS_INLINE V dense_step(const uint8_t* p) {
  if (K == kFloat32) return _mm512_loadu_ps(p);
  if (K == kFloat16) return load_f16(p);
  if (K == kInt8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  return load_bf16(p);
}

template <int K>
COMPRESS_INLINE V sparse_step(const uint8_t* p, uint64_t word, size_t k, size_t* kept) {
  const uint64_t bits = word >> 16 * k & 0xFFFF;
  *kept = (size_t)__builtin_popcountll(bits);
  return _mm512_maskz_expand_ps((__mmask16)bits, dense_step<K>(p));
}
