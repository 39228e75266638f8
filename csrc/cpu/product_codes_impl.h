// Products with codes: activations are rounded to integers a block at a time, block sums are exact
// integers, and only their scaled totals are floats, added up in order of columns. So a result does
// not depend on the instruction set, the number of threads or the other rows of the batch. An
// activation that dwarfs its block would cost the others their bits: it is multiplied alone.

struct Block {
  size_t column;  // in the segment
  size_t length;
  size_t padded;  // `length`, rounded up to kPad
  size_t offset;  // of its first column once all blocks are padded
  size_t group;
};

struct Blocks {
  Block* at;
  size_t count, padded;  // padded: columns of all blocks
};

static size_t each_block(const Segment& s, Block* out, size_t* padded) {
  size_t count = 0, offset = 0;
  for (size_t start = 0, group = 0; start < s.columns; start += s.group_size, ++group) {
    const size_t end = smaller(s.group_size, s.columns - start) + start;
    for (size_t column = start; column < end; column += kMaxBlock, ++count) {
      const size_t length = smaller(kMaxBlock, end - column);
      const size_t wide = (length + kPad - 1) / kPad * kPad;
      if (out) out[count] = {column, length, wide, offset, group};
      offset += wide;
    }
  }
  *padded = offset;
  return count;
}

static bool make_blocks(const Segment& s, Blocks& blocks) {
  blocks.count = each_block(s, nullptr, &blocks.padded);
  blocks.at = (Block*)malloc((blocks.count + 1) * sizeof(Block));
  if (!blocks.at) return false;
  each_block(s, blocks.at, &blocks.padded);
  return true;
}

// A massive activation: taken out of its block, multiplied alone, in float32.
struct Massive {
  uint32_t block, place;  // the block, and the column in it
  float value;
};

// Activations of one segment as integers.
struct Activations {
  bool words;               // int16 words instead of int8
  int planes;               // of a row: 2 where int8 planes hold 16 bits
  size_t plane_bytes;       // from one plane to the next
  int8_t* values;           // [batch][planes][plane_bytes]
  float* scale;             // [batch][blocks]
  int32_t* sums;            // [batch][blocks], of a block's integers
  Massive* massive;         // [batch][blocks][kMostMassive], `massive_count` of a row in use
  uint32_t* massive_count;  // [batch]
};

// Sixteen activations from `x`, zeros behind `count`.
COMPRESS_INLINE F load_activations(const uint8_t* x, Kind kind, size_t count) {
  if (kind == kFloat32) return load_some<kFloat32>(x, count);
  return kind == kFloat16 ? load_some<kFloat16>(x, count) : load_some<kBFloat16>(x, count);
}

COMPRESS_INLINE float magnitude(float x) {
  return x < 0 ? -x : x;
}

constexpr float kMassive = 4.0f;  // times the next largest of the block
constexpr int kMostMassive = 4;   // of a block

// The massive entries of a block: its largest ones, where the last of them is more than kMassive
// times as large as the next, which is not zero. Returns how many; `places` are in order, `next` is
// the largest of the others. `lanes` are the largest magnitudes of the lanes.
static int find_massive(const float* x, size_t length, float largest, const uint32_t* lanes,
                        uint32_t* places, float* next) {
  int near = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    float lane;
    memcpy(&lane, lanes + i, 4);
    near += lane * kMassive >= largest;
  }
  if (near > kMostMassive) return 0;  // the usual case
  float top[kMostMassive + 1] = {0};  // in falling order
  uint32_t at[kMostMassive + 1] = {0};
  for (size_t i = 0; i < length; ++i) {
    const float m = magnitude(x[i]);
    int k = kMostMassive;
    if (!(m > top[k])) continue;
    for (; k > 0 && m > top[k - 1]; --k) {
      top[k] = top[k - 1];
      at[k] = at[k - 1];
    }
    top[k] = m;
    at[k] = (uint32_t)i;
  }
  int count = 0;
  for (int k = 1; k <= kMostMassive; ++k) {
    if (top[k] > 0 && top[k - 1] > kMassive * top[k]) count = k;
  }
  *next = top[count];
  for (int i = 0; i < count; ++i) {
    int k = i;
    for (; k > 0 && places[k - 1] > at[i]; --k) places[k] = places[k - 1];
    places[k] = at[i];
  }
  return count;
}

struct Rounded {
  float scale;
  int32_t sum;
  int massive;  // how many, at `places`
  uint32_t places[kMostMassive];
  float values[kMostMassive];
};

