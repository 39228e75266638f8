// The Python module compress.kernels._cuda.
//
// compress/kernels/cuda.py checks tensors and speaks in their terms; here come device pointers as
// integers, sizes, kinds and a stream. Sizes are checked once more for signs and overflow. The GIL
// is released while a call launches and waits.

#include <nanobind/nanobind.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"
#ifdef COMPRESS_CUDA_EMULATED
#include "emulator/cuda_emulator.h"
#define COMPRESS_MODULE _cuda_emulated
#else
#define COMPRESS_MODULE _cuda
#endif

namespace nb = nanobind;
using namespace compress::cuda;
using compress::Kind;

namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;
using Address = uintptr_t;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  require(a >= 0 && b >= 0, "a size is negative");
  require(!__builtin_mul_overflow(a, b, &result), "size overflow");
  return result;
}

// The bytes of a * b items must be addressable.
int64_t sized(int64_t a, int64_t b, int64_t item) {
  const int64_t count = product(a, b);
  (void)product(count, item);
  return count;
}

Kind checked(int kind) {
  require(kind >= 0 && kind <= 2, "unknown kind");
  return static_cast<Kind>(kind);
}

Kind half_kind(int kind) {
  require(kind == 1 || kind == 2, "activations must be float16 or bfloat16");
  return static_cast<Kind>(kind);
}

void check_bits(int bits) {
  require(bits >= 2 && bits <= 8, "bits must be 2 to 8");
}

int64_t groups_of(int64_t columns, int64_t group_size) {
  require(group_size > 0, "group_size must be positive");
  return columns / group_size + (columns % group_size != 0);
}

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A pointer that must not be null where `count` items are to be touched.
template <class T = void>
T* at(Address address, int64_t count, const char* name) {
  if (count && !address) throw std::invalid_argument(std::string(name) + " is a null pointer");
  return reinterpret_cast<T*>(address);
}

void py_histogram(Address w, int kind, int64_t n, Address counts, int device, Address stream) {
  (void)sized(n, 1, 4);
  magnitude_histogram(at(w, n, "w"), checked(kind), n, at<uint64_t>(counts, 1, "counts"),
                      {device, at(stream)});
}

void py_histogram_low(Address w, int64_t n, uint32_t prefix, Address counts, int device,
                      Address stream) {
  (void)sized(n, 1, 4);
  magnitude_histogram_low(at(w, n, "w"), n, prefix, at<uint64_t>(counts, 1, "counts"),
                          {device, at(stream)});
}

int64_t py_mask_scratch(int64_t n) {
  return mask_scratch(sized(n, 1, 4));
}

int64_t py_threshold_mask(Address w, int kind, int64_t n, uint32_t key, int64_t ties, Address mask,
                          Address scratch, int device, Address stream) {
  (void)sized(n, 1, 4);
  require(key < 1u << 31 && ties >= 0, "key or ties: out of range");
  return threshold_mask(at(w, n, "w"), checked(kind), n, key, ties, at<uint8_t>(mask, n, "mask"),
                        at<int64_t>(scratch, n, "scratch"), {device, at(stream)});
}

int64_t py_finite_index(Address w, int kind, int64_t n, Address scratch, int device,
                        Address stream) {
  (void)sized(n, 1, 4);
  return finite_index(at(w, n, "w"), checked(kind), n, at<int64_t>(scratch, n, "scratch"),
                      {device, at(stream)});
}

int64_t py_quantize_scratch(int64_t rows, int64_t groups) {
  (void)sized(product(rows, 4), groups, 8);
  return quantize_scratch(rows, groups);
}

int64_t py_quantize_groups(Address w, int kind, Address mask, int64_t rows, int64_t columns,
                           int bits, int64_t group_size, int scale_kind, bool search,
                           bool signed_scale, Address codes, Address scale, Address zero_point,
                           Address sums, Address scratch, int device, Address stream) {
  const int64_t n = sized(rows, columns, 4);
  (void)sized(product(rows, 4), groups_of(columns, group_size), 8);
  check_bits(bits);
  const compress::QuantizeArgs args{at<const uint8_t>(w, n, "w"),
                                    checked(kind),
                                    at<const uint8_t>(mask),
                                    static_cast<size_t>(rows),
                                    static_cast<size_t>(columns),
                                    bits,
                                    static_cast<size_t>(group_size),
                                    checked(scale_kind),
                                    search,
                                    signed_scale,
                                    at<uint8_t>(codes, n, "codes"),
                                    nullptr,  // codes are not packed on the way
                                    0,
                                    at<uint8_t>(scale, n, "scale"),
                                    at<uint8_t>(zero_point),
                                    at<double>(sums, rows, "sums"),
                                    nullptr};  // all columns alike
  return quantize_groups(args, at(scratch, rows, "scratch"), {device, at(stream)});
}

