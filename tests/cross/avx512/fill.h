// AVX-512 intrinsics that SIMDe 0.7.4 lacks, from Intel's descriptions, and those where it is laxer
// than a processor: an aligned access to an unaligned address stops the program here.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace fill {

// The lanes of a vector as an array.
template <class T, class V>
struct Lanes {
  static constexpr size_t count = sizeof(V) / sizeof(T);
  T v[count];
};
template <class T, class V>
Lanes<T, V> split(V x) {
  Lanes<T, V> lanes;
  memcpy(&lanes, &x, sizeof x);
  return lanes;
}
template <class T, class V>
V join(const Lanes<T, V>& lanes) {
  V x;
  memcpy(&x, &lanes, sizeof x);
  return x;
}

// The two halves, each through the processor's own narrower instruction.
template <class Half, class V>
Half half(V x, int i) {
  Half h;
  memcpy(&h, (const char*)&x + i * sizeof h, sizeof h);
  return h;
}
template <class V, class Half>
V both(Half low, Half high) {
  V x;
  memcpy(&x, &low, sizeof low);
  memcpy((char*)&x + sizeof low, &high, sizeof high);
  return x;
}

// ---------------------------------------------------------------- memory

template <class V>
V aligned_load(const void* p) {
  if ((uintptr_t)p % sizeof(V)) abort();
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class V>
void aligned_store(void* p, V x) {
  if ((uintptr_t)p % sizeof(V)) abort();
  memcpy(p, &x, sizeof x);
}

// A lane whose bit is not set is not touched in memory.
template <class T, class V>
V masked_load(V other, uint64_t bits, const void* p) {
  auto lanes = split<T>(other);
  for (size_t i = 0; i < lanes.count; ++i) {
    if (bits >> i & 1) memcpy(&lanes.v[i], (const T*)p + i, sizeof(T));
  }
  return join(lanes);
}
template <class T, class V>
void masked_store(void* p, uint64_t bits, V x) {
  const auto lanes = split<T>(x);
  for (size_t i = 0; i < lanes.count; ++i) {
    if (bits >> i & 1) memcpy((T*)p + i, &lanes.v[i], sizeof(T));
  }
}

template <class T, class V>
V expand_load(V other, uint64_t bits, const void* p) {
  auto lanes = split<T>(other);
  const T* from = (const T*)p;
  for (size_t i = 0; i < lanes.count; ++i) {
    if (bits >> i & 1) memcpy(&lanes.v[i], from++, sizeof(T));
  }
  return join(lanes);
}
template <class T, class V>
V expand(V other, uint64_t bits, V x) {
  return expand_load<T>(other, bits, &x);
}
template <class T, class V>
void compress_store(void* p, uint64_t bits, V x) {
  const auto lanes = split<T>(x);
  T* to = (T*)p;
  for (size_t i = 0; i < lanes.count; ++i) {
    if (bits >> i & 1) memcpy(to++, &lanes.v[i], sizeof(T));
  }
}
template <class T, class V>
V compress(V other, uint64_t bits, V x) {
  compress_store<T>(&other, bits, x);
  return other;
}

// ---------------------------------------------------------------- lanes

// Each lane widened or cut.
template <class V, class To, class From, class W>
V convert(W x) {
  const auto from = split<From>(x);
  Lanes<To, V> to{};
  for (size_t i = 0; i < to.count && i < from.count; ++i) to.v[i] = (To)from.v[i];
  return join(to);
}
template <class T, class V>
uint64_t test(V x, V y) {
  const auto a = split<T>(x), b = split<T>(y);
  uint64_t bits = 0;
  for (size_t i = 0; i < a.count; ++i) bits |= (uint64_t)((a.v[i] & b.v[i]) != 0) << i;
  return bits;
}
template <class T, class V, class Function>
T reduce(V x, Function f) {
  const auto lanes = split<T>(x);
  T result = lanes.v[0];
  for (size_t i = 1; i < lanes.count; ++i) result = f(result, lanes.v[i]);
  return result;
}

// Lanes i and i + 8, then i + 4, i + 2, i + 1: the order of the compilers' own.
template <class Function>
float reduce_tree(__m512 x, Function f) {
  auto lanes = split<float>(x);
  for (size_t n = 8; n; n /= 2) {
    for (size_t i = 0; i < n; ++i) lanes.v[i] = f(lanes.v[i], lanes.v[i + n]);
  }
  return lanes.v[0];
}

inline __m512i round_to_int(__m512 x) {
  return both<__m512i>(_mm256_cvtps_epi32(half<__m256>(x, 0)),
                       _mm256_cvtps_epi32(half<__m256>(x, 1)));
}
inline __m512 int_to_float(__m512i x) {
  return both<__m512>(_mm256_cvtepi32_ps(half<__m256i>(x, 0)),
                      _mm256_cvtepi32_ps(half<__m256i>(x, 1)));
}
inline __m512 half_to_float(__m256i x) {
  return both<__m512>(_mm256_cvtph_ps(half<__m128i>(x, 0)), _mm256_cvtph_ps(half<__m128i>(x, 1)));
}
template <int Mode>
__m256i float_to_half(__m512 x) {
  return both<__m256i>(_mm256_cvtps_ph(half<__m256>(x, 0), Mode),
                       _mm256_cvtps_ph(half<__m256>(x, 1), Mode));
}
template <int Mode>
__m512 round(__m512 x) {
  static_assert(Mode >> 4 == 0, "no scaling");
  return both<__m512>(_mm256_round_ps(half<__m256>(x, 0), Mode),
                      _mm256_round_ps(half<__m256>(x, 1), Mode));
}
template <class Part, class V>
V insert(V x, Part part, int i) {
  memcpy((char*)&x + i * sizeof part, &part, sizeof part);
  return x;
}
template <int Order>
__m512i shuffle_words(__m512i x) {
  return both<__m512i>(_mm256_shuffle_epi32(half<__m256i>(x, 0), Order),
                       _mm256_shuffle_epi32(half<__m256i>(x, 1), Order));
}
// Four parts of 16 bytes: two of x, two of y.
template <class V>
V shuffle_parts(V x, V y, int order) {
  V result;
  for (int i = 0; i < 4; ++i) {
    const char* from = (const char*)(i < 2 ? &x : &y) + 16 * (order >> 2 * i & 3);
    memcpy((char*)&result + 16 * i, from, 16);
  }
  return result;
}
template <class T>
__m512i shift_right(__m512i x, unsigned by) {
  auto lanes = split<T>(x);
  const unsigned most = 8 * sizeof(T) - 1;
  for (T& lane : lanes.v) lane = (T)(lane >> (by < most ? by : most));
  return join(lanes);
}
template <class T, class Compare>
uint64_t compare(__m512i x, __m512i y, Compare holds) {
  const auto a = split<T>(x), b = split<T>(y);
  uint64_t bits = 0;
  for (size_t i = 0; i < a.count; ++i) bits |= (uint64_t)holds(a.v[i], b.v[i]) << i;
  return bits;
}

struct Add {
  template <class T>
  T operator()(T x, T y) const {
    return x + y;
  }
};
// As the instructions do: the second where the two compare neither way.
struct Min {
  template <class T>
  T operator()(T x, T y) const {
    return x < y ? x : y;
  }
};
struct Max {
  template <class T>
  T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

}  // namespace fill

#include "names.h"
