// Prefix sums between kernels.

#pragma once

#include "kernels_cuda.h"

namespace compress {
namespace cuda {

// values [n + 1]: entry i becomes the sum of the entries before it, the last that of all n. One
// block: meant for counts of tiles or rows.
void exclusive_scan(int64_t* values, int64_t n, const Place& place);

}  // namespace cuda
}  // namespace compress
