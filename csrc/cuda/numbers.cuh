// Float formats as bit patterns: conversions, and the few operations on pairs of halves.

#pragma once

#include "platform.cuh"

namespace compress {
namespace cuda {

// How a weight of a kind is stored.
template <int K>
using Stored = typename std::conditional<K == kFloat32, float, uint16_t>::type;

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef COMPRESS_CUDA_EMULATED
  return emulator::half_value(bits, false);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ __forceinline__ float bfloat_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// To nearest even; too large becomes infinity.
__device__ __forceinline__ uint16_t float_to_half(float value) {
#ifdef COMPRESS_CUDA_EMULATED
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7FFFu);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // subnormal: a multiple of 2^-24
    const float units = std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24));
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(units));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFFu + odd) >> 13));
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

template <int K>
__device__ __forceinline__ float to_float(Stored<K> value) {
  if constexpr (K == kFloat32) {
    return value;
  } else {
    return K == kFloat16 ? half_to_float(value) : bfloat_to_float(value);
  }
}

// The magnitude key: the bit pattern without its sign.
__device__ __forceinline__ uint32_t key_of(float value) {
  return __float_as_uint(value) & 0x7FFFFFFFu;
}
__device__ __forceinline__ uint32_t key_of(uint16_t value) {
  return value & 0x7FFFu;
}

// The smallest key that is no finite number's.
template <int K>
__device__ __forceinline__ uint32_t infinite_key() {
  return K == kFloat32 ? 0x7F800000u : K == kFloat16 ? 0x7C00u : 0x7F80u;
}

// By a kind known at run time, for what is touched once a row or an output.
__device__ __forceinline__ float load_kind(const void* p, int kind, i64 i) {
  if (kind == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return kind == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}
__device__ __forceinline__ void store_kind(void* p, int kind, i64 i, float value) {
  if (kind == kFloat32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = kind == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

// Half number j (0 to 7) of a 16-byte load.
__device__ __forceinline__ uint16_t half_of(const uint4& v, int j) {
  const uint32_t word = j < 2 ? v.x : j < 4 ? v.y : j < 6 ? v.z : v.w;
  return static_cast<uint16_t>(j % 2 ? word >> 16 : word);
}

// a - b on two halves; exact wherever the kernels use it.
__device__ __forceinline__ uint32_t sub_half2(uint32_t a, uint32_t b) {
#ifdef COMPRESS_CUDA_EMULATED
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float left = half_to_float(static_cast<uint16_t>(a >> shift));
    const float right = half_to_float(static_cast<uint16_t>(b >> shift));
    result |= static_cast<uint32_t>(float_to_half(left - right)) << shift;
  }
  return result;
#else
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#endif
}

// a * b + c on two halves, rounded once.
__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef COMPRESS_CUDA_EMULATED
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float product = half_to_float(static_cast<uint16_t>(a >> shift)) *
                          half_to_float(static_cast<uint16_t>(b >> shift));  // exact
    const float sum = product + half_to_float(static_cast<uint16_t>(c >> shift));
    result |= static_cast<uint32_t>(float_to_half(sum)) << shift;
  }
  return result;
#else
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#endif
}

// a - b on two bfloat16s; sm_80 subtracts them by its fused multiply-add only.
__device__ __forceinline__ uint32_t sub_bfloat2(uint32_t a, uint32_t b) {
#ifdef COMPRESS_CUDA_EMULATED
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float left = bfloat_to_float(static_cast<uint16_t>(a >> shift));
    const float right = bfloat_to_float(static_cast<uint16_t>(b >> shift));
    result |= static_cast<uint32_t>(float_to_bfloat(left - right)) << shift;
  }
  return result;
#else
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(a), "r"(0x3F803F80u), "r"(b ^ 0x80008000u));
  return result;
#endif
}

// Two floats that bfloat16 holds exactly, the first in the low half.
__device__ __forceinline__ uint32_t exact_bfloat2(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

}  // namespace cuda
}  // namespace compress
