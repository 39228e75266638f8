// Reading a packed matrix: every offset and size is checked, because a wrong one would corrupt
// memory. The words are described in compress/kernels/packing.py.

#include <string.h>

#include "product.h"

namespace compress::cpu {
namespace {

constexpr uint64_t kMagic = 0x3154434450524D43;  // "CMRPDCT1"
constexpr size_t kHeaderWords = 16, kSegmentWords = 12;
constexpr uint64_t kLargest = (uint64_t)1 << 62;

struct Reader {
  const uint8_t* buffer;
  size_t size;
  bool fits = true;

  uint64_t word(size_t index) const {
    uint64_t value;
    memcpy(&value, buffer + 8 * index, 8);
    return value;
  }
  // `count` items of `item` bytes at the offset that a word names.
  const uint8_t* array(size_t index, uint64_t count, uint64_t item) {
    const uint64_t offset = word(index);
    uint64_t bytes, end;
    if (__builtin_mul_overflow(count, item, &bytes) ||
        __builtin_add_overflow(offset, bytes, &end) || end > size) {
      fits = false;
      return nullptr;
    }
    return buffer + offset;
  }
  const uint8_t* optional(size_t index, uint64_t count, uint64_t item) {
    return word(index) ? array(index, count, item) : nullptr;
  }
};

size_t item_bytes(Kind kind) {
  return kind == kFloat32 ? 4 : kind == kInt8 ? 1 : 2;
}

uint64_t pieces(uint64_t whole, uint64_t part) {
  return whole / part + (whole % part != 0);
}

// a * b * c, or a size that fits no buffer.
uint64_t product(uint64_t a, uint64_t b, uint64_t c = 1) {
  uint64_t result;
  if (__builtin_mul_overflow(a, b, &result) || __builtin_mul_overflow(result, c, &result)) {
    return ~(uint64_t)0;
  }
  return result;
}

// Columns of a segment once each of its blocks is padded.
uint64_t padded_columns(const Segment& s) {
  const auto padded = [](uint64_t n) {
    return n / kMaxBlock * kMaxBlock + pieces(n % kMaxBlock, kPad) * kPad;
  };
  const uint64_t whole = product(s.columns / s.group_size, padded(s.group_size));
  return whole > kLargest ? whole : whole + padded(s.columns % s.group_size);
}

const char* parse_codes(Reader& r, size_t at, uint64_t tiles, Segment& s) {
  if (s.bits != 2 && s.bits != 4 && s.bits != 8) return "codes must have 2, 4 or 8 bits";
  const uint64_t groups = pieces(s.columns, s.group_size);
  s.data = r.array(at + 6, tiles, product(padded_columns(s), 2 * (uint64_t)s.bits));
  s.scale = r.array(at + 7, tiles, product(groups, kTileRows, item_bytes(s.scale_kind)));
  s.zero = r.optional(at + 8, tiles, product(groups, kTileRows));
  return nullptr;
}

const char* parse_values(Reader& r, size_t at, uint64_t rows, Segment& s) {
  const uint64_t groups = pieces(s.columns, s.group_size);
  uint64_t count;
  if (__builtin_mul_overflow(rows, (uint64_t)s.columns, &count)) return "a size overflows";
  if (s.kind == kBitmask) {
    s.mask = r.array(at + 9, rows, pieces(s.columns, 8));
    s.starts = r.array(at + 10, rows, 8);
    // The kernel bounds every row by `kept`; a row reads at most its columns from there.
    s.kept = count = r.word(at + 11);
    if (count > kLargest) return "a size overflows";
    count += s.columns;
  }
  s.data = r.array(at + 6, count, item_bytes(s.value_kind));
  if (s.value_kind == kInt8)
    s.scale = r.array(at + 7, rows, product(groups, item_bytes(s.scale_kind)));
  return nullptr;
}

const char* parse_segment(Reader& r, size_t at, const Packed& p, Segment& s) {
  memset(&s, 0, sizeof s);
  const uint64_t kind = r.word(at), width = r.word(at + 3), scale_kind = r.word(at + 5);
  s.kind = static_cast<SegmentKind>(kind);
  s.first_column = r.word(at + 1);
  s.columns = r.word(at + 2);
  s.group_size = r.word(at + 4);
  if (kind > kBitmask) return "unknown kind of segment";
  if (s.first_column > p.columns || s.columns > p.columns - s.first_column) {
    return "a segment lies outside the columns";
  }
  if (!s.group_size || s.group_size > kLargest) return "group_size must be positive";
  if (scale_kind > kBFloat16 || width > 8) return "unknown dtype";
  s.scale_kind = static_cast<Kind>(scale_kind);
  const uint64_t tiles = pieces(p.rows, kTileRows);
  if (s.kind == kCodes) {
    s.bits = static_cast<int>(width);
    return parse_codes(r, at, tiles, s);
  }
  if (width > kInt8) return "unknown dtype";
  s.value_kind = static_cast<Kind>(width);
  return parse_values(r, at, p.rows, s);
}

const char* parse_outliers(Reader& r, Packed& p, uint64_t tiles) {
  p.outliers = r.word(11);
  if (!p.outliers) return nullptr;
  p.outlier_tiles = r.array(12, tiles + 1, 8);
  p.outlier_entries = r.array(13, p.outliers, 12);
  if (!r.fits) return nullptr;
  uint64_t previous = 0;
  for (uint64_t tile = 0; tile <= tiles; ++tile) {
    uint64_t start;
    memcpy(&start, p.outlier_tiles + 8 * tile, 8);
    if (start < previous || start > p.outliers) return "outliers are not in order";
    for (uint64_t entry = previous; entry < start; ++entry) {
      uint32_t place[2];
      memcpy(place, p.outlier_entries + 12 * entry, 8);
      if (place[0] / kTileRows + 1 != tile || place[0] >= p.rows || place[1] >= p.columns) {
        return "an outlier lies outside its tile";
      }
    }
    previous = start;
  }
  return previous == p.outliers ? nullptr : "outliers are not in order";
}

}  // namespace

const char* parse(const uint8_t* buffer, size_t size, Packed* packed) {
  Packed& p = *packed;
  memset(&p, 0, sizeof p);
  Reader r{buffer, size};
  if (size < 8 * kHeaderWords || r.word(0) != kMagic || r.word(1) != size) {
    return "not a packed matrix";
  }
  p.rows = r.word(2);
  p.columns = r.word(3);
  p.segment_count = r.word(4);
  p.rank = r.word(6);
  if (p.rows > kLargest || p.columns > kLargest || p.segment_count > kMaxSegments ||
      size < 8 * (kHeaderWords + kSegmentWords * p.segment_count)) {
    return "sizes are out of range";
  }
  const uint64_t tiles = pieces(p.rows, kTileRows);
  for (size_t i = 0; i < p.segment_count; ++i) {
    const char* wrong = parse_segment(r, kHeaderWords + kSegmentWords * i, p, p.segments[i]);
    if (wrong) return wrong;
  }
  p.bias = r.optional(5, p.rows, 4);
  if (p.rank) {
    if (p.rank > size || r.word(7) > kInt8) return "the factors are out of range";
    p.factor_kind = static_cast<Kind>(r.word(7));
    const uint64_t item = item_bytes(p.factor_kind);
    p.factor_a = r.array(8, product(p.rank, p.columns), item);
    p.factor_b = r.array(9, product(p.rank, kTileRows, tiles), item);
    p.rank_scale = r.optional(10, p.rank, 4);
  }
  const char* wrong = parse_outliers(r, p, tiles);
  if (wrong) return wrong;
  return r.fits ? nullptr : "an array lies outside the buffer";
}

}  // namespace compress::cpu
