// The intrinsics of fill.h under their names, whatever the compiler or SIMDe call so.

#pragma once

// memory
#undef _mm512_load_si512
#define _mm512_load_si512(p) fill::aligned_load<__m512i>(p)
#undef _mm512_load_epi32
#define _mm512_load_epi32(p) fill::aligned_load<__m512i>(p)
#undef _mm512_load_ps
#define _mm512_load_ps(p) fill::aligned_load<__m512>(p)
#undef _mm512_store_si512
#define _mm512_store_si512(p, x) fill::aligned_store<__m512i>(p, x)
#undef _mm512_store_epi32
#define _mm512_store_epi32(p, x) fill::aligned_store<__m512i>(p, x)
#undef _mm512_store_ps
#define _mm512_store_ps(p, x) fill::aligned_store<__m512>(p, x)
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8(k, p) fill::masked_load<int8_t>(__m512i{}, k, p)
#undef _mm512_mask_loadu_epi8
#define _mm512_mask_loadu_epi8(x, k, p) fill::masked_load<int8_t>(x, k, p)
#undef _mm512_mask_storeu_epi8
#define _mm512_mask_storeu_epi8(p, k, x) fill::masked_store<int8_t>(p, k, x)
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16(k, p) fill::masked_load<int16_t>(__m512i{}, k, p)
#undef _mm512_mask_loadu_epi16
#define _mm512_mask_loadu_epi16(x, k, p) fill::masked_load<int16_t>(x, k, p)
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16(p, k, x) fill::masked_store<int16_t>(p, k, x)
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32(k, p) fill::masked_load<int32_t>(__m512i{}, k, p)
#undef _mm512_mask_loadu_epi32
#define _mm512_mask_loadu_epi32(x, k, p) fill::masked_load<int32_t>(x, k, p)
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32(p, k, x) fill::masked_store<int32_t>(p, k, x)
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(k, p) fill::masked_load<float>(__m512{}, k, p)
#undef _mm512_mask_loadu_ps
#define _mm512_mask_loadu_ps(x, k, p) fill::masked_load<float>(x, k, p)
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(p, k, x) fill::masked_store<float>(p, k, x)
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8(k, p) fill::masked_load<int8_t>(__m256i{}, k, p)
#undef _mm256_mask_loadu_epi8
#define _mm256_mask_loadu_epi8(x, k, p) fill::masked_load<int8_t>(x, k, p)
#undef _mm256_mask_storeu_epi8
#define _mm256_mask_storeu_epi8(p, k, x) fill::masked_store<int8_t>(p, k, x)
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(k, p) fill::masked_load<int16_t>(__m256i{}, k, p)
#undef _mm256_mask_loadu_epi16
#define _mm256_mask_loadu_epi16(x, k, p) fill::masked_load<int16_t>(x, k, p)
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(p, k, x) fill::masked_store<int16_t>(p, k, x)
#undef _mm256_maskz_loadu_epi32
#define _mm256_maskz_loadu_epi32(k, p) fill::masked_load<int32_t>(__m256i{}, k, p)
#undef _mm256_mask_loadu_epi32
#define _mm256_mask_loadu_epi32(x, k, p) fill::masked_load<int32_t>(x, k, p)
#undef _mm256_mask_storeu_epi32
#define _mm256_mask_storeu_epi32(p, k, x) fill::masked_store<int32_t>(p, k, x)
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps(k, p) fill::masked_load<float>(__m256{}, k, p)
#undef _mm256_mask_loadu_ps
#define _mm256_mask_loadu_ps(x, k, p) fill::masked_load<float>(x, k, p)
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps(p, k, x) fill::masked_store<float>(p, k, x)
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8(k, p) fill::masked_load<int8_t>(__m128i{}, k, p)
#undef _mm_mask_loadu_epi8
#define _mm_mask_loadu_epi8(x, k, p) fill::masked_load<int8_t>(x, k, p)
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8(p, k, x) fill::masked_store<int8_t>(p, k, x)
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16(k, p) fill::masked_load<int16_t>(__m128i{}, k, p)
#undef _mm_mask_loadu_epi16
#define _mm_mask_loadu_epi16(x, k, p) fill::masked_load<int16_t>(x, k, p)
#undef _mm_mask_storeu_epi16
#define _mm_mask_storeu_epi16(p, k, x) fill::masked_store<int16_t>(p, k, x)
#undef _mm_maskz_loadu_epi32
#define _mm_maskz_loadu_epi32(k, p) fill::masked_load<int32_t>(__m128i{}, k, p)
#undef _mm_mask_loadu_epi32
#define _mm_mask_loadu_epi32(x, k, p) fill::masked_load<int32_t>(x, k, p)
#undef _mm_mask_storeu_epi32
#define _mm_mask_storeu_epi32(p, k, x) fill::masked_store<int32_t>(p, k, x)
#undef _mm_maskz_loadu_ps
#define _mm_maskz_loadu_ps(k, p) fill::masked_load<float>(__m128{}, k, p)
#undef _mm_mask_loadu_ps
#define _mm_mask_loadu_ps(x, k, p) fill::masked_load<float>(x, k, p)
#undef _mm_mask_storeu_ps
#define _mm_mask_storeu_ps(p, k, x) fill::masked_store<float>(p, k, x)

