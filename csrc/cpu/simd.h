// What the CPU kernels share: storage types, one function compiled for several instruction sets, threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "../surgery_math.h"

// One binary for every processor: a kernel is compiled for the baseline and for wider vectors, and the loader
// picks one (an ifunc, so glibc only). Everything it calls has to be inlined into it. The sanitizers'
// runtimes are not ready when the loader picks.
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__clang__) ? __clang_major__ >= 17 : __GNUC__ >= 12) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DGS_KERNEL __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DGS_KERNEL
#endif

namespace dgs::cpu {

template <typename To, typename From>
DGS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions are integer arithmetic and selects without branches: every instruction set vectorises them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DGS_INLINE double load(double x) { return x; }
DGS_INLINE float load(float x) { return x; }
DGS_INLINE float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
DGS_INLINE float load(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Times 2^112 moves the exponent's bias, and makes half subnormals normal.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000u) << 16);
}

DGS_INLINE void store(double* to, double x) { *to = x; }
DGS_INLINE void store(float* to, float x) { *to = x; }
DGS_INLINE void store(bf16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  to->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
DGS_INLINE void store(f16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 half's last place is fixed: adding 0.5 lines it up with float's, and rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and beyond round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to->bits = uint16_t(half | (bits >> 16 & 0x8000u));
}

}  // namespace dgs::cpu
