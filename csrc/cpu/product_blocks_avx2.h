// Sums over a block with AVX2. See product_blocks_base.h for what each name means.
//
// Codes of 2 and 4 bits are multiplied as unsigned bytes with int8 activations (vpmaddubsw), and
// pairs are added up in 16 bits for as long as they fit. Codes of 8 bits would not fit, and 16-bit
// activations would take two such planes: there codes are widened to 16 bits (vpmaddwd).

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct I {
  __m256i a, b;
};

constexpr size_t kMaxPlanes = 4;

// Whether activations are int16 words instead of int8 planes. For one row, two planes cost less
// than widening the codes.
constexpr bool uses_words(int bits, bool exact, size_t batch) {
  return bits == 8 || (exact && batch > 1);
}

COMPRESS_INLINE I i_zero_point(const uint8_t* zero) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)zero);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
COMPRESS_INLINE I i_set(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
COMPRESS_INLINE I i_add(I x, I y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
COMPRESS_INLINE I i_join(I high, I low) {
  return i_add({_mm256_slli_epi32(high.a, 8), _mm256_slli_epi32(high.b, 8)}, low);
}
COMPRESS_INLINE I i_subtract_product(I x, I y, I z) {
  return {_mm256_sub_epi32(x.a, _mm256_mullo_epi32(y.a, z.a)),
          _mm256_sub_epi32(x.b, _mm256_mullo_epi32(y.b, z.b))};
}
#if defined(__AVX512F__)  // without VNNI: lanes are one register, integers still two
COMPRESS_INLINE F i_to_float(I x) {
  return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(x.a), x.b, 1));
}
COMPRESS_INLINE I i_from_float(F x) {
  const __m512i q = _mm512_cvtps_epi32(x);
  return {_mm512_castsi512_si256(q), _mm512_extracti64x4_epi64(q, 1)};
}
#else
COMPRESS_INLINE F i_to_float(I x) {
  return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
COMPRESS_INLINE I i_from_float(F x) {
  return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
#endif
COMPRESS_INLINE int32_t i_reduce_add(I x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
COMPRESS_INLINE __m256i words_of(I x) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
}
COMPRESS_INLINE void i_store_plane(I x, int8_t* out) {
  const __m256i words = words_of(x);
  _mm_storeu_si128((__m128i*)out, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                                  _mm256_extracti128_si256(words, 1)));
}
COMPRESS_INLINE void i_store_planes(I x, int8_t* high, int8_t* low) {
  const __m256i half = _mm256_set1_epi32(128);
  const I up = {_mm256_srai_epi32(_mm256_add_epi32(x.a, half), 8),
                _mm256_srai_epi32(_mm256_add_epi32(x.b, half), 8)};
  i_store_plane(up, high);
  i_store_plane({_mm256_sub_epi32(x.a, _mm256_slli_epi32(up.a, 8)),
                 _mm256_sub_epi32(x.b, _mm256_slli_epi32(up.b, 8))},
                low);
}
// Of four columns, the even two come first: their codes are the even bytes of a lane.
COMPRESS_INLINE void i_store_words(I x, int16_t* out) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1,
                                         4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(words_of(x), order));
}

