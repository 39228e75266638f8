// Codes to bit streams and weights, kept values to bitmasks, and back.
// See kernels_impl.h.

#pragma once

static void dequantize(const uint8_t* codes, const uint8_t* scale, const uint8_t* zero_point,
                       size_t rows, size_t columns, int bits, size_t group_size, float* out) {
  size_t group = 0;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = 0; column < columns; ++group) {
      const size_t n = smaller(group_size, columns - column);
      float value;
      memcpy(&value, scale + 4 * group, 4);
      const F s = set1(value);
      const F zero = set1(zero_point ? (float)zero_point[group] : (float)(1 << (bits - 1)));
      size_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        store(out + i, mul(sub(load_u8(codes + i), zero), s));
      }
      if (i < n) {
        uint8_t bytes[kLanes] = {0};
        float values[kLanes];
        memcpy(bytes, codes + i, n - i);
        store(values, mul(sub(load_u8(bytes), zero), s));
        memcpy(out + i, values, 4 * (n - i));
      }
      codes += n;
      out += n;
      column += n;
    }
  }
}

static void pack_bits(const uint8_t* codes, size_t rows, size_t n, int bits, uint8_t* out,
                      size_t width) {
  const size_t used = (n * (size_t)bits + 7) / 8, b = (size_t)bits;
  for (size_t row = 0; row < rows; ++row, codes += n, out += width) {
    if (bits == 8) {
      memcpy(out, codes, n);
    } else {
      size_t i = pack_blocks(codes, n, bits, out);
      for (; (i / 8) * b + 8 <= used && i + 8 <= n; i += 8) {
        const uint64_t x = join_codes(load_u64(codes + i), bits);
        memcpy(out + i / 8 * b, &x, 8);  // what it writes beyond its bits comes later
      }
      for (; i < n; i += 8) {
        uint64_t x = 0;
        memcpy(&x, codes + i, smaller(8, n - i));
        x = join_codes(x, bits);
        memcpy(out + i / 8 * b, &x, smaller(b, used - i / 8 * b));
      }
    }
    memset(out + used, 0, width - used);
  }
}

static void unpack_bits(const uint8_t* packed, size_t width, size_t rows, size_t n, int bits,
                        uint8_t* out) {
  const size_t used = (n * (size_t)bits + 7) / 8, b = (size_t)bits;
  for (size_t row = 0; row < rows; ++row, packed += width, out += n) {
    if (bits == 8) {
      memcpy(out, packed, n);
      continue;
    }
    size_t i = unpack_blocks(packed, n, bits, out);
    for (; (i / 8) * b + 8 <= used && i + 8 <= n; i += 8) {
      const uint64_t x = split_codes(load_u64(packed + i / 8 * b), bits);
      memcpy(out + i, &x, 8);
    }
    for (; i < n; i += 8) {
      uint64_t x = 0;
      memcpy(&x, packed + i / 8 * b, smaller(b, used - i / 8 * b));
      x = split_codes(x, bits);
      memcpy(out + i, &x, smaller(8, n - i));
    }
  }
}

static size_t count_mask(const uint8_t* mask, size_t n) {
  size_t count = 0, i = 0;
  for (; i + 32 <= n; i += 32) count += (size_t)__builtin_popcount(nonzero32(mask + i));
  for (; i < n; ++i) count += mask[i] != 0;
  return count;
}

static size_t count_bits(const uint8_t* bits, size_t rows, size_t n) {
  const size_t width = (n + 7) / 8, whole = n / 8;
  size_t count = 0;
  for (size_t row = 0; row < rows; ++row, bits += width) {
    size_t i = 0;
    for (; i + 8 <= whole; i += 8) count += (size_t)__builtin_popcountll(load_u64(bits + i));
    for (; i < whole; ++i) count += (size_t)__builtin_popcount(bits[i]);
    if (n % 8) count += (size_t)__builtin_popcount(bits[whole] & ((1u << n % 8) - 1));
  }
  return count;
}

template <size_t Item>
static size_t compress_items(const uint8_t* values, const uint8_t* mask, size_t rows, size_t n,
                             uint8_t* bits, uint8_t* kept, size_t room) {
  size_t count = 0;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t i = 0; i < n; i += 32, mask += 32, values += 32 * Item) {
      const size_t here = smaller(32, n - i);
      uint8_t bytes[32] = {0};
      const uint8_t* source = mask;
      if (here < 32) source = (const uint8_t*)memcpy(bytes, mask, here);
      const uint32_t word = nonzero32(source);
      const size_t written = (here + 7) / 8;
      memcpy(bits, &word, written);
      bits += written;
      for (size_t j = 0; j < here; j += 8) {
        const uint32_t byte = word >> j & 0xFF;
        const size_t found = (size_t)__builtin_popcount(byte);
        const uint8_t* from = values + j * Item;
        if (here - j >= 8 && count + 8 <= room) {
          gather8<Item>(from, byte, kept + count * Item);
        } else {
          uint8_t* to = kept + count * Item;
          for (uint32_t left = byte; left; left &= left - 1, to += Item) {
            memcpy(to, from + Item * (size_t)__builtin_ctz(left), Item);
          }
        }
        count += found;
      }
      if (here < 32) {
        mask -= 32 - here;
        values -= (32 - here) * Item;
      }
    }
  }
  return count;
}

static size_t bitmask_compress(const uint8_t* values, size_t item, const uint8_t* mask, size_t rows,
                               size_t n, uint8_t* bits, uint8_t* kept, size_t kept_count) {
  if (item == 1) return compress_items<1>(values, mask, rows, n, bits, kept, kept_count);
  if (item == 2) return compress_items<2>(values, mask, rows, n, bits, kept, kept_count);
  if (item == 4) return compress_items<4>(values, mask, rows, n, bits, kept, kept_count);
  return compress_items<8>(values, mask, rows, n, bits, kept, kept_count);
}

template <size_t Item>
static void expand_items(const uint8_t* bits, const uint8_t* kept, size_t room, const uint8_t* fill,
                         size_t rows, size_t n, uint8_t* out) {
  size_t count = 0;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t i = 0; i < n; i += 8, ++bits) {
      const size_t here = smaller(8, n - i);
      const uint32_t byte = here == 8 ? *bits : *bits & ((1u << here) - 1);
      const uint8_t* from = kept + count * Item;
      if (here == 8 && count + 8 <= room) {
        scatter8<Item>(from, byte, fill, out);
        count += (size_t)__builtin_popcount(byte);
      } else {
        for (size_t j = 0; j < here; ++j) {
          const bool taken = byte >> j & 1;
          memcpy(out + j * Item, taken ? kept + count * Item : fill, Item);
          count += taken;
        }
      }
      out += here * Item;
    }
  }
}

static void bitmask_expand(const uint8_t* bits, const uint8_t* kept, size_t kept_count,
                           const uint8_t* fill, size_t item, size_t rows, size_t n, uint8_t* out) {
  if (item == 1) expand_items<1>(bits, kept, kept_count, fill, rows, n, out);
  if (item == 2) expand_items<2>(bits, kept, kept_count, fill, rows, n, out);
  if (item == 4) expand_items<4>(bits, kept, kept_count, fill, rows, n, out);
  if (item == 8) expand_items<8>(bits, kept, kept_count, fill, rows, n, out);
}
