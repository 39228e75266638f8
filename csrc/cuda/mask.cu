// The mask of a magnitude threshold, ties kept in flat order; the first weight that is not finite.
//
// Ties: count those of each tile of weights, add up the counts of the tiles before, then rank each
// tie inside its tile.

#include "each_weight.cuh"
#include "scan.h"
#include "warp.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kThreads = 256, kItems = 16;  // a thread has sixteen neighbouring weights
constexpr i64 kTile = kThreads * kItems;

// The keys of up to sixteen weights from `first` on; behind the end, keys that equal none.
template <int K>
__device__ __forceinline__ void load_keys(const Stored<K>* w, i64 first, i64 n, bool vectors,
                                          uint32_t (&keys)[kItems]) {
  if (vectors && first + kItems <= n) {
    constexpr int per = 16 / static_cast<int>(sizeof(Stored<K>));
#pragma unroll
    for (int v = 0; v < kItems / per; ++v) {
      const uint4 raw = load_vector<uint4>(w + first + v * per);
      if constexpr (K == kFloat32) {
        keys[4 * v] = raw.x & 0x7FFFFFFFu;
        keys[4 * v + 1] = raw.y & 0x7FFFFFFFu;
        keys[4 * v + 2] = raw.z & 0x7FFFFFFFu;
        keys[4 * v + 3] = raw.w & 0x7FFFFFFFu;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) keys[8 * v + j] = key_of(half_of(raw, j));
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) keys[j] = first + j < n ? key_of(w[first + j]) : 0xFFFFFFFFu;
}

__device__ __forceinline__ int count_equal(const uint32_t (&keys)[kItems], uint32_t key) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < kItems; ++j) count += keys[j] == key;
  return count;
}

template <int K>
__global__ void __launch_bounds__(kThreads)
    count_ties(const Stored<K>* w, i64 n, bool vectors, uint32_t key, i64* counts) {
  __shared__ int shared[kThreads / kWarpSize];
  uint32_t keys[kItems];
  load_keys<K>(w, blockIdx.x * kTile + threadIdx.x * kItems, n, vectors, keys);
  int total;
  block_exclusive_scan(count_equal(keys, key), shared, total);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// `before`: ties in the tiles before each; null where no tie is kept.
template <int K>
__global__ void __launch_bounds__(kThreads)
    apply_threshold(const Stored<K>* w, i64 n, bool vectors, uint32_t key, i64 ties,
                    const i64* before, uint8_t* mask, bool mask_vectors) {
  __shared__ int shared[kThreads / kWarpSize];
  uint32_t keys[kItems];
  const i64 first = blockIdx.x * kTile + threadIdx.x * kItems;
  load_keys<K>(w, first, n, vectors, keys);
  i64 rank = 0;
  if (before) {
    int total;
    rank = before[blockIdx.x] + block_exclusive_scan(count_equal(keys, key), shared, total);
  }
  uint32_t words[kItems / 4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const bool tie = before && keys[j] == key && rank++ < ties;
    words[j / 4] |= static_cast<uint32_t>(keys[j] > key || tie) << j % 4 * 8;
  }
  if (mask_vectors && first + kItems <= n) {
    store_vector(mask + first, uint4{words[0], words[1], words[2], words[3]});
    return;
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    if (first + j < n) mask[first + j] = static_cast<uint8_t>(words[j / 4] >> j % 4 * 8 & 1);
  }
}

template <int K>
__global__ void find_infinite(const Stored<K>* w, i64 n, bool vectors, long long* first) {
  each_weight<K>(w, n, vectors, [&](i64 i, Stored<K> x) {
    if (key_of(x) >= infinite_key<K>()) atomicMin(first, static_cast<long long>(i));
  });
}

}  // namespace

i64 mask_scratch(i64 n) {
  return ceil_div(n, kTile) + 1;
}

i64 threshold_mask(const void* weights, Kind kind, i64 n, uint32_t key, i64 ties, uint8_t* mask,
                   i64* scratch, Place place) {
  if (n == 0) return 0;
  const DeviceGuard guard(place.device);
  if (kind != kFloat32 && key > 0x7FFFu) {
    check(cudaMemsetAsync(mask, 0, static_cast<size_t>(n), stream_of(place)), "threshold_mask");
    return 0;
  }
  const i64 tiles = ceil_div(n, kTile);
  const unsigned grid = grid_x(tiles, "threshold_mask");
  const bool vectors = aligned(weights, 16), mask_vectors = aligned(mask, 16);
  by_kind(kind, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto* w = static_cast<const Stored<K>*>(weights);
    if (ties > 0) {
      launch("threshold_mask (count ties)", place, &count_ties<K>, grid, kThreads, 0, w, n, vectors,
             key, scratch);
      exclusive_scan(scratch, tiles, place);
    }
    launch("threshold_mask", place, &apply_threshold<K>, grid, kThreads, 0, w, n, vectors, key,
           ties, ties > 0 ? scratch : nullptr, mask, mask_vectors);
  });
  if (ties <= 0) return 0;
  i64 found = 0;
  copy_to_host(&found, scratch + tiles, sizeof found, place);
  return found < ties ? found : ties;
}

i64 finite_index(const void* weights, Kind kind, i64 n, i64* scratch, Place place) {
  if (n == 0) return -1;
  const DeviceGuard guard(place.device);
  check(cudaMemsetAsync(scratch, 0x7F, sizeof(i64), stream_of(place)), "finite_index");
  const bool vectors = aligned(weights, 16);
  by_kind(kind, [&](auto k) {
    constexpr int K = decltype(k)::value;
    launch("finite_index", place, &find_infinite<K>, each_grid(n), kEachThreads, 0,
           static_cast<const Stored<K>*>(weights), n, vectors,
           reinterpret_cast<long long*>(scratch));
  });
  i64 first = 0;
  copy_to_host(&first, scratch, sizeof first, place);
  return first < n ? first : -1;
}

}  // namespace cuda
}  // namespace compress
