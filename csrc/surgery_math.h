// The formulas of gradient surgery, per element and per row, shared by the CPU and the CUDA kernels.
#pragma once

#if defined(__CUDACC__)
#define DGS_INLINE __host__ __device__ __forceinline__
#else
#define DGS_INLINE inline __attribute__((always_inline))
#endif

namespace dgs {

enum class Order { align_first, project_first };
enum class Rule { positive, full, conflict };

// Clamps that let NaN through, as torch.clamp does: a comparison with NaN is false, so NaN is returned.
template <typename F>
DGS_INLINE F positive_part(F x) {
  return x < F(0) ? F(0) : x;
}
template <typename F>
DGS_INLINE F negative_part(F x) {
  return x > F(0) ? F(0) : x;
}

// The direction h that the projection removes, from an element of the harmful row.
template <bool positive, typename F>
DGS_INLINE F direction(F harmful) {
  return positive ? positive_part(harmful) : harmful;
}

// k such that the projection onto u = h / (||h|| + eps) is <x, u> u = k h, from <x, h> and ||h||.
template <typename F>
DGS_INLINE F projection(F inner, F norm, F eps, Rule rule) {
  if (rule == Rule::conflict) inner = negative_part(inner);
  const F scale = norm + eps;
  // It is divided twice, as scale * scale would underflow where eps alone is left.
  return inner / scale / scale;
}

}  // namespace dgs
