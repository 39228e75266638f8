// The kernels for ARMv8.2 with dot products: only the products differ from neon.

#define COMPRESS_SET dotprod
#define COMPRESS_SET_NAME "dotprod"
#include "kernels_set.h"
