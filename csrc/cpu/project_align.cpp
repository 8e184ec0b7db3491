// project_align on the CPU. A row is read from memory once: the first loop over it leaves it in the cache for
// the second, which writes the result. So the cost is that of moving three streams in and one out.
#include "../project_align.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

// Sums run in vector lanes over one block and in double over blocks, in the order of the blocks: the result
// is as accurate for long rows as for short ones and does not depend on the number of threads.
constexpr int64_t block = 4096;

struct Sums {
  // These are <x, h> and ||h||^2.
  double inner = 0, square = 0;

  void operator+=(const Sums& other) {
    inner += other.inner;
    square += other.square;
  }
};

enum class Align { none, first, last };

// One block of one row.
template <typename T>
struct Block {
  // The computing type.
  using F = decltype(load(T()));
  const T *grad, *harmful, *beneficial;
  F alignment;
  int64_t size;

  DGS_INLINE F pull(int64_t i) const { return alignment * negative_part(load(beneficial[i])); }
  template <Align align>
  DGS_INLINE F projected(int64_t i) const {
    return align == Align::first ? load(grad[i]) + pull(i) : load(grad[i]);
  }
};

// Blocks are taken by value: a store through `out` cannot change them then, and the loops vectorise.
template <Align align, Rule rule, typename T>
DGS_INLINE Sums sum_loop(const Block<T> b) {
  typename Block<T>::F inner = 0, square = 0;
#pragma omp simd reduction(+ : inner, square)
  for (int64_t i = 0; i < b.size; ++i) {
    const auto x = b.template projected<align>(i);
    const auto h = direction<rule == Rule::positive>(load(b.harmful[i]));
    inner += x * h;
    square += h * h;
  }
  return {double(inner), double(square)};
}

template <Align align, Rule rule, typename T>
DGS_INLINE void apply_loop(const Block<T> b, const typename Block<T>::F k, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < b.size; ++i) {
    const auto x = b.template projected<align>(i) - k * direction<rule == Rule::positive>(load(b.harmful[i]));
    store(&out[i], align == Align::last ? x + b.pull(i) : x);
  }
}

// The loops of Rule::full serve Rule::conflict too.
template <typename T>
DGS_INLINE Sums sum_any(const Block<T>& b, Align align, Rule rule) {
  const bool positive = rule == Rule::positive;
  if (align == Align::first)
    return positive ? sum_loop<Align::first, Rule::positive>(b) : sum_loop<Align::first, Rule::full>(b);
  return positive ? sum_loop<Align::none, Rule::positive>(b) : sum_loop<Align::none, Rule::full>(b);
}

template <Align align, typename T>
DGS_INLINE void apply_aligned(const Block<T>& b, Rule rule, typename Block<T>::F k, T* out) {
  return rule == Rule::positive ? apply_loop<align, Rule::positive>(b, k, out)
                                : apply_loop<align, Rule::full>(b, k, out);
}

template <typename T>
DGS_INLINE void apply_any(const Block<T>& b, Align align, Rule rule, typename Block<T>::F k, T* out) {
  switch (align) {
    case Align::none:
      return apply_aligned<Align::none>(b, rule, k, out);
    case Align::first:
      return apply_aligned<Align::first>(b, rule, k, out);
    case Align::last:
      return apply_aligned<Align::last>(b, rule, k, out);
  }
}

// Multiversioning is for plain functions only, hence the list.
#define DGS_KERNELS(T)                                                                                     \
  DGS_MULTIVERSION Sums sum(const Block<T>& b, Align align, Rule rule) { return sum_any(b, align, rule); } \
  DGS_MULTIVERSION void apply(const Block<T>& b, Align align, Rule rule, double k, T* out) {               \
    apply_any(b, align, rule, Block<T>::F(k), out);                                                        \
  }
DGS_KERNELS(float)
DGS_KERNELS(double)
DGS_KERNELS(bf16)
#undef DGS_KERNELS

// The rows of one call, stored as T.
template <typename T>
class Rows {
  // What the loops read and write.
  using Seen = typename Widened<T, block>::Seen;
  using F = typename Block<Seen>::F;

  const ProjectAlign& a_;
  const double alignment_;
  const Align align_;

