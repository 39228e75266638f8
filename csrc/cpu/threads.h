// One pool of threads for the products: torch's own where torch is loaded, else ours.

#pragma once

#include <stddef.h>

namespace compress::cpu {

using Task = void (*)(void* context, size_t index);

// Calls task(context, i) for every i below `count`, each once, on up to `threads` threads (the
// calling one included), and returns when all are done. Which thread runs what is not defined.
// A call from inside another call runs alone; so does one that finds our own pool in use.
void parallel_for(size_t count, int threads, Task task, void* context);

// "openmp" where torch's (or another library's) GNU OpenMP runtime is loaded, else "own".
const char* pool_name();

}  // namespace compress::cpu
