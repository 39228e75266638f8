// Codes, scales and zero points of groups: plain rounding, and the search over 16 candidates.
//
// Every float operation stands in the order of compress/kernels/reference_quantize.py, is rounded
// by itself
// (--fmad=false) and divides by IEEE rules. All lanes of a team work out a group's scalars alike.

#include "scale.cuh"

namespace compress {
namespace cuda {
namespace {

constexpr unsigned kThreads = 256, kWideThreads = kMostTeams * kLanes;

// The squared error under a scale.
template <class G>
__device__ double error_of(const G& group, Scale s, float top) {
  const float inverse = 1.0f / s.scale;
  double sums[1];
  group.total(sums, [&](float x, i64, float (&lanes)[1]) {
    const float e = x - integer(x, inverse, s.zero_point, top) * s.scale;
    lanes[0] += e * e;
  });
  return sums[0];
}

// The best candidate or its least-squares refit, where it beats plain rounding; `error` follows.
template <class G>
__device__ Scale search(const QuantizeWork& work, const G& group, Scale plain, float low,
                        float high, float top, double& error) {
  // Each lane prepares one candidate.
  const Scale own = candidate(work, low, high, top, group.lane);
  const float own_inverse = 1.0f / own.scale;
  const int team_start = lane_index() - group.lane;
  Scale best = plain;
  double least = static_cast<double>(__uint_as_float(0x7F800000u));
  for (int k = 0; k < kCandidates; ++k) {
    Scale s;
    s.scale = __shfl_sync(kFull, own.scale, team_start + k);
    s.zero_point = __shfl_sync(kFull, own.zero_point, team_start + k);
    const float inverse = __shfl_sync(kFull, own_inverse, team_start + k);
    double sums[1];
    group.total(sums, [&](float x, i64, float (&lanes)[1]) {
      const float scaled = x * inverse;
      const float e = scaled - clip(rintf(scaled), -s.zero_point, top - s.zero_point);
      lanes[0] += e * e;
    });
    const double scale = static_cast<double>(s.scale), e = sums[0] * (scale * scale);
    if (e < least) {
      least = e;
      best = s;
    }
  }

  const float inverse = 1.0f / best.scale;
  double sums[3];
  group.total(sums, [&](float x, i64, float (&lanes)[3]) {
    const float q = integer(x, inverse, best.zero_point, top);
    const float e = x - q * best.scale;
    lanes[0] += e * e;
    lanes[1] += x * q;
    lanes[2] += q * q;
  });
  double found = sums[0];
  const double ratio = sums[2] > 0 ? sums[1] / sums[2] : static_cast<double>(best.scale);
  Scale refit;
  refit.scale = stored_scale(static_cast<float>(ratio), work.args.scale_kind);
  refit.zero_point = best.zero_point;
  const double refit_error = error_of(group, refit, top);
  if (refit_error < found) {
    found = refit_error;
    best = refit;
  }
  if (!(found < error)) return plain;
  error = found;
  return best;
}

template <class G>
__device__ void write(const QuantizeWork& work, const G& group, bool real, i64 index, i64 first,
                      Scale s, float top) {
  const float inverse = 1.0f / s.scale;
  uint8_t* codes = work.args.codes + first;
  double ignored[1];
  group.total(ignored, [&](float x, i64 i, float (&)[1]) {
    const float q = integer(x, inverse, s.zero_point, top);
    if (i < group.size) codes[i] = static_cast<uint8_t>(static_cast<int>(q + s.zero_point));
  });
  if (!real || group.lane != 0 || group.team != 0) return;
  store_kind(work.args.scale, work.args.scale_kind, index, s.scale);
  if (!work.symmetric) work.args.zero_point[index] = static_cast<uint8_t>(s.zero_point);
}

template <int K, bool Masked, int Registers, bool Wide>
__global__ void __launch_bounds__(Wide ? kWideThreads : kThreads)
    quantize_kernel(const QuantizeWork work) {
  using G = Group<K, Masked, Registers, Wide>;
  G group;
  group.lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int teams = static_cast<int>(blockDim.x) / kLanes;
  group.team = Wide ? team : 0;
  group.teams = Wide ? teams : 1;
  const i64 index =
      Wide ? static_cast<i64>(blockIdx.x) : static_cast<i64>(blockIdx.x) * teams + team;
  const bool real = index < work.rows * work.groups;  // the others keep their warp company
  const i64 row = real ? index / work.groups : 0;
  const i64 begin = real ? index % work.groups * work.group_size : 0;
  const i64 first = row * work.columns + begin, left = work.columns - begin;
  group.size = !real ? 0 : left < work.group_size ? left : work.group_size;
  group.w = reinterpret_cast<const Stored<K>*>(work.args.weights) + first;
  group.mask = Masked ? work.args.mask + first : nullptr;
  group.fill();

  const float top = static_cast<float>((1 << work.args.bits) - 1);
  float low = 0, high = 0;
  double energies[2];  // of all weights, of pruned ones
  group.total(energies, [&](float x, i64 i, float (&lanes)[2]) {
    low = fminf(low, x);
    high = fmaxf(high, x);
    const float all = Masked && i < group.size ? group.raw(i) : x;
    lanes[0] += all * all;
    if (Masked && i < group.size && !group.mask[i]) lanes[1] += all * all;
  });
  group.extremes(low, high);
  // A NaN or an infinity spoils the sum of squares; so may large weights: then look closely.
  if (!(energies[0] < static_cast<double>(__uint_as_float(0x7F800000u)))) {
    const i64 step = static_cast<i64>(group.teams) * kLanes;
    for (i64 i = group.team * kLanes + group.lane; i < group.size; i += step) {
      if (key_of(group.w[i]) >= infinite_key<K>()) {
        atomicMin(work.infinite, static_cast<long long>(first + i));
      }
    }
  }
  const Scale plain = plain_scale(work, low, high, top);
  if (real && !(plain.scale < __uint_as_float(0x7F800000u)) && group.lane == 0) {
    atomicMin(work.overflow, static_cast<long long>(first));
  }
  const double plain_error = error_of(group, plain, top);
  double error = plain_error;
  Scale chosen = plain;
  if (work.args.search) chosen = search(work, group, plain, low, high, top, error);
  write(work, group, real, index, first, chosen, top);
  if (!real || group.lane != 0 || group.team != 0) return;
  double* totals = work.totals + 3 * index;
  totals[0] = error + energies[1];
  totals[1] = plain_error + energies[1];
  totals[2] = energies[0];
}

// sums [rows, 3]: the groups' totals, added up in order.
__global__ void sum_groups(const double* totals, i64 rows, i64 groups, double* sums) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * 3) return;
  const double* from = totals + i / 3 * groups * 3 + i % 3;
  double sum = 0;
#pragma unroll 16
  for (i64 g = 0; g < groups; ++g) sum += from[g * 3];  // loads run ahead, sums in order
  sums[i] = sum;
}

template <int K, bool Masked>
void launch_quantize(const QuantizeWork& work, const Place& place) {
  constexpr const char* name = "quantize_groups";
  const i64 count = work.rows * work.groups;
  const auto go = [&](void (*kernel)(QuantizeWork), i64 blocks, unsigned threads) {
    launch(name, place, kernel, grid_x(blocks, name), threads, 0, work);
  };
  const i64 blocks = ceil_div(count, kThreads / kLanes);
  if (work.group_size <= 4 * kLanes) {
    go(&quantize_kernel<K, Masked, 4, false>, blocks, kThreads);
  } else if (work.group_size <= 8 * kLanes) {
    go(&quantize_kernel<K, Masked, 8, false>, blocks, kThreads);
  } else if (work.group_size <= kChunk) {
    go(&quantize_kernel<K, Masked, 0, false>, blocks, kThreads);
  } else {
    go(&quantize_kernel<K, Masked, 0, true>, count, kWideThreads);
  }
}

}  // namespace

