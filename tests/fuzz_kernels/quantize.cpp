// Weights of any bits to codes, with and without the search.

#include <math.h>

#include "call.h"
#include "numbers.h"
#include "targets.h"

namespace fuzz {
namespace {

struct Case {
  size_t rows, columns, group_size, groups, width;
  int kind, bits, scale_kind;
  bool masked, symmetric, search, packed;
  std::vector<uint8_t> weights, mask;
};

Case draw(Input& in) {
  Case c;
  c.rows = in.rows();
  c.columns = in.columns();
  if (c.rows > 2 && c.columns > 40) c.rows = 2;
  c.group_size = 1 + (in.one_in(4) ? 16 * in.below(16) : in.below(140));
  c.groups = (c.columns + c.group_size - 1) / c.group_size;
  c.kind = (int)in.below(3);
  c.bits = 2 + (int)in.below(7);
  c.scale_kind = (int)in.below(3);
  const uint8_t flags = in.byte();
  c.masked = flags & 1, c.symmetric = flags & 2, c.packed = flags & 8;
  c.search = flags % 8 / 4 && in.one_in(2);  // costs as much as ten others
  c.width = c.packed ? (c.columns * (size_t)c.bits + 7) / 8 + in.below(4) : 0;
  floats_of_kind(in, c.weights, c.rows * c.columns, c.kind, in.fill_kind());
  c.mask.resize(c.rows * c.columns);
  if (c.masked) in.bytes(c.mask.data(), c.mask.size(), in.fill_kind());
  for (size_t i = 0; (flags & 16) && i < c.mask.size(); ++i) c.mask[i] &= 1;
  return c;
}

struct Places {
  size_t codes, packed, scale, zero, sums;
};

// Weights of columns: finite and not negative, as callers promise, or of any bits.
void add_column_weights(Call& call, Input& in, const Case& c) {
  if (!in.one_in(4)) return call.none();
  std::vector<uint8_t> weights((c.columns + 16) * 4);
  const bool broken = in.one_in(4);
  in.floats(weights.data(), c.columns, 4, false, broken ? kAnyBits : kTame);
  for (size_t i = 0; !broken && i < c.columns; ++i) weights[4 * i + 3] &= 0x7F;
  if (broken) call.compare_nothing();
  call.in(weights);
}

Places add_arguments(Call& call, Input& in, const Case& c) {
  Places at{};
  call.in(c.weights);
  call.integer((size_t)c.kind);
  c.masked ? call.in(c.mask) : call.none();
  for (const size_t x : {c.rows, c.columns, (size_t)c.bits, c.group_size, (size_t)c.scale_kind}) {
    call.integer(x);
  }
  call.flag(c.search);
  call.flag(in.one_in(2));
  // Where codes are packed, this is a row to work in.
  at.codes = call.out(c.packed ? c.columns : c.rows * c.columns, c.packed ? kIgnore : kBytes);
  if (c.packed) {
    at.packed = call.out(c.rows * c.width);
  } else {
    call.none();
  }
  call.integer(c.width);
  at.scale = call.out(c.rows * c.groups * item_of(c.scale_kind));
  if (c.symmetric) {
    call.none();
  } else {
    at.zero = call.out(c.rows * c.groups);
  }
  at.sums = call.out(c.rows * 3 * 8, kFloat64, 'f', 8);
  add_column_weights(call, in, c);
  call.compare_where_returned(-1);
  return at;
}

uint8_t code_of(const Call& call, const Case& c, const Places& at, size_t row, size_t column) {
  if (!c.packed) return call.result(at.codes)[row * c.columns + column];
  const uint8_t* from = &call.result(at.packed)[row * c.width];
  int code = 0;
  for (int b = 0; b < c.bits; ++b) {
    const size_t bit = column * (size_t)c.bits + (size_t)b;
    code |= (from[bit / 8] >> bit % 8 & 1) << b;
  }
  return (uint8_t)code;
}

// How far plain rounding may be off, in scales. Asymmetric codes and those of 2 bits have no room
// beyond the weights that they were made for: there the rounding of the scale itself counts.
double allowed(const Case& c) {
  static const double units[] = {0x1p-24, 0x1p-11, 0x1p-8};
  const double half = 0.5 * (1 + 0x1p-10);
  const bool edge = !c.symmetric || c.bits == 2;
  return half + (edge ? ((1 << c.bits) - 1) * units[c.scale_kind] : 0);
}

void check_weight(const Call& call, const Case& c, const Places& at, size_t row, size_t column) {
  const size_t i = row * c.columns + column, group = row * c.groups + column / c.group_size;
  const int code = code_of(call, c, at, row, column);
  const int centre = c.symmetric ? 1 << (c.bits - 1) : call.result(at.zero)[group];
  const double scale = number(call.result(at.scale), group, c.scale_kind);
  const double weight = number(c.weights, i, c.kind);
  expect(code < 1 << c.bits && centre < 1 << c.bits, "a code has more bits than it should");
  expect(isfinite(scale) && scale != 0, "a scale is no number to divide by");
  if (c.masked && !c.mask[i]) {
    expect(code == centre, "a pruned weight has not the code of zero");
  } else if (!c.search) {
    expect(fabs(weight - (code - centre) * scale) <= allowed(c) * fabs(scale),
           "a code is farther from its weight than half a scale");
  }
}

}  // namespace

void quantize(Input& in) {
  Call call("quantize_groups", in);
  const Case c = draw(in);
  const Places at = add_arguments(call, in, c);
  const bool weighted = call.last_is_array();
  if (!call.run() || call.distorted() || call.integer_result() != -1) return;
  for (size_t row = 0; row < c.rows; ++row) {
    double sums[3];
    memcpy(sums, &call.result(at.sums)[row * 24], 24);
    expect(weighted || !(sums[0] > sums[1]), "the search made a row worse");
    for (size_t column = 0; column < c.columns; ++column) check_weight(call, c, at, row, column);
  }
}

}  // namespace fuzz
