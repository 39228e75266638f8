// Visiting every weight of a flat array once, in 16-byte loads where the address allows.

#pragma once

#include "numbers.cuh"

namespace compress {
namespace cuda {

constexpr unsigned kEachThreads = 256;

// Blocks of kEachThreads for n weights: enough to fill the device several times over.
inline unsigned each_grid(i64 n) {
  return grid_up_to(ceil_div(n, kEachThreads * 8), 8192);
}

// f(index, weight) for every weight, by a grid that strides.
template <int K, class Function>
__device__ __forceinline__ void each_weight(const Stored<K>* w, i64 n, bool vectors, Function f) {
  constexpr int items = 16 / static_cast<int>(sizeof(Stored<K>));
  const i64 thread = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  const i64 whole = vectors ? n / items : 0;
  for (i64 v = thread; v < whole; v += step) {
    const uint4 raw = load_vector<uint4>(w + v * items);
    if constexpr (K == kFloat32) {
      f(v * 4, __uint_as_float(raw.x));
      f(v * 4 + 1, __uint_as_float(raw.y));
      f(v * 4 + 2, __uint_as_float(raw.z));
      f(v * 4 + 3, __uint_as_float(raw.w));
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) f(v * 8 + j, half_of(raw, j));
    }
  }
  for (i64 i = whole * items + thread; i < n; i += step) f(i, w[i]);
}

}  // namespace cuda
}  // namespace compress
