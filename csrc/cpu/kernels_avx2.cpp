// The kernels for AVX2, F16C and BMI2.

#define COMPRESS_SET avx2
#define COMPRESS_SET_NAME "avx2"
#include "kernels_set.h"
