// What the CPU kernels' launch code shares: threads, storage types, and float16 widened block by block.
#pragma once

#include <type_traits>

#include "../types.h"
#include "simd.h"

namespace dgs::cpu {

// In elements. Less than that is done before a second thread wakes up.
constexpr int64_t work_per_thread = 16384;

template <typename Body>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Body body) {
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<Body*>(context))(i);
      },
      &body);
}

// body(T()) with the storage type.
template <typename Body>
void dispatch(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float());
    case DType::f64:
      return body(double());
    case DType::bf16:
      return body(bf16());
    case DType::f16:
      return body(f16());
  }
}

// Up to `capacity` elements of an array of T from `begin` on, as the loops read them: float16 is copied to floats,
// everything else is there already. Null stays null. `read` false: only to be written.
template <typename T, int64_t capacity = 4096>
class Widened {
  static constexpr bool half = std::is_same_v<T, f16>;

 public:
  using Seen = std::conditional_t<half, float, T>;
  Seen* data = nullptr;

  Widened() = default;
  Widened(const void* array, int64_t begin, int64_t size, bool read = true) { of(array, begin, size, read); }
  Widened(const Widened&) = delete;

  const Seen* of(const void* array, int64_t begin, int64_t size, bool read = true) {
    if (!array) return data = nullptr;
    from_ = static_cast<T*>(const_cast<void*>(array)) + begin, size_ = size;
    if constexpr (half) {
      if (read) widen(from_, copy_, size);
      return data = copy_;
    } else {
      return data = from_;
    }
  }

  void write_back() {
    if constexpr (half) narrow(copy_, from_, size_);
  }

 private:
  T* from_ = nullptr;
  int64_t size_ = 0;
  Seen copy_[half ? capacity : 1];
};

}  // namespace dgs::cpu
