// Packed matrices, whole and damaged, and products with them.

#include "blob.h"
#include "call.h"
#include "numbers.h"
#include "targets.h"

namespace fuzz {
namespace {

constexpr Compare kCompareKind[] = {kFloat32, kFloat16, kBFloat16};
constexpr double kUnit[] = {0x1p-23, 0x1p-10, 0x1p-7};
constexpr size_t kThreads = 7;  // which argument of linear

struct Vectors {
  size_t batch;
  int x_kind, y_kind;
  std::vector<uint8_t> x;
  bool tame;
};

Vectors vectors(Input& in, size_t rows, size_t columns) {
  static const uint8_t batches[] = {1, 1, 2, 3, 4, 5, 8, 0, 17};
  Vectors v;
  v.batch = in.one_of(batches);
  if (v.batch * rows * columns > 4000) v.batch = v.batch < 3 ? v.batch : 3;
  v.x_kind = (int)in.below(3);
  v.y_kind = (int)in.below(3);
  const Fill how = in.one_in(2) ? kTame : in.fill_kind();
  v.tame = how == kTame;
  floats_of_kind(in, v.x, v.batch * columns, v.x_kind, how);
  return v;
}

size_t add_vectors(Call& call, const Vectors& v, size_t rows, Compare compare) {
  call.in(v.x);
  call.integer((size_t)v.x_kind);
  call.integer(v.batch);
  const size_t y = call.out(v.batch * rows * item_of(v.y_kind), compare);
  call.integer((size_t)v.y_kind);
  return y;
}

// Sums of floats in another order: near each other where nothing is large.
void check_near(const Call& call, size_t y, int kind, double most) {
  const size_t count = call.result(y).size() / item_of(kind);
  for (size_t i = 0; i < count; ++i) {
    const double one = number(call.result(y), i, kind), other = number(call.last(y), i, kind);
    const double off = 1e-6 * (most + 1) + kUnit[kind] * fabs(one);
    expect(!(fabs(one) <= 60000) || fabs(one - other) <= off,
           "instruction sets give different products");
  }
}

void linear(Input& in) {
  Call call("linear", in);
  const Blob blob = make_blob(in);
  const Vectors v = vectors(in, blob.rows, blob.columns);
  if (blob.damaged) call.distort_content();
  call.in(blob.bytes);
  const bool exact = blob.codes_alone();
  const size_t y = add_vectors(call, v, blob.rows, exact ? kCompareKind[v.y_kind] : kIgnore);
  call.flag(in.one_in(2));
  call.integer(1);
  const bool twice = in.one_in(16);
  if (!call.run()) return;
  if (!exact && blob.tame && v.tame && !call.distorted()) {
    check_near(call, y, v.y_kind, (double)blob.terms);
  }
  if (twice && !call.distorted()) call.again(kThreads, 2);
}

void dense(Input& in) {
  Call call("dense_linear", in);
  size_t rows = in.rows(), columns = in.columns();
  if (rows > 5 && columns > 40) columns = 33;
  const int kind = (int)in.below(3);
  const Vectors v = vectors(in, rows, columns);
  const Fill how = in.one_in(2) ? kTame : in.fill_kind();
  std::vector<uint8_t> w;
  floats_of_kind(in, w, rows * columns, kind, how);
  call.in(w);
  call.integer((size_t)kind);
  call.integer(rows);
  call.integer(columns);
  const size_t y = add_vectors(call, v, rows, kIgnore);
  call.integer(1);
  if (!call.run() || call.distorted() || !v.tame || how != kTame) return;
  for (size_t i = 0; i < v.batch * rows; ++i) {
    double wanted = 0;
    for (size_t j = 0; j < columns; ++j) {
      wanted +=
          number(v.x, i / rows * columns + j, v.x_kind) * number(w, i % rows * columns + j, kind);
    }
    const double off = 1e-6 * (double)(columns + 1) + kUnit[v.y_kind] * fabs(wanted);
    expect(fabs(number(call.result(y), i, v.y_kind) - wanted) <= off, "a dense product is wrong");
    expect(fabs(number(call.last(y), i, v.y_kind) - wanted) <= off, "a dense product is wrong");
  }
}

// The code of one place of a tile's block.
int code_in(const uint8_t* block, size_t row, size_t k, size_t bits) {
  const size_t step = 32 / bits, in_step = k % step;
  return block[k / step * 64 + 4 * row + in_step % 4] >> (in_step / 4 * bits) & ((1 << bits) - 1);
}

void pack_tiles(Input& in) {
  static const uint8_t widths[] = {2, 4, 8};
  Call call("pack_tiles", in);
  const size_t rows = in.rows(), columns = in.columns(), bits = in.one_of(widths);
  const size_t group_size = 1 + in.below(150);
  const bool fits = in.one_in(2);
  std::vector<uint8_t> codes(rows * columns);
  in.bytes(codes.data(), codes.size(), in.fill_kind());
  for (size_t i = 0; fits && i < codes.size(); ++i) codes[i] &= (uint8_t)((1 << bits) - 1);
  call.in(codes);
  for (const size_t x : {rows, columns, bits, group_size}) call.integer(x);
  const size_t out = call.out(tiles_bytes(rows, columns, bits, group_size));
  if (!call.run() || call.distorted() || !fits) return;
  const size_t tile_bytes = tiles_bytes(1, columns, bits, group_size);
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t row = i / columns, column = i % columns, group = column / group_size;
    const size_t in_group = column - group * group_size;
    const size_t before =
        tiles_bytes(1, group * group_size, bits, group_size) + in_group / 128 * 128 * 2 * bits;
    const uint8_t* block = &call.result(out)[row / 16 * tile_bytes + before];
    expect(code_in(block, row % 16, in_group % 128, bits) == codes[i],
           "a code is in another place");
  }
}

}  // namespace

void products(Input& in) {
  switch (in.below(8)) {
    case 0:
      return pack_tiles(in);
    case 1:
      return dense(in);
    default:
      return linear(in);
  }
}

}  // namespace fuzz
