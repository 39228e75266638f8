// Groups of weights to codes and scales, by plain rounding or by a search.
// See kernels_impl.h.

#pragma once

// Scale candidates; the same tables stand in reference.py.
constexpr double kSymmetricBounds[9][2] = {{0, 0},       {0, 0},       {0.60, 2.40},
                                           {0.80, 1.90}, {0.86, 1.50}, {0.90, 1.25},
                                           {0.94, 1.12}, {0.96, 1.06}, {0.98, 1.03}};
constexpr double kAsymmetricLast[9] = {0, 0, 0.25, 0.55, 0.78, 0.92, 0.95, 0.97, 0.985};
constexpr int kBothEnds = 8, kOneEnd = 4;

struct Factors {
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

COMPRESS_INLINE F stored(F scale, Kind kind) {
  if (kind == kFloat16) return lift(round_f16(scale), 6.103515625e-05f);
  return lift(kind == kBFloat16 ? round_bf16(scale) : scale, 1.17549435e-38f);
}
COMPRESS_INLINE float stored_scalar(float scale, Kind kind) {
  float lanes[kLanes];
  store(lanes, stored(set1(scale), kind));
  return lanes[0];
}

static void write_scale(uint8_t* out, size_t index, float scale, Kind kind) {
  uint32_t bits;
  memcpy(&bits, &scale, 4);
  if (kind == kFloat32) {
    memcpy(out + 4 * index, &bits, 4);
    return;
  }
  uint16_t half = (uint16_t)(bits >> 16);
  if (kind == kFloat16) {  // a normal fp16 value by now: only the exponent's bias differs
    half = (uint16_t)((bits >> 16 & 0x8000u) | (((bits & 0x7FFFFFFFu) - (112u << 23)) >> 13));
  }
  memcpy(out + 2 * index, &half, 2);
}

struct Range {
  F low, high, energy, pruned;
};

// One block of load_group: sixteen weights, padded with zeros that nothing here can feel.
template <bool Masked>
COMPRESS_INLINE void load_block(F x, const uint8_t* mask, float* out, Range& r) {
  r.energy = add(r.energy, mul(x, x));
  if (Masked) {
    const F gone = drop(x, mask);
    r.pruned = add(r.pruned, mul(gone, gone));
    x = keep(x, mask);
  }
  r.low = min_(r.low, x);
  r.high = max_(r.high, x);
  store(out, x);
}

// Converts up to kChunk weights to float32 with pruned ones zeroed, padded to whole blocks.
template <int K, bool Masked>
COMPRESS_INLINE void load_group(const uint8_t* w, const uint8_t* mask, size_t n, float* out,
                                Range& range) {
  Range r = range;
  const auto block = [&](size_t i) __attribute__((always_inline)) {
    load_block<Masked>(load_weights<K>(w + i * item_size<K>()), mask + i, out + i, r);
  };
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (size_t byte = 0; byte < 2 * kLanes * item_size<K>(); byte += 64) {
      __builtin_prefetch(w + i * item_size<K>() + byte + kAhead);
    }
    block(i);
    block(i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) block(i);
  if (i < n) {
    uint8_t kept[kLanes] = {0};
    if (Masked) memcpy(kept, mask + i, n - i);
    load_block<Masked>(load_some<K>(w + i * item_size<K>(), n - i), kept, out + i, r);
  }
  range = r;
}

struct Moments {
  double products, squares;  // sum of w * q, sum of q * q, with q = code - zero_point
};

// Codes by the reciprocal of the scale; returns the lanes of their squared error. Either output may
// be null. Clip: some weight may round to an integer beyond the grid.
template <bool Codes, bool Fit, bool Clip>
COMPRESS_INLINE F measure(const float* w, size_t n, float scale, float zero_point, float top,
                          uint8_t* codes, Moments* moments) {
  const F s = set1(scale), inverse = set1(1.0f / scale), zero = set1(zero_point);
  const F low = set1(-zero_point), high = set1(top - zero_point);
  F error = set1(0), products = set1(0), squares = set1(0);
  const auto block = [&](F x) __attribute__((always_inline)) {
    const F nearest = rint_(mul(x, inverse));
    const F q = Clip ? min_(max_(nearest, low), high) : nearest;
    const F e = sub(x, mul(q, s));
    error = add(error, mul(e, e));
    if (Fit) {
      products = add(products, mul(x, q));
      squares = add(squares, mul(q, q));
    }
    return q;
  };
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F first = block(load(w + i)), second = block(load(w + i + kLanes));
    if (Codes) store_u8_pair(codes + i, first, second, (int)zero_point);
  }
  for (; i + kLanes <= n; i += kLanes) {
    const F q = block(load(w + i));
    if (Codes) store_u8(codes + i, add(q, zero));
  }
  if (i < n) {
    uint8_t bytes[kLanes];
    store_u8(bytes, add(block(load(w + i)), zero));
    if (Codes) memcpy(codes + i, bytes, n - i);
  }
  if (Fit) {
    moments->products += (double)reduce_add(products);
    moments->squares += (double)reduce_add(squares);
  }
  return error;
}

