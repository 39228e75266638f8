// Codes to a little-endian bit stream a row, and back.

#include "platform.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Eight codes fill exactly `bits` bytes. A thread makes such a piece, or zeroes what lies behind
// the last one; `words`: 2, 4 or 8 bits and addresses that allow 8-byte loads and whole stores.
__global__ void pack_rows(const uint8_t* codes, i64 n, int bits, uint8_t* out, i64 width,
                          bool words) {
  const uint8_t* from = codes + static_cast<i64>(blockIdx.x) * n;
  uint8_t* to = out + static_cast<i64>(blockIdx.x) * width;
  const uint64_t mask = (1u << bits) - 1;
  const i64 pieces = (width + bits - 1) / bits, step = static_cast<i64>(gridDim.y) * blockDim.x;
  for (i64 p = static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x; p < pieces; p += step) {
    const i64 first = 8 * p;
    uint64_t stream = 0;
    if (words && first + 8 <= n) {
      const uint2 raw = load_vector<uint2>(from + first);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        stream |= (raw.x >> 8 * j & mask) << bits * j;
        stream |= (raw.y >> 8 * j & mask) << bits * (j + 4);
      }
      if (bits == 2) {
        store_vector(to + 2 * p, static_cast<uint16_t>(stream));
      } else if (bits == 4) {
        store_vector(to + 4 * p, static_cast<uint32_t>(stream));
      } else {
        store_vector(to + 8 * p, stream);
      }
      continue;
    }
    for (int j = 0; j < 8 && first + j < n; ++j) stream |= (from[first + j] & mask) << bits * j;
    for (int j = 0; j < bits && p * bits + j < width; ++j) {
      to[p * bits + j] = static_cast<uint8_t>(stream >> 8 * j);
    }
  }
}

__global__ void unpack_rows(const uint8_t* packed, i64 width, i64 n, int bits, uint8_t* out,
                            bool words) {
  const uint8_t* from = packed + static_cast<i64>(blockIdx.x) * width;
  uint8_t* to = out + static_cast<i64>(blockIdx.x) * n;
  const uint64_t mask = (1u << bits) - 1;
  const i64 pieces = (n + 7) / 8, step = static_cast<i64>(gridDim.y) * blockDim.x;
  for (i64 p = static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x; p < pieces; p += step) {
    uint64_t stream = 0;
    for (int j = 0; j < bits && p * bits + j < width; ++j) {
      stream |= static_cast<uint64_t>(from[p * bits + j]) << 8 * j;
    }
    const i64 first = 8 * p;
    if (words && first + 8 <= n) {
      uint64_t bytes = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) bytes |= (stream >> bits * j & mask) << 8 * j;
      store_vector(to + first, bytes);
      continue;
    }
    for (int j = 0; j < 8 && first + j < n; ++j) {
      to[first + j] = static_cast<uint8_t>(stream >> bits * j & mask);
    }
  }
}

dim3 grid_of(i64 rows, i64 pieces, const char* name) {
  return dim3(grid_x(rows, name), grid_up_to(ceil_div(pieces, kThreads), kMaxGridY));
}

}  // namespace

void pack_bits(const uint8_t* codes, i64 rows, i64 n, int bits, uint8_t* out, i64 width,
               Place place) {
  if (rows == 0 || width == 0) return;
  const DeviceGuard guard(place.device);
  const bool whole = bits == 2 || bits == 4 || bits == 8;
  const bool words =
      whole && n % 8 == 0 && aligned(codes, 8) && width % bits == 0 && aligned(out, bits);
  launch("pack_bits", place, &pack_rows, grid_of(rows, ceil_div(width, bits), "pack_bits"),
         kThreads, 0, codes, n, bits, out, width, words);
}

void unpack_bits(const uint8_t* packed, i64 width, i64 rows, i64 n, int bits, uint8_t* out,
                 Place place) {
  if (rows == 0 || n == 0) return;
  const DeviceGuard guard(place.device);
  const bool words = n % 8 == 0 && aligned(out, 8);
  launch("unpack_bits", place, &unpack_rows, grid_of(rows, ceil_div(n, 8), "unpack_bits"), kThreads,
         0, packed, width, n, bits, out, words);
}

}  // namespace cuda
}  // namespace compress
