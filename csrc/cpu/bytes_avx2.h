// Byte and bit work with AVX2 and BMI2; also used under AVX-512. See bytes_base.h.

#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

COMPRESS_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t x;
  memcpy(&x, p, 8);
  return x;
}

COMPRESS_INLINE uint64_t code_fields(int bits) {
  return ((1u << bits) - 1) * 0x0101010101010101u;
}
COMPRESS_INLINE uint64_t join_codes(uint64_t x, int bits) {
  return _pext_u64(x, code_fields(bits));
}
COMPRESS_INLINE uint64_t split_codes(uint64_t x, int bits) {
  return _pdep_u64(x, code_fields(bits));
}

COMPRESS_INLINE __m256i load256(const uint8_t* p) {
  return _mm256_loadu_si256((const __m256i*)p);
}
COMPRESS_INLINE void store256(uint8_t* p, __m256i v) {
  _mm256_storeu_si256((__m256i*)p, v);
}

COMPRESS_INLINE size_t pack_blocks(const uint8_t* codes, size_t n, int bits, uint8_t* out) {
  size_t i = 0;
  if (bits == 4) {
    const __m256i field = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(0x1001);
    for (; i + 64 <= n; i += 64) {
      const __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(load256(codes + i), field), weights);
      const __m256i b =
          _mm256_maddubs_epi16(_mm256_and_si256(load256(codes + i + 32), field), weights);
      store256(out + i / 2, _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8));
    }
  } else if (bits == 2) {
    const __m256i field = _mm256_set1_epi8(3), pairs = _mm256_set1_epi16(0x0401);
    const __m256i quads = _mm256_set1_epi32(0x00100001);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (; i + 128 <= n; i += 128) {
      __m256i v[4];
      for (int k = 0; k < 4; ++k) {
        const __m256i x = _mm256_and_si256(load256(codes + i + 32 * k), field);
        v[k] = _mm256_madd_epi16(_mm256_maddubs_epi16(x, pairs), quads);
      }
      const __m256i bytes =
          _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
      store256(out + i / 4, _mm256_permutevar8x32_epi32(bytes, order));
    }
  }
  return i;
}

COMPRESS_INLINE size_t unpack_blocks(const uint8_t* packed, size_t n, int bits, uint8_t* out) {
  size_t i = 0;
  if (bits == 4) {
    const __m256i field = _mm256_set1_epi16(0x0F0F);
    for (; i + 32 <= n; i += 32) {
      const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
      store256(out + i, _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), field));
    }
  } else if (bits == 2) {
    const __m256i nibbles = _mm256_set1_epi32(0x000F000F), field = _mm256_set1_epi32(0x03030303);
    for (; i + 32 <= n; i += 32) {
      __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(packed + i / 4)));
      x = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi32(x, 12)), nibbles);
      x = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi32(x, 6)), field);
      store256(out + i, x);
    }
  }
  return i;
}

COMPRESS_INLINE uint32_t nonzero32(const uint8_t* p) {
  return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(load256(p), _mm256_setzero_si256()));
}

template <bool Wide>
COMPRESS_INLINE uint32_t compare_keys(const uint8_t* w, uint32_t key, uint8_t* out) {
  __m256i greater, equal;
  if (Wide) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), k = _mm256_set1_epi32((int)key);
    __m256i g[4], e[4];
    for (int i = 0; i < 4; ++i) {
      const __m256i x = _mm256_and_si256(load256(w + 32 * i), magnitude);
      g[i] = _mm256_cmpgt_epi32(x, k);
      e[i] = _mm256_cmpeq_epi32(x, k);
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    greater = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(g[0], g[1]), _mm256_packs_epi32(g[2], g[3])), order);
    equal = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(e[0], e[1]), _mm256_packs_epi32(e[2], e[3])), order);
  } else {
    const __m256i magnitude = _mm256_set1_epi16(0x7FFF), k = _mm256_set1_epi16((short)key);
    const __m256i a = _mm256_and_si256(load256(w), magnitude);
    const __m256i b = _mm256_and_si256(load256(w + 32), magnitude);
    greater = _mm256_permute4x64_epi64(
        _mm256_packs_epi16(_mm256_cmpgt_epi16(a, k), _mm256_cmpgt_epi16(b, k)), 0xD8);
    equal = _mm256_permute4x64_epi64(
        _mm256_packs_epi16(_mm256_cmpeq_epi16(a, k), _mm256_cmpeq_epi16(b, k)), 0xD8);
  }
  store256(out, _mm256_and_si256(greater, _mm256_set1_epi8(1)));
  return (uint32_t)_mm256_movemask_epi8(equal);
}