struct Candidates {
  float scale[kCandidates], inverse[kCandidates], zero_point[kCandidates];
};

static void make_candidates(Candidates& c, const Factors& factors, float low, float high,
                            const QuantizeArgs& args, float top) {
  F scale, zero_point;
  if (!args.zero_point) {
    float extreme = larger(high, -low);
    // A negative scale turns the grid's longer side to positive weights.
    if (args.signed_scale && high >= -low) extreme = -extreme;
    scale = stored(mul(set1(extreme), load(factors.low)), args.scale_kind);
    zero_point = set1((float)(1 << (args.bits - 1)));
  } else {
    const F from = mul(set1(low), load(factors.low)), to = mul(set1(high), load(factors.high));
    scale = stored(div(sub(to, from), set1(top)), args.scale_kind);
    zero_point = min_(max_(rint_(div(sub(set1(0), from), scale)), set1(0)), set1(top));
  }
  store(c.scale, scale);
  store(c.inverse, div(set1(1), scale));
  store(c.zero_point, zero_point);
}

// errors[k] += squared error of candidate k in units of its squared scale.
COMPRESS_INLINE void rank(const float* w, size_t n, const Candidates& c, float top,
                          double* errors) {
  for (int k = 0; k < kCandidates; k += kTogether) {
    F inverse[kTogether], low[kTogether], high[kTogether], error[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      inverse[j] = set1(c.inverse[k + j]);
      low[j] = set1(-c.zero_point[k + j]);
      high[j] = set1(top - c.zero_point[k + j]);
      error[j] = set1(0);
    }
    for (size_t i = 0; i < n; i += kLanes) {
      const F x = load(w + i);
      for (int j = 0; j < kTogether; ++j) {
        const F scaled = mul(x, inverse[j]);
        const F e = sub(scaled, min_(max_(rint_(scaled), low[j]), high[j]));
        error[j] = add(error[j], mul(e, e));
      }
    }
    for (int j = 0; j < kTogether; ++j) errors[k + j] += (double)reduce_add(error[j]);
  }
}

// One group of a row. Its weights stay in `w` where they fit, else pass through it chunk by chunk.
template <int K, bool Masked>
struct Group {
  const QuantizeArgs* args;
  const Factors* factors;
  size_t first, size;  // flat index of the first weight, number of weights
  float* w;            // aligned; padded to whole blocks
  uint8_t* spare;      // [kChunk]

  float top, low, high;
  double energy, pruned;  // sums of squares: of all weights, of pruned ones

  size_t chunk(size_t start) const { return smaller(kChunk, size - start); }
  uint8_t* codes(size_t start) const { return args->codes + first + start; }

  void read(size_t start, Range& r) const {
    load_group<K, Masked>(args->weights + (first + start) * item_size<K>(),
                          Masked ? args->mask + first + start : nullptr, chunk(start), w, r);
  }
  // Brings a chunk into the buffer, unless the group is its only one and there already.
  void recall(size_t start) const {
    if (size <= kChunk) return;
    Range ignored{set1(0), set1(0), set1(0), set1(0)};
    read(start, ignored);
  }

  // Leaves the last chunk's lanes in `range`: those of several groups are folded together.
  void survey(Range& range) {
    top = (float)((1 << args->bits) - 1);
    energy = pruned = 0;
    range.low = range.high = range.energy = range.pruned = set1(0);
    for (size_t start = 0; start < size; start += kChunk) {
      if (start) {
        energy += (double)reduce_add(range.energy);
        if (Masked) pruned += (double)reduce_add(range.pruned);
        range.energy = range.pruned = set1(0);
      }
      read(start, range);
    }
  }

