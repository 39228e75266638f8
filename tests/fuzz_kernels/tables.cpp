// The base set and AVX2 in place of csrc/cpu/dispatch.cpp's choice: what a fuzzer can compile soon.

#include "../../csrc/kernels.h"

namespace compress::cpu {

namespace base {
extern const Kernels kTable;
}
#if defined(COMPRESS_FUZZ_AVX2)
namespace avx2 {
extern const Kernels kTable;
}
#endif

int available(const Kernels* tables[kMaxTables]) {
  int count = 0;
  tables[count++] = &base::kTable;
#if defined(COMPRESS_FUZZ_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables[count++] = &avx2::kTable;
  }
#endif
  return count;
}

}  // namespace compress::cpu
