// Groups of weights to codes and scales, by plain rounding or by a search.
// See kernels_impl.h.
//
// Up to sixteen groups of a row are worked on together, stage by stage: their sums are folded at
// once, and no group's chain of folds and divisions holds up the next group's.

#pragma once

COMPRESS_INLINE F stored(F scale, Kind kind) {
  if (kind == kFloat16) return lift(round_f16(scale), 6.103515625e-05f);
  return lift(kind == kBFloat16 ? round_bf16(scale) : scale, 1.17549435e-38f);
}

// Rounded up instead: codes made to end at the largest weight still reach it. What is added before
// the second rounding is between 3/4 and 3/2 of a step: it ends at the next value.
COMPRESS_INLINE F stored_above(F scale, Kind kind) {
  const float step = kind == kFloat16 ? 1.0f + 0x1.8p-11f : 1.0f + 0x1.8p-8f;
  const F rounded = stored(scale, kind), above = stored(mul(rounded, set1(step)), kind);
  alignas(64) float exact[kLanes], nearest[kLanes], next[kLanes];
  store(exact, scale);
  store(nearest, rounded);
  store(next, above);
  for (size_t i = 0; i < kLanes; ++i) nearest[i] = nearest[i] < exact[i] ? next[i] : nearest[i];
  return load(nearest);
}

// The first `count` of sixteen scales.
static void write_scales(uint8_t* out, const float* scales, size_t count, Kind kind) {
  if (kind == kFloat32) {
    memcpy(out, scales, 4 * count);
    return;
  }
  uint32_t bits[kLanes];
  uint16_t halves[kLanes];
  memcpy(bits, scales, sizeof bits);
  for (size_t i = 0; i < kLanes; ++i) {
    // A normal fp16 value by now: only the exponent's bias differs.
    const uint32_t half =
        (bits[i] >> 16 & 0x8000u) | (((bits[i] & 0x7FFFFFFFu) - (112u << 23)) >> 13);
    halves[i] = (uint16_t)(kind == kFloat16 ? half : bits[i] >> 16);
  }
  memcpy(out, halves, 2 * count);
}

// ---------------------------------------------------------------- one chunk of a group

struct Range {
  F low, high, energy, pruned;  // of zero or less, of zero or more, sums of squares
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
  r.low = lower(r.low, x);
  r.high = raise(r.high, x);
  store(out, x);
}

