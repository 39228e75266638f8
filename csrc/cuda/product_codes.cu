// y = x . W^T from group-quantized weights as they are stored, on the tensor cores.
//
// A warp has 16 rows of W and walks over tiles of columns. Lane (g, t) loads words of rows g and
// g + 8, its own columns of the tile; those columns are its share of k in every product, and it
// reads the same ones of x, so neither operand passes through shared memory. A tile lies in one
// group: its sum, exact codes times exact activations in float32, is scaled once. The warps of a
// block split the tiles of the same rows, and add up their float32 sums in the end.

#include "codes.cuh"
#include "epilogue.cuh"
#include "product_generic.h"

namespace compress {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kMmaRows = 16, kMmaBatch = 8, kParts = 8;  // lanes that finish one output

struct CodesWork {
  const uint16_t* x;
  const uint32_t* packed;
  const void* scale;
  const uint8_t* zero_point;
  i64 columns, words, groups, group_size;
  int scale_kind;
  Epilogue epilogue;
};

template <int Words>
struct WordVector;
template <>
struct WordVector<1> {
  using Type = uint32_t;
};
template <>
struct WordVector<2> {
  using Type = uint2;
};
template <>
struct WordVector<4> {
  using Type = uint4;
};

// `Words` words from `first` on, or zeros: a row ends between two such loads, never inside one.
template <int Words>
__device__ __forceinline__ void load_words(const uint32_t* row, i64 first, i64 end,
                                           uint32_t (&out)[Words]) {
  typename WordVector<Words>::Type raw = {};
  if (first < end) raw = load_vector<typename WordVector<Words>::Type>(row + first);
  if constexpr (Words == 1) {
    out[0] = raw;
  } else {
    out[0] = raw.x;
    out[1] = raw.y;
  }
  if constexpr (Words == 4) {
    out[2] = raw.z;
    out[3] = raw.w;
  }
}

// The same of x: `Pairs` pairs of neighbouring halves from column `first` on.
template <int Pairs>
__device__ __forceinline__ void load_x(const uint16_t* row, i64 first, i64 end,
                                       uint32_t (&out)[Pairs]) {
  constexpr int words = Pairs < 4 ? Pairs : 4;
#pragma unroll
  for (int v = 0; v < Pairs / words; ++v) {
    uint32_t part[words];
    const auto* from = reinterpret_cast<const uint32_t*>(row);
    load_words<words>(from, first / 2 + v * words, end / 2, part);
#pragma unroll
    for (int w = 0; w < words; ++w) out[v * words + w] = part[w];
  }
}

// One lane's share of a tile: words, scales and zero constants of rows g and g + 8.
template <int Words>
struct Tile {
  uint32_t words[2][Words];
  float scale[2];
  uint32_t zero[2];
};

// Words: 32-bit words that a lane takes from a row at a time. Tiles: of eight activations each.
template <int K, int Bits, int Words, int Tiles>
struct Shape {
  static constexpr int kPerWord = 32 / Bits;
  static constexpr int kColumns = 4 * Words * kPerWord;  // of a tile
  static constexpr int kRowTiles = Tiles == 1 ? 1 : 2;   // of sixteen rows, a block
  static constexpr int kSplits = kWarps / kRowTiles;     // warps that share rows
  static constexpr int kRows = kRowTiles * kMmaRows, kBatch = Tiles * kMmaBatch;
};

template <int K, int Bits, int Words>
__device__ __forceinline__ Tile<Words> load_tile(const CodesWork& work, const i64 (&rows)[2],
                                                 i64 tile) {
  using S = Shape<K, Bits, Words, 1>;
  Tile<Words> result;
  const i64 group = tile * S::kColumns / work.group_size;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    load_words<Words>(work.packed + rows[h] * work.words, (tile * 4 + lane_index() % 4) * Words,
                      work.words, result.words[h]);
    const i64 i = rows[h] * work.groups + group;
    result.scale[h] = load_kind(work.scale, work.scale_kind, i);
    result.zero[h] =
        zero_constant<K, Bits>(work.zero_point ? work.zero_point[i] : 1u << (Bits - 1));
  }
  return result;
}

