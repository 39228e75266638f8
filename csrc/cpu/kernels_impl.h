// The loops, written once over sixteen lanes and compiled for every instruction set: what they
// share, and one *_impl.h an idea.
//
// Included inside an anonymous namespace after a lanes_*.h and a bytes_*.h. Uses no inline library
// function (see lanes_base.h) and no fused multiply-add; sums follow `lane_sum` in
// reference_sums.py: 16 float lanes over at most kChunk entries, a fixed tree, then double.

constexpr size_t kLanes = 16;
constexpr size_t kChunk = 4096;
constexpr int kCandidates = 16;
constexpr size_t kAhead = 4096;  // bytes; prefetched behind the last weight, too: it never faults
constexpr float kInfinity = __builtin_inff();

COMPRESS_INLINE size_t smaller(size_t a, size_t b) {
  return a < b ? a : b;
}

template <int K>
COMPRESS_INLINE size_t item_size() {
  return K == kFloat32 ? 4 : 2;
}

template <int K>
COMPRESS_INLINE F load_weights(const uint8_t* p) {
  if (K == kFloat32) return load(p);
  return K == kFloat16 ? load_f16(p) : load_bf16(p);
}

// Up to 16 weights; missing ones are zero, which no sum, minimum or maximum here can feel.
template <int K>
COMPRESS_INLINE F load_some(const uint8_t* p, size_t count) {
  if (count >= kLanes) return load_weights<K>(p);
  uint8_t bytes[kLanes * 4] = {0};
  memcpy(bytes, p, count * item_size<K>());
  return load_weights<K>(bytes);
}

// Calls `f.run<K>()` for the kind at hand.
template <class Function>
static auto by_kind(Kind kind, const Function& f) {
  if (kind == kFloat32) return f.template run<kFloat32>();
  if (kind == kFloat16) return f.template run<kFloat16>();
  return f.template run<kBFloat16>();
}

#include "codes_impl.h"
#include "magnitudes_impl.h"
#include "matrices_impl.h"
#include "obs_impl.h"
#include "quantize_impl.h"
