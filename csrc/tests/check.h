// What the C++ tests share: threads, random numbers, storage types and a way to fail.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "project_align.h"

namespace check {

using dgs::DType;

// Three threads, so that ranges are uneven.
inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t part = std::max(grain, (count + 2) / 3);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += part)
    threads.emplace_back(body, begin, std::min(count, begin + part), context);
  for (auto& thread : threads) thread.join();
}

inline void single_thread(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, count, context);
}

// The half types by plain arithmetic, to compare the kernels' conversions with.
inline double half_value(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(exponent ? mantissa + (1 << mantissa_bits) : mantissa,
                           std::max(exponent, 1) - bias - mantissa_bits);
}

// The same, computed once: tests ask for each of them thousands of times.
template <int exponent_bits>
double known_half_value(uint16_t bits) {
  static const std::vector<double> values = [] {
    std::vector<double> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = half_value(uint16_t(i), exponent_bits);
    return all;
  }();
  return values[bits];
}

inline size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
inline double unit_roundoff(DType t) {
  return t == DType::f64 ? 0x1p-53 : t == DType::f32 ? 0x1p-24 : t == DType::bf16 ? 0x1p-8 : 0x1p-11;
}
inline double get(const void* data, int64_t i, DType t) {
  switch (t) {
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::bf16:
      return known_half_value<8>(static_cast<const uint16_t*>(data)[i]);
    case DType::f16:
      return known_half_value<5>(static_cast<const uint16_t*>(data)[i]);
  }
  return NAN;
}

// Random numbers that are exact in every type: a few bits around 1.
inline void set(void* data, int64_t i, DType t, double x) {
  switch (t) {
    case DType::f64:
      static_cast<double*>(data)[i] = x;
      return;
    case DType::f32:
      static_cast<float*>(data)[i] = float(x);
      return;
    default:
      break;
  }
  const int mantissa_bits = t == DType::bf16 ? 7 : 10, bias = t == DType::bf16 ? 127 : 15;
  int exponent;
  const double fraction = std::frexp(std::fabs(x), &exponent);
  const auto mantissa = int(std::ldexp(fraction, mantissa_bits + 1)) & ((1 << mantissa_bits) - 1);
  const int biased = x == 0 ? 0 : exponent - 1 + bias;
  static_cast<uint16_t*>(data)[i] = uint16_t((x < 0 ? 0x8000 : 0) | biased << mantissa_bits | mantissa);
}

struct Random {
  std::mt19937 engine{1};
  // Multiples of 1/64 in [-2, 2) are exact in every type.
  double operator()() { return (int(engine() % 256) - 128) / 64.0; }
};

inline int failures = 0;
template <typename... Args>
void expect(bool ok, const char* format, Args... args) {
  if (ok || ++failures > 20) return;
  std::printf(format, args...);
  std::printf("\n");
}
inline int result() {
  std::printf(failures ? "%d failures\n" : "passed\n", failures);
  return failures != 0;
}

}  // namespace check
