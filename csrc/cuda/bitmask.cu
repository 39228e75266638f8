// Kept values and one bit a value: where rows begin, gathering, scattering. A warp has a row.

#include "scan.h"
#include "warp.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

__device__ __forceinline__ i64 row_of_warp() {
  return static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

// Bits of byte i of a row of n columns that stand for columns.
__device__ __forceinline__ unsigned valid_bits(i64 i, i64 n) {
  const i64 left = n - 8 * i;
  return left >= 8 ? 0xFFu : (1u << left) - 1;
}

__global__ void __launch_bounds__(kThreads)
    count_rows(const uint8_t* bits, i64 rows, i64 n, i64* counts) {
  const i64 row = row_of_warp(), width = (n + 7) / 8;
  if (row >= rows) return;
  long long count = 0;
  for (i64 i = lane_index(); i < width; i += kWarpSize) {
    count += __popc(bits[row * width + i] & valid_bits(i, n));
  }
  count = lanes_sum<kWarpSize>(count);
  if (lane_index() == 0) counts[row] = count;
}

__global__ void __launch_bounds__(kThreads)
    count_mask_rows(const uint8_t* mask, i64 rows, i64 n, i64* counts) {
  const i64 row = row_of_warp();
  if (row >= rows) return;
  long long count = 0;
  for (i64 i = lane_index(); i < n; i += kWarpSize) count += mask[row * n + i] != 0;
  count = lanes_sum<kWarpSize>(count);
  if (lane_index() == 0) counts[row] = count;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    compress_rows(const T* values, const uint8_t* mask, const i64* offsets, i64 rows, i64 n,
                  uint8_t* bits, T* kept) {
  const i64 row = row_of_warp(), width = (n + 7) / 8;
  if (row >= rows) return;
  const int lane = lane_index();
  const unsigned below = (1u << lane) - 1;
  i64 next = offsets[row];
  for (i64 start = 0; start < n; start += kWarpSize) {
    const i64 column = start + lane;
    const bool keep = column < n && mask[row * n + column];
    const unsigned word = __ballot_sync(kFull, keep);
    if (keep) kept[next + __popc(word & below)] = values[row * n + column];
    const i64 byte = start / 8 + lane;
    if (lane < 4 && byte < width) bits[row * width + byte] = static_cast<uint8_t>(word >> 8 * lane);
    next += __popc(word);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    expand_rows(const uint8_t* bits, const T* kept, const i64* offsets, const T* fill, i64 rows,
                i64 n, T* out) {
  const i64 row = row_of_warp(), width = (n + 7) / 8;
  if (row >= rows) return;
  const int lane = lane_index();
  const unsigned below = (1u << lane) - 1;
  const T empty = fill ? *fill : T(0);
  i64 next = offsets[row];
  for (i64 start = 0; start < n; start += kWarpSize) {
    const i64 column = start + lane;
    const bool set = column < n && bits[row * width + column / 8] >> column % 8 & 1;
    const unsigned word = __ballot_sync(kFull, set);
    if (column < n) out[row * n + column] = set ? kept[next + __popc(word & below)] : empty;
    next += __popc(word);
  }
}

// Calls f with a null pointer to an unsigned integer of `item` bytes.
template <class Function>
void by_item(int item, const Function& f) {
  if (item == 1) {
    f(static_cast<uint8_t*>(nullptr));
  } else if (item == 2) {
    f(static_cast<uint16_t*>(nullptr));
  } else if (item == 4) {
    f(static_cast<uint32_t*>(nullptr));
  } else {
    f(static_cast<uint64_t*>(nullptr));
  }
}

unsigned grid_of(i64 rows, const char* name) {
  return grid_x(ceil_div(rows, kWarps), name);
}

}  // namespace

void row_offsets(const uint8_t* bits, i64 rows, i64 n, i64* offsets, Place place) {
  const DeviceGuard guard(place.device);
  if (rows) {
    launch("row_offsets", place, &count_rows, grid_of(rows, "row_offsets"), kThreads, 0, bits, rows,
           n, offsets);
  }
  exclusive_scan(offsets, rows, place);
}

i64 mask_offsets(const uint8_t* mask, i64 rows, i64 n, i64* offsets, Place place) {
  const DeviceGuard guard(place.device);
  if (rows) {
    launch("mask_offsets", place, &count_mask_rows, grid_of(rows, "mask_offsets"), kThreads, 0,
           mask, rows, n, offsets);
  }
  exclusive_scan(offsets, rows, place);
  i64 kept = 0;
  copy_to_host(&kept, offsets + rows, sizeof kept, place);
  return kept;
}

void bitmask_compress(const void* values, int item, const uint8_t* mask, const i64* offsets,
                      i64 rows, i64 n, uint8_t* bits, void* kept, Place place) {
  if (rows == 0 || n == 0) return;
  const DeviceGuard guard(place.device);
  by_item(item, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    launch("bitmask_compress", place, &compress_rows<T>, grid_of(rows, "bitmask_compress"),
           kThreads, 0, static_cast<const T*>(values), mask, offsets, rows, n, bits,
           static_cast<T*>(kept));
  });
}

void bitmask_expand(const uint8_t* bits, const void* kept, const i64* offsets, const void* fill,
                    int item, i64 rows, i64 n, void* out, Place place) {
  if (rows == 0 || n == 0) return;
  const DeviceGuard guard(place.device);
  by_item(item, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    launch("bitmask_expand", place, &expand_rows<T>, grid_of(rows, "bitmask_expand"), kThreads, 0,
           bits, static_cast<const T*>(kept), offsets, static_cast<const T*>(fill), rows, n,
           static_cast<T*>(out));
  });
}

}  // namespace cuda
}  // namespace compress
