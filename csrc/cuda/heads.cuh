// What the forward and the backward of surgery_head share.
#pragma once

#include "common.cuh"

namespace dgs::cuda {

// Weights of the compute type, at the places where load() takes features; none is zeros.
template <typename T, bool Aligned>
__device__ __forceinline__ void load_weights(const void* weights, int v, int lane, int lanes, int64_t count,
                                             Compute<T> (&out)[kPack<T>]) {
  using A = Compute<T>;
  const A* w = static_cast<const A*>(weights);
  if constexpr (Aligned) {
    int i = position<T, true>(v, 0, lane, lanes);
#pragma unroll
    for (int k = 0; k < kPack<T>; k += kPack<A>) {
      uint4 bits = w && i < count ? *reinterpret_cast<const uint4*>(w + i + k) : uint4{0, 0, 0, 0};
      memcpy(out + k, &bits, 16);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      int i = position<T, false>(v, j, lane, lanes);
      out[j] = w && i < count ? w[i] : A(0);
    }
  }
}

template <typename Args>
bool weights_aligned(const Args& a) {
  return is_aligned(a.image_weight) && is_aligned(a.teacher_weight) && is_aligned(a.text_weight);
}

}  // namespace dgs::cuda