// One block: integers = rint(x * (top / largest)), scale = largest / top.
template <bool Exact, bool Words>
COMPRESS_INLINE Rounded round_block(const uint8_t* x, Kind kind, const Block& block, int8_t* out,
                                    size_t plane_bytes) {
  constexpr float top = Exact ? 32512.0f : 127.0f;
  constexpr float tiny = 0x1p-100f;  // smaller activations are zeros: their scale has no inverse
  const size_t item = kind == kFloat32 ? 4 : 2;
  alignas(64) float wide[kMaxBlock];
  U worst = set1u(0);
  for (size_t i = 0; i < block.padded; i += kLanes) {
    F value = set1(0);
    if (i < block.length) value = load_activations(x + i * item, kind, block.length - i);
    worst = umax(worst, abs_bits(value));
    store(wide + i, value);
  }
  Rounded r;
  r.scale = 0;
  r.massive = 0;
  const uint32_t bits = reduce_umax(worst);
  float largest;
  memcpy(&largest, &bits, 4);
  if (bits > 0x7F7FFFFFu) {
    r.scale = __builtin_nanf("");  // a NaN or an infinity makes the row's products NaN
    largest = 0;
  } else if (largest >= tiny) {
    uint32_t lanes[kLanes];
    memcpy(lanes, &worst, sizeof lanes);
    float next = 0;
    r.massive = find_massive(wide, block.length, largest, lanes, r.places, &next);
    for (int i = 0; i < r.massive; ++i) {
      r.values[i] = wide[r.places[i]];
      wide[r.places[i]] = 0;
    }
    if (r.massive) largest = next;
  }
  float inverse = 0;
  if (largest >= tiny) {
    inverse = top / largest;
    r.scale = largest / top;
  }
  I total = i_set(0);
  for (size_t i = 0; i < block.padded; i += kLanes) {
    const I q = inverse != 0 ? i_from_float(mul(load(wide + i), set1(inverse))) : i_set(0);
    total = i_add(total, q);
    if (Words) {
      i_store_words(q, (int16_t*)(out + 2 * i));
    } else if (Exact) {
      i_store_planes(q, out + i, out + plane_bytes + i);
    } else {
      i_store_plane(q, out + i);
    }
  }
  r.sum = i_reduce_add(total);
  return r;
}

struct RoundRows {
  const Segment* segment;
  const Blocks* blocks;
  const LinearArgs* args;
  const Activations* activations;
};

template <bool Exact, bool Words>
static void round_row(const RoundRows& r, size_t row) {
  const LinearArgs& args = *r.args;
  const Activations& a = *r.activations;
  const size_t item = args.x_kind == kFloat32 ? 4 : 2;
  const uint8_t* x = args.x + (row * args.packed->columns + r.segment->first_column) * item;
  int8_t* out = a.values + row * (size_t)a.planes * a.plane_bytes;
  const size_t first = row * r.blocks->count;
  uint32_t massive = 0;
  for (size_t b = 0; b < r.blocks->count; ++b) {
    const Block& block = r.blocks->at[b];
    const Rounded one =
        round_block<Exact, Words>(x + block.column * item, args.x_kind, block,
                                  out + block.offset * (Words ? 2 : 1), a.plane_bytes);
    a.scale[first + b] = one.scale;
    a.sums[first + b] = one.sum;
    for (int i = 0; i < one.massive; ++i) {
      a.massive[first * kMostMassive + massive++] = {(uint32_t)b, one.places[i], one.values[i]};
    }
  }
  a.massive_count[row] = massive;
}

static void round_task(void* context, size_t row) {
  const RoundRows& r = *(const RoundRows*)context;
  const bool exact = r.args->exact;
  if (r.activations->words) {
    return exact ? round_row<true, true>(r, row) : round_row<false, true>(r, row);
  }
  exact ? round_row<true, false>(r, row) : round_row<false, false>(r, row);
}

static void free_activations(Activations& a) {
  free(a.values);
  free(a.scale);
  free(a.sums);
  free(a.massive);
  free(a.massive_count);
}