i64 quantize_scratch(i64 rows, i64 groups) {
  return 2 + 3 * rows * groups;
}

i64 quantize_groups(const QuantizeArgs& args, void* scratch, Place place) {
  const DeviceGuard guard(place.device);
  const i64 rows = static_cast<i64>(args.rows), columns = static_cast<i64>(args.columns);
  if (rows == 0) return -1;
  if (columns == 0) {
    check(cudaMemsetAsync(args.sums, 0, static_cast<size_t>(rows) * 3 * sizeof(double),
                          stream_of(place)),
          "quantize_groups");
    return -1;
  }
  QuantizeWork work;
  work.args = args;
  work.rows = rows;
  work.columns = columns;
  // A longer group than the row is the row.
  work.group_size = args.group_size < args.columns ? static_cast<i64>(args.group_size) : columns;
  work.groups = ceil_div(columns, work.group_size);
  work.symmetric = !args.zero_point;
  fill_factors(work, args.bits);
  work.infinite = static_cast<long long*>(scratch);
  work.overflow = work.infinite + 1;
  work.totals = static_cast<double*>(scratch) + 2;
  check(cudaMemsetAsync(scratch, 0x7F, 2 * sizeof(long long), stream_of(place)), "quantize_groups");
  by_kind(args.kind, [&](auto k) {
    constexpr int K = decltype(k)::value;
    if (args.mask) {
      launch_quantize<K, true>(work, place);
    } else {
      launch_quantize<K, false>(work, place);
    }
  });
  launch("quantize_groups (sums)", place, &sum_groups,
         grid_x(ceil_div(rows * 3, kThreads), "quantize_groups (sums)"), kThreads, 0, work.totals,
         rows, work.groups, args.sums);
  long long status[2];
  copy_to_host(status, scratch, sizeof status, place);
  const i64 infinite = status[0], overflow = status[1], size = rows * columns;
  if (infinite < size) {  // the first offending group decides; inside one, the weight
    const i64 column = infinite % columns;
    if (infinite - column + column / work.group_size * work.group_size <= overflow) return infinite;
  }
  return overflow < size ? -2 - overflow : -1;
}

}  // namespace cuda
}  // namespace compress
