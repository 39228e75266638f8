// y = x W^T with every term of a packed matrix: segments, low-rank factors, outliers, bias.
//
// The work is cut into runs of tiles; a run does all rows of the batch, so that a weight is read
// once. Terms are added in one order: segments, factors, outliers, bias.

// What a call prepares before its tiles: one entry a segment.
struct Prepared {
  Blocks blocks;
  Activations activations;
};

struct LinearWork {
  const LinearArgs* args;
  Prepared prepared[kMaxSegments];
  void* wide_room;
  float* wide;  // x in float32 [batch][columns], where a term needs it; at a multiple of 64
  float* low;   // [batch][rank], x A^T scaled
  size_t tiles_each;
  bool failed;
};

// ---------------------------------------------------------------- before the tiles

struct WidenWork {
  const LinearArgs* args;
  float* out;
};

static void widen_task(void* context, size_t row) {
  const WidenWork& w = *(const WidenWork*)context;
  const size_t columns = w.args->packed->columns;
  const size_t item = w.args->x_kind == kFloat32 ? 4 : 2;
  const uint8_t* x = w.args->x + row * columns * item;
  float* out = w.out + row * columns;
  for (size_t i = 0; i < columns; i += kLanes) {
    const F value = load_activations(x + i * item, w.args->x_kind, columns - i);
    if (columns - i >= kLanes) {
      store(out + i, value);
    } else {
      float lanes[kLanes];
      store(lanes, value);
      memcpy(out + i, lanes, 4 * (columns - i));
    }
  }
}

COMPRESS_INLINE F load_i8(const uint8_t* p) {
  float lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = (float)(int8_t)p[i];
  return load(lanes);
}

// Sixteen stored values as floats, zeros behind `count`.
COMPRESS_INLINE F load_values(const uint8_t* p, Kind kind, size_t count) {
  if (kind != kInt8) return load_activations(p, kind, count);
  if (count >= kLanes) return load_i8(p);
  uint8_t bytes[kLanes] = {0};
  memcpy(bytes, p, count);
  return load_i8(bytes);
}

COMPRESS_INLINE size_t value_bytes(Kind kind) {
  return kind == kInt8 ? 1 : kind == kFloat32 ? 4 : 2;
}

// low[row][k] = x . A[k], for one k and every row.
static void low_rank_task(void* context, size_t k) {
  const LinearWork& w = *(const LinearWork*)context;
  const Packed& p = *w.args->packed;
  const size_t item = value_bytes(p.factor_kind), columns = p.columns;
  const uint8_t* a = p.factor_a + k * columns * item;
  const float scale = p.rank_scale ? scalar_at(p.rank_scale, k) : 1.0f;
  for (size_t row = 0; row < w.args->batch; ++row) {
    const float* x = w.wide + row * columns;
    F first = set1(0), second = set1(0);
    size_t i = 0;
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
      first = add(first, mul(load_values(a + i * item, p.factor_kind, kLanes), load(x + i)));
      second = add(second, mul(load_values(a + (i + kLanes) * item, p.factor_kind, kLanes),
                               load(x + i + kLanes)));
    }
    for (; i < columns; i += kLanes) {
      const size_t count = smaller(kLanes, columns - i);
      first = add(first, mul(load_values(a + i * item, p.factor_kind, count),
                             load_some<kFloat32>((const uint8_t*)(x + i), count)));
    }
    w.low[row * p.rank + k] = reduce_add(add(first, second)) * scale;
  }
}

static bool needs_wide(const Packed& p) {
  for (size_t i = 0; i < p.segment_count; ++i) {
    if (p.segments[i].kind != kCodes) return true;
  }
  return p.rank || p.outliers;
}

static bool prepare(LinearWork& w) {
  const LinearArgs& args = *w.args;
  const Packed& p = *args.packed;
  if (needs_wide(p)) {
    w.wide_room = malloc(args.batch * p.columns * 4 + 128);
    if (!w.wide_room) return false;
    w.wide = (float*)(((uintptr_t)w.wide_room + 63) & ~(uintptr_t)63);
    WidenWork widen{&args, w.wide};
    parallel_for(args.batch, args.batch * p.columns < 1 << 16 ? 1 : args.threads, widen_task,
                 &widen);
  }
  if (p.rank) {
    w.low = (float*)malloc(args.batch * p.rank * 4 + 64);
    if (!w.low) return false;
    const bool small = args.batch * p.rank * p.columns < 1 << 17;
    parallel_for(p.rank, small ? 1 : args.threads, low_rank_task, &w);
  }
  for (size_t i = 0; i < p.segment_count; ++i) {
    if (p.segments[i].kind != kCodes) continue;
    Prepared& ready = w.prepared[i];
    if (!make_blocks(p.segments[i], ready.blocks)) return false;
    if (!round_activations(p.segments[i], ready.blocks, args, ready.activations)) return false;
  }
  return true;
}

static void release(LinearWork& w) {
  for (size_t i = 0; i < w.args->packed->segment_count; ++i) {
    free(w.prepared[i].blocks.at);
    free_activations(w.prepared[i].activations);
  }
  free(w.wide_room);
  free(w.low);
}

// ---------------------------------------------------------------- tiles

static void add_low_rank_tile(const LinearWork& w, size_t tile, float* totals) {
  const Packed& p = *w.args->packed;
  const size_t item = value_bytes(p.factor_kind);
  const uint8_t* b = p.factor_b + tile * p.rank * kTileRows * item;
  for (size_t row = 0; row < w.args->batch; ++row) {
    F total = load(totals + row * kTileRows);
    for (size_t k = 0; k < p.rank; ++k) {
      const F column = load_values(b + k * kTileRows * item, p.factor_kind, kLanes);
      total = add(total, mul(column, set1(w.low[row * p.rank + k])));
    }
    store(totals + row * kTileRows, total);
  }
}