// expansion and compression
#undef _mm512_maskz_expand_epi8
#define _mm512_maskz_expand_epi8(k, x) fill::expand<int8_t>(__m512i{}, k, x)
#undef _mm512_mask_expand_epi8
#define _mm512_mask_expand_epi8(o, k, x) fill::expand<int8_t>(o, k, x)
#undef _mm512_maskz_expandloadu_epi8
#define _mm512_maskz_expandloadu_epi8(k, p) fill::expand_load<int8_t>(__m512i{}, k, p)
#undef _mm512_maskz_compress_epi8
#define _mm512_maskz_compress_epi8(k, x) fill::compress<int8_t>(__m512i{}, k, x)
#undef _mm512_mask_compressstoreu_epi8
#define _mm512_mask_compressstoreu_epi8(p, k, x) fill::compress_store<int8_t>(p, k, x)
#undef _mm512_maskz_expand_epi16
#define _mm512_maskz_expand_epi16(k, x) fill::expand<int16_t>(__m512i{}, k, x)
#undef _mm512_mask_expand_epi16
#define _mm512_mask_expand_epi16(o, k, x) fill::expand<int16_t>(o, k, x)
#undef _mm512_maskz_expandloadu_epi16
#define _mm512_maskz_expandloadu_epi16(k, p) fill::expand_load<int16_t>(__m512i{}, k, p)
#undef _mm512_maskz_compress_epi16
#define _mm512_maskz_compress_epi16(k, x) fill::compress<int16_t>(__m512i{}, k, x)
#undef _mm512_mask_compressstoreu_epi16
#define _mm512_mask_compressstoreu_epi16(p, k, x) fill::compress_store<int16_t>(p, k, x)
#undef _mm512_maskz_expand_epi32
#define _mm512_maskz_expand_epi32(k, x) fill::expand<int32_t>(__m512i{}, k, x)
#undef _mm512_mask_expand_epi32
#define _mm512_mask_expand_epi32(o, k, x) fill::expand<int32_t>(o, k, x)
#undef _mm512_maskz_expandloadu_epi32
#define _mm512_maskz_expandloadu_epi32(k, p) fill::expand_load<int32_t>(__m512i{}, k, p)
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32(k, x) fill::compress<int32_t>(__m512i{}, k, x)
#undef _mm512_mask_compressstoreu_epi32
#define _mm512_mask_compressstoreu_epi32(p, k, x) fill::compress_store<int32_t>(p, k, x)
#undef _mm512_maskz_expand_ps
#define _mm512_maskz_expand_ps(k, x) fill::expand<float>(__m512{}, k, x)
#undef _mm512_mask_expand_ps
#define _mm512_mask_expand_ps(o, k, x) fill::expand<float>(o, k, x)
#undef _mm512_maskz_expandloadu_ps
#define _mm512_maskz_expandloadu_ps(k, p) fill::expand_load<float>(__m512{}, k, p)
#undef _mm512_maskz_compress_ps
#define _mm512_maskz_compress_ps(k, x) fill::compress<float>(__m512{}, k, x)
#undef _mm512_mask_compressstoreu_ps
#define _mm512_mask_compressstoreu_ps(p, k, x) fill::compress_store<float>(p, k, x)
#undef _mm256_maskz_expand_epi8
#define _mm256_maskz_expand_epi8(k, x) fill::expand<int8_t>(__m256i{}, k, x)
#undef _mm256_mask_expand_epi8
#define _mm256_mask_expand_epi8(o, k, x) fill::expand<int8_t>(o, k, x)
#undef _mm256_maskz_expandloadu_epi8
#define _mm256_maskz_expandloadu_epi8(k, p) fill::expand_load<int8_t>(__m256i{}, k, p)
#undef _mm256_maskz_compress_epi8
#define _mm256_maskz_compress_epi8(k, x) fill::compress<int8_t>(__m256i{}, k, x)
#undef _mm256_mask_compressstoreu_epi8
#define _mm256_mask_compressstoreu_epi8(p, k, x) fill::compress_store<int8_t>(p, k, x)
#undef _mm256_maskz_expand_epi16
#define _mm256_maskz_expand_epi16(k, x) fill::expand<int16_t>(__m256i{}, k, x)
#undef _mm256_mask_expand_epi16
#define _mm256_mask_expand_epi16(o, k, x) fill::expand<int16_t>(o, k, x)
#undef _mm256_maskz_expandloadu_epi16
#define _mm256_maskz_expandloadu_epi16(k, p) fill::expand_load<int16_t>(__m256i{}, k, p)
#undef _mm256_maskz_compress_epi16
#define _mm256_maskz_compress_epi16(k, x) fill::compress<int16_t>(__m256i{}, k, x)
#undef _mm256_mask_compressstoreu_epi16
#define _mm256_mask_compressstoreu_epi16(p, k, x) fill::compress_store<int16_t>(p, k, x)
#undef _mm256_maskz_expand_epi32
#define _mm256_maskz_expand_epi32(k, x) fill::expand<int32_t>(__m256i{}, k, x)
#undef _mm256_mask_expand_epi32
#define _mm256_mask_expand_epi32(o, k, x) fill::expand<int32_t>(o, k, x)
#undef _mm256_maskz_expandloadu_epi32
#define _mm256_maskz_expandloadu_epi32(k, p) fill::expand_load<int32_t>(__m256i{}, k, p)
#undef _mm256_maskz_compress_epi32
#define _mm256_maskz_compress_epi32(k, x) fill::compress<int32_t>(__m256i{}, k, x)
#undef _mm256_mask_compressstoreu_epi32
#define _mm256_mask_compressstoreu_epi32(p, k, x) fill::compress_store<int32_t>(p, k, x)
#undef _mm256_maskz_expand_ps
#define _mm256_maskz_expand_ps(k, x) fill::expand<float>(__m256{}, k, x)
#undef _mm256_mask_expand_ps
#define _mm256_mask_expand_ps(o, k, x) fill::expand<float>(o, k, x)
#undef _mm256_maskz_expandloadu_ps
#define _mm256_maskz_expandloadu_ps(k, p) fill::expand_load<float>(__m256{}, k, p)
#undef _mm256_maskz_compress_ps
#define _mm256_maskz_compress_ps(k, x) fill::compress<float>(__m256{}, k, x)
#undef _mm256_mask_compressstoreu_ps
#define _mm256_mask_compressstoreu_ps(p, k, x) fill::compress_store<float>(p, k, x)
#undef _mm_maskz_expand_epi8
#define _mm_maskz_expand_epi8(k, x) fill::expand<int8_t>(__m128i{}, k, x)
#undef _mm_mask_expand_epi8
#define _mm_mask_expand_epi8(o, k, x) fill::expand<int8_t>(o, k, x)
#undef _mm_maskz_expandloadu_epi8
#define _mm_maskz_expandloadu_epi8(k, p) fill::expand_load<int8_t>(__m128i{}, k, p)
#undef _mm_maskz_compress_epi8
#define _mm_maskz_compress_epi8(k, x) fill::compress<int8_t>(__m128i{}, k, x)
#undef _mm_mask_compressstoreu_epi8
#define _mm_mask_compressstoreu_epi8(p, k, x) fill::compress_store<int8_t>(p, k, x)
#undef _mm_maskz_expand_epi16
#define _mm_maskz_expand_epi16(k, x) fill::expand<int16_t>(__m128i{}, k, x)
#undef _mm_mask_expand_epi16
#define _mm_mask_expand_epi16(o, k, x) fill::expand<int16_t>(o, k, x)
#undef _mm_maskz_expandloadu_epi16
#define _mm_maskz_expandloadu_epi16(k, p) fill::expand_load<int16_t>(__m128i{}, k, p)
#undef _mm_maskz_compress_epi16
#define _mm_maskz_compress_epi16(k, x) fill::compress<int16_t>(__m128i{}, k, x)
#undef _mm_mask_compressstoreu_epi16
#define _mm_mask_compressstoreu_epi16(p, k, x) fill::compress_store<int16_t>(p, k, x)
#undef _mm_maskz_expand_epi32
#define _mm_maskz_expand_epi32(k, x) fill::expand<int32_t>(__m128i{}, k, x)
#undef _mm_mask_expand_epi32
#define _mm_mask_expand_epi32(o, k, x) fill::expand<int32_t>(o, k, x)
#undef _mm_maskz_expandloadu_epi32
#define _mm_maskz_expandloadu_epi32(k, p) fill::expand_load<int32_t>(__m128i{}, k, p)
#undef _mm_maskz_compress_epi32
#define _mm_maskz_compress_epi32(k, x) fill::compress<int32_t>(__m128i{}, k, x)
#undef _mm_mask_compressstoreu_epi32
#define _mm_mask_compressstoreu_epi32(p, k, x) fill::compress_store<int32_t>(p, k, x)
#undef _mm_maskz_expand_ps
#define _mm_maskz_expand_ps(k, x) fill::expand<float>(__m128{}, k, x)
#undef _mm_mask_expand_ps
#define _mm_mask_expand_ps(o, k, x) fill::expand<float>(o, k, x)
#undef _mm_maskz_expandloadu_ps
#define _mm_maskz_expandloadu_ps(k, p) fill::expand_load<float>(__m128{}, k, p)
#undef _mm_maskz_compress_ps
#define _mm_maskz_compress_ps(k, x) fill::compress<float>(__m128{}, k, x)
#undef _mm_mask_compressstoreu_ps
#define _mm_mask_compressstoreu_ps(p, k, x) fill::compress_store<float>(p, k, x)