  // The squared error but for the last chunk's, whose lanes are left in `last`.
  template <bool Codes, bool Fit, bool Clip>
  double error_but(F& last, float scale, float zero_point, uint8_t* out, Moments* moments) const {
    double error = 0;
    for (size_t start = 0; start < size; start += kChunk) {
      if (start) error += (double)reduce_add(last);
      recall(start);
      last = measure<Codes, Fit, Clip>(w, chunk(start), scale, zero_point, top,
                                       Codes ? out + start : nullptr, moments);
    }
    return error;
  }
  template <bool Codes, bool Fit>
  double error_of(float scale, float zero_point, uint8_t* out, Moments* moments) const {
    F last = set1(0);
    const double error = error_but<Codes, Fit, true>(last, scale, zero_point, out, moments);
    return error + (double)reduce_add(last);
  }

  // Writes the codes of plain rounding; returns what error_but does.
  double round(F& last, bool clip, float scale, float zero_point) const {
    if (clip) return error_but<true, false, true>(last, scale, zero_point, codes(0), nullptr);
    return error_but<true, false, false>(last, scale, zero_point, codes(0), nullptr);
  }

  // Writes the codes of the best candidate and replaces `scale` and `zero_point` where it beats
  // plain rounding, whose error goes to `plain`; returns the error.
  double search(double& plain, float& scale, float& zero_point) const {
    if (low == 0 && high == 0) {
      return plain = error_of<true, false>(scale, zero_point, codes(0), nullptr);
    }
    plain = error_of<false, false>(scale, zero_point, nullptr, nullptr);
    alignas(64) Candidates c;
    make_candidates(c, *factors, low, high, *args, top);
    double errors[kCandidates] = {0}, best = (double)kInfinity;
    for (size_t start = 0; start < size; start += kChunk) {
      recall(start);
      rank(w, chunk(start), c, top, errors);
    }
    float found = scale, zero = zero_point;
    for (int k = 0; k < kCandidates; ++k) {
      const double error = errors[k] * ((double)c.scale[k] * (double)c.scale[k]);
      if (error < best) {
        best = error;
        found = c.scale[k];
        zero = c.zero_point[k];
      }
    }
    const bool once = size <= kChunk;  // the spare buffer then holds the refit's codes
    Moments m{0, 0};
    double error = error_of<true, true>(found, zero, codes(0), &m);
    const double ratio = m.squares > 0 ? m.products / m.squares : (double)found;
    const float refit = stored_scalar((float)ratio, args->scale_kind);
    const double refit_error = once ? error_of<true, false>(refit, zero, spare, nullptr)
                                    : error_of<false, false>(refit, zero, nullptr, nullptr);
    const bool better = refit_error < error;
    if (better) {
      error = refit_error;
      found = refit;
    }
    if (!(error < plain)) {
      error_of<true, false>(scale, zero_point, codes(0), nullptr);
      return plain;
    }
    if (better && once) {
      memcpy(codes(0), spare, size);
    } else if (better) {
      error_of<true, false>(found, zero, codes(0), nullptr);
    }
    scale = found;
    zero_point = zero;
    return error;
  }
};

// Scales and zero points of plain rounding for sixteen groups.
static void plain_scales(const QuantizeArgs& args, const float* lows, const float* highs,
                         float* scales, float* zero_points) {
  const float top = (float)((1 << args.bits) - 1);
  const F low = load(lows), high = load(highs), negated = sub(set1(0), low);
  F scale, zero_point;
  if (!args.zero_point) {
    const float divisor = args.bits == 2 ? 1.5f : (float)((1 << (args.bits - 1)) - 1);
    scale = stored(div(max_(high, negated), set1(divisor)), args.scale_kind);
    zero_point = set1((float)(1 << (args.bits - 1)));
  } else {
    scale = stored(div(sub(high, low), set1(top)), args.scale_kind);
    zero_point = min_(max_(rint_(div(negated, scale)), set1(0)), set1(top));
  }
  store(scales, scale);
  store(zero_points, zero_point);
  for (size_t i = 0; i < kLanes; ++i) {
    if (lows[i] == 0 && highs[i] == 0) {
      scales[i] = 1;
      zero_points[i] = args.zero_point ? 0.0f : zero_points[i];
    }
  }
}

// Sixteen groups' lanes, a row each, and what their folds give.
struct Batch {
  float rows[4][kLanes * kLanes];
  float low[kLanes], high[kLanes], energy[kLanes], pruned[kLanes];
  float scale[kLanes], zero_point[kLanes], error[kLanes];
};

