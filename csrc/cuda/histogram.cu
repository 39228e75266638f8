// Histograms of magnitude keys: a table in shared memory a block where the device has room for
// one, else one table for all.

#include "each_weight.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr int kBins = 1 << 15, kSharedBytes = kBins * 4;
constexpr unsigned kThreads = 1024;  // a block fills a multiprocessor: its table does, too

template <int K>
__device__ __forceinline__ uint32_t bin_of(Stored<K> weight) {
  return key_of(weight) >> (K == kFloat32 ? 16 : 0);
}

// A block sees fewer than 2^32 weights: the launch gives it enough company.
template <int K>
__global__ void __launch_bounds__(kThreads)
    count_shared(const Stored<K>* w, i64 n, bool vectors, unsigned long long* counts) {
  COMPRESS_DYNAMIC_SHARED(uint32_t, table);
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
    table[bin] = 0;
  }
  __syncthreads();
  each_weight<K>(w, n, vectors, [&](i64, Stored<K> x) { atomicAdd(&table[bin_of<K>(x)], 1u); });
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
    if (table[bin]) atomicAdd(&counts[bin], static_cast<unsigned long long>(table[bin]));
  }
}

template <int K>
__global__ void count_global(const Stored<K>* w, i64 n, bool vectors, unsigned long long* counts) {
  each_weight<K>(w, n, vectors, [&](i64, Stored<K> x) { atomicAdd(&counts[bin_of<K>(x)], 1ull); });
}

__global__ void count_low(const float* w, i64 n, bool vectors, uint32_t prefix,
                          unsigned long long* counts) {
  each_weight<kFloat32>(w, n, vectors, [&](i64, float x) {
    const uint32_t key = key_of(x);
    if (key >> 16 == prefix) atomicAdd(&counts[key & 0xFFFFu], 1ull);
  });
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void magnitude_histogram(const void* weights, Kind kind, i64 n, uint64_t* counts, Place place) {
  if (n == 0) return;
  const DeviceGuard guard(place.device);
  const bool vectors = aligned(weights, 16);
  auto* out = reinterpret_cast<unsigned long long*>(counts);
  const bool roomy =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device) >= kSharedBytes;
  by_kind(kind, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto* w = static_cast<const Stored<K>*>(weights);
    if (!roomy) {
      launch("magnitude_histogram (global table)", place, &count_global<K>, each_grid(n),
             kEachThreads, 0, w, n, vectors, out);
      return;
    }
    check(cudaFuncSetAttribute(&count_shared<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kSharedBytes),
          "magnitude_histogram: shared memory");
    // One block a multiprocessor, fewer for little work, more only for counts to stay below 2^32.
    const i64 processors = attribute(cudaDevAttrMultiProcessorCount, place.device);
    const i64 wanted = ceil_div(n, kThreads * 64);
    const i64 least = ceil_div(n, static_cast<i64>(1) << 31);
    const i64 blocks = wanted < processors ? wanted : processors;
    launch("magnitude_histogram", place, &count_shared<K>,
           grid_up_to(blocks > least ? blocks : least, kMaxGridX), kThreads, kSharedBytes, w, n,
           vectors, out);
  });
}

void magnitude_histogram_low(const void* weights, i64 n, uint32_t prefix, uint64_t* counts,
                             Place place) {
  if (n == 0) return;
  const DeviceGuard guard(place.device);
  launch("magnitude_histogram_low", place, &count_low, each_grid(n), kEachThreads, 0,
         static_cast<const float*>(weights), n, aligned(weights, 16), prefix,
         reinterpret_cast<unsigned long long*>(counts));
}

}  // namespace cuda
}  // namespace compress
