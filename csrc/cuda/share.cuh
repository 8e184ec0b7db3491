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

// What one element adds to a row's sums <x, h>, <h, h>, <x, x>, with x the vector that is projected,
template <typename A>
__device__ __forceinline__ void add_products(A g, A h, A, A moved, Order order, A (&sums)[3]) {
  const A x = order == Order::align_first ? moved : g;
  sums[0] += x * h;
  sums[1] += h * h;
  sums[2] += x * x;
}
// and to a group's, from which metrics are made too: <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>.
template <typename A>
__device__ __forceinline__ void add_products(A g, A h, A b, A, Order, A (&sums)[group_sums]) {
  sums[0] += g * h;
  sums[1] += h * h;
  sums[2] += g * g;
  sums[3] += b * h;
  sums[4] += b * b;
  sums[5] += g * b;
}

template <typename T, bool Aligned, int Packs = kShare<T, Aligned> / kPack<T>>
struct Share {
  using A = Compute<T>;
  static constexpr int kPacks = Packs;
  A moved[kPacks * kPack<T>];  // grad + alignment * min(beneficial, 0)
  Pack<T> harmful[kPacks];

  // `count` elements from each pointer on, dealt out to `lanes` threads.
  template <int N>
  __device__ __forceinline__ void read(const T* grad, const T* harmful_row, const T* beneficial, int64_t count,
                                       int lane, int lanes, const SurgeryOptions<A>& options, A (&sums)[N],
                                       bool wide = Aligned) {
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
        A x = widen(g[v].at[j]), pull = negative_part(widen(b[v].at[j]));
        A& y = moved[v * kPack<T> + j];
        y = x + options.alignment * pull;
        add_products(x, direction(widen(harmful[v].at[j]), options.rule), pull, y, options.order, sums);
      }
  }

  __device__ __forceinline__ void scale(A factor) {
#pragma unroll
    for (A& x : moved) x *= factor;
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
