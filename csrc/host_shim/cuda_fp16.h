// Stands in for CUDA's header of the same name: the half type, rounded to nearest even by the compiler.
#pragma once

struct __half {
  _Float16 value;
};
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
