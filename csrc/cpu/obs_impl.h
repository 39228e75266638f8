// The column sweep of the optimal brain surgeon; `obs_block` in reference_obs.py defines it.
// See kernels_impl.h.

#pragma once

constexpr size_t kPanel = 4;  // columns whose errors wait, so that later ones are read once for all

// Sixteen rows, a lane each, column after column.
struct alignas(64) SweepTile {
  float w[kMaxSweep * kLanes];  // weights, then their errors
  float exact[kMaxSweep * kLanes];
  float scale[kLanes], inverse[kLanes], zero_point[kLanes];
  uint8_t kept[kMaxSweep * kLanes], fixed[kMaxSweep * kLanes], codes[kMaxSweep * kLanes];
};

static void read_rows(const ObsArgs& a, size_t row, size_t rows, SweepTile& t) {
  for (size_t r = 0; r < rows; ++r) {
    const size_t from = (row + r) * a.columns + a.first;
    for (size_t i = 0; i < a.n; ++i) t.w[kLanes * i + r] = a.w[from + i];
    for (size_t i = 0; a.mask && i < a.n; ++i) t.kept[kLanes * i + r] = a.mask[from + i];
    for (size_t i = 0; a.exact && i < a.n; ++i) {
      float value;
      memcpy(&value, a.exact + 4 * ((row + r) * a.n + i), 4);
      const bool fixed = value == value;
      t.fixed[kLanes * i + r] = fixed;
      t.exact[kLanes * i + r] = fixed ? value : 0;
    }
  }
}

static void write_rows(const ObsArgs& a, size_t row, size_t rows, const SweepTile& t) {
  for (size_t r = 0; r < rows; ++r) {
    const size_t to = (row + r) * a.columns + a.first;
    for (size_t i = 0; i < a.n; ++i) a.w[to + i] = t.w[kLanes * i + r];
    for (size_t i = 0; i < a.n; ++i) a.codes[to + i] = t.codes[kLanes * i + r];
  }
}

// The scales of one group; rows that are not there keep what they had.
static void read_scales(const ObsArgs& a, size_t row, size_t rows, size_t group, SweepTile& t) {
  for (size_t r = 0; r < rows; ++r) {
    const size_t at = (row + r) * a.groups + group;
    memcpy(t.scale + r, a.scale + 4 * at, 4);
    t.zero_point[r] = a.zero_point ? (float)a.zero_point[at] : (float)(1 << (a.bits - 1));
  }
  store(t.inverse, div(set1(1), load(t.scale)));
}

// Codes column i, returns its error, and leaves it in the column's place.
COMPRESS_INLINE F sweep_column(const ObsArgs& a, size_t i, F x, SweepTile& t) {
  const F scale = load(t.scale), zero = load(t.zero_point);
  const F low = sub(set1(-0.0f), zero), high = sub(set1((float)((1 << a.bits) - 1)), zero);
  F q = clip(rint_(mul(x, load(t.inverse))), low, high);
  if (a.mask) q = keep(q, t.kept + kLanes * i);
  store_u8(t.codes + kLanes * i, add(q, zero));
  F value = mul(q, scale);
  if (a.exact) {
    const uint8_t* fixed = t.fixed + kLanes * i;
    value = add(drop(value, fixed), keep(load(t.exact + kLanes * i), fixed));
  }
  value = add(value, set1(0));  // one zero, whatever its sign was
  const F error = div(sub(x, value), set1(a.upper[i * a.n + i]));
  store(t.w + kLanes * i, error);
  return error;
}

// x - errors[k] * u[k, j] for the columns k of a panel, in order.
COMPRESS_INLINE F corrected(const ObsArgs& a, size_t from, size_t count, const F* errors, size_t j,
                            F x) {
  for (size_t k = 0; k < count; ++k) {
    x = sub(x, mul(errors[k], set1(a.upper[(from + k) * a.n + j])));
  }
  return x;
}

static void sweep(const ObsArgs& a, size_t row, size_t rows, SweepTile& t) {
  int64_t group = -1;
  for (size_t from = 0; from < a.n; from += kPanel) {
    const size_t count = smaller(kPanel, a.n - from);
    F errors[kPanel];
    for (size_t k = 0; k < count; ++k) {
      const size_t i = from + k;
      if (a.group[i] != group) read_scales(a, row, rows, (size_t)(group = a.group[i]), t);
      const F x = corrected(a, from, k, errors, i, load(t.w + kLanes * i));
      errors[k] = sweep_column(a, i, x, t);
    }
    if (count < kPanel) return;  // the last panel: nothing lies behind it
    for (size_t j = from + kPanel; j < a.n; ++j) {
      float* column = t.w + kLanes * j;
      store(column, corrected(a, from, kPanel, errors, j, load(column)));
    }
  }
}

static void obs_block(const ObsArgs& args) {
  SweepTile t;
  for (size_t i = 0; i < kLanes; ++i) t.scale[i] = 1, t.zero_point[i] = 0;
  memset(t.w, 0, sizeof t.w);  // rows that are not there are swept, too
  memset(t.exact, 0, sizeof t.exact);
  for (size_t row = 0; row < args.rows; row += kLanes) {
    const size_t rows = smaller(kLanes, args.rows - row);
    read_rows(args, row, rows, t);
    sweep(args, row, rows, t);
    write_rows(args, row, rows, t);
  }
}