COMPRESS_INLINE uint32_t prefix_bits(const uint8_t* w, uint32_t prefix) {
  const __m256i wanted = _mm256_set1_epi32((int)(prefix << 1));
  uint32_t equal = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i x = _mm256_srli_epi32(_mm256_slli_epi32(load256(w + 32 * i), 1), 17);
    const __m256i same = _mm256_cmpeq_epi32(_mm256_slli_epi32(x, 1), wanted);
    equal |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(same)) << (8 * i);
  }
  return equal;
}

COMPRESS_INLINE __m128i load64(const uint8_t* p) {
  return _mm_loadl_epi64((const __m128i*)p);
}
COMPRESS_INLINE __m128i load128(const uint8_t* p) {
  return _mm_loadu_si128((const __m128i*)p);
}

template <size_t Item>
COMPRESS_INLINE void gather8(const uint8_t* values, uint32_t bits, uint8_t* out) {
  if (Item == 1) {
    const __m128i order = load64(kShuffle.gather1[bits]);
    _mm_storel_epi64((__m128i*)out, _mm_shuffle_epi8(load64(values), order));
  } else if (Item == 2) {
    const __m128i order = load128(kShuffle.gather2[bits]);
    _mm_storeu_si128((__m128i*)out, _mm_shuffle_epi8(load128(values), order));
  } else if (Item == 4) {
    const __m256i order = _mm256_cvtepu8_epi32(load64(kShuffle.gather1[bits]));
    store256(out, _mm256_permutevar8x32_epi32(load256(values), order));
  } else {
    const uint32_t low = bits & 15;
    const __m256i first = _mm256_cvtepu8_epi32(load64(kShuffle.gather8[low]));
    const __m256i second = _mm256_cvtepu8_epi32(load64(kShuffle.gather8[bits >> 4]));
    store256(out, _mm256_permutevar8x32_epi32(load256(values), first));
    store256(out + 8 * (size_t)__builtin_popcount(low),
             _mm256_permutevar8x32_epi32(load256(values + 32), second));
  }
}

template <size_t Item>
COMPRESS_INLINE void scatter8(const uint8_t* kept, uint32_t bits, const uint8_t* fill,
                              uint8_t* out) {
  if (Item == 1) {
    const __m128i order = load64(kShuffle.scatter1[bits]);
    const __m128i moved = _mm_shuffle_epi8(load64(kept), order);
    const __m128i filler = _mm_set1_epi8((char)fill[0]);
    _mm_storel_epi64((__m128i*)out, _mm_blendv_epi8(moved, filler, order));
  } else if (Item == 2) {
    int16_t value;
    memcpy(&value, fill, 2);
    const __m128i order = load128(kShuffle.scatter2[bits]);
    const __m128i moved = _mm_shuffle_epi8(load128(kept), order);
    _mm_storeu_si128((__m128i*)out, _mm_blendv_epi8(moved, _mm_set1_epi16(value), order));
  } else if (Item == 4) {
    int32_t value;
    memcpy(&value, fill, 4);
    const __m256i order = _mm256_cvtepi8_epi32(load64(kShuffle.scatter1[bits]));
    const __m256i moved = _mm256_permutevar8x32_epi32(load256(kept), order);
    store256(out, _mm256_blendv_epi8(moved, _mm256_set1_epi32(value), order));
  } else {
    int64_t value;
    memcpy(&value, fill, 8);
    const __m256i filler = _mm256_set1_epi64x(value);
    const uint32_t low = bits & 15;
    const uint32_t halves[2] = {low, bits >> 4};
    for (int i = 0; i < 2; ++i) {
      const __m256i order = _mm256_cvtepi8_epi32(load64(kShuffle.scatter8[halves[i]]));
      const __m256i moved = _mm256_permutevar8x32_epi32(load256(kept), order);
      store256(out + 32 * i, _mm256_blendv_epi8(moved, filler, order));
      kept += 8 * (size_t)__builtin_popcount(low);
    }
  }
}
