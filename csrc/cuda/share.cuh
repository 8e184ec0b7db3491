// The part of a row, or of a chunk of a tensor, that one thread holds in registers between the inner products
// and the update: it is what lets a row kernel read every element once.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace dgs::cuda {

template <typename A>
struct SurgeryOptions {
  A alignment, eps;
  Order order;
  Rule rule;
};

// What one element adds to the sums <x, h>, <h, h> of a row, with x the vector that is projected,
template <typename A>
__device__ __forceinline__ void add_products(A x, A h, A, A (&sums)[2]) {
  sums[0] += x * h;
  sums[1] += h * h;
}
// and to a group's, from which metrics are made too: <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b>.
template <typename A>
__device__ __forceinline__ void add_products(A g, A h, A b, A (&sums)[group_sums]) {
  sums[0] += g * h;
  sums[1] += h * h;
  sums[2] += g * g;
  sums[3] += b * h;
  sums[4] += b * b;
  sums[5] += g * b;
}

// Calls body with a condition as a type, so that loops in it have no branch.
template <typename F>
__device__ __forceinline__ void with(bool condition, F body) {
  if (condition)
    body(std::true_type());
  else
    body(std::false_type());
}

template <typename T, bool Aligned, int Packs = kShare<T, Aligned> / kPack<T>>
struct Share {
  using A = Compute<T>;
  static constexpr int kPacks = Packs;
  // `grad + alignment * min(beneficial, 0)`.
  A moved[kPacks * kPack<T>];
  // What the rule makes of the harmful row.
  Pack<T> directions[kPacks];

  // `count` elements from each pointer on, dealt out to `lanes` threads.
  template <int N>
  __device__ __forceinline__ void read(const T* grad, const T* harmful, const T* beneficial, int64_t count, int lane,
                                       int lanes, const SurgeryOptions<A>& options, A (&sums)[N], bool wide = Aligned) {
    Pack<T> g[kPacks], b[kPacks];
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      g[v] = load<T, Aligned, true>(grad, v, lane, lanes, count, wide);
      directions[v] = load<T, Aligned, true>(harmful, v, lane, lanes, count, wide);
      b[v] = load<T, Aligned, true>(beneficial, v, lane, lanes, count, wide);
    }
    const auto add = [&](auto positive, auto moved_first) {
#pragma unroll
      for (int v = 0; v < kPacks; ++v)
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) {
          const A x = element(g[v], j), pull = negative_part(element(b[v], j));
          const A h = direction<positive.value>(element(directions[v], j));
          if (positive.value) narrow(h, directions[v].at[j]);
          A& y = moved[v * kPack<T> + j];
          y = x + options.alignment * pull;
          add_products(moved_first.value ? y : x, h, pull, sums);
        }
    };
    with(options.rule == Rule::positive, [&](auto positive) {
      // A group's sums hold those of both orders.
      if constexpr (N == group_sums)
        add(positive, std::false_type());
      else
        with(options.order == Order::align_first, [&](auto moved_first) { add(positive, moved_first); });
    });
  }

  __device__ __forceinline__ A updated(int v, int j, A k) const {
    return moved[v * kPack<T> + j] - k * element(directions[v], j);
  }

  __device__ __forceinline__ void write(T* out, A k, int64_t count, int lane, int lanes, bool wide = Aligned) const {
#pragma unroll
    for (int v = 0; v < kPacks; ++v) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) narrow(updated(v, j, k), pack.at[j]);
      store<T, Aligned, true>(out, pack, v, lane, lanes, count, wide);
    }
  }
};

}  // namespace dgs::cuda
