#include "blob.h"

#include "call.h"

namespace fuzz {
namespace {

constexpr size_t kHeader = 16, kSegment = 12, kTile = 16;
constexpr uint64_t kMagic = 0x3154434450524D43;

size_t pieces(size_t whole, size_t part) {
  return (whole + part - 1) / part;
}

size_t padded(size_t n) {
  return n / 128 * 128 + pieces(n % 128, 16) * 16;
}

class Builder {
 public:
  Builder(Input& in, Blob& blob) : in_(in), blob_(blob) {}

  void build() {
    blob_.rows = in_.rows();
    blob_.columns = in_.columns();
    if (blob_.rows > 5 && blob_.columns > 40) blob_.columns = 33;
    tiles_ = pieces(blob_.rows, kTile);
    const size_t segments = in_.one_in(8) ? in_.below(17) : 1 + in_.below(2);
    blob_.bytes.resize(8 * (kHeader + kSegment * segments));
    put(0, kMagic);
    put(2, blob_.rows);
    put(3, blob_.columns);
    put(4, segments);
    const uint8_t terms = in_.byte();
    if (terms & 1) put(5, floats(blob_.rows, 0));
    if (terms % 8 >= 6) add_factors();
    if (terms / 8 % 4 == 3) add_outliers();
    for (size_t i = 0; i < segments; ++i) add_segment(kHeader + kSegment * i);
    put(1, blob_.bytes.size());
  }

 private:
  Input& in_;
  Blob& blob_;
  size_t tiles_ = 0;

  void put(size_t word, uint64_t value) { memcpy(&blob_.bytes[8 * word], &value, 8); }

  // Room at the end, at any address; returns its offset.
  size_t room(size_t size) {
    const size_t offset = blob_.bytes.size() + in_.below(3);
    blob_.bytes.resize(offset + size);
    return offset;
  }
  size_t bytes(size_t size) {
    const size_t offset = room(size);
    in_.bytes(&blob_.bytes[0] + offset, size, in_.fill_kind());
    return offset;
  }
  // Kind 3 is int8. Offset 0 would mean none; no array lies there.
  size_t floats(size_t count, int kind) {
    if (kind == 3) return bytes(count);
    const Fill how = in_.one_in(2) ? kTame : in_.fill_kind();
    blob_.tame &= how == kTame;
    const size_t offset = room(count * item_of(kind));
    in_.floats(&blob_.bytes[0] + offset, count, item_of(kind), kind == 2, how);
    return offset;
  }

  void add_factors() {
    const size_t rank = 1 + in_.below(5);
    const int kind = (int)in_.below(4);
    put(6, rank);
    put(7, (uint64_t)kind);
    put(8, floats(rank * blob_.columns, kind));
    put(9, floats(tiles_ * rank * kTile, kind));
    if (in_.one_in(2)) put(10, floats(rank, 0));
    blob_.terms += rank * blob_.columns * (kind == 3 ? 16384 : 1);
  }

  void add_outliers() {
    const size_t count = blob_.rows && blob_.columns ? in_.below(5) : 0;
    const size_t starts = room((tiles_ + 1) * 8), entries = room(count * 12);
    put(11, count);
    put(12, starts);
    put(13, entries);
    size_t row = 0;
    uint64_t ends[8] = {0};
    for (size_t i = 0; i < count; ++i) {
      row += in_.below(blob_.rows - row);
      const uint32_t place[2] = {(uint32_t)row, (uint32_t)in_.below(blob_.columns)};
      memcpy(&blob_.bytes[entries + 12 * i], place, 8);
      in_.floats(&blob_.bytes[entries + 12 * i + 8], 1, 4, false, kTame);
      for (size_t tile = row / kTile; tile < tiles_; ++tile) ends[tile + 1] = i + 1;
    }
    memcpy(&blob_.bytes[starts], ends, (tiles_ + 1) * 8);
    blob_.terms += count;
  }

