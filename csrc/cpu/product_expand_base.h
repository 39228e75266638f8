// Stored values to lanes, in the compiler's portable vectors: two of four floats.
//
// All product_expand_*.h define the same names; sums may differ in their last bits, because the
// number of lanes does. A step is kStep columns of a row.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct V {
  F4 v[2];
};

constexpr size_t kStep = 8;
constexpr int kRowsAtOnce = 2, kBatchAtOnce = 2;  // bounded by the register file

COMPRESS_INLINE V v_set1(float x) {
  return {{F4{} + x, F4{} + x}};
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
COMPRESS_INLINE V v_mul(V x, V y) {
  return {{x.v[0] * y.v[0], x.v[1] * y.v[1]}};
}
// x * y + sum, in one rounding where the set has such an instruction.
COMPRESS_INLINE V v_fma(V x, V y, V sum) {
  return {{x.v[0] * y.v[0] + sum.v[0], x.v[1] * y.v[1] + sum.v[1]}};
}
// out[r] += the sum of the lanes of v[r], the same whatever Rows is.
template <int Rows>
COMPRESS_INLINE void add_sums(const V* v, float* out) {
  for (int r = 0; r < Rows; ++r) {
    const F4 four = v[r].v[0] + v[r].v[1];
    out[r] += (four[0] + four[1]) + (four[2] + four[3]);
  }
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

// Expanded int8 values are this many times what is stored; the factor joins the scale.
constexpr float kSparseInt8 = 1.0f;

// The kept values from `p` on (all of kStep may be read), each in the lane of its bit of `bits`.
template <int K>
COMPRESS_INLINE V sparse_step(const uint8_t* p, size_t bits) {
  float kept[kStep], lanes[kStep];
  v_store(kept, dense_step<K>(p));
  for (size_t i = 0, k = 0; i < kStep; ++i) {
    lanes[i] = bits >> i & 1 ? kept[k & 7] : 0.0f;
    k += bits >> i & 1;
  }
  return v_load(lanes);
}
// The bits of one step, at a multiple of kStep columns.
COMPRESS_INLINE size_t bits_of_step(const uint8_t* mask) {
  return *mask;
}
COMPRESS_INLINE size_t count_kept(size_t bits) {
  size_t count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
}
