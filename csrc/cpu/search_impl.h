// The search for the scale of least squared error; see docs/kernels.md and kernels_impl.h.

#pragma once

// Scale candidates; the same tables stand in reference_quantize.py.
constexpr double kSymmetricBounds[9][2] = {{0, 0},       {0, 0},       {0.60, 2.40},
                                           {0.80, 1.90}, {0.86, 1.50}, {0.90, 1.25},
                                           {0.94, 1.12}, {0.96, 1.06}, {0.98, 1.03}};
constexpr double kAsymmetricLast[9] = {0, 0, 0.25, 0.55, 0.78, 0.92, 0.95, 0.97, 0.985};
constexpr int kBothEnds = 8, kOneEnd = 4;

struct alignas(64) Factors {
  float low[kCandidates], high[kCandidates];  // symmetric: `low` alone
};

static void fill_factors(Factors& f, int bits, bool symmetric) {
  if (symmetric) {
    const double half = 1 << (bits - 1);
    const double first = kSymmetricBounds[bits][0], last = kSymmetricBounds[bits][1];
    const double step = (last - first) / (kCandidates - 1);
    for (int k = 0; k < kCandidates; ++k) f.low[k] = (float)(1.0 / (half * (first + step * k)));
    return;
  }
  const double last = kAsymmetricLast[bits];
  for (int k = 0; k < kBothEnds; ++k) {
    f.low[k] = f.high[k] = (float)(1.0 - (1.0 - last) * (k + 1) / kBothEnds);
  }
  for (int k = 0; k < kOneEnd; ++k) {
    const float shrink = (float)(1.0 - (1.0 - last) * (k + 1) / kOneEnd);
    f.low[kBothEnds + k] = f.high[kBothEnds + kOneEnd + k] = shrink;
    f.high[kBothEnds + k] = f.low[kBothEnds + kOneEnd + k] = 1.0f;
  }
}

// Sixteen groups' candidates: `by[k]` holds candidate k of each.
struct Candidates {
  Scales by[kCandidates];
  double error[kCandidates][kLanes];
  alignas(64) float rows[kCandidates][kLanes * kLanes];  // lanes of errors, a row a group
};

static void make_candidates(Candidates& c, const Factors& factors, const float* lows,
                            const float* highs, const QuantizeArgs& args) {
  const F low = load(lows), high = load(highs), negated = sub(set1(0), low);
  const F top = set1((float)((1 << args.bits) - 1));
  alignas(64) float extreme[kLanes];
  store(extreme, max_(high, negated));
  for (size_t i = 0; i < kLanes; ++i) {
    // A negative scale turns the grid's longer side to positive weights.
    if (args.signed_scale && highs[i] >= -lows[i]) extreme[i] = -extreme[i];
  }
  for (int k = 0; k < kCandidates; ++k) {
    F scale, zero_point = set1((float)(1 << (args.bits - 1)));
    if (!args.zero_point) {
      scale = stored(mul(load(extreme), set1(factors.low[k])), args.scale_kind);
    } else {
      const F from = mul(low, set1(factors.low[k])), to = mul(high, set1(factors.high[k]));
      scale = stored(div(sub(to, from), top), args.scale_kind);
      zero_point = min_(max_(rint_(div(sub(set1(0), from), scale)), set1(0)), top);
    }
    store(c.by[k].scale, scale);
    store(c.by[k].zero_point, zero_point);
    c.by[k].invert();
  }
}

// The lanes of group i's squared error under each candidate, in units of its squared scale.
// Weighted: each times its column's weight, a float of `columns`.
template <bool Weighted>
COMPRESS_INLINE void rank(const float* w, const uint8_t* columns, size_t n, size_t i, float top,
                          Candidates& c) {
  for (int k = 0; k < kCandidates; k += kTogether) {
    F inverse[kTogether], low[kTogether], high[kTogether], error[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      inverse[j] = set1(c.by[k + j].inverse[i]);
      low[j] = set1(-c.by[k + j].zero_point[i]);
      high[j] = set1(top - c.by[k + j].zero_point[i]);
      error[j] = set1(0);
    }
    for (size_t at = 0; at < n; at += kLanes) {
      const F x = load(w + at);
      const uint8_t* weights = Weighted ? columns + 4 * at : nullptr;
      for (int j = 0; j < kTogether; ++j) {
        const F scaled = mul(x, inverse[j]);
        const F e = sub(scaled, clip(rint_(scaled), low[j], high[j]));
        error[j] = add(error[j], weigh<Weighted>(mul(e, e), weights));
      }
    }
    for (int j = 0; j < kTogether; ++j) store(c.rows[k + j] + kLanes * i, error[j]);
  }
}

