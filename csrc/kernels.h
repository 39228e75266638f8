// The kernels: raw pointers and sizes, no framework types.
//
// Each operation is defined by the numpy function of the same name in
// compress/kernels/reference.py and gives the same bytes under every instruction set. Weights are
// passed as bytes with a Kind and may lie at any address. Callers check sizes and own all memory.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace compress {

enum Kind : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct QuantizeArgs {
  const uint8_t* weights;  // [rows, columns] of `kind`
  Kind kind;
  const uint8_t* mask;  // [rows, columns], nonzero = kept; or null
  size_t rows, columns;
  int bits;
  size_t group_size;
  Kind scale_kind;
  bool search;        // by squared error
  bool signed_scale;  // symmetric search only
  uint8_t* codes;     // [rows, columns]; one row to work in where `packed` is wanted
  uint8_t* packed;    // [rows, width], as pack_bits packs; or null
  size_t width;
  uint8_t* scale;       // [rows, groups] of `scale_kind`
  uint8_t* zero_point;  // [rows, groups]; null = symmetric
  double* sums;         // [rows, 3]
  // float [columns + kWeightPadding], the last of them zeros, or null = all alike: weights of the
  // search's squared errors. CUDA has no weighted search.
  const uint8_t* column_weights;
};

constexpr size_t kWeightPadding = 16;

constexpr size_t kMaxSweep = 256;

struct ObsArgs {
  float* w;  // [rows, columns]; columns first to first + n are swept and become their errors
  size_t rows, columns, first, n;  // n <= kMaxSweep
  const float* upper;              // [n, n]
  const uint8_t* mask;             // [rows, columns], nonzero = kept; or null
  const uint8_t* exact;            // float [rows, n], NaN = free; or null
  const uint8_t* scale;            // float [rows, groups]
  const uint8_t* zero_point;       // [rows, groups]; null = 2^(bits-1)
  size_t groups;
  const int64_t* group;  // [n]
  int bits;
  uint8_t* codes;  // [rows, columns]
};

namespace cpu {
struct LinearArgs;
}

// One entry per operation; a table per instruction set.
struct Kernels {
  const char* name;

  void (*magnitude_histogram)(const uint8_t* weights, Kind kind, size_t n, uint64_t* counts);
  void (*magnitude_histogram_low)(const uint8_t* weights, size_t n, uint32_t prefix,
                                  uint64_t* counts);
  size_t (*threshold_mask)(const uint8_t* weights, Kind kind, size_t n, uint32_t key, size_t ties,
                           uint8_t* mask);
  int64_t (*finite_index)(const uint8_t* weights, Kind kind, size_t n);
  int64_t (*quantize_groups)(const QuantizeArgs& args);
  void (*dequantize)(const uint8_t* codes, const uint8_t* scale, const uint8_t* zero_point,
                     size_t rows, size_t columns, int bits, size_t group_size, float* out);
  void (*pack_bits)(const uint8_t* codes, size_t rows, size_t n, int bits, uint8_t* out,
                    size_t width);
  void (*unpack_bits)(const uint8_t* packed, size_t width, size_t rows, size_t n, int bits,
                      uint8_t* out);
  size_t (*count_mask)(const uint8_t* mask, size_t n);  // bytes that are not zero
  size_t (*count_bits)(const uint8_t* bits, size_t rows, size_t n);
  // `kept` has room for exactly the kept values.
  size_t (*bitmask_compress)(const uint8_t* values, size_t item, const uint8_t* mask, size_t rows,
                             size_t n, uint8_t* bits, uint8_t* kept, size_t kept_count);
  void (*bitmask_expand)(const uint8_t* bits, const uint8_t* kept, size_t kept_count,
                         const uint8_t* fill, size_t item, size_t rows, size_t n, uint8_t* out);
  void (*add_low_rank)(float* matrix, const uint8_t* b, const uint8_t* a, size_t rows,
                       size_t columns, size_t rank);
  void (*error_sums)(const uint8_t* weights, Kind kind, const uint8_t* decoded, size_t n,
                     double* sums);
  void (*squared_norms)(const uint8_t* weights, Kind kind, size_t rows, size_t columns,
                        double* out);
  // Products with packed matrices: cpu/product.h.
  void (*pack_tiles)(const uint8_t* codes, size_t rows, size_t columns, int bits, size_t group_size,
                     uint8_t* out);
  bool (*linear)(const cpu::LinearArgs& args);
  void (*obs_block)(const ObsArgs& args);
};

namespace cpu {

// The tables that this machine can run, the best one last. Returns how many.
constexpr int kMaxTables = 4;
int available(const Kernels* tables[kMaxTables]);

}  // namespace cpu
}  // namespace compress
