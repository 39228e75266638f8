// Which tables this machine can run.

#include "../kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace compress::cpu {

namespace base {
extern const Kernels kTable;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512vnni {
extern const Kernels kTable;
}

namespace {

// Read from the processor and not through __builtin_cpu_supports: not every compiler knows f16c.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

}  // namespace
#elif defined(__aarch64__)
namespace dotprod {
extern const Kernels kTable;
}

namespace {

bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // macOS: every one of Apple's own processors
#endif
}

}  // namespace
#endif

int available(const Kernels* tables[kMaxTables]) {
  int count = 0;
  tables[count++] = &base::kTable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These also ask whether the operating system saves the wide registers.
  const bool avx2_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                       __builtin_cpu_supports("popcnt") && has_f16c();
  if (avx2_ok) tables[count++] = &avx2::kTable;
  if (avx2_ok && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables[count++] = &avx512::kTable;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2")) {
      tables[count++] = &avx512vnni::kTable;
    }
  }
#elif defined(__aarch64__)
  if (has_dotprod()) tables[count++] = &dotprod::kTable;
#endif
  return count;
}

}  // namespace compress::cpu
