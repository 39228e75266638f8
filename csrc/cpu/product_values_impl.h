// Products with stored values, dense or kept by a bitmask: floats times floats, in float32.
//
// A row is cut into spans of columns, and a span's sum (product_values_rows.h) is added to the
// row's total. Weights that serve a row or two of the batch are used as they are expanded; for more
// rows, the spans of a tile are first expanded to floats. Both add in the same order, so a result
// depends on its own row of the batch alone.

constexpr size_t kSpan = 1024;          // columns
constexpr ptrdiff_t kAheadDense = 512;  // bytes; prefetched behind a buffer, too: it never faults
constexpr int kRowsAtOnce = 2;
constexpr size_t kRowsAhead = 4;  // from sparse rows to those that are prefetched

struct ValuesWork {
  const Segment* segment;
  const float* x;  // [batch][stride], at the segment's first column
  size_t stride, batch;
  size_t rows;    // of the matrix
  size_t groups;  // of a row: how many scales it has
};

COMPRESS_INLINE float scalar_at(const uint8_t* floats, size_t index) {
  float value;
  memcpy(&value, floats + 4 * index, 4);
  return value;
}

COMPRESS_INLINE float scale_at(const ValuesWork& v, size_t row, size_t group) {
  const size_t at = row * v.groups + group;
  if (v.segment->scale_kind == kFloat32) return scalar_at(v.segment->scale, at);
  uint16_t half;
  memcpy(&half, v.segment->scale + 2 * at, 2);
  if (v.segment->scale_kind == kFloat16) return widen_f16(half);
  const uint32_t bits = (uint32_t)half << 16;
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

// ---------------------------------------------------------------- a row or two of the batch

// out[batch][16] += a span of `Rows` rows, which stand at column `start`. `next` are the rows that
// come after them.
template <class Row, int Rows, int Batch>
static void multiply_span(const ValuesWork& v, size_t number, size_t start, Row* all,
                          const Row* next, float* out) {
  const Segment& s = *v.segment;
  const size_t end = smaller(s.columns, start + kSpan);
  Row rows[Rows];
  ptrdiff_t ahead[Rows];
  V scale[Rows];
  Sums<Rows, Batch> sums;
  sums.clear();
  COMPRESS_UNROLL
  for (int r = 0; r < Rows; ++r) {
    rows[r] = all[r];
    ahead[r] = Row::kWhole ? kAheadDense : next[r].p - rows[r].p;
    next[r].prefetch_mask();
  }
  for (size_t at = start, stop; at < end; at = stop) {
    stop = end;
    if (Row::kScaled) {
      const size_t group = at / s.group_size;
      stop = smaller(end, (group + 1) * s.group_size);
      COMPRESS_UNROLL
      for (int r = 0; r < Rows; ++r) {
        scale[r] = v_set1(scale_at(v, number + (size_t)r, group));
      }
    }
    add_columns<Row, Rows, Batch>(rows, scale, v.x + at, v.stride, stop - at, ahead, sums);
    const size_t rest = (stop - at) % kColumns;
    if (!rest) continue;
    Rest copies[Rows];
    float few[Batch * kColumns];
    short_activations<Batch>(v.x + stop - rest, v.stride, rest, few);
    COMPRESS_UNROLL
    for (int r = 0; r < Rows; ++r) rows[r].last(rest, copies[r]);
    add_block<Row, Rows, Batch>(rows, scale, few, kColumns, sums);
  }
  COMPRESS_UNROLL
  for (int r = 0; r < Rows; ++r) all[r] = rows[r];
  sums.add_to(out);
}

// Rows of a tile from left to right, `Rows` at a time; returns the first that is left over.
template <class Row, int Rows, int Batch>
COMPRESS_INLINE size_t multiply_whole(const ValuesWork& v, size_t first, size_t row, size_t count,
                                      Row* rows, float* out) {
  for (; row + Rows <= count; row += Rows) {
    for (size_t start = 0; start < v.segment->columns; start += kSpan) {
      Row* at = rows + row;
      multiply_span<Row, Rows, Batch>(v, first + row, start, at, at, out + row);
    }
  }
  return row;
}

// out[batch][16] += one tile. Dense rows are read whole: processors foresee what they need. Of
// sparse rows a span is read after the other, so that x stays in the first cache.
template <class Row, int Batch>
static void multiply_few(const ValuesWork& v, size_t first, size_t count, float* out) {
  Row rows[kTileRows + kRowsAhead];  // those of the next tile behind these
  for (size_t r = 0; r < kTileRows + kRowsAhead; ++r) {
    rows[r].start(*v.segment, smaller(first + r, v.rows - 1));
  }
  if (Row::kWhole) {
    constexpr int most = Batch == 1 ? kDenseRows : kRowsAtOnce;
    const size_t left = multiply_whole<Row, most, Batch>(v, first, 0, count, rows, out);
    multiply_whole<Row, 1, Batch>(v, first, left, count, rows, out);
    return;
  }
  for (size_t start = 0; start < v.segment->columns; start += kSpan) {
    const bool last = start + kSpan >= v.segment->columns;
    size_t r = 0;
    for (; r + kRowsAtOnce <= count; r += kRowsAtOnce) {
      // After the last rows of a span come the first ones of the next.
      const size_t ahead = r + kRowsAhead;
      const Row* next = rows + (ahead + kRowsAtOnce <= count || last ? ahead : ahead % kTileRows);
      multiply_span<Row, kRowsAtOnce, Batch>(v, first + r, start, rows + r, next, out + r);
    }
    if (r < count) {
      multiply_span<Row, 1, Batch>(v, first + r, start, rows + r, rows + r + 1, out + r);
    }
  }
}

// ---------------------------------------------------------------- many rows of the batch

// The next `count` columns of a row as floats, zeros up to a whole block.
template <class Row>
static void expand_columns(const ValuesWork& v, size_t number, Row& row, size_t start, size_t count,
                           float* out) {
  const Segment& s = *v.segment;
  Rest rest;
  for (size_t i = 0; i < count; i += kColumns) {
    if (count - i < kColumns) row.last(count - i, rest);
    const uint64_t word = row.word();
    COMPRESS_UNROLL
    for (size_t k = 0; k < kColumns / kStep; ++k) v_store(out + i + k * kStep, row.next(word, k));
  }
  if (!Row::kScaled) return;
  for (size_t at = start; at < start + count;) {
    const size_t group = at / s.group_size;
    const size_t next = smaller(start + count, (group + 1) * s.group_size);
    const float scale = scale_at(v, number, group);
    for (; at < next; ++at) out[at - start] *= scale;
  }
}

template <int Rows, int Batch>
static void multiply_panel_rows(const float* panel, const float* x, size_t stride, size_t count,
                                float* out) {
  PanelRow rows[Rows];
  ptrdiff_t ahead[Rows] = {0};
  COMPRESS_UNROLL
  for (int r = 0; r < Rows; ++r) rows[r].p = panel + (size_t)r * kSpan;
  Sums<Rows, Batch> sums;
  sums.clear();
  add_columns<PanelRow, Rows, Batch>(rows, nullptr, x, stride, count, ahead, sums);
  if (const size_t rest = count % kColumns) {
    float few[Batch * kColumns];
    short_activations<Batch>(x + count - rest, stride, rest, few);
    add_block<PanelRow, Rows, Batch>(rows, nullptr, few, kColumns, sums);
  }
  sums.add_to(out);
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

// How many rows of the batch to take of those left: 3 2 2 rather than 3 3 1.
COMPRESS_INLINE size_t batch_step(size_t left) {
  constexpr size_t most = kBatchAtOnce;
  return left == most + 1 && most > 2 ? most - 1 : smaller(left, most);
}

static void multiply_panel_batch(const float* panel, size_t rows, const float* x, size_t stride,
                                 size_t count, size_t batch, float* out) {
  if constexpr (kBatchAtOnce >= 4) {
    if (batch == 4) return multiply_panel<4>(panel, rows, x, stride, count, out);
  }
  if constexpr (kBatchAtOnce >= 3) {
    if (batch == 3) return multiply_panel<3>(panel, rows, x, stride, count, out);
  }
  if constexpr (kBatchAtOnce >= 2) {
    if (batch == 2) return multiply_panel<2>(panel, rows, x, stride, count, out);
  }
  multiply_panel<1>(panel, rows, x, stride, count, out);
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
    for (size_t b = 0, each; b < v.batch; b += each) {
      each = batch_step(v.batch - b);
      multiply_panel_batch(panel, count, v.x + start + b * v.stride, v.stride, columns, each,
                           out + b * kTileRows);
    }
  }
}

// ---------------------------------------------------------------- any segment

template <class Row>
static void multiply_value_rows(const ValuesWork& v, size_t first_tile, size_t tiles,
                                float* totals) {
  // Groups that end inside a block are scaled value by value, once all are expanded.
  const bool broken = Row::kScaled && v.groups > 1 && v.segment->group_size % kColumns;
  for (size_t tile = 0; tile < tiles; ++tile) {
    const size_t first = (first_tile + tile) * kTileRows;
    const size_t count = smaller(kTileRows, v.rows - first);
    float* out = totals + tile * v.batch * kTileRows;
    if (broken || v.batch > 2) {
      multiply_many<Row>(v, first, count, out);
    } else if (v.batch == 2) {
      multiply_few<Row, 2>(v, first, count, out);
    } else {
      multiply_few<Row, 1>(v, first, count, out);
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
