// project_align on the CPU. A row is read from memory once: the first loop over it leaves it in the cache for
// the second, which writes the result. So the cost is that of moving three streams in and one out.
#include "../project_align.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace dgs::cpu {
namespace {

// Sums run in vector lanes over one block and in double over blocks, in the order of the blocks: the result
// is as accurate for long rows as for short ones and does not depend on the number of threads.
constexpr int64_t block = 4096;
constexpr int64_t work_per_thread = 16384;  // elements; less than that is done before a thread wakes up

struct Sums {
  double inner = 0, square = 0;  // <x, h> and ||h||^2
};

enum class Align { none, first, last };

template <typename T>
struct Computing {
  using type = float;
};
template <>
struct Computing<double> {
  using type = double;
};

// One block of one row.
template <typename T, Align align, bool positive>
struct Block {
  using F = typename Computing<T>::type;
  const T *grad, *harmful, *beneficial;
  T* out;
  int64_t size;
  F alignment;

  DGS_INLINE Block(const ProjectAlign& a, double alignment, int64_t row, int64_t begin)
      : grad(static_cast<const T*>(a.grad) + row * a.grad_stride + begin),
        harmful(static_cast<const T*>(a.harmful) + row * a.harmful_stride + begin),
        beneficial(align == Align::none
                       ? nullptr
                       : static_cast<const T*>(a.beneficial) + row * a.beneficial_stride + begin),
        out(static_cast<T*>(a.out) + row * a.out_stride + begin),
        size(std::min(block, a.dim - begin)),
        alignment(F(alignment)) {}

  DGS_INLINE F pull(int64_t i) const { return alignment * negative_part(load(beneficial[i])); }
  DGS_INLINE F h(int64_t i) const { return direction<positive>(load(harmful[i])); }
  DGS_INLINE F projected(int64_t i) const {
    const F x = load(grad[i]);
    return align == Align::first ? x + pull(i) : x;
  }

  DGS_INLINE Sums sums() const {
    F inner = 0, square = 0;
#pragma omp simd reduction(+ : inner, square)
    for (int64_t i = 0; i < size; ++i) {
      inner += projected(i) * h(i);
      square += h(i) * h(i);
    }
    return {double(inner), double(square)};
  }

  DGS_INLINE void apply(F k) const {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const F x = projected(i) - k * h(i);
      store(&out[i], align == Align::last ? x + pull(i) : x);
    }
  }
};

// Calls body(Block) with the types and options of `a` made constants.
template <typename T, Align align, typename Body>
DGS_INLINE void with_rule(const ProjectAlign& a, double alignment, int64_t row, int64_t begin, Body body) {
  if (a.rule == Rule::positive)
    body(Block<T, align, true>(a, alignment, row, begin));
  else
    body(Block<T, align, false>(a, alignment, row, begin));
}
template <typename T, typename Body>
DGS_INLINE void with_align(const ProjectAlign& a, double alignment, int64_t row, int64_t begin, Body body) {
  if (!a.beneficial)
    with_rule<T, Align::none>(a, alignment, row, begin, body);
  else if (a.order == Order::align_first)
    with_rule<T, Align::first>(a, alignment, row, begin, body);
  else
    with_rule<T, Align::last>(a, alignment, row, begin, body);
}
template <typename Body>
DGS_INLINE void with_block(const ProjectAlign& a, double alignment, int64_t row, int64_t begin, Body body) {
  switch (a.dtype) {
    case DType::f32: return with_align<float>(a, alignment, row, begin, body);
    case DType::f64: return with_align<double>(a, alignment, row, begin, body);
    case DType::bf16: return with_align<bf16>(a, alignment, row, begin, body);
    case DType::f16: return with_align<f16>(a, alignment, row, begin, body);
  }
}

DGS_KERNEL void sum(const ProjectAlign& a, double alignment, int64_t row, int64_t begin, Sums* sums) {
  with_block(a, alignment, row, begin, [=](auto b) __attribute__((always_inline)) { *sums = b.sums(); });
}
DGS_KERNEL void apply(const ProjectAlign& a, double alignment, int64_t row, int64_t begin, double k) {
  with_block(a, alignment, row, begin, [=](auto b) __attribute__((always_inline)) { b.apply(k); });
}

double coefficient(const ProjectAlign& a, const Sums& total) {
  return projection(total.inner, std::sqrt(total.square), a.eps, a.rule);
}

template <typename Body>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Body body) {
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<Body*>(context))(i);
      },
      &body);
}

}  // namespace

void project_align(const ProjectAlign& a, ParallelFor parallel_for) {
  double alignment = a.alignment;
  if (a.scale)
    alignment *= a.dtype == DType::f64 ? *static_cast<const double*>(a.scale) : *static_cast<const float*>(a.scale);
  const int64_t blocks = (a.dim + block - 1) / block;
  const auto add = [](Sums& total, const Sums& part) {
    total.inner += part.inner;
    total.square += part.square;
  };

  if (a.rows >= 8 || blocks == 1) {  // a thread takes whole rows
    const int64_t grain = std::max<int64_t>(1, work_per_thread / a.dim);
    parallel(parallel_for, a.rows, grain, [&](int64_t row) {
      Sums total, part;
      for (int64_t i = 0; i < a.dim; i += block) {
        sum(a, alignment, row, i, &part);
        add(total, part);
      }
      const double k = coefficient(a, total);
      for (int64_t i = 0; i < a.dim; i += block) apply(a, alignment, row, i, k);
    });
    return;
  }
  // Few long rows: threads share a row's blocks.
  const int64_t grain = work_per_thread / block;
  std::vector<Sums> parts(a.rows * blocks);
  parallel(parallel_for, a.rows * blocks, grain, [&](int64_t i) {
    sum(a, alignment, i / blocks, i % blocks * block, &parts[i]);
  });
  std::vector<double> ks(a.rows);
  for (int64_t row = 0; row < a.rows; ++row) {
    Sums total;
    for (int64_t i = 0; i < blocks; ++i) add(total, parts[row * blocks + i]);
    ks[row] = coefficient(a, total);
  }
  parallel(parallel_for, a.rows * blocks, grain,
           [&](int64_t i) { apply(a, alignment, i / blocks, i % blocks * block, ks[i / blocks]); });
}

}  // namespace dgs::cpu
