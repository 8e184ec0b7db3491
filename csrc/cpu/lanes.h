// Vectors of 32 bytes of the computing type, for loops whose sums have to stay in registers.
#pragma once

#include <cstring>

#include "simd.h"

namespace dgs::cpu {

template <typename F>
struct Lanes {
  static constexpr int64_t count = 32 / sizeof(F);
  typedef F Vector __attribute__((vector_size(32)));
  Vector of = {};
};

template <typename F>
DGS_INLINE void read(const F* from, Lanes<F>& to) {
  std::memcpy(&to.of, from, sizeof to.of);
}
DGS_INLINE void read(const bf16* from, Lanes<float>& to) {
  typedef uint16_t Half __attribute__((vector_size(16)));
  typedef uint32_t Word __attribute__((vector_size(32)));
  Half half;
  std::memcpy(&half, from, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  std::memcpy(&to.of, &word, sizeof word);
}

DGS_INLINE void write(const Lanes<float>& from, float* to) { std::memcpy(to, &from.of, sizeof from.of); }
DGS_INLINE void write(const Lanes<double>& from, double* to) { std::memcpy(to, &from.of, sizeof from.of); }
DGS_INLINE void write(const Lanes<float>& from, bf16* to) {
#pragma omp simd
  for (int i = 0; i < 8; ++i) store(&to[i], from.of[i]);
}

}  // namespace dgs::cpu
