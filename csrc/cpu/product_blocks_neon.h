// Sums over a block with NEON's dot products (ARMv8.2 dotprod): four registers are a step of a
// tile. See product_blocks_base.h for what each name means.

#pragma once

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct I {
  int32x4_t v[4];
};

constexpr size_t kMaxPlanes = 4;

constexpr bool uses_words(int, bool, size_t) {
  return false;
}

#define COMPRESS_EACH_I(expression)                  \
  I r;                                               \
  for (int k = 0; k < 4; ++k) r.v[k] = (expression); \
  return r

COMPRESS_INLINE I i_zero_point(const uint8_t* zero) {
  const uint8x16_t bytes = vld1q_u8(zero);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
           vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
COMPRESS_INLINE I i_set(int32_t x) {
  COMPRESS_EACH_I(vdupq_n_s32(x));
}
COMPRESS_INLINE I i_add(I x, I y) {
  COMPRESS_EACH_I(vaddq_s32(x.v[k], y.v[k]));
}
COMPRESS_INLINE I i_join(I high, I low) {
  COMPRESS_EACH_I(vaddq_s32(vshlq_n_s32(high.v[k], 8), low.v[k]));
}
COMPRESS_INLINE I i_subtract_product(I x, I y, I z) {
  COMPRESS_EACH_I(vmlsq_s32(x.v[k], y.v[k], z.v[k]));
}
COMPRESS_INLINE F i_to_float(I x) {
  F r;
  for (int k = 0; k < 4; ++k) r.v[k] = (F4)vcvtq_f32_s32(x.v[k]);
  return r;
}
COMPRESS_INLINE I i_from_float(F x) {
  COMPRESS_EACH_I(vcvtnq_s32_f32((float32x4_t)x.v[k]));
}
COMPRESS_INLINE int32_t i_reduce_add(I x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
COMPRESS_INLINE void i_store_plane(I x, int8_t* out) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
  vst1q_s8(out, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
COMPRESS_INLINE void i_store_planes(I x, int8_t* high, int8_t* low) {
  I up, down;
  for (int k = 0; k < 4; ++k) {
    up.v[k] = vshrq_n_s32(vaddq_s32(x.v[k], vdupq_n_s32(128)), 8);
    down.v[k] = vsubq_s32(x.v[k], vshlq_n_s32(up.v[k], 8));
  }
  i_store_plane(up, high);
  i_store_plane(down, low);
}
COMPRESS_INLINE void i_store_words(I, int16_t*) {}

template <int Bits, bool, int Planes>
COMPRESS_INLINE void block_sums(const uint8_t* codes, const int8_t* x, size_t stride,
                                size_t columns, I* sums) {
  constexpr int fields = 8 / Bits;
  const uint8x16_t low = vdupq_n_u8((1 << Bits) - 1);
  I total[Planes];
  int32x4_t activations[Planes];  // their sum, in every lane
  for (int p = 0; p < Planes; ++p) {
    total[p] = i_set(0);
    activations[p] = vdupq_n_s32(0);
  }
  for (size_t k = 0; k < columns; k += 4 * (size_t)fields, codes += 64) {
    if (Planes <= 2) __builtin_prefetch(codes + 2048);
    for (int field = 0; field < fields; ++field) {
      int8x16_t rows[4];
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t word = vld1q_u8(codes + 16 * i);
        // Bytes of 8 bits lose 128, which makes them signed; it comes back at the end.
        rows[i] = vreinterpretq_s8_u8(
            Bits == 8 ? veorq_u8(word, vdupq_n_u8(0x80))
                      : vandq_u8(vshlq_u8(word, vdupq_n_s8((int8_t)(-Bits * field))), low));
      }
      for (int p = 0; p < Planes; ++p) {
        int32_t four;
        memcpy(&four, x + (size_t)p * stride + k + 4 * (size_t)field, 4);
        const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; ++i) total[p].v[i] = vdotq_s32(total[p].v[i], rows[i], a);
        if (Bits == 8) activations[p] = vdotq_s32(activations[p], vdupq_n_s8(1), a);
      }
    }
  }
  for (int p = 0; p < Planes; ++p) {
    for (int i = 0; i < 4; ++i) {
      sums[p].v[i] = vaddq_s32(total[p].v[i], vshlq_n_s32(activations[p], 7));
    }
  }
}
