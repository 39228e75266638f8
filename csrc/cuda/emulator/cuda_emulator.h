// CUDA on the host, for tests: the .cu sources compiled by a C++ compiler, every thread a fiber.
//
// Blocks run one after another. The threads of a block take turns: each runs until it reaches a
// barrier (__syncthreads, __syncwarp, a shuffle, a ballot, an mma) and goes on when all that
// barrier waits for have come. Warps, and the lanes of a warp, run in index order or in the reverse
// (`reverse`), each as far as it can: where a barrier is missing, one thread reads before another
// has written, or after it has written again, and in one of the two orders the result differs. A
// lane that ends or goes elsewhere while its warp waits, and a block that cannot go on, are errors.
// Timing, memory ordering and caches are not modelled.
//
// Only what the kernels use is here. Shared memory is static storage: one launch at a time.

#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10, kSlot = 32;

// Threads that wait for each other: `generation` moves on when `alive` of them have arrived.
struct Barrier {
  unsigned alive = 0, arrived = 0, generation = 0;
  const char* operation = nullptr;
};

struct Warp {
  Barrier barrier;
  unsigned size = 0;
  alignas(16) unsigned char slots[2][kWarp][kSlot];  // a lane may be one exchange ahead
};

struct Fiber {
  ucontext_t entry;
  jmp_buf resume;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  bool started, done;
  dim3 index;
  unsigned lane, parity;
  Warp* warp;
  const Barrier* waits_for;
  unsigned generation;
};

struct Machine {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier block;
  Fiber* self = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
  std::vector<uint64_t> dynamic;
  std::string failure;
  dim3 block_index, block_size, grid_size;
  bool reverse = false;
  int shared_memory = 163 << 10;  // that a block may have
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void to_scheduler() {
  Machine& m = machine();
  if (_setjmp(m.self->resume) == 0) _longjmp(m.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  machine().failure = what;
  _longjmp(machine().scheduler, 1);
}

inline void wait_at(Barrier& barrier, const char* operation) {
  Machine& m = machine();
  if (barrier.arrived && barrier.operation != operation &&
      strcmp(barrier.operation, operation) != 0) {
    fail(std::string("threads wait at ") + operation + " and at " + barrier.operation);
  }
  barrier.operation = operation;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.alive) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  m.self->waits_for = &barrier;
  m.self->generation = generation;
  to_scheduler();
}

inline void warp_barrier(unsigned mask, const char* operation) {
  Warp& warp = *machine().self->warp;
  if (mask != 0xFFFFFFFFu) fail(std::string(operation) + ": only full masks are emulated");
  if (warp.size != kWarp || warp.barrier.alive != kWarp) {
    fail(std::string(operation) + " in a warp whose lanes are not all there");
  }
  wait_at(warp.barrier, operation);
}

// Publishes `mine` to the warp; afterwards `peer(lane)` gives what that lane published.
template <class T>
inline const unsigned char* exchange(const T& mine, const char* operation) {
  static_assert(sizeof(T) <= kSlot, "a slot is too small");
  Fiber& self = *machine().self;
  unsigned char (*slots)[kSlot] = self.warp->slots[self.parity];
  memcpy(slots[self.lane], &mine, sizeof(T));
  self.parity ^= 1;
  warp_barrier(0xFFFFFFFFu, operation);
  return slots[0];
}

template <class T>
inline T peer(const unsigned char* slots, unsigned lane) {
  T value;
  memcpy(&value, slots + lane * kSlot, sizeof(T));
  return value;
}

inline void body() {
  Machine& m = machine();
  m.kernel();
  Fiber& self = *m.self;
  self.done = true;
  if (self.warp->barrier.arrived) fail("a lane ended while its warp waits");
  --self.warp->barrier.alive;
  if (--m.block.alive && m.block.arrived == m.block.alive) {
    m.block.arrived = 0;
    ++m.block.generation;
  }
  _longjmp(m.scheduler, 1);
}

inline void enter(Fiber& fiber) {
  Machine& m = machine();
  m.self = &fiber;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

inline void prepare(unsigned threads) {
  Machine& m = machine();
  m.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  m.block = Barrier();
  m.block.alive = threads;
  while (m.fibers.size() < threads) m.fibers.emplace_back(new Fiber());
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *m.fibers[t];
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, body, 0);
    fiber.started = fiber.done = false;
    fiber.index = dim3(t % m.block_size.x, t / m.block_size.x % m.block_size.y,
                       t / m.block_size.x / m.block_size.y);
    fiber.lane = t % kWarp;
    fiber.parity = 0;
    fiber.warp = &m.warps[t / kWarp];
    ++fiber.warp->size;
    ++fiber.warp->barrier.alive;
    fiber.waits_for = nullptr;
  }
}

