// Sixteen float lanes as four of the compiler's portable 16-byte vectors: SSE2, NEON.
//
// All lanes_*.h define the same names with the same results. Nothing here calls a library
// function, so that no inline function compiled for one instruction set can be linked into another.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int32_t S4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));

struct F {
  F4 v[4];
};
struct U {
  U4 v[4];
};

constexpr int kTogether = 1;  // candidates ranked in one sweep: bounded by the register file

#define COMPRESS_EACH(Type, expression)              \
  Type r;                                            \
  for (int k = 0; k < 4; ++k) r.v[k] = (expression); \
  return r

COMPRESS_INLINE F set1(float x) {
  COMPRESS_EACH(F, (F4{x, x, x, x}));  // F4{} + x would lose the sign of a zero
}
COMPRESS_INLINE U set1u(uint32_t x) {
  COMPRESS_EACH(U, U4{} + x);
}
COMPRESS_INLINE F load(const void* p) {
  F r;
  memcpy(&r, p, sizeof r);
  return r;
}
COMPRESS_INLINE void store(float* p, F x) {
  memcpy(p, &x, sizeof x);
}
COMPRESS_INLINE F add(F x, F y) {
  COMPRESS_EACH(F, x.v[k] + y.v[k]);
}
COMPRESS_INLINE F sub(F x, F y) {
  COMPRESS_EACH(F, x.v[k] - y.v[k]);
}
COMPRESS_INLINE F mul(F x, F y) {
  COMPRESS_EACH(F, x.v[k] * y.v[k]);
}
// x - y * z, where y * z has no more than 24 bits: fused or not, one rounding.
COMPRESS_INLINE F sub_exact(F x, F y, F z) {
  return sub(x, mul(y, z));
}
COMPRESS_INLINE F div(F x, F y) {
  COMPRESS_EACH(F, x.v[k] / y.v[k]);
}
COMPRESS_INLINE F min_(F x, F y) {
  COMPRESS_EACH(F, x.v[k] < y.v[k] ? x.v[k] : y.v[k]);
}
COMPRESS_INLINE F max_(F x, F y) {
  COMPRESS_EACH(F, x.v[k] > y.v[k] ? x.v[k] : y.v[k]);
}
// The largest and smallest so far: of zero or more (+0 at first), of zero or less (-0 at first).
// The sign of a zero that these and `clip` return is any.
COMPRESS_INLINE F raise(F high, F x) {
  return max_(high, x);
}
COMPRESS_INLINE F lower(F low, F x) {
  return min_(low, x);
}
// To low <= -0 and high >= +0.
COMPRESS_INLINE F clip(F x, F low, F high) {
  return min_(max_(x, low), high);
}
// To nearest even for |x| < 2^22, which every argument here keeps.
COMPRESS_INLINE F rint_(F x) {
  COMPRESS_EACH(F, (x.v[k] + 12582912.0f) - 12582912.0f);
}
COMPRESS_INLINE U abs_bits(F x) {
  COMPRESS_EACH(U, (U4)x.v[k] & 0x7FFFFFFFu);
}
COMPRESS_INLINE U4 choose(S4 condition, U4 yes, U4 no) {
  return ((U4)condition & yes) | (~(U4)condition & no);
}
// Magnitude bits are never negative, so a signed comparison orders them.
COMPRESS_INLINE U umax(U x, U y) {
  COMPRESS_EACH(U, choose((S4)x.v[k] > (S4)y.v[k], x.v[k], y.v[k]));
}

