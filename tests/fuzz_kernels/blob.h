// Packed matrices as compress/kernels/packing.py makes them, of any content, and damaged ones.

#pragma once

#include "input.h"

namespace fuzz {

struct Blob {
  std::vector<uint8_t> bytes;
  size_t rows, columns;
  bool damaged = false;  // may be refused
  bool tame = true;      // every float in it has a magnitude of 1 or less
  size_t terms = 0;      // products that an entry of y is the sum of, at most

  // Whether every product is with codes: then results have the same bits everywhere.
  bool codes_alone() const;
};

Blob make_blob(Input& input);

// Bytes of the tiles of [rows, columns] codes.
size_t tiles_bytes(size_t rows, size_t columns, size_t bits, size_t group_size);

}  // namespace fuzz
