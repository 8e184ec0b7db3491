// project_align_ on the CPU, and the walk over a list of tensors that surgery_adamw_ shares. A layer that fits a
// core's cache is summed and then edited by one thread: memory is read once. Larger layers take two passes over
// their blocks, each by all threads, one layer after the other so that a shared cache may still hold it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../tensor_list.h"
#include "layers.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

// In elements. Three float streams of it are 1.5 MiB.
constexpr int64_t small_layer = 131072;

// Vector lanes inside a block, double over blocks in their order: no thread count changes the result.
struct Sums {
  double at[group_sums] = {};

  void operator+=(const Sums& other) {
    for (int n = 0; n < group_sums; ++n) at[n] += other.at[n];
  }
};

template <bool positive, bool aligned, typename T>
DGS_INLINE Sums sum_loop(const T* grad, const T* harmful, const T* beneficial, int64_t size) {
  using F = decltype(load(T()));
  F gh = 0, hh = 0, gg = 0, bh = 0, bb = 0, gb = 0;
#pragma omp simd reduction(+ : gh, hh, gg, bh, bb, gb)
  for (int64_t i = 0; i < size; ++i) {
    const F g = load(grad[i]), h = direction<positive>(load(harmful[i]));
    gh += g * h;
    hh += h * h;
    gg += g * g;
    if constexpr (aligned) {
      const F b = negative_part(load(beneficial[i]));
      bh += b * h;
      bb += b * b;
      gb += g * b;
    }
  }
  return {{gh, hh, gg, bh, bb, gb}};
}

template <typename T>
DGS_INLINE Sums sum_any(const T* g, const T* h, const T* b, int64_t size, bool positive) {
  if (positive) return b ? sum_loop<true, true>(g, h, b, size) : sum_loop<true, false>(g, h, b, size);
  return b ? sum_loop<false, true>(g, h, b, size) : sum_loop<false, false>(g, h, b, size);
}

template <bool positive, bool aligned, typename T, typename F>
DGS_INLINE void apply_loop(T* grad, const T* harmful, const T* beneficial, int64_t size, F alignment, F k) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    F g = load(grad[i]);
    if constexpr (aligned) g += alignment * negative_part(load(beneficial[i]));
    store(&grad[i], g - k * direction<positive>(load(harmful[i])));
  }
}

template <typename T, typename F>
DGS_INLINE void apply_any(T* g, const T* h, const T* b, int64_t size, bool positive, F alignment, F k) {
  if (positive) {
    if (b) return apply_loop<true, true>(g, h, b, size, alignment, k);
    return apply_loop<true, false>(g, h, b, size, alignment, k);
  }
  if (b) return apply_loop<false, true>(g, h, b, size, alignment, k);
  return apply_loop<false, false>(g, h, b, size, alignment, k);
}

// Multiversioning is for plain functions only, hence the list.
#define DGS_KERNELS(T)                                                                                                 \
  DGS_MULTIVERSION Sums sum(const T* g, const T* h, const T* b, int64_t size, bool positive) {                         \
    return sum_any(g, h, b, size, positive);                                                                           \
  }                                                                                                                    \
  DGS_MULTIVERSION void apply(T* g, const T* h, const T* b, int64_t size, bool positive, double alignment, double k) { \
    using F = decltype(load(T()));                                                                                     \
    apply_any(g, h, b, size, positive, F(alignment), F(k));                                                            \
  }
DGS_KERNELS(float)
DGS_KERNELS(double)
DGS_KERNELS(bf16)
#undef DGS_KERNELS

template <typename T>
Sums sum_block(const ListTensor& t, int64_t begin, int64_t size, bool positive) {
  Widened<T> grad(t.grad, begin, size), harmful(t.harmful, begin, size), beneficial(t.beneficial, begin, size);
  return sum(grad.data, harmful.data, beneficial.data, size, positive);
}

template <typename T>
void apply_block(const ListBlock& block, bool positive) {
  const ListTensor& t = block.tensor;
  Widened<T> grad(t.grad, block.begin, block.size), harmful(t.harmful, block.begin, block.size),
      beneficial(t.beneficial, block.begin, block.size);
  apply(grad.data, harmful.data, beneficial.data, block.size, positive, block.alignment, block.k);
  grad.write_back();
}

// A list's layers, one after the other: the tensors of each in the order of the list.
template <typename T>
class Layers {
  using F = decltype(load(typename Widened<T>::Seen()));

  const TensorList& list_;
  const double alignment_;
  void (*const apply_)(const ListBlock&, const void*);
  const void* const context_;
  const ByGroup groups_;

