// Products with stored values, dense or kept by a bitmask: floats times floats, in float32.
//
// A row is cut into spans. A span's products are added up in the lanes of one register, the lanes
// in one order, and the spans' sums to the row's total. Weights that serve a few rows of the batch
// are used as they are expanded; for more rows, the span of a tile is first expanded to floats.
// Both add in the same order, so a result depends on its own row of the batch alone.

#define COMPRESS_MEMBER inline __attribute__((always_inline))

constexpr size_t kSpan = 1024;            // columns; a multiple of every kStep
constexpr size_t kSteps = 8;              // steps between two prefetches
constexpr size_t kValuesAhead = 512;      // bytes; prefetched behind the buffer, too: never faults

struct ValuesWork {
  const Segment* segment;
  const float* x;  // [batch][stride], at the segment's first column
  size_t stride, batch;
  size_t rows;    // of the matrix
  size_t groups;  // of a row: how many scales it has
};

template <int K>
COMPRESS_INLINE constexpr size_t stored_bytes() {
  return K == kInt8 ? 1 : K == kFloat32 ? 4 : 2;
}

// A row of values being read from left to right.
template <int K>
struct DenseRow {
  static constexpr bool kScaled = K == kInt8;
  static constexpr float kUnit = 1.0f;
  const uint8_t* p;

  COMPRESS_MEMBER void start(const Segment& s, size_t row) {
    p = s.data + row * s.columns * stored_bytes<K>();
  }
  COMPRESS_MEMBER void prefetch(size_t ahead) const {
    for (size_t line = 0; line < kSteps * kStep * stored_bytes<K>(); line += 64) {
      __builtin_prefetch(p + ahead + line);
    }
  }
  COMPRESS_MEMBER V next() {
    const V v = dense_step<K>(p);
    p += kStep * stored_bytes<K>();
    return v;
  }
  COMPRESS_MEMBER V last(size_t count) {
    uint8_t values[kStep * 4] = {0};
    memcpy(values, p, count * stored_bytes<K>());
    return dense_step<K>(values);
  }
};

template <int K>
struct SparseRow {
  static constexpr bool kScaled = K == kInt8;
  static constexpr float kUnit = K == kInt8 ? kSparseInt8 : 1.0f;
  const uint8_t* p;
  const uint8_t* mask;

  // A row whose start lies behind the values, as in a damaged buffer, reads the room behind them.
  COMPRESS_MEMBER void start(const Segment& s, size_t row) {
    uint64_t first;
    memcpy(&first, s.starts + 8 * row, 8);
    p = s.data + smaller((size_t)first, s.kept) * stored_bytes<K>();
    mask = s.mask + row * ((s.columns + 7) / 8);
  }
  COMPRESS_MEMBER void prefetch(size_t ahead) const {
    __builtin_prefetch(p + ahead);
    if (stored_bytes<K>() > 1) __builtin_prefetch(p + ahead + 64);
    __builtin_prefetch(mask + ahead);
  }
  COMPRESS_MEMBER V next() {
    const size_t bits = bits_of_step(mask);
    const V v = sparse_step<K>(p, bits);
    p += count_kept(bits) * stored_bytes<K>();
    mask += kStep / 8;
    return v;
  }
  COMPRESS_MEMBER V last(size_t count) {
    uint8_t values[kStep * 4] = {0}, bits[8] = {0};
    memcpy(values, p, count * stored_bytes<K>());
    memcpy(bits, mask, (count + 7) / 8);
    return sparse_step<K>(values, bits_of_step(bits) & (((size_t)1 << count) - 1));
  }
};

// A row of a tile that was expanded before.
struct PanelRow {
  static constexpr bool kScaled = false;
  const float* p;

  COMPRESS_MEMBER void prefetch(size_t) const {}
  COMPRESS_MEMBER V next() {
    const V v = v_load(p);
    p += kStep;
    return v;
  }
  COMPRESS_MEMBER V last(size_t) {
    return v_load(p);
  }
};

template <class Row, int Rows, int Batch>
COMPRESS_INLINE void add_step(Row* rows, const V* scale, const float* x, size_t stride, V* sums) {
  V activations[Batch];
  for (int b = 0; b < Batch; ++b) activations[b] = v_load(x + (size_t)b * stride);
  for (int r = 0; r < Rows; ++r) {
    V w = rows[r].next();
    if (Row::kScaled) w = v_mul(w, scale[r]);
    for (int b = 0; b < Batch; ++b) {
      sums[b * Rows + r] = v_fma(w, activations[b], sums[b * Rows + r]);
    }
  }
}