  void add_segment(size_t at) {
    const size_t first = blob_.columns && in_.one_in(2) ? in_.below(blob_.columns) : 0;
    const size_t columns =
        in_.one_in(4) ? in_.below(blob_.columns - first + 1) : blob_.columns - first;
    const size_t kind = in_.below(3), group_size = 1 + in_.below(150);
    const int scales = (int)in_.below(3);
    put(at, kind);
    put(at + 1, first);
    put(at + 2, columns);
    put(at + 4, group_size);
    put(at + 5, (uint64_t)scales);
    const size_t groups = pieces(columns, group_size);
    if (kind == 0) return add_codes(at, columns, groups, group_size, scales);
    const int values = (int)in_.below(4);
    put(at + 3, (uint64_t)values);
    if (values == 3) put(at + 7, floats(blob_.rows * groups, scales));
    blob_.terms += columns * (values == 3 ? 128 : 1);
    if (kind == 1) return put(at + 6, floats(blob_.rows * columns, values));
    add_bitmask(at, columns, values);
  }

  void add_codes(size_t at, size_t columns, size_t groups, size_t group_size, int scales) {
    static const uint8_t widths[] = {2, 4, 8};
    const size_t bits = in_.one_of(widths);
    put(at + 3, bits);
    put(at + 6, bytes(tiles_bytes(blob_.rows, columns, bits, group_size)));
    put(at + 7, floats(tiles_ * groups * kTile, scales));
    if (in_.one_in(2)) put(at + 8, bytes(tiles_ * groups * kTile));
    blob_.terms += columns * 256;
  }

  void add_bitmask(size_t at, size_t columns, int values) {
    const size_t width = pieces(columns, 8), rows = blob_.rows;
    const size_t mask = bytes(rows * width), starts = room(rows * 8);
    const bool wild = in_.one_in(8);  // starts behind the values: bounded by the kernel
    uint64_t kept = 0;
    for (size_t row = 0; row < rows; ++row) {
      const uint64_t start =
          wild && in_.one_in(2) ? (uint64_t)wild_integer(in_, (int64_t)kept) : kept;
      memcpy(&blob_.bytes[starts + 8 * row], &start, 8);
      for (size_t i = 0; i < columns; ++i) {
        kept += blob_.bytes[mask + row * width + i / 8] >> i % 8 & 1;
      }
    }
    put(at + 9, mask);
    put(at + 10, starts);
    put(at + 11, kept);
    put(at + 6, floats(kept + columns, values));
  }
};

// Words of the head, or any bytes, or the length.
void damage(Input& in, Blob& blob) {
  blob.damaged = true;
  for (size_t left = 1 + in.below(3); left; --left) {
    const size_t words = blob.bytes.size() / 8 < 52 ? blob.bytes.size() / 8 : 52;
    const size_t word = in.below(words ? words : 1), what = in.below(8);
    if (what == 0 && blob.bytes.size() > 16) {
      blob.bytes.resize(blob.bytes.size() - 1 - in.below(16));
      const uint64_t size = blob.bytes.size();
      memcpy(&blob.bytes[8], &size, 8);
    } else if (what == 1 && !blob.bytes.empty()) {
      blob.bytes[(in.byte() * 256u + in.byte()) % blob.bytes.size()] = in.byte();
    } else if (words) {
      int64_t value;
      memcpy(&value, &blob.bytes[8 * word], 8);
      value = in.one_in(2) ? (int64_t)in.byte() : wild_integer(in, value);
      memcpy(&blob.bytes[8 * word], &value, 8);
    }
  }
}

}  // namespace

size_t tiles_bytes(size_t rows, size_t columns, size_t bits, size_t group_size) {
  const size_t wide = columns / group_size * padded(group_size) + padded(columns % group_size);
  return pieces(rows, kTile) * wide * 2 * bits;
}

bool Blob::codes_alone() const {
  const auto word = [this](size_t index) {
    uint64_t value = 0;
    if (8 * index + 8 <= bytes.size()) memcpy(&value, &bytes[8 * index], 8);
    return value;
  };
  bool alone = !word(6);
  for (size_t i = 0; i < word(4) && i < 16; ++i) alone &= word(kHeader + kSegment * i) == 0;
  return alone;
}

Blob make_blob(Input& in) {
  Blob blob;
  Builder(in, blob).build();
  if (in.one_in(2)) damage(in, blob);
  return blob;
}

}  // namespace fuzz
