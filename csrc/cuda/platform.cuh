// What every .cu file starts from: the CUDA runtime (or its stand-in for tests), launches that are
// checked, the device guard and vector loads.

#pragma once

#ifdef COMPRESS_CUDA_EMULATED
#include "emulator/cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdint.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels_cuda.h"

namespace compress {
namespace cuda {

using i64 = int64_t;

constexpr unsigned kFull = 0xFFFFFFFFu;  // every lane of a warp takes part
constexpr int kWarpSize = 32;
constexpr i64 kMaxGridX = 0x7FFFFFFF, kMaxGridY = 65535;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t stream_of(const Place& place) {
  return static_cast<cudaStream_t>(place.stream);
}

// Runs a kernel and reports a failed launch by `name`. An earlier error is not taken for ours.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Place& place, void (*kernel)(Parameters...), dim3 grid,
            unsigned threads, size_t shared, Arguments... arguments) {
#ifdef COMPRESS_CUDA_EMULATED
  (void)name;
  (void)place;
  emulator::launch(grid, dim3(threads), shared,
                   [=] { kernel(static_cast<Parameters>(arguments)...); });
#else
  (void)cudaGetLastError();
  // clang-format off
  kernel<<<grid, dim3(threads), shared, stream_of(place)>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  check(cudaGetLastError(), name);
#endif
}

inline i64 ceil_div(i64 a, i64 b) {
  return a / b + (a % b != 0);
}

// A grid of exactly `count` blocks along x.
inline unsigned grid_x(i64 count, const char* name) {
  if (count > kMaxGridX) {
    throw std::runtime_error(std::string(name) + ": too large for one launch");
  }
  return static_cast<unsigned>(count);
}

// At most `most` blocks: for kernels that stride over their grid.
inline unsigned grid_up_to(i64 count, i64 most) {
  return static_cast<unsigned>(count < most ? count : most);
}

inline void copy_to_host(void* target, const void* source, size_t size, const Place& place) {
  check(cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToHost, stream_of(place)),
        "copy of a result to the host");
  check(cudaStreamSynchronize(stream_of(place)), "wait for a result");
}

inline bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Calls f(std::integral_constant<int, kind>).
template <class Function>
void by_kind(Kind kind, const Function& f) {
  if (kind == kFloat32) {
    f(std::integral_constant<int, kFloat32>());
  } else if (kind == kFloat16) {
    f(std::integral_constant<int, kFloat16>());
  } else {
    f(std::integral_constant<int, kBFloat16>());
  }
}

// A read-only load of 4, 8 or 16 bytes; the address must be aligned to them.
template <class T>
__device__ __forceinline__ T load_vector(const void* p) {
#ifdef COMPRESS_CUDA_EMULATED
  if (!aligned(p, sizeof(T))) emulator::fail("an unaligned vector load");
  return *static_cast<const T*>(p);
#else
  return __ldg(static_cast<const T*>(p));
#endif
}
template <class T>
__device__ __forceinline__ void store_vector(void* p, T value) {
#ifdef COMPRESS_CUDA_EMULATED
  if (!aligned(p, sizeof(T))) emulator::fail("an unaligned vector store");
#endif
  *static_cast<T*>(p) = value;
}

// Dynamic shared memory, aligned to 16 bytes.
#ifdef COMPRESS_CUDA_EMULATED
#define COMPRESS_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::emulator::machine().dynamic.data())
#else
#define COMPRESS_DYNAMIC_SHARED(type, name)                \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  type* name = reinterpret_cast<type*>(name##_)
#endif

}  // namespace cuda
}  // namespace compress
