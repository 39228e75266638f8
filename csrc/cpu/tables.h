// Shuffle patterns that move the kept ones of eight items, indexed by their bits.

#pragma once

#include <stdint.h>

namespace compress::cpu {

struct ShuffleTables {
  alignas(16) uint8_t gather1[256][8];   // byte i of the result comes from this byte
  alignas(16) uint8_t gather2[256][16];  // the same for 2-byte items
  alignas(16) uint8_t gather8[16][8];    // four 8-byte items, as 4-byte halves
  alignas(16) uint8_t scatter1[256][8];  // 0x80 = not kept: shuffles give zero, blends the fill
  alignas(16) uint8_t scatter2[256][16];
  alignas(16) uint8_t scatter8[16][8];
};

constexpr ShuffleTables make_shuffle_tables() {
  ShuffleTables t{};
  for (int bits = 0; bits < 256; ++bits) {
    int kept = 0;
    for (int i = 0; i < 8; ++i) {
      if (bits >> i & 1) {
        t.gather1[bits][kept] = (uint8_t)i;
        t.gather2[bits][2 * kept] = (uint8_t)(2 * i);
        t.gather2[bits][2 * kept + 1] = (uint8_t)(2 * i + 1);
        if (bits < 16) {
          t.gather8[bits][2 * kept] = (uint8_t)(2 * i);
          t.gather8[bits][2 * kept + 1] = (uint8_t)(2 * i + 1);
        }
      }
      const bool taken = bits >> i & 1;
      t.scatter1[bits][i] = taken ? (uint8_t)kept : 0x80;
      t.scatter2[bits][2 * i] = taken ? (uint8_t)(2 * kept) : 0x80;
      t.scatter2[bits][2 * i + 1] = taken ? (uint8_t)(2 * kept + 1) : 0x80;
      if (bits < 16 && i < 4) {
        t.scatter8[bits][2 * i] = taken ? (uint8_t)(2 * kept) : 0x80;
        t.scatter8[bits][2 * i + 1] = taken ? (uint8_t)(2 * kept + 1) : 0x80;
      }
      kept += taken;
    }
  }
  return t;
}

static constexpr ShuffleTables kShuffle = make_shuffle_tables();

}  // namespace compress::cpu