// sums[Batch][Rows] += the next `count` columns of some rows times some rows of the batch.
template <class Row, int Rows, int Batch>
COMPRESS_INLINE void add_columns(Row* rows, const V* scale, const float* x, size_t stride,
                                 size_t count, V* sums) {
  size_t i = 0;
  for (; i + kSteps * kStep <= count; i += kSteps * kStep) {
    for (int r = 0; r < Rows; ++r) rows[r].prefetch(kValuesAhead);
    for (size_t k = 0; k < kSteps; ++k) {
      add_step<Row, Rows, Batch>(rows, scale, x + i + k * kStep, stride, sums);
    }
  }
  for (; i + kStep <= count; i += kStep) {
    add_step<Row, Rows, Batch>(rows, scale, x + i, stride, sums);
  }
  if (i == count) return;
  for (int b = 0; b < Batch; ++b) {
    float some[kStep] = {0};
    memcpy(some, x + (size_t)b * stride + i, 4 * (count - i));
    const V activations = v_load(some);
    for (int r = 0; r < Rows; ++r) {
      Row row = rows[r];
      V w = row.last(count - i);
      if (Row::kScaled) w = v_mul(w, scale[r]);
      sums[b * Rows + r] = v_fma(w, activations, sums[b * Rows + r]);
    }
  }
}

COMPRESS_INLINE float scale_at(const ValuesWork& v, size_t row, size_t group) {
  const size_t item = v.segment->scale_kind == kFloat32 ? 4 : 2;
  const uint8_t* at = v.segment->scale + (row * v.groups + group) * item;
  float lanes[kLanes];
  store(lanes, load_activations(at, v.segment->scale_kind, 1));
  return lanes[0];
}

// ---------------------------------------------------------------- a few rows of the batch

// out[batch][16] += Rows rows from `first` on.
template <class Row, int Rows, int Batch>
static void multiply_few(const ValuesWork& v, size_t first, const float* x, float* out) {
  const Segment& s = *v.segment;
  Row rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r].start(s, first + (size_t)r);
  for (size_t start = 0; start < s.columns; start += kSpan) {
    const size_t end = smaller(s.columns, start + kSpan);
    V sums[Batch * Rows], scale[Rows];
    for (int i = 0; i < Batch * Rows; ++i) sums[i] = v_zero();
    for (size_t at = start, next; at < end; at = next) {
      next = end;
      if (Row::kScaled) {
        const size_t group = at / s.group_size;
        next = smaller(end, (group + 1) * s.group_size);
        for (int r = 0; r < Rows; ++r) {
          scale[r] = v_set1(scale_at(v, first + (size_t)r, group) * Row::kUnit);
        }
      }
      add_columns<Row, Rows, Batch>(rows, scale, x + at, v.stride, next - at, sums);
    }
    for (int b = 0; b < Batch; ++b) add_sums<Rows>(sums + b * Rows, out + b * (int)kTileRows);
  }
}

template <class Row, int Batch>
static void multiply_few_rows(const ValuesWork& v, size_t first, size_t count, const float* x,
                              float* out) {
  size_t row = 0;
  for (; row + kRowsAtOnce <= count; row += kRowsAtOnce) {
    multiply_few<Row, kRowsAtOnce, Batch>(v, first + row, x, out + row);
  }
  for (; row < count; ++row) multiply_few<Row, 1, Batch>(v, first + row, x, out + row);
}

// ---------------------------------------------------------------- many rows of the batch

// The next `count` columns of a row as floats, zeros up to a whole step.
template <class Row>
static void expand_columns(const ValuesWork& v, size_t number, Row& row, size_t start, size_t count,
                           float* out) {
  const Segment& s = *v.segment;
  size_t i = 0;
  for (; i + kStep <= count; i += kStep) v_store(out + i, row.next());
  if (i < count) v_store(out + i, row.last(count - i));
  if (!Row::kScaled) return;
  for (size_t at = start; at < start + count;) {
    const size_t group = at / s.group_size;
    const size_t next = smaller(start + count, (group + 1) * s.group_size);
    const float scale = scale_at(v, number, group) * Row::kUnit;
    for (; at < next; ++at) out[at - start] *= scale;
  }
}

template <int Rows, int Batch>
static void multiply_panel_rows(const float* panel, const float* x, size_t stride, size_t count,
                                float* out) {
  PanelRow rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r].p = panel + (size_t)r * kSpan;
  V sums[Batch * Rows];
  for (int i = 0; i < Batch * Rows; ++i) sums[i] = v_zero();
  add_columns<PanelRow, Rows, Batch>(rows, nullptr, x, stride, count, sums);
  for (int b = 0; b < Batch; ++b) add_sums<Rows>(sums + b * Rows, out + b * (int)kTileRows);
}

