// What every kernel's entry point is told of numbers and of threads.
#pragma once

#include <cstdint>

namespace dgs {

enum class DType { f32, f64, bf16, f16 };

namespace cpu {

// Runs body(begin, end, context) over ranges that cover [0, count), each of at least `grain` where it can.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace cpu
}  // namespace dgs
