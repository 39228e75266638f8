// Bit streams to codes and back, and codes to floats.

#include "call.h"
#include "targets.h"

namespace fuzz {
namespace {

size_t packed_width(size_t n, int bits) {
  return (n * (size_t)bits + 7) / 8;
}

// Bit `index` of a row that starts at `row`.
bool bit(const uint8_t* row, size_t index) {
  return row[index / 8] >> index % 8 & 1;
}

uint8_t code_at(const uint8_t* row, size_t i, int bits) {
  int code = 0;
  for (int b = 0; b < bits; ++b) code |= bit(row, i * (size_t)bits + (size_t)b) << b;
  return (uint8_t)code;
}

struct Stream {
  size_t rows, n, width;
  int bits;
};

Stream stream(Input& in) {
  Stream s;
  s.rows = in.rows();
  s.n = in.columns();
  s.bits = 2 + (int)in.below(7);
  s.width = packed_width(s.n, s.bits) + (in.one_in(3) ? in.below(20) : 0);
  return s;
}

// Both directions agree with the stream's definition, bit by bit.
void check_stream(const Stream& s, const std::vector<uint8_t>& packed,
                  const std::vector<uint8_t>& codes) {
  const int top = (1 << s.bits) - 1;
  for (size_t row = 0; row < s.rows; ++row) {
    for (size_t i = 0; i < s.n; ++i) {
      expect(code_at(&packed[row * s.width], i, s.bits) == (codes[row * s.n + i] & top),
             "a code is not where the stream has it");
    }
  }
}

void unpack(Input& in) {
  Call call("unpack_bits", in);
  const Stream s = stream(in);
  std::vector<uint8_t> packed(s.rows * s.width);
  in.bytes(packed.data(), packed.size(), in.fill_kind());
  call.in(packed);
  call.integer(s.width);
  call.integer(s.rows);
  call.integer(s.n);
  call.integer((size_t)s.bits);
  const size_t codes = call.out(s.rows * s.n);
  if (!call.run() || call.distorted()) return;
  check_stream(s, packed, call.result(codes));
}

void pack(Input& in) {
  Call call("pack_bits", in);
  const Stream s = stream(in);
  std::vector<uint8_t> codes(s.rows * s.n);
  in.bytes(codes.data(), codes.size(), in.fill_kind());  // bits above those of a code, too
  call.in(codes);
  call.integer(s.rows);
  call.integer(s.n);
  call.integer((size_t)s.bits);
  const size_t packed = call.out(s.rows * s.width);
  call.integer(s.width);
  if (!call.run() || call.distorted()) return;
  check_stream(s, call.result(packed), codes);
  for (size_t row = 0; row < s.rows; ++row) {
    for (size_t i = s.n * (size_t)s.bits; i < s.width * 8; ++i) {
      expect(!bit(&call.result(packed)[row * s.width], i), "the rest of a row is not zero");
    }
  }
}

// Codes and zero points of any value; scales of any bits.
void dequantize(Input& in) {
  Call call("dequantize", in);
  const size_t rows = in.rows(), columns = in.columns(), group_size = 1 + in.below(140);
  const int bits = 2 + (int)in.below(7);
  const size_t groups = (columns + group_size - 1) / group_size;
  std::vector<uint8_t> codes(rows * columns), scale, zero(rows * groups);
  in.bytes(codes.data(), codes.size(), in.fill_kind());
  floats_of_kind(in, scale, rows * groups, 0, in.fill_kind());
  call.in(codes);
  call.in(scale);
  const bool has_zero = in.one_in(2);
  if (has_zero) {
    in.bytes(zero.data(), zero.size(), in.fill_kind());
    call.in(zero);
  } else {
    call.none();
  }
  call.integer(rows);
  call.integer(columns);
  call.integer((size_t)bits);
  call.integer(group_size);
  const size_t out = call.out(rows * columns * 4, kFloat32, 'f', 4);
  if (!call.run() || call.distorted()) return;
  for (size_t i = 0; i < rows * columns; ++i) {
    const size_t group = i / columns * groups + i % columns / group_size;
    const int centre = has_zero ? zero[group] : 1 << (bits - 1);
    float by, found;
    memcpy(&by, &scale[4 * group], 4);
    memcpy(&found, &call.result(out)[4 * i], 4);
    const float wanted = (float)(codes[i] - centre) * by;
    expect(found == wanted || (found != found && wanted != wanted), "a code decodes wrongly");
  }
}

}  // namespace

void codes(Input& in) {
  switch (in.below(3)) {
    case 0:
      return unpack(in);
    case 1:
      return pack(in);
    default:
      return dequantize(in);
  }
}

}  // namespace fuzz
