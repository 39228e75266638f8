// Low-rank updates and sums over float32 matrices.
// See kernels_impl.h.

#pragma once

COMPRESS_INLINE F load_floats(const uint8_t* p, size_t count) {
  return load_some<kFloat32>(p, count);
}

static void add_low_rank(float* matrix, const uint8_t* b, const uint8_t* a, size_t rows,
                         size_t columns, size_t rank) {
  // A tile of `a` is copied side by side: rows a power of two apart would share cache sets.
  constexpr size_t tile = 4 * kLanes, depth = 128;
  alignas(64) float panel[depth * tile];
  for (size_t column = 0; column < columns; column += tile) {
    const size_t width = smaller(tile, columns - column);
    for (size_t from = 0; from < rank; from += depth) {
      const size_t deep = smaller(depth, rank - from);
      for (size_t k = 0; k < deep; ++k) {
        for (size_t j = 0; j < tile; j += kLanes) {
          const uint8_t* p = a + 4 * ((from + k) * columns + column + j);
          store(panel + k * tile + j, j < width ? load_floats(p, width - j) : set1(0));
        }
      }
      for (size_t row = 0; row < rows; ++row) {
        float* target = matrix + row * columns + column;
        float edge[tile] = {0};
        float* out = target;
        if (width < tile) out = (float*)memcpy(edge, target, 4 * width);
        F x0 = load(out), x1 = load(out + 16), x2 = load(out + 32), x3 = load(out + 48);
        const uint8_t* weights = b + 4 * (row * rank + from);
        for (size_t k = 0; k < deep; ++k) {
          float value;
          memcpy(&value, weights + 4 * k, 4);
          const F factor = set1(value);
          const float* p = panel + k * tile;
          x0 = add(x0, mul(factor, load(p)));
          x1 = add(x1, mul(factor, load(p + 16)));
          x2 = add(x2, mul(factor, load(p + 32)));
          x3 = add(x3, mul(factor, load(p + 48)));
        }
        store(out, x0);
        store(out + 16, x1);
        store(out + 32, x2);
        store(out + 48, x3);
        if (width < tile) memcpy(target, edge, 4 * width);
      }
    }
  }
}

struct ErrorSums {
  const uint8_t *w, *decoded;
  size_t n;
  double* sums;

  template <int K>
  int run() const {
    for (size_t start = 0; start < n; start += kChunk) {
      const size_t end = smaller(start + kChunk, n);
      F error = set1(0), energy = set1(0);
      for (size_t i = start; i < end; i += kLanes) {
        const F x = load_some<K>(w + i * item_size<K>(), end - i);
        const F e = sub(x, load_floats(decoded + 4 * i, end - i));
        error = add(error, mul(e, e));
        energy = add(energy, mul(x, x));
      }
      sums[0] += (double)reduce_add(error);
      sums[1] += (double)reduce_add(energy);
    }
    return 0;
  }
};

static void error_sums(const uint8_t* w, Kind kind, const uint8_t* decoded, size_t n,
                       double* sums) {
  by_kind(kind, ErrorSums{w, decoded, n, sums});
}

struct SquaredNorms {
  const uint8_t* w;
  size_t rows, columns;
  double* out;

  template <int K>
  int run() const {
    for (size_t row = 0; row < rows; ++row) {
      const uint8_t* from = w + row * columns * item_size<K>();
      double total = 0;
      for (size_t start = 0; start < columns; start += kChunk) {
        const size_t end = smaller(start + kChunk, columns);
        F sum = set1(0);
        for (size_t i = start; i < end; i += kLanes) {
          const F x = load_some<K>(from + i * item_size<K>(), end - i);
          sum = add(sum, mul(x, x));
        }
        total += (double)reduce_add(sum);
      }
      out[row] = total;
    }
    return 0;
  }
};

static void squared_norms(const uint8_t* w, Kind kind, size_t rows, size_t columns, double* out) {
  by_kind(kind, SquaredNorms{w, rows, columns, out});
}
