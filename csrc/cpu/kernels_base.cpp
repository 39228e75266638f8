// The kernels for every machine: SSE2 on x86-64, NEON on aarch64.

#define COMPRESS_SET base
#if defined(__aarch64__)
#define COMPRESS_SET_NAME "neon"
#else
#define COMPRESS_SET_NAME "base"
#endif
#include "kernels_set.h"