 public:
  Layers(const TensorList& list, void (*apply)(const ListBlock&, const void*), const void* context)
      : list_(list),
        alignment_(list.alignment * (list.scale ? double(*static_cast<const F*>(list.scale)) : 1.0)),
        apply_(apply),
        context_(context),
        groups_(list.tensors, list.num_tensors, list.num_groups) {}

  void run(ParallelFor parallel_for) const {
    std::vector<int64_t> small;
    int64_t work = 0;
    for (int64_t group = 0; group < list_.num_groups; ++group)
      if (groups_.elements[group] <= small_layer) {
        small.push_back(group);
        work += groups_.elements[group];
      }
    if (!small.empty()) {
      const int64_t count = small.size(), each = std::max<int64_t>(1, work / count);
      in_turns(parallel_for, count, std::max<int64_t>(1, work_per_thread / each),
               [&](int64_t i) { small_layer_of(small[i]); });
    }
    for (int64_t group = 0; group < list_.num_groups; ++group)
      if (groups_.elements[group] > small_layer) large_layer_of(group, parallel_for);
  }

 private:
  template <typename Body>
  void for_blocks(int64_t group, Body body) const {
    for (int64_t i = groups_.begin[group]; i < groups_.begin[group + 1]; ++i) {
      const ListTensor& t = list_.tensors[groups_.tensors[i]];
      for (int64_t at = 0; at < t.numel; at += list_block) body(t, at, std::min(list_block, t.numel - at));
    }
  }

  Sums sums_of(const ListTensor& t, int64_t at, int64_t size) const {
    return sum_block<T>(t, at, size, list_.rule == Rule::positive);
  }

  F* row(int64_t group) const { return static_cast<F*>(list_.sums) + group * group_sums; }
  void write(int64_t group, const Sums& total) const {
    for (int n = 0; n < group_sums; ++n) row(group)[n] = F(total.at[n]);
  }

  // From the sums as they are stored, so that `all` does what `sums` and then `apply` do.
  double coefficient(int64_t group) const {
    const F* sums = row(group);
    const double inner = list_.order == Order::align_first ? sums[0] + alignment_ * sums[3] : double(sums[0]);
    return projection(inner, std::sqrt(double(sums[1])), list_.eps, list_.rule);
  }

  void small_layer_of(int64_t group) const {
    if (list_.part != Part::apply) {
      Sums total;
      for_blocks(group, [&](const ListTensor& t, int64_t at, int64_t size) { total += sums_of(t, at, size); });
      write(group, total);
    }
    if (list_.part == Part::sums) return;
    const double k = coefficient(group);
    // Backwards: what was read last is nearest.
    for (int64_t i = groups_.begin[group + 1]; i-- > groups_.begin[group];) {
      const ListTensor& t = list_.tensors[groups_.tensors[i]];
      for (int64_t at = (t.numel - 1) / list_block * list_block; t.numel && at >= 0; at -= list_block)
        apply_({t, at, std::min(list_block, t.numel - at), alignment_, k}, context_);
    }
  }

  void large_layer_of(int64_t group, ParallelFor parallel_for) const {
    struct Place {
      const ListTensor* tensor;
      int64_t at, size;
    };
    std::vector<Place> blocks;
    for_blocks(group, [&](const ListTensor& t, int64_t at, int64_t size) { blocks.push_back({&t, at, size}); });
    const int64_t count = blocks.size(), grain = work_per_thread / list_block;
    if (list_.part != Part::apply) {
      std::vector<Sums> parts(count);
      in_turns(parallel_for, count, grain,
               [&](int64_t i) { parts[i] = sums_of(*blocks[i].tensor, blocks[i].at, blocks[i].size); });
      Sums total;
      for (const Sums& part : parts) total += part;
      write(group, total);
    }
    if (list_.part == Part::sums) return;
    const double k = coefficient(group);
    in_turns(parallel_for, count, grain,
             [&](int64_t i) { apply_({*blocks[i].tensor, blocks[i].at, blocks[i].size, alignment_, k}, context_); });
  }
};

}  // namespace

void surgery_on_list(const TensorList& list, ParallelFor parallel_for,
                     void (*apply)(const ListBlock&, const void* context), const void* context) {
  dispatch(list.dtype, [&](auto zero) { Layers<decltype(zero)>(list, apply, context).run(parallel_for); });
}

void project_align_(const TensorList& list, ParallelFor parallel_for) {
  dispatch(list.dtype, [&](auto zero) {
    surgery_on_list(
        list, parallel_for,
        [](const ListBlock& block, const void* list) {
          apply_block<decltype(zero)>(block, static_cast<const TensorList*>(list)->rule == Rule::positive);
        },
        &list);
  });
}

}  // namespace dgs::cpu
