// Bitmasks and the values that they keep.

#include "call.h"
#include "targets.h"

namespace fuzz {
namespace {

size_t item_size(Input& in) {
  static const uint8_t sizes[] = {1, 2, 4, 8};
  return in.one_of(sizes);
}

bool taken(const std::vector<uint8_t>& bits, size_t row, size_t i, size_t n) {
  return bits[row * ((n + 7) / 8) + i / 8] >> i % 8 & 1;
}

size_t count(const std::vector<uint8_t>& bits, size_t rows, size_t n) {
  size_t found = 0;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t i = 0; i < n; ++i) found += taken(bits, row, i, n);
  }
  return found;
}

// Kept values that are fewer or more than the mask's bits come from `Call`'s distortions.
void expand(Input& in) {
  Call call("bitmask_expand", in);
  const size_t rows = in.rows(), n = in.columns(), item = item_size(in);
  std::vector<uint8_t> bits(rows * ((n + 7) / 8)), fill(item);
  in.bytes(bits.data(), bits.size(), in.fill_kind());
  std::vector<uint8_t> kept(count(bits, rows, n) * item);
  in.bytes(kept.data(), kept.size(), in.fill_kind());
  in.bytes(fill.data(), item, in.fill_kind());
  call.in(bits);
  call.in(kept);
  call.in(fill);
  call.integer(item);
  call.integer(rows);
  call.integer(n);
  const size_t out = call.out(rows * n * item);
  if (!call.run() || call.distorted()) return;
  const std::vector<uint8_t>& found = call.result(out);
  size_t next = 0;
  for (size_t i = 0; i < rows * n; ++i) {
    const uint8_t* wanted = fill.data();
    if (taken(bits, i / n, i % n, n)) wanted = &kept[item * next++];
    expect(!memcmp(&found[i * item], wanted, item), "a value is not where its bit is");
  }
}

void compress(Input& in) {
  Call call("bitmask_compress", in);
  const size_t rows = in.rows(), n = in.columns(), item = item_size(in);
  std::vector<uint8_t> values(rows * n * item), mask(rows * n), wanted;
  in.bytes(values.data(), values.size(), in.fill_kind());
  in.bytes(mask.data(), mask.size(), in.fill_kind());
  for (size_t i = 0; in.one_in(2) && i < mask.size(); ++i) mask[i] &= 1;
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask[i]) wanted.insert(wanted.end(), &values[i * item], &values[i * item] + item);
  }
  call.in(values);
  call.integer(item);
  call.in(mask);
  call.integer(rows);
  call.integer(n);
  const size_t bits = call.out(rows * ((n + 7) / 8)), kept = call.out(wanted.size());
  if (!call.run() || call.distorted()) return;
  expect((size_t)call.integer_result() * item == wanted.size(), "another number of values is kept");
  expect(call.result(kept) == wanted, "other values are kept");
  for (size_t i = 0; i < rows * n; ++i) {
    expect(taken(call.result(bits), i / n, i % n, n) == (mask[i] != 0), "a bit is wrong");
  }
  for (size_t row = 0; n % 8 && row < rows; ++row) {
    expect(!(call.result(bits)[row * ((n + 7) / 8) + n / 8] >> n % 8), "a padding bit is set");
  }
}

void count_bits(Input& in) {
  Call call("count_bits", in);
  const size_t rows = in.rows(), n = in.columns();
  std::vector<uint8_t> bits(rows * ((n + 7) / 8));
  in.bytes(bits.data(), bits.size(), in.fill_kind());
  call.in(bits);
  call.integer(rows);
  call.integer(n);
  if (!call.run() || call.distorted()) return;
  expect((size_t)call.integer_result() == count(bits, rows, n), "bits are counted wrongly");
}

void count_mask(Input& in) {
  Call call("count_mask", in);
  std::vector<uint8_t> mask(in.columns());
  in.bytes(mask.data(), mask.size(), in.fill_kind());
  call.in(mask);
  if (!call.run() || call.distorted()) return;
  size_t wanted = 0;
  for (const uint8_t byte : mask) wanted += byte != 0;
  expect((size_t)call.integer_result() == wanted, "a mask is counted wrongly");
}

}  // namespace

void bitmask(Input& in) {
  switch (in.below(6)) {
    case 0:
      return count_bits(in);
    case 1:
      return count_mask(in);
    case 2:
    case 3:
      return compress(in);
    default:
      return expand(in);
  }
}

}  // namespace fuzz