// conversions
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32(x) fill::convert<__m512i, int32_t, uint8_t>(x)
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(x) fill::convert<__m512i, int32_t, int8_t>(x)
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(x) fill::convert<__m512i, int32_t, uint16_t>(x)
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32(x) fill::convert<__m512i, int32_t, int16_t>(x)
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16(x) fill::convert<__m512i, int16_t, uint8_t>(x)
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16(x) fill::convert<__m512i, int16_t, int8_t>(x)
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(x) fill::convert<__m128i, int8_t, int32_t>(x)
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(x) fill::convert<__m256i, int16_t, int32_t>(x)
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8(x) fill::convert<__m256i, int8_t, int16_t>(x)
#undef _mm512_cvtepu32_ps
#define _mm512_cvtepu32_ps(x) fill::convert<__m512, float, uint32_t>(x)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32(x) fill::round_to_int(x)
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(x) fill::int_to_float(x)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(x) fill::half_to_float(x)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, mode) fill::float_to_half<mode>(x)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(x, mode) fill::round<mode>(x)

// parts
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, i) fill::half<__m256>(x, i)
#undef _mm512_extracti32x8_epi32
#define _mm512_extracti32x8_epi32(x, i) fill::half<__m256i>(x, i)
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64(x, i) fill::half<__m256i>(x, i)
#undef _mm512_insertf32x8
#define _mm512_insertf32x8(x, y, i) fill::insert(x, y, i)
#undef _mm512_inserti32x8
#define _mm512_inserti32x8(x, y, i) fill::insert(x, y, i)
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(x, y, i) fill::insert(x, y, i)
#undef _mm512_zextsi256_si512
#define _mm512_zextsi256_si512(x) fill::insert(__m512i{}, x, 0)
#undef _mm512_zextsi128_si512
#define _mm512_zextsi128_si512(x) fill::insert(__m512i{}, x, 0)
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(x, order) fill::shuffle_words<order>(x)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(x, y, order) fill::shuffle_parts(x, y, order)
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(x, y, order) fill::shuffle_parts(x, y, order)
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f64x2(x, y, order) fill::shuffle_parts(x, y, order)
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2(x, y, order) fill::shuffle_parts(x, y, order)

