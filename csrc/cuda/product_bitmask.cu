// y = x . W^T from bitmask-sparse weights as they are stored.
//
// A warp has a row and goes through it 1024 columns at a time: a lane takes 32 bits of the mask and
// the lanes add up how many values come before their own; the kept values, one run of memory, go
// through shared memory in 16-byte loads; then each lane has eight columns at a time and walks
// along its values. Sums are float32.

#include "epilogue.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kPerLane = 32, kStep = kWarpSize * kPerLane;  // columns
constexpr int kLoads = kStep / 8 / kWarpSize + 1;           // of 8 values a lane, to fill a step
constexpr int kRoom = kLoads * kWarpSize * 8;               // values

struct BitmaskWork {
  const uint16_t* x;
  const uint8_t* bits;
  const uint16_t* kept;
  const i64* offsets;
  i64 columns, width, kept_count;  // width: bytes of a row of the mask
  bool word_bits, vector_x;
  Epilogue epilogue;
};

// 32 bits of a row's mask from byte `first` on; bits that stand for no column are cleared.
__device__ __forceinline__ uint32_t load_bits(const BitmaskWork& work, const uint8_t* row,
                                              i64 first) {
  uint32_t word = 0;
  if (work.word_bits && first + 4 <= work.width) {
    word = load_vector<uint32_t>(row + first);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + j < work.width) word |= static_cast<uint32_t>(row[first + j]) << 8 * j;
    }
  }
  const i64 left = work.columns - first * 8;
  return left >= 32 ? word : left <= 0 ? 0 : word & ((1u << left) - 1);
}

// Copies `count` values from `from` on to shared memory, zeros for those that lie behind `end`; the
// first one lands at the index returned.
__device__ __forceinline__ int stage_values(const uint16_t* kept, i64 from, int count, i64 end,
                                            uint16_t* shared) {
  // Loads start at a 16-byte boundary before `from`.
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(kept + from) % 16 / 2);
  uint4 loaded[kLoads];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const i64 first = from - shift + (u * kWarpSize + lane_index()) * 8;
    loaded[u] = uint4{0, 0, 0, 0};
    if (first >= end) continue;
    if (first >= from && first + 8 <= end) {
      loaded[u] = load_vector<uint4>(kept + first);
      continue;
    }
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const i64 i = first + j;
      if (i >= from && i < end) words[j / 2] |= static_cast<uint32_t>(kept[i]) << j % 2 * 16;
    }
    loaded[u] = uint4{words[0], words[1], words[2], words[3]};
  }
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    if (u * kWarpSize * 8 < shift + count) {
      store_vector(shared + (u * kWarpSize + lane_index()) * 8, loaded[u]);
    }
  }
  return shift;
}