static bool round_activations(const Segment& s, const Blocks& blocks, const LinearArgs& args,
                              Activations& a) {
  const bool words = uses_words(s.bits, args.exact, args.batch);
  a.words = words;
  a.planes = words || !args.exact ? 1 : 2;
  a.plane_bytes = blocks.padded * (words ? 2 : 1);
  a.values = (int8_t*)malloc(args.batch * (size_t)a.planes * a.plane_bytes + 64);
  a.scale = (float*)malloc(args.batch * blocks.count * 4 + 64);
  a.sums = (int32_t*)malloc(args.batch * blocks.count * 4 + 64);
  a.massive = (Massive*)malloc(args.batch * blocks.count * kMostMassive * sizeof(Massive) + 64);
  a.massive_count = (uint32_t*)malloc(args.batch * 4);
  if (!a.values || !a.scale || !a.sums || !a.massive || !a.massive_count) return false;
  RoundRows rows{&s, &blocks, &args, &a};
  parallel_for(args.batch, args.batch * blocks.padded < 1 << 16 ? 1 : args.threads, round_task,
               &rows);
  return true;
}

COMPRESS_INLINE F load_scales(const uint8_t* p, Kind kind) {
  if (kind == kFloat32) return load(p);
  return kind == kFloat16 ? load_f16(p) : load_bf16(p);
}

struct CodesTile {
  const Segment* segment;
  const Blocks* blocks;
  const Activations* activations;
  size_t groups;
};

// out[r] += one tile times `Rows` rows of activations, over the blocks [from, to).
// Not inlined: it needs every register.
template <int Bits, bool Words, int PlanesEach, int Rows>
__attribute__((noinline)) static void multiply_rows(const CodesTile& t, size_t tile, size_t from,
                                                    size_t to, size_t row, float* out) {
  const Segment& s = *t.segment;
  const Activations& a = *t.activations;
  const size_t scale_item = s.scale_kind == kFloat32 ? 4 : 2;
  const uint8_t* codes = s.data + tile * t.blocks->padded * kTileRows * Bits / 8;
  const uint8_t* scale = s.scale + tile * t.groups * kTileRows * scale_item;
  const uint8_t* zero = s.zero ? s.zero + tile * t.groups * kTileRows : nullptr;
  const int8_t* x = a.values + row * PlanesEach * a.plane_bytes;
  F total[Rows];
  for (int r = 0; r < Rows; ++r) total[r] = load(out + kTileRows * r);
  for (size_t b = from; b < to; ++b) {
    const Block& block = t.blocks->at[b];
    I sums[Rows * PlanesEach];
    block_sums<Bits, Words, Rows * PlanesEach>(codes + block.offset * kTileRows * Bits / 8,
                                               x + block.offset * (Words ? 2 : 1), a.plane_bytes,
                                               block.padded, sums);
    const F step = load_scales(scale + block.group * kTileRows * scale_item, s.scale_kind);
    const I zeros = zero ? i_zero_point(zero + block.group * kTileRows) : i_set(1 << (Bits - 1));
    for (int r = 0; r < Rows; ++r) {
      const size_t at = (row + r) * t.blocks->count + b;
      const I joined =
          PlanesEach == 2 ? i_join(sums[r * PlanesEach], sums[r * PlanesEach + 1]) : sums[r];
      const I centred =
          zero ? i_subtract_product(joined, zeros, i_set(a.sums[at]))
               : i_add(joined, i_set((int32_t)(0u - ((uint32_t)a.sums[at] << (Bits - 1)))));
      total[r] = add(total[r], mul(i_to_float(centred), mul(step, set1(a.scale[at]))));
    }
  }
  for (int r = 0; r < Rows; ++r) store(out + kTileRows * r, total[r]);
}

// out += the massive activations of one row times their columns of the tile.
static void add_massive(const CodesTile& t, size_t tile, size_t row, float* out) {
  const Segment& s = *t.segment;
  const Activations& a = *t.activations;
  const size_t bits = (size_t)s.bits, step = 32 / bits;
  const size_t scale_item = s.scale_kind == kFloat32 ? 4 : 2;
  const uint8_t* codes = s.data + tile * t.blocks->padded * kTileRows * bits / 8;
  for (uint32_t i = 0; i < a.massive_count[row]; ++i) {
    const Massive& m = a.massive[row * t.blocks->count * kMostMassive + i];
    const Block& block = t.blocks->at[m.block];
    const size_t group = (tile * t.groups + block.group) * kTileRows;
    const uint8_t* from =
        codes + block.offset * kTileRows * bits / 8 + m.place / step * 64 + m.place % 4;
    float centred[kTileRows];
    for (size_t r = 0; r < kTileRows; ++r) {
      const int code = from[4 * r] >> (m.place % step / 4 * bits) & ((1 << bits) - 1);
      centred[r] = (float)(code - (s.zero ? s.zero[group + r] : 1 << (bits - 1)));
    }
    const F weights = mul(load(centred), load_scales(s.scale + group * scale_item, s.scale_kind));
    store(out, add(load(out), mul(set1(m.value), weights)));
  }
}