// Up to sixteen groups at a time: first all are read, then all are rounded, so that one group's
// chain of folds and divisions does not hold up the next group's.
template <int K, bool Masked>
static int64_t quantize_rows(const QuantizeArgs& args) {
  alignas(64) float w[kChunk];
  alignas(64) uint8_t spare[kChunk];
  alignas(64) Factors factors;
  alignas(64) Batch batch;
  memset(&batch, 0, sizeof batch);  // a row without a group is folded, too
  fill_factors(factors, args.bits, !args.zero_point);
  // The largest weight of a symmetric group becomes the largest code, however its scale is rounded:
  // nothing to clip. With 2 bits it lies between two codes.
  const bool clip = args.zero_point || args.bits == 2;
  Group<K, Masked> groups[kLanes];
  size_t index = 0;
  for (size_t row = 0; row < args.rows; ++row) {
    double error_sum = 0, plain_sum = 0, energy_sum = 0;
    for (size_t column = 0; column < args.columns;) {
      size_t count = 0, used = 0;
      while (column < args.columns && count < kLanes) {
        const size_t size = smaller(args.group_size, args.columns - column);
        const size_t padded = (smaller(size, kChunk) + kLanes - 1) / kLanes * kLanes;
        if (used + padded > kChunk) break;
        Group<K, Masked>& group = groups[count];
        group.args = &args;
        group.factors = &factors;
        group.first = row * args.columns + column;
        group.size = size;
        group.w = w + used;
        group.spare = spare;
        Range range;
        group.survey(range);
        store(batch.rows[0] + kLanes * count, range.low);
        store(batch.rows[1] + kLanes * count, range.high);
        store(batch.rows[2] + kLanes * count, range.energy);
        if (Masked) store(batch.rows[3] + kLanes * count, range.pruned);
        used += padded;
        column += size;
        ++count;
      }
      fold_rows<kMin>(batch.rows[0], batch.low);
      fold_rows<kMax>(batch.rows[1], batch.high);
      fold_rows<kAdd>(batch.rows[2], batch.energy);
      if (Masked) fold_rows<kAdd>(batch.rows[3], batch.pruned);
      plain_scales(args, batch.low, batch.high, batch.scale, batch.zero_point);
      double energy = 0;
      for (size_t i = 0; i < count; ++i) {
        groups[i].low = batch.low[i];
        groups[i].high = batch.high[i];
        groups[i].energy += (double)batch.energy[i];
        groups[i].pruned += (double)batch.pruned[i];
        energy += groups[i].energy;
      }
      // A NaN or an infinity spoils the sum of squares; so may large weights: then look closely.
      const bool finite = energy < (double)kInfinity;
      for (size_t i = 0; i < count; ++i) {
        if (!finite) {
          const uint8_t* from = args.weights + groups[i].first * item_size<K>();
          const int64_t bad = FiniteIndex{from, groups[i].size}.template run<K>();
          if (bad >= 0) return (int64_t)groups[i].first + bad;
        }
        if (!(batch.scale[i] < kInfinity)) return -2 - (int64_t)groups[i].first;
      }
      double error[kLanes], plain[kLanes];
      if (args.search) {
        for (size_t i = 0; i < count; ++i) {
          error[i] = groups[i].search(plain[i], batch.scale[i], batch.zero_point[i]);
        }
      } else {
        for (size_t i = 0; i < count; ++i) {
          F last = set1(0);
          plain[i] = groups[i].round(last, clip, batch.scale[i], batch.zero_point[i]);
          store(batch.rows[0] + kLanes * i, last);
        }
        fold_rows<kAdd>(batch.rows[0], batch.error);
        for (size_t i = 0; i < count; ++i) error[i] = plain[i] += (double)batch.error[i];
      }
      for (size_t i = 0; i < count; ++i, ++index) {
        write_scale(args.scale, index, batch.scale[i], args.scale_kind);
        if (args.zero_point) args.zero_point[index] = (uint8_t)batch.zero_point[i];
        error_sum += error[i] + groups[i].pruned;
        plain_sum += plain[i] + groups[i].pruned;
        energy_sum += groups[i].energy;
      }
    }
    double* sums = args.sums + 3 * row;
    sums[0] = error_sum;
    sums[1] = plain_sum;
    sums[2] = energy_sum;
  }
  return -1;
}

struct QuantizeGroups {
  const QuantizeArgs& args;

  template <int K>
  int64_t run() const {
    return args.mask ? quantize_rows<K, true>(args) : quantize_rows<K, false>(args);
  }
};

static int64_t quantize_groups(const QuantizeArgs& args) {
  return by_kind(args.kind, QuantizeGroups{args});
}