// total += scale * (codes . x) over the lane's columns of one tile.
template <int K, int Bits, int Words, int Tiles>
__device__ __forceinline__ void multiply_tile(const CodesWork& work, const Tile<Words>& tile,
                                              i64 column, i64 first_n, float (&total)[Tiles][4]) {
  constexpr int pairs = 16 / Bits;  // of a word
  float sum[Tiles][4] = {};
#pragma unroll
  for (int w = 0; w < Words; ++w) {
    uint32_t a[pairs / 2][4];
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      a[p / 2][p % 2 * 2] = decode_pair<K, Bits>(tile.words[0][w], p, tile.zero[0]);
      a[p / 2][p % 2 * 2 + 1] = decode_pair<K, Bits>(tile.words[1][w], p, tile.zero[1]);
    }
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const i64 n = first_n + t * kMmaBatch + lane_index() / 4;
      const bool real = n < work.epilogue.batch;
      uint32_t x[pairs];
      load_x<pairs>(work.x + (real ? n : 0) * work.columns, column + w * 2 * pairs,
                    real ? work.columns : 0, x);
#pragma unroll
      for (int m = 0; m < pairs / 2; ++m) {  // pairs 2m and 2m + 1
        const uint32_t low = x[m], high = x[m + pairs / 2];
        const uint32_t b[2] = {__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
        mma_16x8x16<K>(sum[t], a[m], b);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[t][i] = fmaf(tile.scale[i / 2], sum[t][i], total[t][i]);
  }
}

template <int K, int Bits, int Words, int Tiles>
__global__ void __launch_bounds__(kThreads) product_tiles(const CodesWork work) {
  using S = Shape<K, Bits, Words, Tiles>;
  __shared__ float partial[kWarps][kMmaRows][S::kBatch];
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const i64 block_row = static_cast<i64>(blockIdx.x) * S::kRows;
  const i64 first_n = static_cast<i64>(blockIdx.y) * S::kBatch;
  const Epilogue& e = work.epilogue;
  i64 rows[2];
  for (int h = 0; h < 2; ++h) {  // rows that are not there: the last one again, not stored
    const i64 row = block_row + warp % S::kRowTiles * kMmaRows + lane / 4 + 8 * h;
    rows[h] = row < e.rows ? row : e.rows - 1;
  }
  float total[Tiles][4] = {};
  const i64 tiles = (work.columns + S::kColumns - 1) / S::kColumns;
  const auto fetch = [&](Tile<Words>& into, i64 tile) {
    if (tile < tiles) into = load_tile<K, Bits, Words>(work, rows, tile);
  };
  const auto use = [&](const Tile<Words>& from, i64 tile) {
    const i64 column = tile * S::kColumns + lane % 4 * Words * S::kPerWord;
    multiply_tile<K, Bits, Words, Tiles>(work, from, column, first_n, total);
  };
  // While one tile is used, one or two of those that follow are under way.
  i64 tile = warp / S::kRowTiles;
  Tile<Words> even, odd;
  fetch(even, tile);
  fetch(odd, tile + S::kSplits);
  while (tile < tiles) {
    use(even, tile);
    fetch(even, tile + 2 * S::kSplits);
    tile += S::kSplits;
    if (tile >= tiles) break;
    use(odd, tile);
    fetch(odd, tile + 2 * S::kSplits);
    tile += S::kSplits;
  }
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[warp][lane / 4 + i / 2 * 8][t * kMmaBatch + lane % 4 * 2 + i % 2] = total[t][i];
    }
  }
  __syncthreads();
  // Eight lanes add up the splits and the low-rank term of one output. All lanes of a warp take
  // every turn, because they meet in the sum.
  const int part = static_cast<int>(threadIdx.x) % kParts;
  for (int o = static_cast<int>(threadIdx.x) / kParts; o < S::kRows * S::kBatch;
       o += kThreads / kParts) {
    const int row_here = o / S::kBatch, n_here = o % S::kBatch;
    const i64 row = block_row + row_here, n = first_n + n_here;
    const bool real = row < e.rows && n < e.batch;
    float value = 0;
    if (part < S::kSplits) {
      value = partial[part * S::kRowTiles + row_here / kMmaRows][row_here % kMmaRows][n_here];
    }
    if (real) value += low_rank_part<4>(e, n, row, part, kParts);
    value = lanes_sum<kParts>(value);
    if (real && part == 0) store_output(e, n, row, value);
  }
}

