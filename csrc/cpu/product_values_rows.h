// Rows of stored values, read from left to right, and their products over the columns of a span.
//
// A span is cut into blocks of 64 columns, a block into steps of one register. Even steps of a span
// are added up in one register, odd ones in another.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define COMPRESS_MEMBER inline __attribute__((always_inline))
// Unrolled before the compiler gives registers to arrays; else these would live in memory.
#define COMPRESS_UNROLL _Pragma("GCC unroll 16")

constexpr size_t kColumns = 64;  // of a block

template <int K>
constexpr size_t kBytes = K == kInt8      ? 1
                          : K == kFloat32 ? 4
                                          : 2;

// Less than a block of a row, copied, with zeros behind it.
struct Rest {
  alignas(64) uint8_t values[kColumns * 4 + 64];
  uint8_t mask[8];
};

// A row of values that is read from left to right, block by block.
template <int K>
struct DenseRow {
  static constexpr bool kScaled = K == kInt8;
  static constexpr bool kWhole = true;
  const uint8_t* p;

  COMPRESS_MEMBER void start(const Segment& s, size_t row) {
    p = s.data + row * s.columns * kBytes<K>;
  }
  COMPRESS_MEMBER uint64_t word() { return 0; }  // what the steps of a block share
  COMPRESS_MEMBER V next(uint64_t, size_t) {
    const V v = dense_step<K>(p);
    p += kStep * kBytes<K>;
    return v;
  }
  COMPRESS_MEMBER void last(size_t count, Rest& rest) {
    memset(&rest, 0, sizeof rest);
    memcpy(rest.values, p, count * kBytes<K>);
    p = rest.values;
  }
  COMPRESS_MEMBER void prefetch_mask() const {}
  COMPRESS_MEMBER void prefetch(ptrdiff_t ahead) const {
    COMPRESS_UNROLL
    for (size_t line = 0; line < kColumns * kBytes<K>; line += 64) {
      __builtin_prefetch(p + ahead + line);
    }
  }
};

template <int K>
struct SparseRow {
  static constexpr bool kScaled = K == kInt8;
  static constexpr bool kWhole = false;
  const uint8_t* p;
  const uint8_t* mask;

  // A row whose start lies behind the values, as in a damaged buffer, reads the room behind them.
  COMPRESS_MEMBER void start(const Segment& s, size_t row) {
    uint64_t first;
    memcpy(&first, s.starts + 8 * row, 8);
    p = s.data + smaller((size_t)first, s.kept) * kBytes<K>;
    mask = s.mask + row * ((s.columns + 7) / 8);
  }
  COMPRESS_MEMBER uint64_t word() {
    uint64_t bits;
    memcpy(&bits, mask, 8);
    mask += 8;
    return bits;
  }
  COMPRESS_MEMBER V next(uint64_t word, size_t k) {
    size_t kept;
    const V v = sparse_step<K>(p, word, k, &kept);
    p += kept * kBytes<K>;
    return v;
  }
  COMPRESS_MEMBER void last(size_t count, Rest& rest) {
    memset(&rest, 0, sizeof rest);
    memcpy(rest.values, p, count * kBytes<K>);
    memcpy(rest.mask, mask, (count + 7) / 8);
    if (count % 8) rest.mask[count / 8] &= (uint8_t)((1u << count % 8) - 1);
    p = rest.values;
    mask = rest.mask;
  }
  COMPRESS_MEMBER void prefetch_mask() const {
    __builtin_prefetch(mask);
    __builtin_prefetch(mask + 64);
  }
  COMPRESS_MEMBER void prefetch(ptrdiff_t ahead) const {
    __builtin_prefetch(p + ahead);
    if (kBytes<K> > 1) __builtin_prefetch(p + ahead + 64);
  }
};

// A row of a tile that was expanded before, zeros up to a whole block.
struct PanelRow {
  static constexpr bool kScaled = false;
  const float* p;

  COMPRESS_MEMBER uint64_t word() { return 0; }
  COMPRESS_MEMBER V next(uint64_t, size_t) {
    const V v = v_load(p);
    p += kStep;
    return v;
  }
  COMPRESS_MEMBER void prefetch(ptrdiff_t) const {}
};

template <int Rows, int Batch>
struct Sums {
  V even[Batch * Rows], odd[Batch * Rows];

  COMPRESS_MEMBER void clear() {
    COMPRESS_UNROLL
    for (int i = 0; i < Batch * Rows; ++i) even[i] = odd[i] = v_zero();
  }
  // out[batch][16] += the span's sums
  COMPRESS_MEMBER void add_to(float* out) const {
    COMPRESS_UNROLL
    for (int b = 0; b < Batch; ++b) {
      COMPRESS_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const int i = b * Rows + r;
        out[b * (int)kTileRows + r] += v_sum(v_add(even[i], odd[i]));
      }
    }
  }
};

// The next block of some rows times some rows of the batch.
template <class Row, int Rows, int Batch>
COMPRESS_INLINE void add_block(Row* rows, const V* scale, const float* x, size_t stride,
                               Sums<Rows, Batch>& sums) {
  uint64_t words[Rows];
  COMPRESS_UNROLL
  for (int r = 0; r < Rows; ++r) words[r] = rows[r].word();
  COMPRESS_UNROLL
  for (size_t k = 0; k < kColumns / kStep; ++k) {
    V* to = k % 2 ? sums.odd : sums.even;
    V activations[Batch];
    COMPRESS_UNROLL
    for (int b = 0; b < Batch; ++b) {
      activations[b] = v_load(x + (size_t)b * stride + k * kStep);
      if (Rows > 1) v_keep(activations[b]);
    }
    COMPRESS_UNROLL
    for (int r = 0; r < Rows; ++r) {
      V w = rows[r].next(words[r], k);
      if (Row::kScaled) w = v_mul(w, scale[r]);
      COMPRESS_UNROLL
      for (int b = 0; b < Batch; ++b) {
        to[b * Rows + r] = v_fma(w, activations[b], to[b * Rows + r]);
      }
    }
  }
}

// The next `count` columns, the last block of which may be short. ahead[r]: from a row's values to
// those that will be needed next.
template <class Row, int Rows, int Batch>
COMPRESS_INLINE void add_columns(Row* rows, const V* scale, const float* x, size_t stride,
                                 size_t count, const ptrdiff_t* ahead, Sums<Rows, Batch>& sums) {
  const float* end = x + count / kColumns * kColumns;
  for (; x < end; x += kColumns) {
    COMPRESS_UNROLL
    for (int r = 0; r < Rows; ++r) rows[r].prefetch(ahead[r]);
    add_block<Row, Rows, Batch>(rows, scale, x, stride, sums);
  }
}

// Activations of a block that is short, with zeros behind them.
template <int Batch>
COMPRESS_INLINE void short_activations(const float* x, size_t stride, size_t count, float* out) {
  memset(out, 0, Batch * kColumns * 4);
  for (int b = 0; b < Batch; ++b) {
    memcpy(out + (size_t)b * kColumns, x + (size_t)b * stride, 4 * count);
  }
}
