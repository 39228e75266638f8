// The product for code widths and groups that do not fill the tensor cores' tiles.

#pragma once

#include "kernels_cuda.h"

namespace compress {
namespace cuda {

// As product_codes, for 2 to 8 bits and any group.
void product_generic(const Product& product, const StoredCodes& codes, const Place& place);

}  // namespace cuda
}  // namespace compress
