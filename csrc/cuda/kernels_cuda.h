// The CUDA kernels: raw device pointers, sizes and a stream, no framework types.
//
// The operations of ../kernels.h under the same names, with the same bytes as
// compress/kernels/reference.py, and products of activations with weights as they are stored.
// Callers check sizes and own all memory, scratch included. Pointers are device pointers, aligned
// to their item. Every function makes `place.device` current while it works, launches on
// `place.stream` and throws std::runtime_error that names the kernel where a launch fails. Only
// functions that return a value wait, and only for that stream.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"

namespace compress {
namespace cuda {

struct Place {
  int device;
  void* stream;  // a cudaStream_t
};

// counts [32768] and [65536] are added to.
void magnitude_histogram(const void* weights, Kind kind, int64_t n, uint64_t* counts, Place place);
void magnitude_histogram_low(const void* weights, int64_t n, uint32_t prefix, uint64_t* counts,
                             Place place);

// scratch: int64 [mask_scratch(n)]. Returns the ties kept.
int64_t mask_scratch(int64_t n);
int64_t threshold_mask(const void* weights, Kind kind, int64_t n, uint32_t key, int64_t ties,
                       uint8_t* mask, int64_t* scratch, Place place);
// scratch: int64 [1].
int64_t finite_index(const void* weights, Kind kind, int64_t n, int64_t* scratch, Place place);

// As compress::QuantizeArgs, of device pointers. scratch: 8-byte items [quantize_scratch(...)].
int64_t quantize_scratch(int64_t rows, int64_t groups);
int64_t quantize_groups(const QuantizeArgs& args, void* scratch, Place place);
void dequantize(const uint8_t* codes, const float* scale, const uint8_t* zero_point, int64_t rows,
                int64_t columns, int bits, int64_t group_size, float* out, Place place);

void pack_bits(const uint8_t* codes, int64_t rows, int64_t n, int bits, uint8_t* out, int64_t width,
               Place place);
void unpack_bits(const uint8_t* packed, int64_t width, int64_t rows, int64_t n, int bits,
                 uint8_t* out, Place place);

// offsets int64 [rows + 1]: where the kept values of each row begin; the last is their number.
void row_offsets(const uint8_t* bits, int64_t rows, int64_t n, int64_t* offsets, Place place);
// The same from a mask of bytes. Returns the number of kept values.
int64_t mask_offsets(const uint8_t* mask, int64_t rows, int64_t n, int64_t* offsets, Place place);
void bitmask_compress(const void* values, int item, const uint8_t* mask, const int64_t* offsets,
                      int64_t rows, int64_t n, uint8_t* bits, void* kept, Place place);
// `fill` is a device pointer to one item, or null for zero.
void bitmask_expand(const uint8_t* bits, const void* kept, const int64_t* offsets, const void* fill,
                    int item, int64_t rows, int64_t n, void* out, Place place);

// y [batch, rows] = x [batch, columns] . W^T + projected [batch, rank] . b^T + bias
struct Product {
  const void* x;
  Kind kind;  // of x: kFloat16 or kBFloat16
  int64_t batch, rows, columns;
  void* y;
  Kind y_kind;
  const void* bias;  // [rows] of `bias_kind`, or null
  Kind bias_kind;
  const float* projected;  // from `project`, or null
  const void* b;           // [rows, rank] of `b_kind`
  Kind b_kind;
  int64_t rank;
};

// W = (code - zero point) * scale; the codes are a bit stream a row, rows padded to 32 bits.
struct StoredCodes {
  const uint32_t* packed;  // [rows, ceil(columns * bits / 32)]
  const void* scale;       // [rows, groups] of `scale_kind`
  Kind scale_kind;
  const uint8_t* zero_point;  // [rows, groups]; null = 2^(bits-1)
  int bits;
  int64_t group_size;
};

// W = the next kept value where the bit is set, else 0; kept values are of the product's kind.
struct StoredBitmask {
  const uint8_t* bits;  // [rows, ceil(columns / 8)]
  const void* kept;     // [kept_count], row after row
  int64_t kept_count;
  const int64_t* offsets;  // [rows + 1], from `row_offsets`
};

void product_codes(const Product& product, const StoredCodes& codes, Place place);
void product_bitmask(const Product& product, const StoredBitmask& weights, Place place);
// projected float32 [batch, rank] = x . a^T; a [rank, columns] of `a_kind`
void project(const void* x, Kind kind, int64_t batch, int64_t columns, const void* a, Kind a_kind,
             int64_t rank, float* projected, Place place);

}  // namespace cuda
}  // namespace compress