void py_dequantize(Address codes, Address scale, Address zero_point, int64_t rows, int64_t columns,
                   int bits, int64_t group_size, Address out, int device, Address stream) {
  const int64_t n = sized(rows, columns, 4);
  (void)groups_of(columns, group_size);
  check_bits(bits);
  dequantize(at<const uint8_t>(codes, n, "codes"), at<const float>(scale, n, "scale"),
             at<const uint8_t>(zero_point), rows, columns, bits, group_size,
             at<float>(out, n, "out"), {device, at(stream)});
}

void check_packed(int64_t rows, int64_t n, int bits, int64_t width) {
  check_bits(bits);
  (void)sized(rows, n, 1);
  (void)sized(rows, width, 1);
  require(product(n, bits) <= std::numeric_limits<int64_t>::max() - 7, "size overflow");
  require(width >= (n * bits + 7) / 8, "packed rows are too short");
}

void py_pack_bits(Address codes, int64_t rows, int64_t n, int bits, Address out, int64_t width,
                  int device, Address stream) {
  check_packed(rows, n, bits, width);
  pack_bits(at<const uint8_t>(codes, rows * n, "codes"), rows, n, bits,
            at<uint8_t>(out, rows * width, "out"), width, {device, at(stream)});
}

void py_unpack_bits(Address packed, int64_t width, int64_t rows, int64_t n, int bits, Address out,
                    int device, Address stream) {
  check_packed(rows, n, bits, width);
  unpack_bits(at<const uint8_t>(packed, rows * width, "packed"), width, rows, n, bits,
              at<uint8_t>(out, rows * n, "out"), {device, at(stream)});
}

void py_row_offsets(Address bits, int64_t rows, int64_t n, Address offsets, int device,
                    Address stream) {
  const int64_t count = sized(rows, n, 8);
  row_offsets(at<const uint8_t>(bits, count, "bits"), rows, n, at<int64_t>(offsets, 1, "offsets"),
              {device, at(stream)});
}

int64_t py_mask_offsets(Address mask, int64_t rows, int64_t n, Address offsets, int device,
                        Address stream) {
  const int64_t count = sized(rows, n, 8);
  return mask_offsets(at<const uint8_t>(mask, count, "mask"), rows, n,
                      at<int64_t>(offsets, 1, "offsets"), {device, at(stream)});
}

void check_item(int item) {
  require(item == 1 || item == 2 || item == 4 || item == 8, "item size must be 1, 2, 4 or 8");
}

void py_bitmask_compress(Address values, int item, Address mask, Address offsets, int64_t rows,
                         int64_t n, Address bits, Address kept, int device, Address stream) {
  check_item(item);
  const int64_t count = sized(rows, n, item);
  bitmask_compress(at<const void>(values, count, "values"), item,
                   at<const uint8_t>(mask, count, "mask"),
                   at<const int64_t>(offsets, count, "offsets"), rows, n,
                   at<uint8_t>(bits, count, "bits"), at(kept), {device, at(stream)});
}

void py_bitmask_expand(Address bits, Address kept, Address offsets, Address fill, int item,
                       int64_t rows, int64_t n, Address out, int device, Address stream) {
  check_item(item);
  const int64_t count = sized(rows, n, item);
  bitmask_expand(at<const uint8_t>(bits, count, "bits"), at<const void>(kept),
                 at<const int64_t>(offsets, count, "offsets"), at<const void>(fill), item, rows, n,
                 at(out, count, "out"), {device, at(stream)});
}

void py_project(Address x, int kind, int64_t batch, int64_t columns, Address a, int a_kind,
                int64_t rank, Address projected, int device, Address stream) {
  const int64_t inputs = sized(batch, columns, 2), weights = sized(rank, columns, 4);
  const int64_t outputs = sized(batch, rank, 4);
  project(at<const void>(x, inputs, "x"), half_kind(kind), batch, columns,
          at<const void>(a, weights, "a"), checked(a_kind), rank,
          at<float>(projected, outputs, "projected"), {device, at(stream)});
}

