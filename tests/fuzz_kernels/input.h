// What a fuzzer's bytes become: choices, sizes and arrays. The same bytes give the same values.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

namespace fuzz {

// What an array is filled with.
enum Fill : int {
  kAnyBits,  // NaN, infinities, subnormal numbers
  kTame,     // floats of magnitude 1 or less; for bytes the same as kAnyBits
  kSpecial,  // the edges of a dtype, between tame ones
  kEqual,    // one item again and again
  kGiven,    // the input's own bytes, as far as they go, then zeros
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : next_(data), left_(size) {}

  // Zero where nothing is left, so that short inputs mean small cases.
  uint8_t byte() {
    if (!left_) return 0;
    --left_;
    return *next_++;
  }
  size_t below(size_t end) { return byte() % end; }
  bool one_in(size_t n) { return byte() % n == n - 1; }
  template <class T, size_t N>
  T one_of(const T (&choices)[N]) {
    return choices[below(N)];
  }
  uint64_t word() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x = x << 8 | byte();
    return x;
  }

  // The sizes that kernels trip over: none, one, both sides of a register and of a block.
  size_t columns() {
    static const uint16_t sizes[] = {0,  1,  2,  3,  5,  7,  8,  9,   15,  16,  17,  24,
                                     31, 32, 33, 40, 63, 64, 65, 100, 127, 128, 129, 260};
    return one_of(sizes);
  }
  size_t rows() {
    static const uint8_t sizes[] = {1, 1, 1, 2, 2, 3, 3, 4, 5, 0, 16, 17, 33};
    return one_of(sizes);
  }
  Fill fill_kind() { return static_cast<Fill>(below(5)); }

  void bytes(uint8_t* to, size_t size, Fill how) {
    if (how == kGiven) {
      const size_t own = size < left_ ? size : left_;
      if (own) memcpy(to, next_, own);
      if (size > own) memset(to + own, 0, size - own);
      next_ += own;
      left_ -= own;
      return;
    }
    if (how == kEqual) {
      const uint8_t value = byte();
      if (size) memset(to, value, size);
      return;
    }
    seed();
    for (size_t i = 0; i < size; i += 8) {
      const uint64_t x = random();
      memcpy(to + i, &x, size - i < 8 ? size - i : 8);
    }
  }

  // Items of `item` bytes: float32, or float16 where 2; `bfloat16` instead of that.
  void floats(uint8_t* to, size_t count, size_t item, bool bfloat16, Fill how) {
    if (how == kAnyBits || how == kGiven) return bytes(to, count * item, how);
    seed();
    const uint32_t same = float_bits(item, bfloat16, how == kEqual ? kSpecial : how);
    for (size_t i = 0; i < count; ++i) {
      const uint32_t x = how == kEqual ? same : float_bits(item, bfloat16, how);
      memcpy(to + i * item, &x, item);
    }
  }

 private:
  const uint8_t* next_;
  size_t left_;
  uint64_t state_ = 1;

  void seed() {
    state_ = 0x9E3779B97F4A7C15u ^ byte();
    state_ = state_ << 8 ^ byte();
  }
  uint64_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Du;
  }

  uint32_t float_bits(size_t item, bool bfloat16, Fill how) {
    const uint64_t x = random() >> 16;
    if (how == kSpecial && x % 3 == 0) return special(x / 3, item, bfloat16);
    const uint32_t sign = x & 1;
    const uint32_t in_unit = (uint32_t)(x >> 1) % 0x3C01u;  // float16's magnitudes up to 1
    if (item == 2 && !bfloat16) return sign << 15 | in_unit;
    const float value = (float)(int32_t)(x >> 8 & 0xFFFFFF) / 16777216.0f;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign << 31;
    return bfloat16 ? bits >> 16 : bits;
  }
  static uint32_t special(uint64_t x, size_t item, bool bfloat16) {
    // Zeros, the least and the largest subnormal and normal numbers, infinity, NaN, one, and what
    // no float16 scale can hold.
    static const uint32_t of_float[] = {0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF,
                                        0x7F800000, 0x7FC00000, 0x3F800000, 0x477FF000, 0x7F000000};
    static const uint16_t of_half[] = {0x0000, 0x0001, 0x03FF, 0x0400, 0x7BFF,
                                       0x7C00, 0x7E00, 0x3C00, 0x7BFE, 0x7800};
    const uint32_t sign = x & 1;
    const size_t which = x / 2 % 10;
    if (item == 4) return of_float[which] | sign << 31;
    return (bfloat16 ? of_float[which] >> 16 : of_half[which]) | sign << 15;
  }
};

// The item size of the kernels' kinds: 0 float32, 1 float16, 2 bfloat16.
inline size_t item_of(int kind) {
  return kind == 0 ? 4 : 2;
}

inline void floats_of_kind(Input& in, std::vector<uint8_t>& to, size_t count, int kind, Fill how) {
  to.resize(count * item_of(kind));
  in.floats(to.data(), count, item_of(kind), kind == 2, how);
}

}  // namespace fuzz