  // Where a block of a row is read.
  struct Streams {
    const int64_t size;
    const Widened<T, block> grad, harmful, beneficial;

    Streams(const ProjectAlign& a, int64_t row, int64_t begin)
        : size(std::min(block, a.dim - begin)),
          grad(a.grad, row * a.grad_stride + begin, size),
          harmful(a.harmful, row * a.harmful_stride + begin, size),
          beneficial(a.beneficial, row * a.beneficial_stride + begin, size) {}
  };
  Block<Seen> block_of(const Streams& s) const {
    return {s.grad.data, s.harmful.data, s.beneficial.data, F(alignment_), s.size};
  }

  void write(const Streams& s, double k, int64_t row, int64_t begin) const {
    Widened<T, block> out(a_.out, row * a_.out_stride + begin, s.size, /*read=*/false);
    apply(block_of(s), align_, a_.rule, k, out.data);
    out.write_back();
  }

 public:
  explicit Rows(const ProjectAlign& a)
      : a_(a),
        alignment_(a.alignment * (a.scale ? double(*static_cast<const F*>(a.scale)) : 1.0)),
        align_(!a.beneficial                   ? Align::none
               : a.order == Order::align_first ? Align::first
                                               : Align::last) {}

  Sums sums(int64_t row, int64_t begin) const { return sum(block_of({a_, row, begin}), align_, a_.rule); }

  // What of the direction h is removed: k h.
  double share_of(const Sums& total) const { return projection(total.inner, std::sqrt(total.square), a_.eps, a_.rule); }

  void write(int64_t row, int64_t begin, double k) const { write({a_, row, begin}, k, row, begin); }

  // While one row is computed, the next one is on its way.
  void prefetch(int64_t row) const {
    if (row >= a_.rows) return;
    const auto lines = [&](const void* rows, int64_t stride) {
      const char* from = reinterpret_cast<const char*>(static_cast<const T*>(rows) + row * stride);
      const int64_t bytes = std::min(block, a_.dim) * sizeof(T);
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    };
    lines(a_.grad, a_.grad_stride);
    lines(a_.harmful, a_.harmful_stride);
    if (a_.beneficial) lines(a_.beneficial, a_.beneficial_stride);
  }

  void whole_row(int64_t row) const {
    // What was read for the sums is there for the result.
    if (a_.dim <= block) {
      const Streams s(a_, row, 0);
      const double k = share_of(sum(block_of(s), align_, a_.rule));
      prefetch(row + 1);
      return write(s, k, row, 0);
    }
    Sums total;
    for (int64_t i = 0; i < a_.dim; i += block) total += sums(row, i);
    const double k = share_of(total);
    prefetch(row + 1);
    for (int64_t i = 0; i < a_.dim; i += block) write(row, i, k);
  }
};

template <typename T>
void project_align(const ProjectAlign& a, ParallelFor parallel_for) {
  const Rows<T> rows(a);
  const int64_t blocks = (a.dim + block - 1) / block;
  if (a.rows >= 8 || blocks == 1) {
    const int64_t grain = std::max<int64_t>(1, work_per_thread / a.dim);
    parallel(parallel_for, a.rows, grain, [&](int64_t row) { rows.whole_row(row); });
    return;
  }
  // Few long rows: threads share the blocks of a row.
  const int64_t grain = work_per_thread / block;
  std::vector<Sums> parts(a.rows * blocks);
  parallel(parallel_for, a.rows * blocks, grain,
           [&](int64_t i) { parts[i] = rows.sums(i / blocks, i % blocks * block); });
  std::vector<double> shares(a.rows);
  for (int64_t row = 0; row < a.rows; ++row) {
    Sums total;
    for (int64_t i = 0; i < blocks; ++i) total += parts[row * blocks + i];
    shares[row] = rows.share_of(total);
  }
  parallel(parallel_for, a.rows * blocks, grain,
           [&](int64_t i) { rows.write(i / blocks, i % blocks * block, shares[i / blocks]); });
}

}  // namespace

void project_align(const ProjectAlign& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&](auto zero) { project_align<decltype(zero)>(a, parallel_for); });
}

}  // namespace dgs::cpu