template <int K, int Bits, int Words, int Tiles>
void launch_tiles(const CodesWork& work, const Place& place) {
  using S = Shape<K, Bits, Words, Tiles>;
  static_assert(S::kRows * S::kBatch % (kThreads / kParts) == 0, "a warp's lanes would part");
  const i64 batches = ceil_div(work.epilogue.batch, S::kBatch);
  if (batches > kMaxGridY) throw std::runtime_error("product_codes: the batch is too large");
  const dim3 grid(grid_x(ceil_div(work.epilogue.rows, S::kRows), "product_codes"),
                  static_cast<unsigned>(batches));
  launch("product_codes", place, &product_tiles<K, Bits, Words, Tiles>, grid, kThreads, 0, work);
}

template <int K, int Bits, int Words>
void launch_words(const CodesWork& work, const Place& place) {
  const i64 batch = work.epilogue.batch;
  if (batch <= 8) {
    launch_tiles<K, Bits, Words, 1>(work, place);
  } else if (batch <= 16) {
    launch_tiles<K, Bits, Words, 2>(work, place);
  } else if (batch <= 32) {
    launch_tiles<K, Bits, Words, 4>(work, place);
  } else {
    launch_tiles<K, Bits, Words, 8>(work, place);
  }
}

// Takes the most words a lane that groups and addresses allow. False: this cannot be tiled.
template <int K, int Bits>
bool launch_bits(const CodesWork& work, const Place& place) {
  // Loads of x must not straddle a row's end, either.
  constexpr int x_columns = Bits == 2 ? 16 : 8;
  if (work.columns % x_columns != 0 || !aligned(work.x, 16)) return false;
  const auto fits = [&](int words) {
    const bool one_group =
        work.group_size >= work.columns || work.group_size % (4 * words * 32 / Bits) == 0;
    const size_t bytes = 4 * static_cast<size_t>(words);
    return one_group && work.words % words == 0 && aligned(work.packed, bytes);
  };
  if (Bits > 2 && fits(4)) {
    launch_words<K, Bits, Bits == 2 ? 2 : 4>(work, place);
  } else if (fits(2)) {
    launch_words<K, Bits, 2>(work, place);
  } else if (fits(1)) {
    launch_words<K, Bits, 1>(work, place);
  } else {
    return false;
  }
  return true;
}

template <int K>
bool launch_kind(const CodesWork& work, int bits, const Place& place) {
  if (bits == 4) return launch_bits<K, 4>(work, place);
  if (bits == 8) return launch_bits<K, 8>(work, place);
  return bits == 2 && launch_bits<K, 2>(work, place);
}

}  // namespace

void product_codes(const Product& product, const StoredCodes& codes, Place place) {
  if (product.batch == 0 || product.rows == 0) return;
  const DeviceGuard guard(place.device);
  CodesWork work;
  work.x = static_cast<const uint16_t*>(product.x);
  work.packed = codes.packed;
  work.scale = codes.scale;
  work.zero_point = codes.zero_point;
  work.columns = product.columns;
  work.words = ceil_div(product.columns * codes.bits, 32);
  work.group_size = codes.group_size;
  work.groups = ceil_div(product.columns, codes.group_size);
  work.scale_kind = codes.scale_kind;
  work.epilogue = epilogue_of(product);
  const bool done = product.kind == kFloat16 ? launch_kind<kFloat16>(work, codes.bits, place)
                                             : launch_kind<kBFloat16>(work, codes.bits, place);
  if (!done) product_generic(product, codes, place);
}

}  // namespace cuda
}  // namespace compress
