// combine_ on the CPU: all objectives are read side by side, and the sum of a few vectors is in registers until it is
// written.
#include <algorithm>
#include <cstring>

#include "../objectives.h"
#include "lanes.h"
#include "layers.h"
#include "stream.h"

namespace dgs::cpu {
namespace {

constexpr int64_t block = objectives_block;

// A block of every objective.
template <typename T>
struct Rows {
  const T* at[max_objectives];
  int count;
};

// `past_caches`: out divides by 16 bytes.
template <bool past_caches, typename T, typename F>
DGS_INLINE void combine_loop(const Rows<T> x, const F* weights, T* out, int64_t size) {
  constexpr int64_t vectors = 4, lanes = Lanes<F>::count, step = vectors * lanes;
  int64_t i = 0;
  for (; i + step <= size; i += step) {
    Lanes<F> sum[vectors];
    for (int k = 0; k < x.count; ++k) {
      const F weight = weights[k];
      for (int v = 0; v < vectors; ++v) {
        Lanes<F> row;
        read(x.at[k] + i + v * lanes, row);
        sum[v].of += weight * row.of;
      }
    }
    if constexpr (past_caches) {
      alignas(32) T cached[step];
      for (int v = 0; v < vectors; ++v) write(sum[v], cached + v * lanes);
      stream(cached, out + i, sizeof cached);
    } else {
      for (int v = 0; v < vectors; ++v) write(sum[v], out + i + v * lanes);
    }
  }
  for (; i < size; ++i) {
    F sum = 0;
    for (int k = 0; k < x.count; ++k) sum += weights[k] * load(x.at[k][i]);
    store(&out[i], sum);
  }
}

// Multiversioning is for plain functions only, hence the list.
#define DGS_KERNELS(T, F)                                                                                        \
  DGS_MULTIVERSION void combine(const Rows<T>& x, const F* weights, T* out, int64_t size, bool past_caches) {    \
    return past_caches ? combine_loop<true>(x, weights, out, size) : combine_loop<false>(x, weights, out, size); \
  }
DGS_KERNELS(float, float)
DGS_KERNELS(double, double)
DGS_KERNELS(bf16, float)
#undef DGS_KERNELS

template <typename T>
class Combination {
  using Seen = typename Widened<T>::Seen;
  using F = decltype(load(Seen()));
  const Objectives& o_;
  bool beyond_caches_;

 public:
  explicit Combination(const Objectives& o) : o_(o) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < o.num_tensors; ++i) bytes += o.tensors[i].numel * sizeof(T);
    beyond_caches_ = DGS_X86 && bytes >= beyond_cache && std::is_same_v<T, Seen>;
  }

  void run(ParallelFor parallel_for) const {
    const Pieces pieces(o_.tensors, o_.num_tensors, o_.num_groups);
    pieces.run(parallel_for, [&](int64_t i) {
      const F* weights = static_cast<const F*>(o_.weights) + pieces[i].group * o_.weights_stride;
      pieces.for_blocks(pieces[i], o_.tensors, block, [&](const ObjectivesTensor& t, int64_t at, int64_t size) {
        Widened<T, block> blocks[max_objectives];
        Rows<Seen> x{{}, o_.count};
        for (int k = 0; k < o_.count; ++k) x.at[k] = blocks[k].of(t.objectives[k], at, size);
        Widened<T, block> out(t.grad, at, size, /*read=*/false);
        combine(x, weights, out.data, size, streamable(t, out.data));
        out.write_back();
      });
      if (beyond_caches_) stream_end();
    });
  }

 private:
  // Where one of the objectives is written to, its lines are in the cache already.
  bool streamable(const ObjectivesTensor& t, const void* out) const {
    return beyond_caches_ && reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
           std::find(t.objectives, t.objectives + o_.count, t.grad) == t.objectives + o_.count;
  }
};

}  // namespace

void combine_(const Objectives& o, ParallelFor parallel_for) {
  dispatch(o.dtype, [&](auto zero) { Combination<decltype(zero)>(o).run(parallel_for); });
}

}  // namespace dgs::cpu
