// Stored values to lanes with AVX2: eight floats a register. See product_expand_base.h for what
// each name means.
//
// The table of a bitmask's byte says which kept value each lane takes; a shuffle that also widens
// puts it there, and zero into the lanes of pruned values.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef __m256 V;

constexpr size_t kStep = 8;
constexpr int kRowsAtOnce = 4, kBatchAtOnce = 3;  // 12 sums, 3 activations and a weight

COMPRESS_INLINE V v_zero() {
  return _mm256_setzero_ps();
}
COMPRESS_INLINE V v_load(const float* p) {
  return _mm256_loadu_ps(p);
}
COMPRESS_INLINE void v_store(float* p, V v) {
  _mm256_storeu_ps(p, v);
}
COMPRESS_INLINE V v_set1(float x) {
  return _mm256_set1_ps(x);
}
COMPRESS_INLINE V v_mul(V x, V y) {
  return _mm256_mul_ps(x, y);
}
COMPRESS_INLINE V v_fma(V x, V y, V sum) {
  return _mm256_fmadd_ps(x, y, sum);
}

COMPRESS_INLINE float v_sum(V v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehdup_ps(four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)));
}
template <int Rows>
COMPRESS_INLINE void add_sums(const V* v, float* out) {
  if (Rows == 4) {  // in the order of v_sum: neighbours, then pairs of them; halves come first
    __m128 half[4];
    for (int r = 0; r < Rows; ++r) {
      half[r] = _mm_add_ps(_mm256_castps256_ps128(v[r]), _mm256_extractf128_ps(v[r], 1));
    }
    const __m128 sums = _mm_hadd_ps(_mm_hadd_ps(half[0], half[1]), _mm_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
    return;
  }
  for (int r = 0; r < Rows; ++r) out[r] += v_sum(v[r]);
}

template <int K>
COMPRESS_INLINE V dense_step(const uint8_t* p) {
  if (K == kFloat32) return _mm256_loadu_ps((const float*)p);
  if (K == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  if (K == kInt8) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Indexed by a byte of the bitmask. Entries of 0x80 become zero bytes.
struct ExpandTables {
  alignas(32) uint8_t bf16[256][32];   // the two bytes of a value, on top of a lane
  alignas(32) uint8_t int8[256][32];   // the byte of a value, on top of a lane
  alignas(32) int32_t fp32[256][8];    // the lane to take, negative where none
};

constexpr ExpandTables make_expand_tables() {
  ExpandTables t{};
  for (int bits = 0; bits < 256; ++bits) {
    int kept = 0;
    for (int i = 0; i < 8; ++i) {
      const bool taken = bits >> i & 1;
      for (int j = 0; j < 4; ++j) t.bf16[bits][4 * i + j] = t.int8[bits][4 * i + j] = 0x80;
      if (taken) {
        t.bf16[bits][4 * i + 2] = (uint8_t)(2 * kept);
        t.bf16[bits][4 * i + 3] = (uint8_t)(2 * kept + 1);
        t.int8[bits][4 * i + 3] = (uint8_t)kept;
      }
      t.fp32[bits][i] = taken ? kept : -8;
      kept += taken;
    }
  }
  return t;
}

static constexpr ExpandTables kExpand = make_expand_tables();

// What a lane of integers must be multiplied with to be an int8 again.
constexpr float kSparseInt8 = 0x1p-24f;

// `bits` is a byte of the bitmask.
template <int K>
COMPRESS_INLINE V sparse_step(const uint8_t* p, size_t bits) {
  if (K == kFloat32) {
    const __m256i lanes = _mm256_load_si256((const __m256i*)kExpand.fp32[bits]);
    const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)p), lanes);
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
  }
  if (K == kFloat16) {
    const __m128i order = _mm_load_si128((const __m128i*)kShuffle.scatter2[bits]);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), order));
  }
  if (K == kInt8) {
    int64_t eight;
    memcpy(&eight, p, 8);
    const __m256i order = _mm256_load_si256((const __m256i*)kExpand.int8[bits]);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), order));
  }
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  const __m256i order = _mm256_load_si256((const __m256i*)kExpand.bf16[bits]);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(values, order));
}
COMPRESS_INLINE size_t bits_of_step(const uint8_t* mask) {
  return *mask;
}
COMPRESS_INLINE size_t count_kept(size_t bits) {
  return (size_t)__builtin_popcountll(bits);
}