static void add_outliers(const LinearWork& w, size_t tile, float* totals) {
  const Packed& p = *w.args->packed;
  uint64_t range[2];
  memcpy(range, p.outlier_tiles + 8 * tile, 16);
  for (uint64_t i = range[0]; i < range[1]; ++i) {
    uint32_t place[2];
    memcpy(place, p.outlier_entries + 12 * i, 8);
    const float difference = scalar_at(p.outlier_entries + 12 * i + 8, 0);
    for (size_t row = 0; row < w.args->batch; ++row) {
      totals[row * kTileRows + place[0] % kTileRows] +=
          difference * w.wide[row * p.columns + place[1]];
    }
  }
}

COMPRESS_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u);
  return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
COMPRESS_INLINE uint16_t to_f16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // rounds to infinity
  if (magnitude >= 0x38800000u) {                                   // a normal number
    const uint32_t shifted = magnitude - (112u << 23);
    return (uint16_t)(sign | ((shifted + 0xFFFu + (shifted >> 13 & 1u)) >> 13));
  }
  float small;  // a multiple of 2^-24: adding 0.5 leaves it, rounded, in the low bits
  memcpy(&small, &magnitude, 4);
  small += 0.5f;
  uint32_t rounded;
  memcpy(&rounded, &small, 4);
  return (uint16_t)(sign | (rounded - 0x3F000000u));
}

static void write_tile(const LinearWork& w, size_t tile, const float* totals) {
  const LinearArgs& args = *w.args;
  const Packed& p = *args.packed;
  const size_t first = tile * kTileRows, count = smaller(kTileRows, p.rows - first);
  for (size_t row = 0; row < args.batch; ++row) {
    float out[kTileRows];
    store(out, load(totals + row * kTileRows));
    if (p.bias) {
      for (size_t i = 0; i < count; ++i) out[i] += scalar_at(p.bias, first + i);
    }
    const size_t at = row * p.rows + first;
    if (args.y_kind == kFloat32) {
      memcpy(args.y + 4 * at, out, 4 * count);
      continue;
    }
    uint16_t half[kTileRows];
    for (size_t i = 0; i < count; ++i) {
      half[i] = args.y_kind == kFloat16 ? to_f16(out[i]) : to_bf16(out[i]);
    }
    memcpy(args.y + 2 * at, half, 2 * count);
  }
}

static void tiles_task(void* context, size_t run) {
  LinearWork& w = *(LinearWork*)context;
  const Packed& p = *w.args->packed;
  const size_t all = (p.rows + kTileRows - 1) / kTileRows, batch = w.args->batch;
  const size_t first = run * w.tiles_each, tiles = smaller(w.tiles_each, all - first);
  const size_t floats = batch * kTileRows;
  float few[4 * kTileRows];
  // A row or two need no buffer: their tiles are done one by one.
  const size_t together = floats <= 4 * kTileRows ? 1 : tiles;
  float* totals = floats <= 4 * kTileRows ? few : (float*)malloc(together * floats * 4);
  if (!totals) {
    __atomic_store_n(&w.failed, true, __ATOMIC_RELAXED);
    return;
  }
  for (size_t tile = first; tile < first + tiles; tile += together) {
    memset(totals, 0, together * floats * 4);
    for (size_t i = 0; i < p.segment_count; ++i) {
      const Segment& s = p.segments[i];
      const size_t groups = (s.columns + s.group_size - 1) / s.group_size;
      if (s.kind != kCodes) {
        multiply_values({&s, w.wide + s.first_column, p.columns, batch, p.rows, groups}, tile,
                        together, totals);
      } else {
        const Prepared& ready = w.prepared[i];
        multiply_codes({&s, &ready.blocks, &ready.activations, groups}, tile, together, batch,
                       totals);
      }
    }
    for (size_t j = 0; j < together; ++j) {
      if (p.rank) add_low_rank_tile(w, tile + j, totals + j * floats);
      if (p.outliers) add_outliers(w, tile + j, totals + j * floats);
      write_tile(w, tile + j, totals + j * floats);
    }
  }
  if (totals != few) free(totals);
}

static bool multiply_rows_of(const LinearArgs& args) {
  const Packed& p = *args.packed;
  LinearWork w;
  memset(&w, 0, sizeof w);
  w.args = &args;
  const bool ready = prepare(w);
  if (ready) {
    const size_t tiles = (p.rows + kTileRows - 1) / kTileRows;
    const size_t runs = 8 * (size_t)args.threads;  // small enough to even out a busy processor
    w.tiles_each = args.batch > kMaxPlanes ? 4 : (tiles + runs - 1) / runs;
    parallel_for((tiles + w.tiles_each - 1) / w.tiles_each, args.threads, tiles_task, &w);
  }
  release(w);
  return ready && !w.failed;
}

// False where memory ran out; y is then undefined.
static bool linear(const LinearArgs& args) {
  constexpr size_t most = 512;  // rows at a time: more would cost memory and gain nothing
  const Packed& p = *args.packed;
  for (size_t row = 0; row < args.batch && p.rows; row += most) {
    LinearArgs part = args;
    part.batch = smaller(most, args.batch - row);
    part.x += row * p.columns * (args.x_kind == kFloat32 ? 4 : 2);
    part.y += row * p.rows * (args.y_kind == kFloat32 ? 4 : 2);
    if (!multiply_rows_of(part)) return false;
  }
  return true;
}
