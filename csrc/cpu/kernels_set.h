// One instruction set's table of kernels; COMPRESS_SET names it. The file that includes this is
// compiled with that set's flags, and everything but the table has internal linkage.

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels.h"
#include "product.h"
#include "threads.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "tables.h"
#endif

static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must not be widened");

#define COMPRESS_INLINE static inline __attribute__((always_inline))

namespace compress::cpu {
namespace {

enum Fold { kAdd, kMin, kMax };

#if defined(__AVX512F__)
#include "bytes_avx2.h"
#include "lanes_avx512.h"
#include "rows_avx2.h"
#elif defined(__AVX2__)
#include "bytes_avx2.h"
#include "lanes_avx2.h"
#include "rows_avx2.h"
#else
#include "bytes_base.h"
#include "lanes_base.h"
#endif

#include "kernels_impl.h"

#if defined(__AVX512VNNI__)
#include "product_blocks_vnni.h"
#elif defined(__AVX2__)
#include "product_blocks_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "product_blocks_neon.h"
#else
#include "product_blocks_base.h"
#endif

#if defined(__AVX512F__)
#include "product_expand_avx512.h"
#elif defined(__AVX2__)
#include "product_expand_avx2.h"
#else
#include "product_expand_base.h"
#endif

// clang-format off: each uses the one before
#include "product_codes_impl.h"
#include "product_values_rows.h"
#include "product_values_impl.h"
#include "product_linear_impl.h"
// clang-format on

}  // namespace

namespace COMPRESS_SET {

extern const Kernels kTable;
const Kernels kTable = {
    COMPRESS_SET_NAME, magnitude_histogram, magnitude_histogram_low,
    threshold_mask,    finite_index,        quantize_groups,
    dequantize,        pack_bits,           unpack_bits,
    count_mask,        count_bits,          bitmask_compress,
    bitmask_expand,    add_low_rank,        error_sums,
    squared_norms,     pack_tiles,          linear,
    obs_block,
};

}  // namespace COMPRESS_SET
}  // namespace compress::cpu
