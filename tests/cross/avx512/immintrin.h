// Stands before the compiler's <immintrin.h>: AVX-512 by SIMDe's portable intrinsics, and by
// fill.h what SIMDe 0.7.4 lacks; everything narrower is the compiler's own.
//
// A name that neither knows stays the compiler's, whose functions refuse to compile without the
// processor's flags: nothing is left out silently.

#pragma once

#include_next <immintrin.h>

#if defined(__AVX512F__)
#error "compile without -mavx512f: this directory emulates it"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "fill.h"

// What -mavx512f and its like would have defined; driver.cmake turns those flags into these.
#if defined(EMULATE_f)
#define __AVX512F__ 1
#endif
#if defined(EMULATE_bw)
#define __AVX512BW__ 1
#endif
#if defined(EMULATE_vl)
#define __AVX512VL__ 1
#endif
#if defined(EMULATE_dq)
#define __AVX512DQ__ 1
#endif
#if defined(EMULATE_vnni)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATE_vbmi)
#define __AVX512VBMI__ 1
#endif
#if defined(EMULATE_vbmi2)
#define __AVX512VBMI2__ 1
#endif
