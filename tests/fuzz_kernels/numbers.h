// Items of arrays as numbers.

#pragma once

#include <math.h>

#include "input.h"

namespace fuzz {

inline double half_number(uint16_t bits) {
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return exponent ? sign * ldexp(1024 + mantissa, exponent - 25) : sign * ldexp(mantissa, -24);
}

// Item `i` of floats of a kernels' kind.
inline double number(const std::vector<uint8_t>& bytes, size_t i, int kind) {
  uint32_t bits = 0;
  memcpy(&bits, &bytes[i * item_of(kind)], item_of(kind));
  if (kind == 1) return half_number((uint16_t)bits);
  if (kind == 2) bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline bool all_finite(const std::vector<uint8_t>& bytes, int kind) {
  for (size_t i = 0; i < bytes.size() / item_of(kind); ++i) {
    if (!isfinite(number(bytes, i, kind))) return false;
  }
  return true;
}

}  // namespace fuzz
