// projected = x . a^T in float32: the first half of a low-rank term, whose second half is the
// epilogue of a product.

#include "warp.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kBatch = 8;

// A block has one row of a and up to eight activations.
template <int K>
__global__ void __launch_bounds__(kThreads)
    project_rows(const uint16_t* x, const void* a, int a_kind, i64 batch, i64 columns, i64 rank,
                 float* projected) {
  __shared__ float partial[kBatch][kWarps];
  const i64 r = blockIdx.x, first_n = static_cast<i64>(blockIdx.y) * kBatch;
  float sum[kBatch] = {};
  for (i64 c = threadIdx.x; c < columns; c += kThreads) {
    const float w = load_kind(a, a_kind, r * columns + c);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first_n + j < batch) {
        sum[j] = fmaf(w, to_float<K>(x[(first_n + j) * columns + c]), sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const float total = lanes_sum<kWarpSize>(sum[j]);
    if (lane_index() == 0) partial[j][threadIdx.x / kWarpSize] = total;
  }
  __syncthreads();
  const i64 n = first_n + threadIdx.x;
  if (threadIdx.x < kBatch && n < batch) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[threadIdx.x][w];
    projected[n * rank + r] = total;
  }
}

}  // namespace

void project(const void* x, Kind kind, i64 batch, i64 columns, const void* a, Kind a_kind, i64 rank,
             float* projected, Place place) {
  if (batch == 0 || rank == 0) return;
  const DeviceGuard guard(place.device);
  const i64 batches = ceil_div(batch, kBatch);
  if (batches > kMaxGridY) throw std::runtime_error("project: the batch is too large");
  const dim3 grid(grid_x(rank, "project"), static_cast<unsigned>(batches));
  const auto go = [&](auto kernel) {
    launch("project", place, kernel, grid, kThreads, 0, static_cast<const uint16_t*>(x), a,
           static_cast<int>(a_kind), batch, columns, rank, projected);
  };
  if (kind == kFloat16) {
    go(&project_rows<kFloat16>);
  } else {
    go(&project_rows<kBFloat16>);
  }
}

}  // namespace cuda
}  // namespace compress
