// The fuzzed kernels, by what they have in common.

#pragma once

#include "input.h"

namespace fuzz {

void codes(Input& input);     // bit streams to codes and back, codes to floats
void bitmask(Input& input);   // bitmasks and kept values
void products(Input& input);  // packed matrices, whole and damaged, and products with them
void quantize(Input& input);  // weights to codes, with and without the search
void matrices(Input& input);  // sums, histograms, masks, low rank, the column sweep
void planted(Input& input);   // a fault, to see that it is found: bytes "R", "W" or "D"

struct Target {
  const char* name;
  void (*run)(Input&);
};

}  // namespace fuzz
