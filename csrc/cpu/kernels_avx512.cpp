// The kernels for AVX-512 F, BW, VL and DQ.

#define COMPRESS_SET avx512
#define COMPRESS_SET_NAME "avx512"
#include "kernels_set.h"