// Runs a thread on if it can go on.
inline bool step(Fiber& fiber) {
  if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) {
    return false;
  }
  fiber.waits_for = nullptr;
  enter(fiber);
  if (!machine().failure.empty()) throw std::runtime_error("emulator: " + machine().failure);
  return true;
}

// Each warp runs as far as it can before the next one has its turn: what should wait for the others
// but does not runs ahead of them.
inline void run_block(unsigned threads) {
  Machine& m = machine();
  prepare(threads);
  const unsigned warps = (unsigned)m.warps.size();
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = (m.reverse ? warps - 1 - w : w) * kWarp;
      const unsigned count = threads - first < kWarp ? threads - first : kWarp;
      for (bool warp_moved = true; warp_moved;) {
        warp_moved = false;
        for (unsigned k = 0; k < count; ++k) {
          warp_moved |= step(*m.fibers[first + (m.reverse ? count - 1 - k : k)]);
        }
        moved |= warp_moved;
      }
    }
  }
  if (m.block.alive)
    throw std::runtime_error("emulator: the block cannot go on (a missed barrier)");
}

inline void launch(dim3 grid, dim3 block, size_t dynamic_bytes, std::function<void()> kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> one_launch(m.mutex);
  const size_t threads = (size_t)block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("emulator: block size");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulator: grid size");
  }
  m.failure.clear();
  m.kernel = std::move(kernel);
  m.block_size = block;
  m.grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block_index = dim3(x, y, z);
        m.dynamic.assign(dynamic_bytes / 8 + 2, 0xCDCDCDCDCDCDCDCDull);
        run_block((unsigned)threads);
      }
    }
  }
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline std::vector<float> half_table() {
  std::vector<float> values(1 << 16);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023, sign = bits >> 15 << 31;
    uint32_t magnitude = (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) magnitude = 0x7F800000u | fraction << 13;
    if (exponent == 0) {
      const float small = (float)fraction / (1 << 24);
      memcpy(&magnitude, &small, 4);
    }
    values[bits] = float_of(sign | magnitude);
  }
  return values;
}

inline float half_value(uint16_t bits, bool bfloat) {
  static const std::vector<float> halves = half_table();
  return bfloat ? float_of((uint32_t)bits << 16) : halves[bits];
}

// mma.sync.aligned.m16n8k16: the lanes' registers hold A, B and C as the PTX manual lays them out.
template <bool BFloat>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* slots = exchange(mine, "mma");
  const unsigned lane = machine().self->lane;
  const auto half = [&](unsigned owner, unsigned reg, unsigned high) {
    const uint32_t word = peer<uint32_t>(slots + 4 * reg, owner);
    return half_value((uint16_t)(high ? word >> 16 : word), BFloat);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      c[i] += left * half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
}

}  // namespace emulator

#define threadIdx (::emulator::machine().self->index)
#define blockIdx (::emulator::machine().block_index)
#define blockDim (::emulator::machine().block_size)
#define gridDim (::emulator::machine().grid_size)

inline void __syncthreads() {
  emulator::wait_at(emulator::machine().block, "__syncthreads");
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulator::warp_barrier(mask, "__syncwarp");
}
template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
  return emulator::peer<T>(emulator::exchange(value, "__shfl_sync"), (unsigned)source % 32);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int distance) {
  const unsigned char* slots = emulator::exchange(value, "__shfl_xor_sync");
  return emulator::peer<T>(slots, emulator::machine().self->lane ^ (unsigned)distance);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned char* slots = emulator::exchange(value, "__shfl_up_sync");
  const unsigned lane = emulator::machine().self->lane;
  return emulator::peer<T>(slots, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned char* slots = emulator::exchange(predicate, "__ballot_sync");
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    bits |= (unsigned)(emulator::peer<int>(slots, lane) != 0) << lane;
  }
  return bits;
}

template <class T>
inline T atomicAdd(T* target, T value) {
  const T old = *target;
  *target += value;
  return old;
}
template <class T>
inline T atomicMin(T* target, T value) {
  const T old = *target;
  if (value < old) *target = value;
  return old;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    result |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// ---------------------------------------------------------------- the runtime's host side

typedef int cudaError_t;
typedef struct CUstream_st* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t) {
  memset(target, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(target, source, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : emulator::machine().shared_memory;
  return cudaSuccess;
}
template <class Function>
inline cudaError_t cudaFuncSetAttribute(Function*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
