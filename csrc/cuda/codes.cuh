// Codes to pairs of halves, exactly: code - zero point is an integer that both formats hold.
//
// A 32-bit word holds 32 / Bits codes. Pair p has codes p and p + 16 / Bits: one mask takes both
// out of the word at once, and an exponent put above them makes each a float without a conversion:
// 1024 + code in float16, 128 + code in bfloat16.

#pragma once

#include "numbers.cuh"

namespace compress {
namespace cuda {

// The constant that `decode_pair` subtracts, of a zero point of 0 to 255.
template <int K, int Bits>
__device__ __forceinline__ uint32_t zero_constant(uint32_t zero_point) {
  if constexpr (K == kFloat16) return (0x6400u + zero_point) * 0x00010001u;
  if constexpr (Bits < 8) return (0x4300u + zero_point) * 0x00010001u;  // below 128
  return __float_as_uint(8388608.0f + static_cast<float>(zero_point));
}

// Codes p (low half) and p + 16 / Bits less the zero point.
template <int K, int Bits>
__device__ __forceinline__ uint32_t decode_pair(uint32_t word, int p, uint32_t zero) {
  constexpr uint32_t mask = ((1u << Bits) - 1) * 0x00010001u;
  if constexpr (K == kFloat16 && Bits == 4) {
    // Odd pairs stay four bits up, 1024 + 16 code: a shift less each. A fused multiply-add brings
    // them down: (1024 + 16 code) / 16 - (64 + zero point).
    const uint32_t shifted = word >> p / 2 * 8;
    if (p % 2 == 0) return sub_half2((shifted & 0x000F000Fu) | 0x64006400u, zero);
    const uint32_t less = (zero & 0x000F000Fu) << 4 | 0x54005400u;
    return fma_half2((shifted & 0x00F000F0u) | 0x64006400u, 0x2C002C00u, less ^ 0x80008000u);
  } else if constexpr (K == kFloat16) {
    return sub_half2((word >> Bits * p & mask) | 0x64006400u, zero);
  } else if constexpr (Bits < 8) {
    return sub_bfloat2((word >> Bits * p & mask) | 0x43004300u, zero);
  } else {
    // bfloat16 cannot hold 128 + code: by way of float32, 2^23 + code.
    const float less = __uint_as_float(zero);
    const unsigned low = 0x7440u + static_cast<unsigned>(p);
    const float first = __uint_as_float(__byte_perm(word, 0x4B000000u, low)) - less;
    const float second = __uint_as_float(__byte_perm(word, 0x4B000000u, low + 2)) - less;
    return exact_bfloat2(first, second);
  }
}

// Code i of a row's bit stream, for any width.
__device__ __forceinline__ uint32_t code_at(const uint32_t* row, i64 words, i64 i, int bits) {
  const i64 bit = i * bits, word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  uint64_t pair = row[word];
  if (shift + bits > 32 && word + 1 < words) pair |= static_cast<uint64_t>(row[word + 1]) << 32;
  return static_cast<uint32_t>(pair >> shift) & ((1u << bits) - 1);
}

}  // namespace cuda
}  // namespace compress
