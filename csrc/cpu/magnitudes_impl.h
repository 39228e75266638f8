// Magnitude keys: histograms, masks by a threshold, and the search for what is not finite.
// See kernels_impl.h.

#pragma once

COMPRESS_INLINE uint32_t key_at(const uint8_t* w, bool wide, size_t i) {
  if (wide) {
    uint32_t bits;
    memcpy(&bits, w + 4 * i, 4);
    return bits & 0x7FFFFFFFu;
  }
  uint16_t bits;
  memcpy(&bits, w + 2 * i, 2);
  return bits & 0x7FFFu;
}

// Adds the top 15 bits of each key to `counts`. One store a weight is the limit, so several tables
// would gain nothing.
template <bool Wide, class Count>
static void count_keys(const uint8_t* w, size_t n, Count* counts) {
  constexpr size_t item = Wide ? 4 : 2;
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __builtin_prefetch(w + i * item + kAhead);
    for (size_t j = 0; j < item; ++j) {
      const uint64_t x = load_u64(w + i * item + 8 * j);
      if (!Wide) ++counts[x & 0x7FFF];
      ++counts[(x >> 16) & 0x7FFF];
      if (!Wide) ++counts[(x >> 32) & 0x7FFF];
      ++counts[(x >> 48) & 0x7FFF];
    }
  }
  for (; i < n; ++i) ++counts[key_at(w, Wide, i) >> (Wide ? 16 : 0)];
}

template <bool Wide>
static void histogram(const uint8_t* w, size_t n, uint64_t* counts) {
  constexpr size_t bins = 1 << 15, piece = (size_t)1 << 30;
  // A table of narrow counts takes half the cache.
  uint32_t* table = n < 1 << 16 ? nullptr : (uint32_t*)calloc(bins, sizeof(uint32_t));
  if (!table) {
    count_keys<Wide>(w, n, counts);
    return;
  }
  for (size_t start = 0; start < n; start += piece) {
    count_keys<Wide>(w + start * (Wide ? 4 : 2), smaller(piece, n - start), table);
    for (size_t bin = 0; bin < bins; ++bin) {
      counts[bin] += table[bin];
      table[bin] = 0;
    }
  }
  free(table);
}

static void magnitude_histogram(const uint8_t* w, Kind kind, size_t n, uint64_t* counts) {
  if (kind == kFloat32) return histogram<true>(w, n, counts);
  histogram<false>(w, n, counts);
}

static void magnitude_histogram_low(const uint8_t* w, size_t n, uint32_t prefix, uint64_t* counts) {
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (uint32_t equal = prefix_bits(w + 4 * i, prefix); equal; equal &= equal - 1) {
      ++counts[key_at(w, true, i + (size_t)__builtin_ctz(equal)) & 0xFFFF];
    }
  }
  for (; i < n; ++i) {
    const uint32_t key = key_at(w, true, i);
    if (key >> 16 == prefix) ++counts[key & 0xFFFF];
  }
}

template <bool Wide>
static size_t threshold(const uint8_t* w, size_t n, uint32_t key, size_t ties, uint8_t* mask) {
  size_t used = 0, i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t equal = compare_keys<Wide>(w + i * (Wide ? 4 : 2), key, mask + i);
    for (; equal && used < ties; equal &= equal - 1, ++used)
      mask[i + (size_t)__builtin_ctz(equal)] = 1;
  }
  for (; i < n; ++i) {
    const uint32_t own = key_at(w, Wide, i);
    const bool tie = own == key && used < ties;
    mask[i] = own > key || tie;
    used += tie;
  }
  return used;
}

static size_t threshold_mask(const uint8_t* w, Kind kind, size_t n, uint32_t key, size_t ties,
                             uint8_t* mask) {
  if (kind == kFloat32) return threshold<true>(w, n, key, ties, mask);
  if (key > 0x7FFF) {
    memset(mask, 0, n);
    return 0;
  }
  return threshold<false>(w, n, key, ties, mask);
}

struct FiniteIndex {
  const uint8_t* w;
  size_t n;

  template <int K>
  int64_t run() const {
    constexpr uint32_t largest = 0x7F7FFFFFu;
    for (size_t start = 0; start < n; start += kChunk) {
      const size_t end = smaller(start + kChunk, n);
      U worst = set1u(0);
      for (size_t i = start; i < end; i += kLanes) {
        worst = umax(worst, abs_bits(load_some<K>(w + i * item_size<K>(), end - i)));
      }
      if (reduce_umax(worst) <= largest) continue;
      for (size_t i = start; i < end; ++i) {
        const U one = abs_bits(load_some<K>(w + i * item_size<K>(), 1));
        if (reduce_umax(one) > largest) return (int64_t)i;
      }
    }
    return -1;
  }
};

static int64_t finite_index(const uint8_t* w, Kind kind, size_t n) {
  return by_kind(kind, FiniteIndex{w, n});
}