template <int Batch>
static void multiply_panel(const float* panel, size_t rows, const float* x, size_t stride,
                           size_t count, float* out) {
  size_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    multiply_panel_rows<kRowsAtOnce, Batch>(panel + row * kSpan, x, stride, count, out + row);
  }
  for (; row < rows; ++row) {
    multiply_panel_rows<1, Batch>(panel + row * kSpan, x, stride, count, out + row);
  }
}

// How many of the rows left to take. A single one would leave the multipliers waiting for its sums.
COMPRESS_INLINE size_t batch_step(size_t left) {
  constexpr size_t most = kBatchAtOnce;
  return left == most + 1 && most > 2 ? most - 1 : smaller(left, most);
}

static void multiply_panel_batch(const float* panel, size_t rows, const float* x, size_t stride,
                                 size_t count, size_t batch, float* out) {
  switch (batch) {
    case 1:
      return multiply_panel<1>(panel, rows, x, stride, count, out);
    case 2:
      return multiply_panel<2>(panel, rows, x, stride, count, out);
    case 3:
      if constexpr (kBatchAtOnce >= 3) multiply_panel<3>(panel, rows, x, stride, count, out);
      return;
    default:
      if constexpr (kBatchAtOnce >= 4) multiply_panel<4>(panel, rows, x, stride, count, out);
  }
}

// out[batch][16] += one tile.
template <class Row>
static void multiply_many(const ValuesWork& v, size_t first, size_t count, float* out) {
  const Segment& s = *v.segment;
  alignas(64) float panel[kTileRows * kSpan];
  Row rows[kTileRows];
  for (size_t r = 0; r < count; ++r) rows[r].start(s, first + r);
  for (size_t start = 0; start < s.columns; start += kSpan) {
    const size_t columns = smaller(kSpan, s.columns - start);
    for (size_t r = 0; r < count; ++r) {
      expand_columns(v, first + r, rows[r], start, columns, panel + r * kSpan);
    }
    const float* x = v.x + start;
    for (size_t b = 0, each; b < v.batch; b += each) {
      each = batch_step(v.batch - b);
      multiply_panel_batch(panel, count, x + b * v.stride, v.stride, columns, each,
                           out + b * kTileRows);
    }
  }
}

// ---------------------------------------------------------------- any segment

template <class Row>
static void multiply_value_rows(const ValuesWork& v, size_t first_tile, size_t tiles,
                                float* totals) {
  const Segment& s = *v.segment;
  // Groups that end inside a step are scaled value by value, once all are expanded.
  const bool broken = Row::kScaled && v.groups > 1 && s.group_size % kStep;
  for (size_t tile = 0; tile < tiles; ++tile) {
    const size_t first = (first_tile + tile) * kTileRows;
    const size_t count = smaller(kTileRows, v.rows - first);
    float* out = totals + tile * v.batch * kTileRows;
    if (broken || v.batch > 2) {
      multiply_many<Row>(v, first, count, out);
    } else if (v.batch == 2) {
      multiply_few_rows<Row, 2>(v, first, count, v.x, out);
    } else {
      multiply_few_rows<Row, 1>(v, first, count, v.x, out);
    }
  }
}

// totals[tile - first_tile][batch][16] += tiles of a dense or bitmask segment times x.
static void multiply_values(const ValuesWork& v, size_t first_tile, size_t tiles, float* totals) {
  const bool sparse = v.segment->kind == kBitmask;
  switch ((int)v.segment->value_kind) {
    case kFloat32:
      return sparse ? multiply_value_rows<SparseRow<kFloat32>>(v, first_tile, tiles, totals)
                    : multiply_value_rows<DenseRow<kFloat32>>(v, first_tile, tiles, totals);
    case kFloat16:
      return sparse ? multiply_value_rows<SparseRow<kFloat16>>(v, first_tile, tiles, totals)
                    : multiply_value_rows<DenseRow<kFloat16>>(v, first_tile, tiles, totals);
    case kInt8:
      return sparse ? multiply_value_rows<SparseRow<kInt8>>(v, first_tile, tiles, totals)
                    : multiply_value_rows<DenseRow<kInt8>>(v, first_tile, tiles, totals);
    default:
      return sparse ? multiply_value_rows<SparseRow<kBFloat16>>(v, first_tile, tiles, totals)
                    : multiply_value_rows<DenseRow<kBFloat16>>(v, first_tile, tiles, totals);
  }
}