Product product_of(Address x, int kind, int64_t batch, int64_t rows, int64_t columns, Address y,
                   int y_kind, Address bias, int bias_kind, Address projected, Address b,
                   int b_kind, int64_t rank) {
  const int64_t inputs = sized(batch, columns, 2), outputs = sized(batch, rows, 4);
  (void)sized(rows, columns, 4);
  const int64_t factors = projected ? sized(rows, rank, 4) : 0;
  return {at<const void>(x, inputs, "x"),
          half_kind(kind),
          batch,
          rows,
          columns,
          at(y, outputs, "y"),
          checked(y_kind),
          at<const void>(bias),
          checked(bias_kind),
          at<const float>(projected),
          at<const void>(b, factors, "b"),
          checked(b_kind),
          rank};
}

void py_product_codes(Address x, int kind, int64_t batch, int64_t rows, int64_t columns, Address y,
                      int y_kind, Address bias, int bias_kind, Address projected, Address b,
                      int b_kind, int64_t rank, Address packed, Address scale, int scale_kind,
                      Address zero_point, int bits, int64_t group_size, int device,
                      Address stream) {
  const Product p = product_of(x, kind, batch, rows, columns, y, y_kind, bias, bias_kind, projected,
                               b, b_kind, rank);
  const int64_t n = rows * columns;
  check_bits(bits);
  (void)sized(product(rows, groups_of(columns, group_size)), 1, 4);
  (void)product(columns, bits);
  product_codes(p,
                {at<const uint32_t>(packed, n, "packed"), at<const void>(scale, n, "scale"),
                 checked(scale_kind), at<const uint8_t>(zero_point), bits, group_size},
                {device, at(stream)});
}

void py_product_bitmask(Address x, int kind, int64_t batch, int64_t rows, int64_t columns,
                        Address y, int y_kind, Address bias, int bias_kind, Address projected,
                        Address b, int b_kind, int64_t rank, Address bits, Address kept,
                        int64_t kept_count, Address offsets, int device, Address stream) {
  const Product p = product_of(x, kind, batch, rows, columns, y, y_kind, bias, bias_kind, projected,
                               b, b_kind, rank);
  const int64_t n = rows * columns;
  product_bitmask(p,
                  {at<const uint8_t>(bits, n, "bits"), at<const void>(kept, kept_count, "kept"),
                   sized(kept_count, 1, 2), at<const int64_t>(offsets, n, "offsets")},
                  {device, at(stream)});
}

}  // namespace

NB_MODULE(COMPRESS_MODULE, module) {
  module.doc() = "CUDA kernels; compress.kernels.cuda is their interface.";
#ifdef COMPRESS_CUDA_EMULATED
  module.attr("device_type") = "cpu";
  module.def("set_reverse", [](bool reverse) { emulator::machine().reverse = reverse; });
  module.def("set_shared_memory", [](int bytes) { emulator::machine().shared_memory = bytes; });
#else
  module.attr("device_type") = "cuda";
#endif
  module.def("magnitude_histogram", &py_histogram, Release());
  module.def("magnitude_histogram_low", &py_histogram_low, Release());
  module.def("mask_scratch", &py_mask_scratch);
  module.def("threshold_mask", &py_threshold_mask, Release());
  module.def("finite_index", &py_finite_index, Release());
  module.def("quantize_scratch", &py_quantize_scratch);
  module.def("quantize_groups", &py_quantize_groups, Release());
  module.def("dequantize", &py_dequantize, Release());
  module.def("pack_bits", &py_pack_bits, Release());
  module.def("unpack_bits", &py_unpack_bits, Release());
  module.def("row_offsets", &py_row_offsets, Release());
  module.def("mask_offsets", &py_mask_offsets, Release());
  module.def("bitmask_compress", &py_bitmask_compress, Release());
  module.def("bitmask_expand", &py_bitmask_expand, Release());
  module.def("project", &py_project, Release());
  module.def("product_codes", &py_product_codes, Release());
  module.def("product_bitmask", &py_product_bitmask, Release());
}
