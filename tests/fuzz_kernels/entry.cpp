// Where libFuzzer, or replay.cpp, comes in. COMPRESS_FUZZ_TARGET names the target.

#include "targets.h"

#include <stdio.h>
#include <stdlib.h>

#include "call.h"

namespace fuzz {

const Target kTargets[] = {
    {"codes", codes},       {"bitmask", bitmask},   {"products", products},
    {"quantize", quantize}, {"matrices", matrices}, {"planted", planted},
};

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fuzz::Target* const target = [] {
    const char* wanted = getenv("COMPRESS_FUZZ_TARGET");
    for (const fuzz::Target& each : fuzz::kTargets) {
      if (wanted && !strcmp(wanted, each.name)) return &each;
    }
    fprintf(stderr, "COMPRESS_FUZZ_TARGET must name one of:");
    for (const fuzz::Target& each : fuzz::kTargets) fprintf(stderr, " %s", each.name);
    fprintf(stderr, "\n");
    exit(2);
  }();
  fuzz::Input input(data, size);
  target->run(input);
  return 0;
}
