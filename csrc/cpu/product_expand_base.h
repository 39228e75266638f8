// Stored values to lanes, in the compiler's portable vectors: two of four floats.
//
// All product_expand_*.h define the same names; sums may differ in their last bits, because the
// number of lanes does. A step is kStep columns of a row: eight or
// sixteen.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct V {
  F4 v[2];
};

constexpr size_t kStep = 8;
constexpr int kDenseRows = 2;    // dense rows read side by side
constexpr int kBatchAtOnce = 1;  // rows of the batch whose sums fit into registers

COMPRESS_INLINE V v_set1(float x) {
  return {{F4{x, x, x, x}, F4{x, x, x, x}}};
}
COMPRESS_INLINE V v_zero() {
  return v_set1(0);
}
COMPRESS_INLINE V v_load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
COMPRESS_INLINE void v_store(float* p, V v) {
  memcpy(p, &v, sizeof v);
}
COMPRESS_INLINE V v_add(V x, V y) {
  return {{x.v[0] + y.v[0], x.v[1] + y.v[1]}};
}
COMPRESS_INLINE V v_mul(V x, V y) {
  return {{x.v[0] * y.v[0], x.v[1] * y.v[1]}};
}
// x * y + sum, in one rounding where the set has such an instruction.
COMPRESS_INLINE V v_fma(V x, V y, V sum) {
  return {{x.v[0] * y.v[0] + sum.v[0], x.v[1] * y.v[1] + sum.v[1]}};
}
COMPRESS_INLINE float v_sum(V v) {
  const F4 four = v.v[0] + v.v[1];
  return (four[0] + four[1]) + (four[2] + four[3]);
}
// Asks for `v` to stay in a register.
COMPRESS_INLINE void v_keep(V&) {}

COMPRESS_INLINE float widen_f16(uint16_t half) {
  return half_to_float(U4{half, 0, 0, 0})[0];
}

// kStep stored values, side by side.
template <int K>
COMPRESS_INLINE V dense_step(const uint8_t* p) {
  V v;
  for (int half = 0; half < 2; ++half, p += K == kFloat32 ? 16 : K == kInt8 ? 4 : 8) {
    if (K == kFloat32) {
      memcpy(&v.v[half], p, 16);
    } else if (K == kFloat16) {
      v.v[half] = half_to_float(widen4(p));
    } else if (K == kInt8) {
      v.v[half] = __builtin_convertvector((S4)(spread4(p) << 24) >> 24, F4);
    } else {
      v.v[half] = (F4)(widen4(p) << 16);
    }
  }
  return v;
}

// Step `k` of 64 columns, `word` their bits: the kept values from `p` on (all of kStep may be
// read), each in the lane of its bit, and how many they are.
template <int K>
COMPRESS_INLINE V sparse_step(const uint8_t* p, uint64_t word, size_t k, size_t* kept) {
  float values[kStep], lanes[kStep];
  v_store(values, dense_step<K>(p));
  size_t taken = 0;
  for (size_t i = 0; i < kStep; ++i) {
    const size_t bit = word >> (8 * k + i) & 1;
    lanes[i] = bit ? values[taken] : 0.0f;
    taken += bit;
  }
  *kept = taken;
  return v_load(lanes);
}