COMPRESS_INLINE __m256i spread4(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// sum += term, here and now: GCC would first add terms to each other, and then needs more registers
// than there are.
COMPRESS_INLINE void add_words(__m256i& sum, __m256i term) {
  sum = _mm256_add_epi16(sum, term);
  __asm__("" : "+x"(sum));
}
COMPRESS_INLINE void add_integers(__m256i& sum, __m256i term) {
  sum = _mm256_add_epi32(sum, term);
  __asm__("" : "+x"(sum));
}
// The codes again, not kept in registers.
COMPRESS_INLINE __m256i load_codes(const uint8_t* codes) {
  __asm__("" : "+r"(codes));
  return _mm256_loadu_si256((const __m256i*)codes);
}

// 16-bit activations: one plane a row of the batch.
template <int Bits, int Planes>
COMPRESS_INLINE void block_sums_words(const uint8_t* codes, const int8_t* x, size_t stride,
                                      size_t columns, I* sums) {
  constexpr int fields = 8 / Bits;
  const __m256i low = _mm256_set1_epi16((1 << Bits) - 1);
  I total[Planes];
  for (int p = 0; p < Planes; ++p) total[p] = i_set(0);
  for (size_t k = 0; k < columns; k += 4 * fields, codes += 64) {
    if (Planes <= 2) __builtin_prefetch(codes + 2048);
    for (int field = 0; field < 2 * fields; ++field) {
      // Even columns of four first: in the low byte of each word; then odd ones.
      const int shift = field / 2 * Bits + field % 2 * 8;
      __m256i a = _mm256_srli_epi16(load_codes(codes), shift);
      __m256i b = _mm256_srli_epi16(load_codes(codes + 32), shift);
      if (shift + Bits < 16) {
        a = _mm256_and_si256(a, low);
        b = _mm256_and_si256(b, low);
      }
      for (int p = 0; p < Planes; ++p) {
        const __m256i two = spread4(x + (size_t)p * stride + 2 * k + 4 * (size_t)field);
        add_integers(total[p].a, _mm256_madd_epi16(a, two));
        add_integers(total[p].b, _mm256_madd_epi16(b, two));
      }
    }
  }
  for (int p = 0; p < Planes; ++p) sums[p] = total[p];
}

// Steps whose products are added up in 16 bits: each adds 8 / Bits pairs of at most
// 2 * (2^Bits - 1) * 128.
template <int Bits>
constexpr size_t kNarrowSteps = Bits == 4 ? 4 : 8;

// Totals live in memory while the inner loop needs every register; without this hint GCC keeps them
// in registers and spills the loop's own.
COMPRESS_INLINE void stay_in_memory(I* totals) {
  __asm__ volatile("" : : "r"(totals) : "memory");
}

template <int Bits, bool Words, int Planes>
COMPRESS_INLINE void block_sums(const uint8_t* codes, const int8_t* x, size_t stride,
                                size_t columns, I* sums) {
  if (Words) return block_sums_words<Bits, Planes>(codes, x, stride, columns, sums);
  constexpr size_t fields = 8 / Bits, step = 4 * fields;
  const __m256i low = _mm256_set1_epi8((char)((1 << Bits) - 1)), ones = _mm256_set1_epi16(1);
  for (int p = 0; p < Planes; ++p) sums[p] = i_set(0);
  if (Planes > 2) stay_in_memory(sums);
  for (size_t k = 0; k < columns;) {
    const size_t end = smaller(columns, k + step * kNarrowSteps<Bits>);
    __m256i narrow[Planes][2];
    for (int p = 0; p < Planes; ++p) narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
    do {
      if (Planes <= 2) __builtin_prefetch(codes + 2048);
      for (size_t field = 0; field < fields; ++field) {
        const int shift = (int)field * Bits;
        const __m256i ca = _mm256_and_si256(_mm256_srli_epi16(load_codes(codes), shift), low);
        const __m256i cb = _mm256_and_si256(_mm256_srli_epi16(load_codes(codes + 32), shift), low);
        for (int p = 0; p < Planes; ++p) {
          const __m256i four = spread4(x + (size_t)p * stride + k + 4 * field);
          add_words(narrow[p][0], _mm256_maddubs_epi16(ca, four));
          add_words(narrow[p][1], _mm256_maddubs_epi16(cb, four));
        }
      }
      k += step;
      codes += 64;
    } while (k < end);
    for (int p = 0; p < Planes; ++p) {
      sums[p] = i_add(
          sums[p], {_mm256_madd_epi16(narrow[p][0], ones), _mm256_madd_epi16(narrow[p][1], ones)});
    }
    if (Planes > 2) stay_in_memory(sums);
  }
}