// Eight activations from `column` on, zero behind the end.
__device__ __forceinline__ uint4 load_eight(const uint16_t* row, i64 column, i64 columns,
                                            bool vectors) {
  if (vectors && column + 8 <= columns) return load_vector<uint4>(row + column);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (column + j < columns) words[j / 2] |= static_cast<uint32_t>(row[column + j]) << j % 2 * 16;
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// Batch: activations that a warp takes at a time.
template <int K, int Batch>
__global__ void __launch_bounds__(kThreads) product_kept(const BitmaskWork work) {
  __shared__ uint4 staged[kWarps][kRoom / 8];
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const i64 row = static_cast<i64>(blockIdx.x) * kWarps + warp;
  const i64 first_n = static_cast<i64>(blockIdx.y) * Batch;
  const Epilogue& e = work.epilogue;
  if (row >= e.rows) return;  // a whole warp; the others never wait for it
  const uint8_t* bits = work.bits + row * work.width;
  auto* values = reinterpret_cast<uint16_t*>(staged[warp]);
  i64 next = work.offsets[row];
  float sum[Batch] = {};
  uint32_t later = load_bits(work, bits, lane * 4);
  for (i64 start = 0; start < work.columns; start += kStep) {
    const uint32_t word = later;
    later = load_bits(work, bits, (start + kStep) / 8 + lane * 4);  // nothing behind the end
    const int inclusive = inclusive_scan(__popc(word)), before = inclusive - __popc(word);
    const int count = __shfl_sync(kFull, inclusive, kWarpSize - 1);
    __syncwarp();  // the last step's values have been read
    // A mask that asks for more values than there are reads zeros, not other memory.
    const i64 end = next + count < work.kept_count ? next + count : work.kept_count;
    const int shift = stage_values(work.kept, next, count, end, values);
    __syncwarp();
    next += count;
#pragma unroll(Batch < 4 ? 4 / Batch : 1)
    for (int s = 0; s < kPerLane / 8; ++s) {
      // Byte 32 s + lane of the step belongs to lane 8 s + lane / 4.
      const int owner = 8 * s + lane / 4, low = lane % 4 * 8;
      const uint32_t owned = __shfl_sync(kFull, word, owner);
      int at = shift + __shfl_sync(kFull, before, owner) + __popc(owned & ((1u << low) - 1));
      const i64 column = start + s * 256 + lane * 8;
      uint4 x[Batch];
#pragma unroll
      for (int n = 0; n < Batch; ++n) {
        const bool real = first_n + n < e.batch;
        x[n] = load_eight(work.x + (real ? first_n + n : 0) * work.columns, column,
                          real ? work.columns : 0, work.vector_x);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (owned >> (low + j) & 1) {
          const float w = to_float<K>(values[at++]);
#pragma unroll
          for (int n = 0; n < Batch; ++n) sum[n] = fmaf(w, to_float<K>(half_of(x[n], j)), sum[n]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < Batch; ++n) {
    const bool real = first_n + n < e.batch;
    if (real) sum[n] += low_rank_part<1>(e, first_n + n, row, lane, kWarpSize);
    const float value = lanes_sum<kWarpSize>(sum[n]);
    if (real && lane == 0) store_output(e, first_n + n, row, value);
  }
}

template <int K, int Batch>
void launch_kept(const BitmaskWork& work, const Place& place) {
  const i64 batches = ceil_div(work.epilogue.batch, Batch);
  if (batches > kMaxGridY) throw std::runtime_error("product_bitmask: the batch is too large");
  const dim3 grid(grid_x(ceil_div(work.epilogue.rows, kWarps), "product_bitmask"),
                  static_cast<unsigned>(batches));
  launch("product_bitmask", place, &product_kept<K, Batch>, grid, kThreads, 0, work);
}

template <int K>
void launch_batch(const BitmaskWork& work, const Place& place) {
  const i64 batch = work.epilogue.batch;
  if (batch == 1) {
    launch_kept<K, 1>(work, place);
  } else if (batch == 2) {
    launch_kept<K, 2>(work, place);
  } else if (batch <= 4) {
    launch_kept<K, 4>(work, place);
  } else {
    launch_kept<K, 8>(work, place);
  }
}

}  // namespace

void product_bitmask(const Product& product, const StoredBitmask& weights, Place place) {
  if (product.batch == 0 || product.rows == 0) return;
  const DeviceGuard guard(place.device);
  BitmaskWork work;
  work.x = static_cast<const uint16_t*>(product.x);
  work.bits = weights.bits;
  work.kept = static_cast<const uint16_t*>(weights.kept);
  work.offsets = weights.offsets;
  work.kept_count = weights.kept_count;
  work.columns = product.columns;
  work.width = ceil_div(product.columns, 8);
  work.word_bits = work.width % 4 == 0 && aligned(weights.bits, 4);
  work.vector_x = product.columns % 8 == 0 && aligned(product.x, 16);
  work.epilogue = epilogue_of(product);
  if (product.kind == kFloat16) {
    launch_batch<kFloat16>(work, place);
  } else {
    launch_batch<kBFloat16>(work, place);
  }
}

}  // namespace cuda
}  // namespace compress
