// What follows a product before it is stored: the low-rank term and the bias, in float32.

#pragma once

#include "warp.cuh"

namespace compress {
namespace cuda {

// A Product's outputs, by value for a kernel.
struct Epilogue {
  void* y;
  const void* bias;
  const float* projected;
  const void* b;
  i64 batch, rows, rank;
  int y_kind, bias_kind, b_kind;
};

inline Epilogue epilogue_of(const Product& p) {
  const bool low_rank = p.projected != nullptr && p.rank > 0;
  return {p.y,      p.bias,      p.projected, p.b, p.batch, p.rows, low_rank ? p.rank : 0,
          p.y_kind, p.bias_kind, p.b_kind};
}

// Part `part` of `parts` of the low-rank term of output (n, row): ranks part, part + parts, ...
template <int Unroll>
__device__ __forceinline__ float low_rank_part(const Epilogue& e, i64 n, i64 row, int part,
                                               int parts) {
  float sum = 0;
#pragma unroll Unroll
  for (i64 r = part; r < e.rank; r += parts) {
    sum = fmaf(e.projected[n * e.rank + r], load_kind(e.b, e.b_kind, row * e.rank + r), sum);
  }
  return sum;
}

__device__ __forceinline__ void store_output(const Epilogue& e, i64 n, i64 row, float value) {
  if (e.bias) value += load_kind(e.bias, e.bias_kind, row);
  store_kind(e.y, e.y_kind, n * e.rows + row, value);
}

}  // namespace cuda
}  // namespace compress
