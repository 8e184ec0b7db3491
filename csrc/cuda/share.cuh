// The part of a row, or of a chunk of a tensor, that one thread holds in registers between the inner products
// and the update: it is what lets a row kernel read every element once.
#pragma once

#include "common.cuh"

namespace dgs::cuda {

template <typename A>
struct SurgeryOptions {
  A alignment, eps;
  Order order;
  Rule rule;
};

template <typename A>
__device__ __forceinline__ A direction(A harmful, Rule rule) {
  return rule == Rule::positive ? dgs::direction<true>(harmful) : dgs::direction<false>(harmful);
}

// What one element adds to <x, h>, <h, h> and <x, x>, with x the vector that is projected.
template <typename A>
__device__ __forceinline__ void add_products(A grad, A moved, A h, Order order, A (&sums)[3]) {
  A x = order == Order::align_first ? moved : grad;
  sums[0] += x * h;
  sums[1] += h * h;
  sums[2] += x * x;
}

template <typename A>
__device__ __forceinline__ A coefficient(const A (&sums)[3], const SurgeryOptions<A>& options) {
  return projection(sums[0], sqrt(sums[1]), options.eps, options.rule);
}

template <typename T, bool Aligned>
struct Share {
  using A = Compute<T>;
  static constexpr int kPacks = kShare<T, Aligned> / kPack<T>;
  A moved[kShare<T, Aligned>];        // grad + alignment * min(beneficial, 0)
  Pack<T> harmful[kPacks];

  // `count` elements from each pointer on, dealt out to `lanes` threads.
  __device__ __forceinline__ void read(const T* grad, const T* harmful_row, const T* beneficial, int64_t count, int lane,
                                       int lanes, const SurgeryOptions<A>& options, A (&sums)[3], bool wide = Aligned) {
    Pack<T> g[kPacks], b[kPacks];
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      g[v] = load<T, Aligned>(grad, v, lane, lanes, count, wide);
      harmful[v] = load<T, Aligned>(harmful_row, v, lane, lanes, count, wide);
      b[v] = load<T, Aligned>(beneficial, v, lane, lanes, count, wide);
    }
#pragma unroll
    for (int v = 0; v < kPacks; ++v)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        A x = widen(g[v].at[j]);
        A& y = moved[v * kPack<T> + j];
        y = x + options.alignment * negative_part(widen(b[v].at[j]));
        add_products(x, y, direction(widen(harmful[v].at[j]), options.rule), options.order, sums);
      }
  }

  __device__ __forceinline__ A updated(int v, int j, A k, Rule rule) const {
    return moved[v * kPack<T> + j] - k * direction(widen(harmful[v].at[j]), rule);
  }

  __device__ __forceinline__ void write(T* out, A k, int64_t count, int lane, int lanes, Rule rule,
                                        bool wide = Aligned) const {
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) narrow(updated(v, j, k, rule), pack.at[j]);
      store<T, Aligned>(out, pack, v, lane, lanes, count, wide);
    }
  }
};

}  // namespace dgs::cuda