// Each group's candidate of least error; where none is finite, what `found` holds stays.
static void take_best(Candidates& c, Scales& found) {
  double best[kLanes];
  alignas(64) float folded[kLanes];
  for (size_t i = 0; i < kLanes; ++i) best[i] = (double)kInfinity;
  for (int k = 0; k < kCandidates; ++k) {
    fold_rows<kAdd>(c.rows[k], folded);
    for (size_t i = 0; i < kLanes; ++i) {
      const double scale = (double)c.by[k].scale[i];
      const double error = (c.error[k][i] + (double)folded[i]) * (scale * scale);
      const bool better = error < best[i];
      best[i] = better ? error : best[i];
      found.scale[i] = better ? c.by[k].scale[i] : found.scale[i];
      found.zero_point[i] = better ? c.by[k].zero_point[i] : found.zero_point[i];
    }
  }
  found.invert();
}

template <int K, bool Masked>
struct Search {
  const QuantizeArgs& args;
  Factors factors;
  Candidates candidates;

  explicit Search(const QuantizeArgs& args) : args(args) {
    if (!args.search) return;
    fill_factors(factors, args.bits, !args.zero_point);
    memset(&candidates, 0, sizeof candidates);  // groups that are not there are folded, too
  }

  // Replaces each group's scale and zero point where a better one is found, and writes codes.
  // `error` and `plain` get the errors of the new scales and of those given, unweighted.
  template <bool Weighted>
  void run(Batch<K, Masked>& batch, Scales& scales, Totals& error, Totals& plain) {
    batch.template measure_all<false, false, true, false>(scales, plain);
    if (!Weighted) {
      choose<false>(batch, scales, error, plain);
      return batch.encode_all(scales);
    }
    Totals weighted_error, weighted_plain;
    batch.template measure_all<false, false, true, true>(scales, weighted_plain);
    choose<true>(batch, scales, weighted_error, weighted_plain);
    batch.template measure_all<true, false, true, false>(scales, error);
  }

  // Replaces scales and zero points; `plain` and `error`, before and after, are weighted if those
  // of the columns count.
  template <bool Weighted>
  void choose(Batch<K, Masked>& batch, Scales& scales, Totals& error, const Totals& plain) {
    Scales found = scales;
    Totals refit_error;
    make_candidates(candidates, factors, batch.low, batch.high, args);
    rank_all<Weighted>(batch);
    take_best(candidates, found);
    batch.template measure_all<false, true, true, Weighted>(found, error);
    Scales refit = found;
    for (size_t i = 0; i < batch.count; ++i) {
      if (error.squares[i] > 0) refit.scale[i] = (float)(error.products[i] / error.squares[i]);
    }
    store(refit.scale, stored(load(refit.scale), args.scale_kind));
    refit.invert();
    batch.template measure_all<false, false, true, Weighted>(refit, refit_error);
    for (size_t i = 0; i < batch.count; ++i) {
      const bool better = refit_error.error[i] < error.error[i];
      error.error[i] = better ? refit_error.error[i] : error.error[i];
      const float scale = better ? refit.scale[i] : found.scale[i];
      const bool won = error.error[i] < plain.error[i];
      error.error[i] = won ? error.error[i] : plain.error[i];
      scales.scale[i] = won ? scale : scales.scale[i];
      scales.zero_point[i] = won ? found.zero_point[i] : scales.zero_point[i];
    }
    scales.invert();
  }

  template <bool Weighted>
  void rank_all(Batch<K, Masked>& batch) {
    Candidates& c = candidates;
    for (size_t i = 0; i < batch.count; ++i) {
      for (int k = 0; k < kCandidates; ++k) c.error[k][i] = 0;
      batch.each_chunk(
          i, [&](const float* from, size_t n, size_t start) __attribute__((always_inline)) {
            for (int k = 0; start && k < kCandidates; ++k) {
              c.error[k][i] += (double)reduce_add(load(c.rows[k] + kLanes * i));
            }
            const uint8_t* columns = batch.template columns_of<Weighted>(i, start);
            rank<Weighted>(from, columns, n, i, batch.top, c);
          });
    }
  }
};
