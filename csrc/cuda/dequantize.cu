// out = (code - zero point) * scale, one rounding a weight.

#include "platform.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr i64 kColumns = 2048;  // of a block

__global__ void dequantize_rows(const uint8_t* codes, const float* scale, const uint8_t* zero_point,
                                i64 columns, i64 groups, float middle, i64 group_size, float* out) {
  const i64 row = blockIdx.x;
  const i64 step = static_cast<i64>(gridDim.y) * blockDim.x;
  for (i64 c = static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x; c < columns; c += step) {
    const i64 group = row * groups + c / group_size;
    const float zero = zero_point ? static_cast<float>(zero_point[group]) : middle;
    const i64 i = row * columns + c;
    out[i] = (static_cast<float>(codes[i]) - zero) * scale[group];
  }
}

}  // namespace

void dequantize(const uint8_t* codes, const float* scale, const uint8_t* zero_point, i64 rows,
                i64 columns, int bits, i64 group_size, float* out, Place place) {
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(place.device);
  const dim3 grid(grid_x(rows, "dequantize"), grid_up_to(ceil_div(columns, kColumns), kMaxGridY));
  launch("dequantize", place, &dequantize_rows, grid, kThreads, 0, codes, scale, zero_point,
         columns, ceil_div(columns, group_size), static_cast<float>(1 << (bits - 1)), group_size,
         out);
}

}  // namespace cuda
}  // namespace compress