COMPRESS_INLINE U4 widen4(const uint8_t* p) {
  H4 half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, U4);
}
COMPRESS_INLINE F load_bf16(const void* p) {
  COMPRESS_EACH(F, (F4)(widen4((const uint8_t*)p + 8 * k) << 16));
}
COMPRESS_INLINE F4 half_to_float(U4 bits) {
  // Scaling by 2^112 rebiases the exponent and makes subnormals normal, exactly.
  const F4 scaled = (F4)((bits & 0x7FFFu) << 13) * 5.192296858534828e33f;
  const U4 special = (U4)((bits & 0x7C00u) == 0x7C00u) & 0x7F800000u;
  return (F4)((U4)scaled | special | ((bits & 0x8000u) << 16));
}
COMPRESS_INLINE F load_f16(const void* p) {
  COMPRESS_EACH(F, half_to_float(widen4((const uint8_t*)p + 8 * k)));
}
// Four bytes to four words: spread by shifts, which every compiler keeps in one register.
COMPRESS_INLINE U4 spread4(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  const U4 shifts = {0, 8, 16, 24};
  return ((U4{} + word) >> shifts) & 0xFFu;
}
COMPRESS_INLINE F load_u8(const void* p) {
  COMPRESS_EACH(F, __builtin_convertvector((S4)spread4((const uint8_t*)p + 4 * k), F4));
}
COMPRESS_INLINE void store_u8(uint8_t* p, F x) {
  for (int k = 0; k < 4; ++k) {
    const S4 words = __builtin_convertvector(x.v[k], S4);
    for (int i = 0; i < 4; ++i) p[4 * k + i] = (uint8_t)words[i];
  }
}
// Two blocks of integers, each plus `zero`.
COMPRESS_INLINE void store_u8_pair(uint8_t* p, F x, F y, int zero) {
  const F z = set1((float)zero);
  store_u8(p, add(x, z));
  store_u8(p + 16, add(y, z));
}
COMPRESS_INLINE U4 kept4(const uint8_t* mask) {
  uint32_t word;
  memcpy(&word, mask, 4);
  const U4 bytes = {0x000000FFu, 0x0000FF00u, 0x00FF0000u, 0xFF000000u};
  return (U4)(((U4{} + word) & bytes) != 0u);
}
COMPRESS_INLINE F keep(F x, const uint8_t* mask) {
  COMPRESS_EACH(F, (F4)((U4)x.v[k] & kept4(mask + 4 * k)));
}
COMPRESS_INLINE F drop(F x, const uint8_t* mask) {
  COMPRESS_EACH(F, (F4)((U4)x.v[k] & ~kept4(mask + 4 * k)));
}

// To nearest even at 10 (fp16) or 7 (bf16) mantissa bits. Subnormals of fp16 are left alone,
// because every caller lifts them to the smallest normal number.
COMPRESS_INLINE F4 round_f16_4(F4 x) {
  const U4 sign = (U4)x & 0x80000000u, bits = (U4)x & 0x7FFFFFFFu;
  const U4 rounded = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
  const S4 over = (S4)rounded >= 0x47800000;  // 65536
  return (F4)(sign | choose(over, U4{} + 0x7F800000u, rounded));
}
COMPRESS_INLINE F round_f16(F x) {
  COMPRESS_EACH(F, round_f16_4(x.v[k]));
}
COMPRESS_INLINE F4 round_bf16_4(F4 x) {
  const U4 bits = (U4)x;
  return (F4)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}
COMPRESS_INLINE F round_bf16(F x) {
  COMPRESS_EACH(F, round_bf16_4(x.v[k]));
}
COMPRESS_INLINE F4 lift4(F4 x, float tiny) {
  const U4 bits = (U4)x & 0x7FFFFFFFu;
  const F4 floor = F4{} + tiny;
  return (F4)(((U4)x & 0x80000000u) | choose((S4)((F4)bits < floor), (U4)floor, bits));
}
COMPRESS_INLINE F lift(F x, float tiny) {
  COMPRESS_EACH(F, lift4(x.v[k], tiny));
}

// The one order of a sum of 16 lanes.
COMPRESS_INLINE float reduce_add(F x) {
  const F4 four = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
COMPRESS_INLINE float reduce_min(F x) {
  float a[16], m;
  memcpy(a, &x, sizeof a);
  m = a[0];
  for (int i = 1; i < 16; ++i) m = a[i] < m ? a[i] : m;
  return m;
}
COMPRESS_INLINE float reduce_max(F x) {
  float a[16], m;
  memcpy(a, &x, sizeof a);
  m = a[0];
  for (int i = 1; i < 16; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
// Sixteen rows of sixteen floats, aligned: out[i] = the fold of row i.
template <Fold kFold>
COMPRESS_INLINE void fold_rows(const float* rows, float* out) {
  for (int i = 0; i < 16; ++i) {
    const F row = load(rows + 16 * i);
    out[i] = kFold == kAdd ? reduce_add(row) : kFold == kMin ? reduce_min(row) : reduce_max(row);
  }
}
COMPRESS_INLINE uint32_t reduce_umax(U x) {
  uint32_t a[16], m = 0;
  memcpy(a, &x, sizeof a);
  for (int i = 0; i < 16; ++i) m = a[i] > m ? a[i] : m;
  return m;
}

#undef COMPRESS_EACH
