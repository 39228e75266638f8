// One group of weights under one scale, worked on by one or more teams of sixteen lanes.
//
// Lane i of a team has entries i, i + 16, ... of a chunk of 4096: the float32 lanes of `lane_sum`
// in compress/kernels/reference_sums.py, ended by the same tree. Chunks are added up in double, in
// order.

#pragma once

#include "warp.cuh"

namespace compress {
namespace cuda {

constexpr int kLanes = 16, kCandidates = 16;
constexpr i64 kChunk = 4096;
constexpr int kMostTeams = 32;  // of a block

struct QuantizeWork {
  QuantizeArgs args;
  i64 rows, columns, group_size, groups;  // groups: a row
  int symmetric;
  float low[kCandidates], high[kCandidates];  // how far candidates shrink; symmetric: `low` alone
  double* totals;                             // [rows, groups, 3]
  long long *infinite, *overflow;             // first such weight, first such group's first weight
};

// To the stored dtype, but no magnitude below its smallest normal number.
__device__ __forceinline__ float stored_scale(float scale, int kind) {
  float rounded = scale, tiny = 1.17549435e-38f;
  if (kind == kFloat16) {
    rounded = half_to_float(float_to_half(scale));
    tiny = 6.103515625e-05f;
  } else if (kind == kBFloat16) {
    rounded = bfloat_to_float(float_to_bfloat(scale));
  }
  return fabsf(rounded) < tiny ? copysignf(tiny, rounded) : rounded;
}

// Rounded up instead: codes made to end at the largest weight still reach it. What is added before
// the second rounding is between 3/4 and 3/2 of a step: it ends at the next value.
__device__ __forceinline__ float stored_scale_above(float scale, int kind) {
  const float rounded = stored_scale(scale, kind);
  const float step = kind == kFloat16 ? 1.0f + 0x1.8p-11f : 1.0f + 0x1.8p-8f;
  return rounded < scale ? stored_scale(rounded * step, kind) : rounded;
}

struct Scale {
  float scale, zero_point;
};

// Registers: entries that a lane keeps in registers; 0: it reads them again from memory.
// Wide: all teams of the block share one group of any size, else a team has a group of one chunk.
template <int K, bool Masked, int Registers, bool Wide>
struct Group {
  const Stored<K>* w;
  const uint8_t* mask;
  i64 size;
  int lane, team, teams;
  float kept[Registers ? Registers : 1];

  __device__ float raw(i64 i) const { return to_float<K>(w[i]); }
  __device__ float load(i64 i) const { return Masked && !mask[i] ? 0.0f : raw(i); }

  __device__ void fill() {
    if constexpr (Registers > 0) {
#pragma unroll
      for (int j = 0; j < Registers; ++j) {
        const i64 i = lane + kLanes * j;
        kept[j] = i < size ? load(i) : 0.0f;
      }
    }
  }

  // term(entry, its index, lanes) adds to N float lanes; `sums` gets their totals, in all threads.
  template <int N, class Term>
  __device__ void total(double (&sums)[N], Term term) const {
    for (int s = 0; s < N; ++s) sums[s] = 0;
    if constexpr (!Wide) {
      float lanes[N] = {};
      if constexpr (Registers > 0) {
#pragma unroll
        for (int j = 0; j < Registers; ++j) term(kept[j], lane + kLanes * j, lanes);
      } else {
        for (i64 i = lane; i < size; i += kLanes) term(load(i), i, lanes);
      }
#pragma unroll
      for (int s = 0; s < N; ++s) sums[s] = static_cast<double>(lanes_sum<kLanes>(lanes[s]));
    } else {
      __shared__ float partial[kMostTeams][N];
      const i64 chunks = (size + kChunk - 1) / kChunk;
      for (i64 round = 0; round < chunks; round += teams) {
        float lanes[N] = {};
        const i64 begin = (round + team) * kChunk;
        const i64 end = begin + kChunk < size ? begin + kChunk : size;
        for (i64 i = begin + lane; i < end; i += kLanes) term(load(i), i, lanes);
#pragma unroll
        for (int s = 0; s < N; ++s) {
          const float sum = lanes_sum<kLanes>(lanes[s]);
          if (lane == 0) partial[team][s] = sum;
        }
        __syncthreads();
        const i64 here = chunks - round < teams ? chunks - round : teams;
        for (i64 t = 0; t < here; ++t) {
          for (int s = 0; s < N; ++s) sums[s] += static_cast<double>(partial[t][s]);
        }
        __syncthreads();
      }
    }
  }

  // The smallest and the largest of `low` and `high` over the group's threads. Once a kernel: no
  // barrier keeps a second call from writing over what is still read.
  __device__ void extremes(float& low, float& high) const {
#pragma unroll
    for (int distance = kLanes / 2; distance; distance /= 2) {
      low = fminf(low, __shfl_xor_sync(kFull, low, distance));
      high = fmaxf(high, __shfl_xor_sync(kFull, high, distance));
    }
    if constexpr (Wide) {
      __shared__ float lows[kMostTeams], highs[kMostTeams];
      if (lane == 0) {
        lows[team] = low;
        highs[team] = high;
      }
      __syncthreads();
      for (int t = 0; t < teams; ++t) {
        low = fminf(low, lows[t]);
        high = fmaxf(high, highs[t]);
      }
    }
  }
};

}  // namespace cuda
}  // namespace compress