// arithmetic
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(x, by) fill::shift_right<int32_t>(x, by)
#undef _mm512_srai_epi16
#define _mm512_srai_epi16(x, by) fill::shift_right<int16_t>(x, by)
#undef _mm512_test_epi8_mask
#define _mm512_test_epi8_mask(x, y) (__mmask64) fill::test<uint8_t>(x, y)
#undef _mm512_test_epi16_mask
#define _mm512_test_epi16_mask(x, y) (__mmask32) fill::test<uint16_t>(x, y)
#undef _mm512_test_epi32_mask
#define _mm512_test_epi32_mask(x, y) (__mmask16) fill::test<uint32_t>(x, y)
#undef _mm256_test_epi8_mask
#define _mm256_test_epi8_mask(x, y) (__mmask32) fill::test<uint8_t>(x, y)
#undef _mm256_test_epi16_mask
#define _mm256_test_epi16_mask(x, y) (__mmask16) fill::test<uint16_t>(x, y)
#undef _mm256_test_epi32_mask
#define _mm256_test_epi32_mask(x, y) (__mmask8) fill::test<uint32_t>(x, y)
#undef _mm_test_epi8_mask
#define _mm_test_epi8_mask(x, y) (__mmask16) fill::test<uint8_t>(x, y)
#undef _mm_test_epi16_mask
#define _mm_test_epi16_mask(x, y) (__mmask8) fill::test<uint16_t>(x, y)
#undef _mm_test_epi32_mask
#define _mm_test_epi32_mask(x, y) (__mmask8) fill::test<uint32_t>(x, y)
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a < b; })
#undef _mm512_cmple_epi32_mask
#define _mm512_cmple_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a <= b; })
#undef _mm512_cmpgt_epi32_mask
#define _mm512_cmpgt_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a > b; })
#undef _mm512_cmpge_epi32_mask
#define _mm512_cmpge_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a >= b; })
#undef _mm512_cmpeq_epi32_mask
#define _mm512_cmpeq_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a == b; })
#undef _mm512_cmpneq_epi32_mask
#define _mm512_cmpneq_epi32_mask(x, y) \
  (__mmask16) fill::compare<int32_t>(x, y, [](int32_t a, int32_t b) { return a != b; })
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps(x) fill::reduce_tree(x, fill::Add{})
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32(x) (int)fill::reduce<uint32_t>(x, fill::Add{})
#undef _mm512_reduce_min_ps
#define _mm512_reduce_min_ps(x) fill::reduce_tree(x, fill::Min{})
#undef _mm512_reduce_min_epi32
#define _mm512_reduce_min_epi32(x) (int)fill::reduce<int32_t>(x, fill::Min{})
#undef _mm512_reduce_min_epu32
#define _mm512_reduce_min_epu32(x) fill::reduce<uint32_t>(x, fill::Min{})
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps(x) fill::reduce_tree(x, fill::Max{})
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32(x) (int)fill::reduce<int32_t>(x, fill::Max{})
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32(x) fill::reduce<uint32_t>(x, fill::Max{})
