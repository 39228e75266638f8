// Faults on purpose: what tests/robust/test_fuzz_kernels.py expects to be found.

#include "../../csrc/kernels.h"
#include "call.h"
#include "targets.h"

namespace fuzz {

void planted(Input& in) {
  const compress::Kernels* tables[compress::cpu::kMaxTables];
  const int best = compress::cpu::available(tables) - 1;
  const std::vector<uint8_t> nine{1, 2, 3, 4, 5, 6, 7, 8, 9};
  switch (in.byte()) {
    case 'R': {  // past the binding's checks: the mask keeps more values than there are
      const std::vector<uint8_t> mask{0xFF, 0xFF};
      std::vector<uint8_t> out(16);
      const uint8_t fill = 0;
      tables[best]->bitmask_expand(mask.data(), nine.data(), 9, &fill, 1, 1, 16, out.data());
      return;
    }
    case 'W': {  // the output is one code short
      std::vector<uint8_t> out(17);
      tables[best]->unpack_bits(nine.data(), 9, 1, 18, 4, out.data());
      return;
    }
    case 'D': {  // refused, though nothing was distorted
      Call call("count_bits", in);
      call.in(nine);
      call.integer(2);
      call.integer(2);
      call.run();
      return;
    }
    default:
      return;
  }
}

}  // namespace fuzz