// Converts up to kChunk weights to float32 with pruned ones zeroed, padded to whole blocks.
template <int K, bool Masked>
COMPRESS_INLINE void load_group(const uint8_t* w, const uint8_t* mask, size_t n, float* out,
                                Range& range) {
  Range r = range;
  const auto block = [&](size_t i) __attribute__((always_inline)) {
    load_block<Masked>(load_weights<K>(w + i * item_size<K>()), Masked ? mask + i : nullptr,
                       out + i, r);
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

struct Scale {
  float scale, inverse, zero_point, top;
};

// The lanes of sums over a chunk: of (w - decoded)^2, of w * q and of q * q, q = code - zero_point.
struct GroupSums {
  F error, products, squares;
};

// Sixteen terms, each times its column's weight where those count.
template <bool Weighted>
COMPRESS_INLINE F weigh(F term, const uint8_t* weights) {
  return Weighted ? mul(term, load(weights)) : term;
}

// Codes by the reciprocal of the scale, where wanted, and the sums that they leave. Fit: all three
// sums. Clip: some weight may round to an integer beyond the grid. Short: a scale has 11 bits, so
// that its product with an integer is exact. Weighted: each term times its column's weight, a float
// of `columns`.
template <bool Codes, bool Fit, bool Clip, bool Short, bool Weighted>
COMPRESS_INLINE GroupSums measure(const float* w, size_t n, const Scale& by, uint8_t* codes,
                                  const uint8_t* columns) {
  const F s = set1(by.scale), inverse = set1(by.inverse), zero = set1(by.zero_point);
  const F low = set1(-by.zero_point), high = set1(by.top - by.zero_point);
  GroupSums r{set1(0), set1(0), set1(0)};
  const auto block = [&](F x, size_t i) __attribute__((always_inline)) {
    const uint8_t* weights = Weighted ? columns + 4 * i : nullptr;
    const F nearest = rint_(mul(x, inverse));
    const F q = Clip ? clip(nearest, low, high) : nearest;
    const F e = Short ? sub_exact(x, q, s) : sub(x, mul(q, s));
    r.error = add(r.error, weigh<Weighted>(mul(e, e), weights));
    if (Fit) {
      r.products = add(r.products, weigh<Weighted>(mul(x, q), weights));
      r.squares = add(r.squares, weigh<Weighted>(mul(q, q), weights));
    }
    return q;
  };
  size_t i = 0;
  for (; Codes && i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F first = block(load(w + i), i), second = block(load(w + i + kLanes), i + kLanes);
    store_u8_pair(codes + i, first, second, (int)by.zero_point);
  }
  for (; i + kLanes <= n; i += kLanes) {
    const F q = block(load(w + i), i);
    if (Codes) store_u8(codes + i, add(q, zero));
  }
  if (i < n) {
    uint8_t bytes[kLanes];
    store_u8(bytes, add(block(load(w + i), i), zero));
    if (Codes) memcpy(codes + i, bytes, n - i);
  }
  return r;
}

// ---------------------------------------------------------------- sixteen groups

// A lane a group, or a candidate.
struct alignas(64) Scales {
  float scale[kLanes], inverse[kLanes], zero_point[kLanes];

  void invert() { store(inverse, div(set1(1), load(scale))); }
};

// Scales and zero points of plain rounding; lows and highs as `Range` has them.
static void plain_scales(const QuantizeArgs& args, const float* lows, const float* highs,
                         Scales& out) {
  const float top = (float)((1 << args.bits) - 1);
  const F low = load(lows), high = load(highs), negated = sub(set1(0), low);
  F scale, zero_point;
  if (!args.zero_point) {
    const float divisor = args.bits == 2 ? 1.5f : (float)((1 << (args.bits - 1)) - 1);
    scale = div(max_(high, negated), set1(divisor));
    // From 3 bits on the largest weight keeps the largest code, however its scale is rounded.
    scale = args.bits == 2 ? stored_above(scale, args.scale_kind) : stored(scale, args.scale_kind);
    zero_point = set1((float)(1 << (args.bits - 1)));
  } else {
    scale = stored_above(div(sub(high, low), set1(top)), args.scale_kind);
    zero_point = min_(max_(rint_(div(negated, scale)), set1(0)), set1(top));
  }
  store(out.scale, scale);
  store(out.zero_point, zero_point);
  for (size_t i = 0; i < kLanes; ++i) {
    if (lows[i] == 0 && highs[i] == 0) {
      out.scale[i] = 1;
      if (args.zero_point) out.zero_point[i] = 0;
    }
  }
  out.invert();
}

// Sums in float64, a number a group.
struct Totals {
  double error[kLanes], products[kLanes], squares[kLanes];
};

// Neighbouring groups of one row. Their weights stay in `w` where they fit together; a group longer
// than kChunk is alone and passes through it chunk by chunk.
template <int K, bool Masked>
struct Batch {
  const QuantizeArgs& args;
  const float top;
  size_t count = 0;
  uint8_t* codes = nullptr;  // of the row
  // Flat index and column of the first weight, their number, where they are in `w`.
  size_t first[kLanes], begin[kLanes], size[kLanes], place[kLanes];
  double energy[kLanes], pruned[kLanes];  // sums of squares: of all weights, of pruned ones
  alignas(64) float low[kLanes], high[kLanes], folded[kLanes];
  alignas(64) float rows[4][kLanes * kLanes];
  alignas(64) float w[kChunk];

  explicit Batch(const QuantizeArgs& args) : args(args), top((float)((1 << args.bits) - 1)) {
    memset(rows, 0, sizeof rows);  // a row without a group is folded, too
    memset(energy, 0, sizeof energy);
  }

  size_t chunk(size_t i, size_t start) const { return smaller(kChunk, size[i] - start); }

  void read(size_t i, size_t start, Range& r) {
    const size_t from = first[i] + start;
    load_group<K, Masked>(args.weights + from * item_size<K>(), Masked ? args.mask + from : nullptr,
                          chunk(i, start), w + place[i], r);
  }

  // As many groups as fit, from `column` on; returns the column behind them.
  size_t survey(size_t row, size_t column) {
    size_t used = 0;
    for (count = 0; column < args.columns && count < kLanes; ++count) {
      const size_t n = smaller(args.group_size, args.columns - column);
      const size_t padded = (smaller(n, kChunk) + kLanes - 1) / kLanes * kLanes;
      if (used + padded > kChunk) break;
      first[count] = row * args.columns + column;
      begin[count] = column;
      size[count] = n;
      place[count] = used;
      survey_group(count);
      used += padded;
      column += n;
    }
    fold_rows<kMin>(rows[0], low);
    fold_rows<kMax>(rows[1], high);
    add_folded(rows[2], energy);
    if (Masked) add_folded(rows[3], pruned);
    return column;
  }

  void survey_group(size_t i) {
    Range r{set1(-0.0f), set1(0), set1(0), set1(0)};
    energy[i] = 0;
    if (Masked) pruned[i] = 0;
    for (size_t start = 0; start < size[i]; start += kChunk) {
      if (start) {
        energy[i] += (double)reduce_add(r.energy);
        if (Masked) pruned[i] += (double)reduce_add(r.pruned);
        r.energy = r.pruned = set1(0);
      }
      read(i, start, r);
    }
    store(rows[0] + kLanes * i, r.low);
    store(rows[1] + kLanes * i, r.high);
    store(rows[2] + kLanes * i, r.energy);
    if (Masked) store(rows[3] + kLanes * i, r.pruned);
  }

  void add_folded(const float* lanes, double* totals) {
    fold_rows<kAdd>(lanes, folded);
    for (size_t i = 0; i < count; ++i) totals[i] += (double)folded[i];
  }

  // -1, or what quantize_groups returns for a group that cannot be coded.
  int64_t problem(const Scales& plain) const {
    int doubts = 0;
    for (size_t i = 0; i < kLanes; ++i) {
      doubts += !(energy[i] < (double)kInfinity) | !(plain.scale[i] < kInfinity);
    }
    for (size_t i = 0; doubts && i < count; ++i) {
      // A NaN or an infinity spoils the sum of squares; so may large weights: then look closely.
      const uint8_t* from = args.weights + first[i] * item_size<K>();
      const int64_t bad = FiniteIndex{from, size[i]}.template run<K>();
      if (bad >= 0) return (int64_t)first[i] + bad;
      if (!(plain.scale[i] < kInfinity)) return -2 - (int64_t)first[i];
    }
    return -1;
  }

  // Calls f(weights, their number, start) for each chunk of group i, with its weights in `w`.
  template <class Function>
  __attribute__((always_inline)) void each_chunk(size_t i, const Function& f) {
    if (size[i] <= kChunk) return f(w + place[i], size[i], (size_t)0);
    for (size_t start = 0; start < size[i]; start += kChunk) {
      Range ignored{set1(-0.0f), set1(0), set1(0), set1(0)};
      read(i, start, ignored);
      f(w, chunk(i, start), start);
    }
  }

  // The codes of every group under its scale.
  void encode_all(const Scales& by) {
    for (size_t i = 0; i < count; ++i) {
      const Scale scale{by.scale[i], by.inverse[i], by.zero_point[i], top};
      each_chunk(i, [&](const float* from, size_t n, size_t start) __attribute__((always_inline)) {
        measure<true, false, true, false, false>(from, n, scale, codes + begin[i] + start, nullptr);
      });
    }
  }

  // The weights of group i's columns from `start` on.
  template <bool Weighted>
  const uint8_t* columns_of(size_t i, size_t start) const {
    return Weighted ? args.column_weights + 4 * (begin[i] + start) : nullptr;
  }

  // Sums over every group under its scale. Codes: written, too.
  template <bool Codes, bool Fit, bool Clip, bool Weighted>
  void measure_all(const Scales& by, Totals& t) {
    if (args.scale_kind == kFloat16) return measure_as<Codes, Fit, Clip, true, Weighted>(by, t);
    measure_as<Codes, Fit, Clip, false, Weighted>(by, t);
  }

  template <bool Codes, bool Fit, bool Clip, bool Short, bool Weighted>
  void measure_as(const Scales& by, Totals& t) {
    for (size_t i = 0; i < kLanes; ++i) t.error[i] = 0;
    for (size_t i = 0; Fit && i < kLanes; ++i) t.products[i] = t.squares[i] = 0;
    for (size_t i = 0; i < count; ++i) {
      const Scale scale{by.scale[i], by.inverse[i], by.zero_point[i], top};
      GroupSums last{set1(0), set1(0), set1(0)};
      each_chunk(i, [&](const float* from, size_t n, size_t start) __attribute__((always_inline)) {
        if (start) {
          t.error[i] += (double)reduce_add(last.error);
          if (Fit) t.products[i] += (double)reduce_add(last.products);
          if (Fit) t.squares[i] += (double)reduce_add(last.squares);
        }
        last = measure<Codes, Fit, Clip, Short, Weighted>(from, n, scale, codes + begin[i] + start,
                                                          columns_of<Weighted>(i, start));
      });
      store(rows[0] + kLanes * i, last.error);
      if (Fit) store(rows[1] + kLanes * i, last.products);
      if (Fit) store(rows[2] + kLanes * i, last.squares);
    }
    add_folded(rows[0], t.error);
    if (Fit) add_folded(rows[1], t.products);
    if (Fit) add_folded(rows[2], t.squares);
  }
};

#include "search_impl.h"

// ---------------------------------------------------------------- all groups

template <int K, bool Masked>
static int64_t quantize_rows(const QuantizeArgs& args) {
  Batch<K, Masked> batch(args);
  Search<K, Masked> search(args);
  Scales scales;
  Totals error, plain;
  // The largest weight of a symmetric group becomes the largest code, however its scale is rounded:
  // nothing to clip. With 2 bits it lies between two codes.
  const bool clips = args.zero_point || args.bits == 2;
  const size_t scale_size = args.scale_kind == kFloat32 ? 4 : 2;
  size_t index = 0;
  for (size_t row = 0; row < args.rows; ++row) {
    double error_sum = 0, plain_sum = 0, energy_sum = 0;
    batch.codes = args.codes + (args.packed ? 0 : row * args.columns);
    for (size_t column = 0; column < args.columns;) {
      column = batch.survey(row, column);
      plain_scales(args, batch.low, batch.high, scales);
      const int64_t problem = batch.problem(scales);
      if (problem != -1) return problem;
      if (args.search) {
        if (args.column_weights)
          search.template run<true>(batch, scales, error, plain);
        else
          search.template run<false>(batch, scales, error, plain);
      } else {
        if (clips)
          batch.template measure_all<true, false, true, false>(scales, error);
        else
          batch.template measure_all<true, false, false, false>(scales, error);
      }
      const Totals& before = args.search ? plain : error;
      for (size_t i = 0; i < batch.count; ++i) {
        const double pruned = Masked ? batch.pruned[i] : 0;
        error_sum += error.error[i] + pruned;
        plain_sum += before.error[i] + pruned;
        energy_sum += batch.energy[i];
      }
      write_scales(args.scale + scale_size * index, scales.scale, batch.count, args.scale_kind);
      for (size_t i = 0; args.zero_point && i < batch.count; ++i) {
        args.zero_point[index + i] = (uint8_t)scales.zero_point[i];
      }
      index += batch.count;
    }
    if (args.packed) {
      uint8_t* out = args.packed + row * args.width;
      pack_bits(args.codes, 1, args.columns, args.bits, out, args.width);
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
