// The Python module compress.kernels._cpu.
//
// compress/kernels/__init__.py checks shapes and dtypes and speaks in array terms; here arrays are
// flat vectors of bytes with their sizes, checked once more, because a wrong one would corrupt
// memory. The GIL is released while a kernel runs. An empty array says nothing of the size of its
// other axis, which may be 2^48 in a file: no loop may run over it.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"
#include "product.h"
#include "threads.h"

namespace nb = nanobind;
using compress::Kernels;
using compress::Kind;

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = Vector<const uint8_t>;
using OutBytes = Vector<uint8_t>;

std::atomic<const Kernels*> active{nullptr};

std::vector<const Kernels*> tables() {
  const Kernels* found[compress::cpu::kMaxTables];
  const int count = compress::cpu::available(found);
  return {found, found + count};
}

const Kernels& kernels() {
  return *active.load(std::memory_order_relaxed);
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

size_t product(size_t a, size_t b) {
  size_t result;
  require(!__builtin_mul_overflow(a, b, &result), "size overflow");
  return result;
}

size_t item_size(Kind kind) {
  return kind == compress::kFloat32 ? 4 : 2;
}

Kind checked(int kind) {
  require(kind >= 0 && kind <= 2, "unknown kind");
  return static_cast<Kind>(kind);
}

size_t count_of(const Bytes& weights, Kind kind) {
  require(weights.size() % item_size(kind) == 0, "weights: a broken item");
  return weights.size() / item_size(kind);
}

size_t groups_of(size_t columns, size_t group_size) {
  require(group_size > 0, "group_size must be positive");
  return columns / group_size + (columns % group_size != 0);
}

void check_bits(int bits) {
  require(bits >= 2 && bits <= 8, "bits must be 2 to 8");
}

void check_packed(size_t n, int bits, size_t width) {
  check_bits(bits);
  require(width >= (product(n, static_cast<size_t>(bits)) + 7) / 8, "packed rows are too short");
}

using Release = nb::gil_scoped_release;

void magnitude_histogram(const Bytes& w, int kind, const Vector<uint64_t>& counts) {
  const size_t n = count_of(w, checked(kind));
  require(counts.size() == 1 << 15, "counts must have 32768 bins");
  const Release release;
  kernels().magnitude_histogram(w.data(), checked(kind), n, counts.data());
}

void magnitude_histogram_low(const Bytes& w, uint32_t prefix, const Vector<uint64_t>& counts) {
  const size_t n = count_of(w, compress::kFloat32);
  require(counts.size() == 1 << 16, "counts must have 65536 bins");
  const Release release;
  kernels().magnitude_histogram_low(w.data(), n, prefix, counts.data());
}

size_t threshold_mask(const Bytes& w, int kind, uint32_t key, size_t ties, const OutBytes& mask) {
  const size_t n = count_of(w, checked(kind));
  require(mask.size() == n && key < 1u << 31, "mask must have one byte a weight");
  const Release release;
  return kernels().threshold_mask(w.data(), checked(kind), n, key, ties, mask.data());
}

int64_t finite_index(const Bytes& w, int kind) {
  const size_t n = count_of(w, checked(kind));
  const Release release;
  return kernels().finite_index(w.data(), checked(kind), n);
}

int64_t quantize_groups(const Bytes& w, int kind, const std::optional<Bytes>& mask, size_t rows,
                        size_t columns, int bits, size_t group_size, int scale_kind, bool search,
                        bool signed_scale, const OutBytes& codes,
                        const std::optional<OutBytes>& packed, size_t width, const OutBytes& scale,
                        const std::optional<OutBytes>& zero_point, const Vector<double>& sums,
                        const std::optional<Bytes>& column_weights) {
  const Kind weights = checked(kind), scales = checked(scale_kind);
  const size_t n = product(rows, columns), groups = product(rows, groups_of(columns, group_size));
  check_bits(bits);
  require(count_of(w, weights) == n, "weights: wrong size");
  require(codes.size() == (packed ? columns : n), "codes: wrong size");
  if (packed) check_packed(columns, bits, width);
  require(!packed || packed->size() == product(rows, width), "packed: wrong size");
  require(!mask || mask->size() == n, "mask: wrong size");
  require(scale.size() == product(groups, item_size(scales)), "scale: wrong size");
  require(!zero_point || zero_point->size() == groups, "zero_point: wrong size");
  require(sums.size() == product(rows, 3), "sums: wrong size");
  require(columns <= SIZE_MAX - compress::kWeightPadding, "size overflow");
  require(
      !column_weights || column_weights->size() == product(columns + compress::kWeightPadding, 4),
      "column_weights: wrong size");
  // An empty array's pointer may be null, but null means "no mask" and "symmetric".
  static uint8_t nothing;
  const compress::QuantizeArgs args{
      w.data(),
      weights,
      mask ? (n ? mask->data() : &nothing) : nullptr,
      rows,
      columns,
      bits,
      group_size,
      scales,
      search,
      signed_scale,
      codes.data(),
      packed ? packed->data() : nullptr,
      width,
      scale.data(),
      zero_point ? (groups ? zero_point->data() : &nothing) : nullptr,
      sums.data(),
      column_weights ? column_weights->data() : nullptr,
  };
  const Release release;
  return kernels().quantize_groups(args);
}

void dequantize(const Bytes& codes, const Bytes& scale, const std::optional<Bytes>& zero_point,
                size_t rows, size_t columns, int bits, size_t group_size,
                const Vector<float>& out) {
  const size_t n = product(rows, columns), groups = product(rows, groups_of(columns, group_size));
  check_bits(bits);
  require(codes.size() == n && out.size() == n, "codes and out: wrong size");
  require(scale.size() == product(groups, 4), "scale: wrong size");
  require(!zero_point || zero_point->size() == groups, "zero_point: wrong size");
  if (!n) return;
  const uint8_t* zero = zero_point ? zero_point->data() : nullptr;
  const Release release;
  kernels().dequantize(codes.data(), scale.data(), zero, rows, columns, bits, group_size,
                       out.data());
}

void pack_bits(const Bytes& codes, size_t rows, size_t n, int bits, const OutBytes& out,
               size_t width) {
  check_packed(n, bits, width);
  require(codes.size() == product(rows, n), "codes: wrong size");
  require(out.size() == product(rows, width), "out: wrong size");
  if (!out.size()) return;
  const Release release;
  kernels().pack_bits(codes.data(), rows, n, bits, out.data(), width);
}

void unpack_bits(const Bytes& packed, size_t width, size_t rows, size_t n, int bits,
                 const OutBytes& out) {
  check_packed(n, bits, width);
  require(packed.size() == product(rows, width), "packed: wrong size");
  require(out.size() == product(rows, n), "out: wrong size");
  if (!out.size()) return;
  const Release release;
  kernels().unpack_bits(packed.data(), width, rows, n, bits, out.data());
}

size_t count_mask(const Bytes& mask) {
  const Release release;
  return kernels().count_mask(mask.data(), mask.size());
}

size_t count_bits(const Bytes& bits, size_t rows, size_t n) {
  require(bits.size() == product(rows, groups_of(n, 8)), "bits: wrong size");
  if (!bits.size()) return 0;
  const Release release;
  return kernels().count_bits(bits.data(), rows, n);
}

void check_item(size_t item) {
  require(item == 1 || item == 2 || item == 4 || item == 8, "item size must be 1, 2, 4 or 8");
}

size_t bitmask_compress(const Bytes& values, size_t item, const Bytes& mask, size_t rows, size_t n,
                        const OutBytes& bits, const OutBytes& kept) {
  check_item(item);
  const size_t count = product(rows, n);
  require(values.size() == product(count, item) && mask.size() == count, "values: wrong size");
  require(bits.size() == product(rows, groups_of(n, 8)), "bits: wrong size");
  const Release release;
  const size_t found = kernels().count_mask(mask.data(), count);
  require(kept.size() == product(found, item), "kept: wrong size");
  if (!count) return 0;
  return kernels().bitmask_compress(values.data(), item, mask.data(), rows, n, bits.data(),
                                    kept.data(), found);
}

void bitmask_expand(const Bytes& bits, const Bytes& kept, const Bytes& fill, size_t item,
                    size_t rows, size_t n, const OutBytes& out) {
  check_item(item);
  require(out.size() == product(product(rows, n), item), "out: wrong size");
  require(bits.size() == product(rows, groups_of(n, 8)), "bits: wrong size");
  require(fill.size() == item, "fill: wrong size");
  const Release release;
  const size_t found = bits.size() ? kernels().count_bits(bits.data(), rows, n) : 0;
  require(kept.size() == product(found, item), "kept: wrong size");
  if (!out.size()) return;
  kernels().bitmask_expand(bits.data(), kept.data(), found, fill.data(), item, rows, n, out.data());
}

void add_low_rank(const Vector<float>& matrix, const Bytes& b, const Bytes& a, size_t rows,
                  size_t columns, size_t rank) {
  require(matrix.size() == product(rows, columns), "matrix: wrong size");
  require(b.size() == product(product(rows, rank), 4), "b: wrong size");
  require(a.size() == product(product(rank, columns), 4), "a: wrong size");
  if (!matrix.size()) return;
  const Release release;
  kernels().add_low_rank(matrix.data(), b.data(), a.data(), rows, columns, rank);
}

void error_sums(const Bytes& w, int kind, const Bytes& decoded, const Vector<double>& sums) {
  const size_t n = count_of(w, checked(kind));
  require(decoded.size() == product(n, 4) && sums.size() == 2, "decoded or sums: wrong size");
  const Release release;
  kernels().error_sums(w.data(), checked(kind), decoded.data(), n, sums.data());
}

void squared_norms(const Bytes& w, int kind, size_t rows, size_t columns,
                   const Vector<double>& out) {
  const size_t n = count_of(w, checked(kind));
  require(n == product(rows, columns) && out.size() == rows, "out: wrong size");
  const Release release;
  kernels().squared_norms(w.data(), checked(kind), rows, columns, out.data());
}

void pack_tiles(const Bytes& codes, size_t rows, size_t columns, int bits, size_t group_size,
                const OutBytes& out) {
  require(bits == 2 || bits == 4 || bits == 8, "bits must be 2, 4 or 8");
  require(codes.size() == product(rows, columns), "codes: wrong size");
  const size_t groups = groups_of(columns, group_size);  // also: group_size is positive
  const auto padded = [](size_t n) {
    constexpr size_t block = compress::cpu::kMaxBlock, pad = compress::cpu::kPad;
    return n / block * block + groups_of(n % block, pad) * pad;
  };
  const size_t whole = groups ? columns / group_size : 0;
  const size_t wide = product(whole, padded(group_size)) + padded(columns - whole * group_size);
  const size_t tiles = groups_of(rows, compress::cpu::kTileRows);
  require(out.size() == product(tiles, product(wide, 2 * static_cast<size_t>(bits))),
          "out: wrong size");
  if (!out.size()) return;
  const Release release;
  kernels().pack_tiles(codes.data(), rows, columns, bits, group_size, out.data());
}

void multiply(const compress::cpu::Packed& matrix, const Bytes& x, int x_kind, size_t batch,
              const OutBytes& y, int y_kind, bool exact, int threads) {
  const Kind from = checked(x_kind), to = checked(y_kind);
  require(x.size() == product(product(batch, matrix.columns), item_size(from)), "x: wrong size");
  require(y.size() == product(product(batch, matrix.rows), item_size(to)), "y: wrong size");
  require(threads > 0, "threads must be positive");
  const compress::cpu::LinearArgs args{&matrix,  x.data(), from,  batch,
                                       y.data(), to,       exact, threads};
  bool done;
  {
    const Release release;
    done = kernels().linear(args);
  }
  if (!done) throw std::bad_alloc();
}

void linear(const Bytes& packed, const Bytes& x, int x_kind, size_t batch, const OutBytes& y,
            int y_kind, bool exact, int threads) {
  compress::cpu::Packed matrix;
  const char* wrong = compress::cpu::parse(packed.data(), packed.size(), &matrix);
  if (wrong) throw std::invalid_argument(std::string("packed: ") + wrong);
  multiply(matrix, x, x_kind, batch, y, y_kind, exact, threads);
}

// A weight where it lies, as a packed matrix of one dense segment.
void dense_linear(const Bytes& w, int w_kind, size_t rows, size_t columns, const Bytes& x,
                  int x_kind, size_t batch, const OutBytes& y, int y_kind, int threads) {
  const Kind kind = checked(w_kind);
  require(w.size() == product(product(rows, columns), item_size(kind)), "w: wrong size");
  compress::cpu::Packed matrix{};
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.segment_count = 1;
  compress::cpu::Segment& segment = matrix.segments[0];
  segment.kind = compress::cpu::kDense;
  segment.columns = columns;
  segment.value_kind = kind;
  segment.group_size = columns ? columns : 1;
  segment.data = w.data();
  multiply(matrix, x, x_kind, batch, y, y_kind, true, threads);
}

void obs_block(const Vector<float>& w, size_t rows, size_t columns, size_t first, size_t n,
               const Vector<const float>& upper, const std::optional<Bytes>& mask,
               const std::optional<Bytes>& exact, const Bytes& scale,
               const std::optional<Bytes>& zero_point, size_t groups,
               const Vector<const int64_t>& group, int bits, const OutBytes& codes) {
  check_bits(bits);
  require(n <= compress::kMaxSweep && first <= columns && n <= columns - first, "n: wrong size");
  const size_t count = product(rows, columns), scales = product(rows, groups);
  require(w.size() == count && codes.size() == count, "w and codes: wrong size");
  require(upper.size() == n * n && group.size() == n, "upper or group: wrong size");
  require(!mask || mask->size() == count, "mask: wrong size");
  require(!exact || exact->size() == product(product(rows, n), 4), "exact: wrong size");
  require(scale.size() == product(scales, 4), "scale: wrong size");
  require(!zero_point || zero_point->size() == scales, "zero_point: wrong size");
  for (size_t i = 0; i < n; ++i) {
    require(group.data()[i] >= 0 && (size_t)group.data()[i] < groups, "group: out of range");
  }
  if (rows == 0 || n == 0) return;
  const compress::ObsArgs args{
      w.data(),
      rows,
      columns,
      first,
      n,
      upper.data(),
      mask ? mask->data() : nullptr,
      exact ? exact->data() : nullptr,
      scale.data(),
      zero_point ? zero_point->data() : nullptr,
      groups,
      group.data(),
      bits,
      codes.data(),
  };
  const Release release;
  kernels().obs_block(args);
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "Compiled kernels; compress.kernels is their interface.";
  active = tables().back();

  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* table : tables()) names.emplace_back(table->name);
    return names;
  });
  module.def("set_isa", [](const std::string& name) {
    for (const Kernels* table : tables()) {
      if (name == table->name) {
        active = table;
        return;
      }
    }
    throw std::invalid_argument("unavailable instruction set: " + name);
  });

  module.def("magnitude_histogram", &magnitude_histogram);
  module.def("magnitude_histogram_low", &magnitude_histogram_low);
  module.def("threshold_mask", &threshold_mask);
  module.def("finite_index", &finite_index);
  module.def("quantize_groups", &quantize_groups, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().none(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none());
  module.def("dequantize", &dequantize, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg());
  module.def("pack_bits", &pack_bits);
  module.def("unpack_bits", &unpack_bits);
  module.def("count_mask", &count_mask);
  module.def("count_bits", &count_bits);
  module.def("bitmask_compress", &bitmask_compress);
  module.def("bitmask_expand", &bitmask_expand);
  module.def("add_low_rank", &add_low_rank);
  module.def("error_sums", &error_sums);
  module.def("squared_norms", &squared_norms);
  module.def("pack_tiles", &pack_tiles);
  module.def("linear", &linear, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg());
  module.def("dense_linear", &dense_linear);
  module.def("pool_name", &compress::cpu::pool_name);
  module.def("obs_block", &obs_block, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg().none(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg());
}
