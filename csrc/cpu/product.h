// A packed matrix: one buffer that holds every term of a Linear's weight, laid out for the
// products.
//
// compress/kernels/packing.py writes it and describes it word by word; it lives in memory only. The
// matrix is cut into tiles of sixteen rows; what belongs to a tile lies together.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"

namespace compress::cpu {

constexpr size_t kTileRows = 16;
constexpr size_t kMaxBlock = 128;  // columns that share a scale of activations, at most
constexpr size_t kPad = 16;        // a block is padded to a multiple of this
constexpr size_t kMaxSegments = 16;
constexpr Kind kInt8 = static_cast<Kind>(3);

enum SegmentKind : int64_t { kCodes = 0, kDense = 1, kBitmask = 2 };

// A range of columns in one representation.
struct Segment {
  SegmentKind kind;
  size_t first_column, columns;
  int bits;           // kCodes: 2, 4 or 8
  Kind value_kind;    // kDense, kBitmask: of the values; kInt8 has a scale a group
  size_t group_size;  // columns that share a scale
  Kind scale_kind;
  const uint8_t* data;    // kCodes: [tiles][blocks][steps][64]; else values, row after row
  const uint8_t* scale;   // kCodes: [tiles][groups][16]; else [rows][groups]
  const uint8_t* zero;    // kCodes: uint8 [tiles][groups][16], or null: 2^(bits-1)
  const uint8_t* mask;    // kBitmask: [rows][ceil(columns / 8)]
  const uint8_t* starts;  // kBitmask: uint64 [rows], the first kept value of a row
  size_t kept;            // kBitmask: values of all rows; `columns` more may be read
};

struct Packed {
  size_t rows, columns, segment_count;
  Segment segments[kMaxSegments];
  const uint8_t* bias;  // float32 [rows], or null
  size_t rank;
  Kind factor_kind;
  const uint8_t* factor_a;    // [rank][columns]
  const uint8_t* factor_b;    // [tiles][rank][16]
  const uint8_t* rank_scale;  // float32 [rank], or null
  size_t outliers;
  const uint8_t* outlier_tiles;    // uint64 [tiles + 1]: the first entry of a tile
  const uint8_t* outlier_entries;  // (uint32 row, uint32 column, float32 difference) [outliers]
};

// Reads and checks a buffer. Returns null, or what is wrong with it.
const char* parse(const uint8_t* buffer, size_t size, Packed* packed);

struct LinearArgs {
  const Packed* packed;
  const uint8_t* x;  // [batch, columns] of `x_kind`
  Kind x_kind;
  size_t batch;
  uint8_t* y;  // [batch, rows] of `y_kind`
  Kind y_kind;
  bool exact;  // activations of 16 bits instead of 8, where weights are codes
  int threads;
};

}  // namespace compress::cpu
