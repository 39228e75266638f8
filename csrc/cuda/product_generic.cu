#include "product_generic.h"

#include "codes.cuh"
#include "epilogue.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kBatch = 4;

// A warp has a row of W and up to four activations (more would take nvcc long to compile); a lane
// has every 32nd column.
template <int K>
__global__ void __launch_bounds__(kThreads)
    product_rows(const uint16_t* x, const StoredCodes codes, i64 columns, i64 words, i64 groups,
                 const Epilogue e) {
  const i64 row = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const i64 first_n = static_cast<i64>(blockIdx.y) * kBatch;
  if (row >= e.rows) return;
  const int lane = lane_index();
  const uint32_t* packed = codes.packed + row * words;
  const float middle = static_cast<float>(1 << (codes.bits - 1));
  float sum[kBatch] = {};
#pragma unroll 1
  for (i64 c = lane; c < columns; c += kWarpSize) {
    const i64 group = row * groups + c / codes.group_size;
    const float zero = codes.zero_point ? static_cast<float>(codes.zero_point[group]) : middle;
    const float code = static_cast<float>(code_at(packed, words, c, codes.bits));
    const float w = (code - zero) * load_kind(codes.scale, codes.scale_kind, group);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first_n + j < e.batch) {
        sum[j] = fmaf(w, to_float<K>(x[(first_n + j) * columns + c]), sum[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const i64 n = first_n + j;
    if (n < e.batch) sum[j] += low_rank_part<1>(e, n, row, lane, kWarpSize);
    const float value = lanes_sum<kWarpSize>(sum[j]);
    if (n < e.batch && lane == 0) store_output(e, n, row, value);
  }
}

}  // namespace

void product_generic(const Product& product, const StoredCodes& codes, const Place& place) {
  const i64 batches = ceil_div(product.batch, kBatch);
  if (batches > kMaxGridY) throw std::runtime_error("product_codes: the batch is too large");
  const dim3 grid(grid_x(ceil_div(product.rows, kWarps), "product_codes"),
                  static_cast<unsigned>(batches));
  const auto go = [&](auto kernel) {
    launch("product_codes (any width)", place, kernel, grid, kThreads, 0,
           static_cast<const uint16_t*>(product.x), codes, product.columns,
           ceil_div(product.columns * codes.bits, 32), ceil_div(product.columns, codes.group_size),
           epilogue_of(product));
  };
  if (product.kind == kFloat16) {
    go(&product_rows<kFloat16>);
  } else {
    go(&product_rows<kBFloat16>);
  }
}

}  // namespace cuda
}  // namespace compress
