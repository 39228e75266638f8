// Sums, histograms, masks, low-rank updates and the column sweep, over floats of any bits.

#include "call.h"
#include "numbers.h"
#include "targets.h"

namespace fuzz {
namespace {

struct Weights {
  int kind;
  size_t n;
  std::vector<uint8_t> bytes;

  uint32_t key(size_t i) const {
    uint32_t bits = 0;
    memcpy(&bits, &bytes[i * item_of(kind)], item_of(kind));
    return bits & (kind == 0 ? 0x7FFFFFFFu : 0x7FFFu);
  }
};

Weights weights(Input& in, size_t n, int kind) {
  Weights w{kind, n, {}};
  floats_of_kind(in, w.bytes, n, kind, in.fill_kind());
  return w;
}

Weights weights(Input& in) {
  const size_t n = in.columns();
  return weights(in, n, (int)in.below(3));
}

std::vector<uint8_t> zeros(size_t count) {
  return std::vector<uint8_t>(count * 8);
}

void histogram(Input& in) {
  const bool low = in.one_in(2);
  Call call(low ? "magnitude_histogram_low" : "magnitude_histogram", in);
  const Weights w = low ? weights(in, in.columns(), 0) : weights(in);
  call.in(w.bytes);
  call.integer(low ? (w.n ? w.key(0) >> 16 : in.word()) & 0xFFFFFFFFu : (size_t)w.kind);
  const size_t counts = call.in_out(zeros(low ? 1 << 16 : 1 << 15), kBytes, 'u', 8);
  if (!call.run() || call.distorted() || low) return;
  for (size_t i = 0; i < w.n; ++i) {
    uint64_t count;
    memcpy(&count, &call.result(counts)[8 * (w.key(i) >> (w.kind == 0 ? 16 : 0))], 8);
    expect(count > 0, "a weight is not counted");
  }
}

void threshold(Input& in) {
  Call call("threshold_mask", in);
  const Weights w = weights(in);
  const uint32_t key = w.n && in.one_in(2) ? w.key(w.n / 2) : (uint32_t)in.word() & 0x7FFFFFFFu;
  const size_t ties = in.byte();
  call.in(w.bytes);
  call.integer((size_t)w.kind);
  call.integer(key);
  call.integer(ties);
  const size_t mask = call.out(w.n);
  if (!call.run() || call.distorted()) return;
  size_t taken = 0;
  for (size_t i = 0; i < w.n; ++i) {
    const bool tie = w.key(i) == key && taken < ties;
    taken += tie;
    expect(call.result(mask)[i] == (tie || w.key(i) > key), "a weight is masked wrongly");
  }
  expect((size_t)call.integer_result() == taken, "ties are counted wrongly");
}

void finite(Input& in) {
  Call call("finite_index", in);
  const Weights w = weights(in);
  call.in(w.bytes);
  call.integer((size_t)w.kind);
  if (!call.run() || call.distorted()) return;
  int64_t wanted = -1;
  for (size_t i = w.n; i-- > 0;)
    wanted = isfinite(number(w.bytes, i, w.kind)) ? wanted : (int64_t)i;
  expect(call.integer_result() == wanted, "the first NaN or infinity is elsewhere");
}

void error_sums(Input& in) {
  Call call("error_sums", in);
  const Weights w = weights(in), decoded = weights(in, w.n, 0);
  call.in(w.bytes);
  call.integer((size_t)w.kind);
  call.in(decoded.bytes);
  call.in_out(zeros(2), kFloat64, 'f', 8);
  call.run();
}

void squared_norms(Input& in) {
  Call call("squared_norms", in);
  const size_t rows = in.rows(), columns = in.columns();
  const Weights w = weights(in, rows * columns, (int)in.below(3));
  call.in(w.bytes);
  call.integer((size_t)w.kind);
  call.integer(rows);
  call.integer(columns);
  call.out(rows * 8, kFloat64, 'f', 8);
  call.run();
}

void add_low_rank(Input& in) {
  Call call("add_low_rank", in);
  const size_t rows = in.rows(), columns = in.columns(), rank = in.below(12);
  call.in_out(weights(in, rows * columns, 0).bytes, kFloat32, 'f', 4);
  call.in(weights(in, rows * rank, 0).bytes);
  call.in(weights(in, rank * columns, 0).bytes);
  call.integer(rows);
  call.integer(columns);
  call.integer(rank);
  call.run();
}

// Which group a column of the sweep has; now and then one that is not there.
std::vector<uint8_t> groups_of_columns(Call& call, Input& in, size_t n, size_t groups) {
  std::vector<uint8_t> bytes(n * 8);
  const size_t broken = in.one_in(8) && n ? in.below(n < 256 ? n : 256) : n;
  for (size_t i = 0; i < n; ++i) {
    int64_t group = (int64_t)(groups ? in.below(groups) : 0);
    if (i == broken) group = wild_integer(in, (int64_t)groups);
    if (group < 0 || (size_t)group >= groups) call.distort_content();
    memcpy(&bytes[8 * i], &group, 8);
  }
  return bytes;
}

// Bytes, or nothing; returns the largest.
uint8_t add_optional(Call& call, Input& in, size_t count) {
  uint8_t largest = 0;
  if (!in.one_in(2)) {
    call.none();
    return largest;
  }
  std::vector<uint8_t> bytes(count);
  in.bytes(bytes.data(), count, in.fill_kind());
  for (const uint8_t byte : bytes) largest = byte > largest ? byte : largest;
  call.in(bytes);
  return largest;
}

// Scales, weights and zero points of any bits are tried. Where they are what callers promise
// (normal, finite, no larger than a code) and errors stay finite, the instruction sets agree.
void sweep(Input& in) {
  Call call("obs_block", in);
  const size_t columns = in.columns(), most = in.one_in(4) ? 60 : 12;
  const size_t rows = most == 12 ? in.rows() : 1 + in.below(2);
  const size_t first = columns ? in.below(columns < 200 ? columns : 200) : 0;
  const size_t left = columns - first, n = left ? in.below(left < most ? left : most) + 1 : 0;
  const size_t groups = 1 + in.below(4);
  const size_t w = call.in_out(weights(in, rows * columns, 0).bytes, kIgnore, 'f', 4);
  for (const size_t x : {rows, columns, first, n}) call.integer(x);
  call.in(weights(in, n * n, 0).bytes, 'f', 4);
  add_optional(call, in, rows * columns);
  in.one_in(2) ? call.in(weights(in, rows * n, 0).bytes) : call.none();
  const Weights scale = weights(in, rows * groups, 0);
  call.in(scale.bytes);
  const int largest_zero = add_optional(call, in, rows * groups);
  call.integer(groups);
  call.in(groups_of_columns(call, in, n, groups), 'i', 8);
  const size_t bits = 2 + in.below(7);
  call.integer(bits);
  const size_t codes = call.in_out(std::vector<uint8_t>(rows * columns), kIgnore, 'u', 1);
  if (!call.run() || !all_finite(call.result(w), 0)) return;
  if (call.distorted() || largest_zero >= 1 << bits) return;
  for (size_t i = 0; i < scale.n; ++i) {
    if (!isnormal((float)number(scale.bytes, i, 0))) return;
  }
  expect(call.result(w) == call.last(w), "instruction sets leave different errors");
  expect(call.result(codes) == call.last(codes), "instruction sets write different codes");
}

}  // namespace

void matrices(Input& in) {
  if (in.byte() == 255) return histogram(in);  // half a megabyte of counts
  switch (in.below(8)) {
    case 0:
      return threshold(in);
    case 1:
      return finite(in);
    case 2:
      return error_sums(in);
    case 3:
      return squared_norms(in);
    case 4:
      return add_low_rank(in);
    default:
      return sweep(in);
  }
}

}  // namespace fuzz
