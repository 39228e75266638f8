// Scales of a group: that of plain rounding, and the candidates of the search.

#pragma once

#include "group.cuh"

namespace compress {
namespace cuda {

// Scale candidates; the same tables stand in reference_quantize.py.
constexpr double kSymmetricBounds[9][2] = {{0, 0},       {0, 0},       {0.60, 2.40},
                                           {0.80, 1.90}, {0.86, 1.50}, {0.90, 1.25},
                                           {0.94, 1.12}, {0.96, 1.06}, {0.98, 1.03}};
constexpr double kAsymmetricLast[9] = {0, 0, 0.25, 0.55, 0.78, 0.92, 0.95, 0.97, 0.985};
constexpr int kBothEnds = 8, kOneEnd = 4;

inline void fill_factors(QuantizeWork& work, int bits) {
  if (work.symmetric) {
    const double half = 1 << (bits - 1);
    const double first = kSymmetricBounds[bits][0], last = kSymmetricBounds[bits][1];
    const double step = (last - first) / (kCandidates - 1);
    for (int k = 0; k < kCandidates; ++k) {
      work.low[k] = static_cast<float>(1.0 / (half * (first + step * k)));
    }
    return;
  }
  const double last = kAsymmetricLast[bits];
  for (int k = 0; k < kBothEnds; ++k) {
    work.low[k] = work.high[k] = static_cast<float>(1.0 - (1.0 - last) * (k + 1) / kBothEnds);
  }
  for (int k = 0; k < kOneEnd; ++k) {
    const float shrink = static_cast<float>(1.0 - (1.0 - last) * (k + 1) / kOneEnd);
    work.low[kBothEnds + k] = work.high[kBothEnds + kOneEnd + k] = shrink;
    work.high[kBothEnds + k] = work.low[kBothEnds + kOneEnd + k] = 1.0f;
  }
}

__device__ __forceinline__ float clip(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}

// The integer (code less zero point) of a weight.
__device__ __forceinline__ float integer(float x, float inverse, float zero_point, float top) {
  return clip(rintf(x * inverse), -zero_point, top - zero_point);
}

__device__ __forceinline__ float zero_of(float low, float scale, float top) {
  return clip(rintf(-low / scale), 0.0f, top);
}

__device__ inline Scale plain_scale(const QuantizeWork& work, float low, float high, float top) {
  const int bits = work.args.bits;
  Scale result;
  if (work.symmetric) {
    const float divisor = bits == 2 ? 1.5f : static_cast<float>((1 << (bits - 1)) - 1);
    const float scale = fmaxf(high, -low) / divisor;
    result.scale = bits == 2 ? stored_scale_above(scale, work.args.scale_kind)
                             : stored_scale(scale, work.args.scale_kind);
    result.zero_point = static_cast<float>(1 << (bits - 1));
  } else {
    result.scale = stored_scale_above((high - low) / top, work.args.scale_kind);
    result.zero_point = zero_of(low, result.scale, top);
  }
  if (low == 0 && high == 0) {
    result.scale = 1;
    if (!work.symmetric) result.zero_point = 0;
  }
  return result;
}

__device__ inline Scale candidate(const QuantizeWork& work, float low, float high, float top,
                                  int k) {
  Scale result;
  if (work.symmetric) {
    float extreme = fmaxf(high, -low);
    // A negative scale turns the grid's longer side to positive weights.
    if (work.args.signed_scale && high >= -low) extreme = -extreme;
    result.scale = stored_scale(extreme * work.low[k], work.args.scale_kind);
    result.zero_point = static_cast<float>(1 << (work.args.bits - 1));
  } else {
    const float from = low * work.low[k], to = high * work.high[k];
    result.scale = stored_scale((to - from) / top, work.args.scale_kind);
    result.zero_point = zero_of(from, result.scale, top);
  }
  return result;
}

}  // namespace cuda
}  // namespace compress
