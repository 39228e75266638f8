// The kernels for AVX-512 with VNNI, VBMI and VBMI2: only the products differ from avx512.

#define COMPRESS_SET avx512vnni
#define COMPRESS_SET_NAME "avx512vnni"
#include "kernels_set.h"
