// Sums and scans over the lanes of a warp and the warps of a block, and the tensor cores' product.

#pragma once

#include "numbers.cuh"

namespace compress {
namespace cuda {

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x % kWarpSize);
}

// The sum of `Width` neighbouring lanes, in all of them: lanes i and i + Width/2 first, and so on.
// For 16 lanes this is the tree of `lane_sum` in compress/kernels/reference_sums.py.
template <int Width, class T>
__device__ __forceinline__ T lanes_sum(T value) {
#pragma unroll
  for (int distance = Width / 2; distance; distance /= 2) {
    value += __shfl_xor_sync(kFull, value, distance);
  }
  return value;
}

// The sum of this lane and of those before it.
template <class T>
__device__ __forceinline__ T inclusive_scan(T value) {
#pragma unroll
  for (unsigned distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kFull, value, distance);
    if (lane_index() >= static_cast<int>(distance)) value += below;
  }
  return value;
}

// The sum of the threads before this one; `total` gets that of all. `shared` holds an item a warp.
// Every thread of the block must come, and `shared` is free again when it returns.
template <class T>
__device__ T block_exclusive_scan(T value, T* shared, T& total) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const T inclusive = inclusive_scan(value);
  if (lane_index() == kWarpSize - 1) shared[warp] = inclusive;
  __syncthreads();
  T before = 0, all = 0;
  for (int i = 0; i < warps; ++i) {
    if (i == warp) before = all;
    all += shared[i];
  }
  __syncthreads();
  total = all;
  return before + inclusive - value;
}

// c += A . B on the tensor cores: A 16 x 16 halves, B 16 x 8, c 16 x 8 in float32. With lane =
// 4 * g + t: a[0], a[2] hold row g and a[1], a[3] row g + 8 at k = 2t, 2t + 1 (a[0], a[1]) and
// 2t + 8, 2t + 9; b[0], b[1] the same k of column g; c[0], c[1] row g and c[2], c[3] row g + 8 of
// columns 2t, 2t + 1.
template <int K>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  static_assert(K == kFloat16 || K == kBFloat16, "tensor cores take halves");
#ifdef COMPRESS_CUDA_EMULATED
  emulator::mma<K == kBFloat16>(c, a, b);
#else
  if constexpr (K == kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace cuda
}  // namespace compress
