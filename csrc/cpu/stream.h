// Stores past the caches.
#pragma once

#include "simd.h"

#if DGS_X86
#include <emmintrin.h>
#endif

namespace dgs::cpu {

// A result larger than caches goes past them: a line that is written as a whole need not be read first, which
// would be as much traffic again.
constexpr int64_t beyond_cache = 8 << 20;

// Both addresses divide by 16, and so does the number of bytes.
inline void stream([[maybe_unused]] const void* from, [[maybe_unused]] void* to, [[maybe_unused]] int64_t bytes) {
#if DGS_X86
  for (int64_t i = 0; i < bytes / 16; ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, static_cast<const __m128i*>(from)[i]);
#endif
}

// Before another thread may read what was stored.
inline void stream_end() {
#if DGS_X86
  _mm_sfence();
#endif
}

}  // namespace dgs::cpu
