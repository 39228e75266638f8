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
constexpr int kDenseRows = 4;
constexpr int kBatchAtOnce = 3;  // times two rows: 12 sums, 3 activations and a weight

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
COMPRESS_INLINE V v_add(V x, V y) {
  return _mm256_add_ps(x, y);
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
// Compilers would rather load it again for each use, and loads are what is short.
COMPRESS_INLINE void v_keep(V& v) {
  asm("" : "+x"(v));
}

COMPRESS_INLINE float widen_f16(uint16_t half) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
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
  alignas(32) uint8_t bf16[256][32];  // the two bytes of a value, on top of a lane
  alignas(32) uint8_t int8[256][32];  // the byte of a value, on top of a lane
  alignas(32) int32_t fp32[256][8];   // the lane to take, negative where none
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

COMPRESS_INLINE __m256i row_of(const void* table, size_t offset) {
  return _mm256_load_si256((const __m256i*)((const uint8_t*)table + offset));
}

template <int K>
COMPRESS_INLINE V sparse_step(const uint8_t* p, uint64_t word, size_t k, size_t* kept) {
  // Byte k of the word times 32, by a rotation: a row of a table.
  const size_t turn = (8 * k + 59) % 64;
  const size_t offset = (word >> turn | word << (64 - turn) % 64) & 0x1FE0;
  *kept = (size_t)__builtin_popcountll(offset);
  if (K == kFloat32) {
    const __m256i lanes = row_of(kExpand.fp32, offset);
    const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)p), lanes);
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
  }
  if (K == kFloat16) {
    const uint8_t* order = (const uint8_t*)kShuffle.scatter2 + offset / 2;
    const __m128i values = _mm_loadu_si128((const __m128i*)p);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(values, _mm_load_si128((const __m128i*)order)));
  }
  if (K == kInt8) {
    int64_t eight;
    memcpy(&eight, p, 8);
    const __m256i tops =
        _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), row_of(kExpand.int8, offset));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(tops, 24));
  }
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(values, row_of(kExpand.bf16, offset)));
}
