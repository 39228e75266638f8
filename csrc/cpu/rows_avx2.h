// Folds of sixteen rows at once with AVX2; also used under AVX-512. See lanes_base.h.

#pragma once

#include <immintrin.h>

template <Fold kFold>
COMPRESS_INLINE __m256 fold(__m256 x, __m256 y) {
  if (kFold == kAdd) return _mm256_add_ps(x, y);
  return kFold == kMin ? _mm256_min_ps(x, y) : _mm256_max_ps(x, y);
}

// Lanes i and i + 4 of two rows: one row in each half of the result.
template <Fold kFold>
COMPRESS_INLINE __m256 fold_fours(const float* x, const float* y) {
  const __m256 a = fold<kFold>(_mm256_load_ps(x), _mm256_load_ps(x + 8));
  const __m256 b = fold<kFold>(_mm256_load_ps(y), _mm256_load_ps(y + 8));
  return fold<kFold>(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Lanes i and i + 2: in each half x0 y0 x1 y1.
template <Fold kFold>
COMPRESS_INLINE __m256 fold_twos(__m256 x, __m256 y) {
  return fold<kFold>(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
}

template <Fold kFold>
COMPRESS_INLINE void fold_rows(const float* rows, float* out) {
  for (int half = 0; half < 16; half += 8) {
    const float* row = rows + 16 * half;
    __m256 four[4];
    for (int i = 0; i < 4; ++i) four[i] = fold_fours<kFold>(row + 16 * i, row + 16 * (i + 4));
    const __m256 x = fold_twos<kFold>(four[0], four[1]), y = fold_twos<kFold>(four[2], four[3]);
    _mm256_store_ps(out + half,
                    fold<kFold>(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xEE)));
  }
}