// All rows of the batch, as many at a time as the registers hold. out: [batch][16]
template <int Bits, bool Words, int PlanesEach>
static void multiply_batch(const CodesTile& t, size_t tile, size_t from, size_t to, size_t first,
                           size_t batch, float* out) {
  constexpr int most = kMaxPlanes / PlanesEach;
  size_t row = first;
  const size_t end = first + batch;
  for (; row + most <= end; row += most) {
    multiply_rows<Bits, Words, PlanesEach, most>(t, tile, from, to, row, out + kTileRows * row);
  }
  if (most > 4 && row + 4 <= end) {
    multiply_rows<Bits, Words, PlanesEach, 4>(t, tile, from, to, row, out + kTileRows * row);
    row += 4;
  }
  if (most > 2 && row + 2 <= end) {
    multiply_rows<Bits, Words, PlanesEach, 2>(t, tile, from, to, row, out + kTileRows * row);
    row += 2;
  }
  if (row < end) {
    multiply_rows<Bits, Words, PlanesEach, 1>(t, tile, from, to, row, out + kTileRows * row);
  }
}

template <int Bits>
static void multiply_bits(const CodesTile& t, size_t tile, size_t from, size_t to, size_t first,
                          size_t batch, float* out) {
  if (t.activations->words) {
    return multiply_batch<Bits, true, 1>(t, tile, from, to, first, batch, out);
  }
  if (t.activations->planes == 2) {
    return multiply_batch<Bits, false, 2>(t, tile, from, to, first, batch, out);
  }
  multiply_batch<Bits, false, 1>(t, tile, from, to, first, batch, out);
}

// totals[tile - first][batch][16] += tiles times activations. Blocks are taken a few thousand
// columns at a time, and rows of the batch a few at a time, so that activations wait in the first
// cache and codes in the second.
static void multiply_codes(const CodesTile& t, size_t first_tile, size_t tiles, size_t batch,
                           float* totals) {
  constexpr size_t deep = 2048;
  const size_t few = batch <= kMaxPlanes ? batch : kMaxPlanes;
  for (size_t from = 0, to; from < t.blocks->count; from = to) {
    to = t.blocks->count;
    if (batch > kMaxPlanes) {
      to = from + 1;
      const size_t start = t.blocks->at[from].offset;
      while (to < t.blocks->count && t.blocks->at[to].offset - start < deep) ++to;
    }
    for (size_t row = 0; row < batch; row += few) {
      for (size_t tile = 0; tile < tiles; ++tile) {
        const size_t count = smaller(few, batch - row);
        float* out = totals + tile * batch * kTileRows;
        if (t.segment->bits == 2) {
          multiply_bits<2>(t, first_tile + tile, from, to, row, count, out);
        } else if (t.segment->bits == 4) {
          multiply_bits<4>(t, first_tile + tile, from, to, row, count, out);
        } else {
          multiply_bits<8>(t, first_tile + tile, from, to, row, count, out);
        }
      }
    }
  }
  for (size_t row = 0; row < batch; ++row) {
    if (!t.activations->massive_count[row]) continue;
    for (size_t tile = 0; tile < tiles; ++tile) {
      add_massive(t, first_tile + tile, row, totals + (tile * batch + row) * kTileRows);
    }
  }
}

// Codes [rows, columns] of one segment to its tiles; see product_blocks_base.h for a step.
static void pack_tiles(const uint8_t* codes, size_t rows, size_t columns, int bits,
                       size_t group_size, uint8_t* out) {
  const size_t fields = 8 / (size_t)bits, step = 4 * fields;
  for (size_t first = 0; first < rows; first += kTileRows) {
    const size_t count = smaller(kTileRows, rows - first);
    for (size_t start = 0; start < columns; start += group_size) {
      const size_t end = start + smaller(group_size, columns - start);
      for (size_t column = start; column < end; column += kMaxBlock) {
        const size_t length = smaller(kMaxBlock, end - column);
        const size_t padded = (length + kPad - 1) / kPad * kPad;
        memset(out, 0, padded * kTileRows / fields);
        for (size_t row = 0; row < count; ++row) {
          const uint8_t* from = codes + (first + row) * columns + column;
          for (size_t k = 0; k < length; ++k) {
            const size_t in_step = k % step;
            out[k / step * 64 + 4 * row + in_step % 4] |=
                (uint8_t)(from[k] << (in_step / 4 * (size_t)bits));
          }
        }
        out += padded * kTileRows / fields;
      }
    }
  }
}
