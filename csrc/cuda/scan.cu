#include "scan.h"

#include "warp.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr unsigned kThreads = 1024;
constexpr i64 kItems = 4;  // neighbouring entries that a thread adds up before it meets the others

__global__ void __launch_bounds__(kThreads) scan_counts(i64* values, i64 n) {
  __shared__ long long shared[kThreads / kWarpSize];
  long long carry = 0;
  for (i64 start = 0; start < n; start += kThreads * kItems) {
    const i64 first = start + threadIdx.x * kItems;
    long long own[kItems], sum = 0, total;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      own[j] = first + j < n ? values[first + j] : 0;
      sum += own[j];
    }
    long long before = carry + block_exclusive_scan(sum, shared, total);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (first + j < n) values[first + j] = before;
      before += own[j];
    }
    carry += total;
  }
  if (threadIdx.x == 0) values[n] = carry;
}

}  // namespace

void exclusive_scan(i64* values, i64 n, const Place& place) {
  launch("exclusive_scan", place, &scan_counts, 1, kThreads, 0, values, n);
}

}  // namespace cuda
}  // namespace compress
