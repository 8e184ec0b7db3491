// What the CPU kernels share: functions compiled for several instruction sets, and the half-precision types.
#pragma once

#include <cstdint>
#include <cstring>

#include "../surgery_math.h"

// One binary for every processor: a function is compiled for the baseline and for wider vectors, and the loader
// picks one (an ifunc, so glibc only). What it calls has to be inlined into it. Sanitizers are not ready for work
// at the time when the loader picks.
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__clang__) ? __clang_major__ >= 17 : __GNUC__ >= 12) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(DGS_BASELINE_ONLY)
#define DGS_X86 1
#define DGS_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DGS_X86 0
#define DGS_MULTIVERSION
#endif

namespace dgs::cpu {

template <typename To, typename From>
DGS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Kernels read and write float, double and bf16 element by element, and compute in float or double.
DGS_INLINE float load(float x) { return x; }
DGS_INLINE double load(double x) { return x; }
DGS_INLINE float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

DGS_INLINE void store(float* to, float x) { *to = x; }
DGS_INLINE void store(double* to, double x) { *to = x; }
DGS_INLINE void store(bf16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  // It rounds to nearest, ties to even.
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// float16 is dearer, or has instructions of its own: it passes through arrays of float.
void widen(const f16*, float*, int64_t count);
void narrow(const float*, f16*, int64_t count);

}  // namespace dgs::cpu
