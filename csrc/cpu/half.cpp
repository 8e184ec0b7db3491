// float16 arrays to float (exact) and back (rounded to nearest, ties to even). x86 has instructions for it since
// AVX2's time; elsewhere it is integer arithmetic and selects, which compilers vectorise.
#include "simd.h"

#if DGS_X86
#include <immintrin.h>
#endif

namespace dgs::cpu {
namespace {

DGS_INLINE float to_float(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Times 2^112 moves the exponent's bias, and makes half's subnormals normal.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  // This makes infinity and NaN.
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000u) << 16);
}

DGS_INLINE f16 to_f16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the last place of a half is fixed: adding 0.5 lines it up with float's, and rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  // 65520 and beyond round to infinity.
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | (bits >> 16 & 0x8000u))};
}

#if DGS_X86
bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}

__attribute__((target("avx2,f16c"))) void widen_f16c(const f16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

__attribute__((target("avx2,f16c"))) void narrow_f16c(const float* from, f16* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

}  // namespace

void widen(const f16* from, float* to, int64_t count) {
#if DGS_X86
  if (has_f16c()) return widen_f16c(from, to, count);
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

void narrow(const float* from, f16* to, int64_t count) {
#if DGS_X86
  if (has_f16c()) return narrow_f16c(from, to, count);
#endif
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = to_f16(from[i]);
}

}  // namespace dgs::cpu
