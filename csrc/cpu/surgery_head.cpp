// surgery_head on the CPU. Forward: a sample's rows are read from memory once; its inner products make its
// residuals, and while the rows are still in the cache they are added to the head gradients. Backward: a row of
// the result is a sum of three vectors that stay in the cache, so memory is only written.
#include "../surgery_head.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

constexpr int64_t block = 4096;  // elements that are summed in vector lanes, and in double beyond
constexpr int64_t work_per_thread = 16384;

struct Dots {
  double head = 0, rises = 0, falls = 0;  // <x, w>, and <x, min(v, 0)>, <x, min(-v, 0)>
};

template <typename T, typename F>
DGS_INLINE double dot_loop(const T* x, const F* w, int64_t size) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += F(load(x[i])) * w[i];
  return sum;
}

template <typename T, typename F>
DGS_INLINE Dots dots_loop(const T* x, const F* w, const F* v, int64_t size) {
  F head = 0, rises = 0, falls = 0;
#pragma omp simd reduction(+ : head, rises, falls)
  for (int64_t i = 0; i < size; ++i) {
    const F f = load(x[i]);
    head += f * w[i];
    rises += f * negative_part(v[i]);
    falls += f * negative_part(-v[i]);
  }
  return {head, rises, falls};
}

template <typename T, typename F>
DGS_INLINE void add_loop(const T* x, F factor, F* sums, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sums[i] += factor * F(load(x[i]));
}

// A row of the backward's result: image * w + pull * min(+-v, 0) + push * relu(+-u), the signs of v and u given.
template <typename F>
struct Mix {
  const F *w, *v, *u;  // u may be null
  F image, pull, push, v_sign, u_sign;
};

template <bool text, typename T, typename F>
DGS_INLINE void mix_loop(const Mix<F> m, T* out, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    F x = m.image * m.w[i] + m.pull * negative_part(m.v_sign * m.v[i]);
    if constexpr (text) x += m.push * positive_part(m.u_sign * m.u[i]);
    store(&out[i], decltype(load(T()))(x));
  }
}

#define DGS_KERNELS(T, F)                                                                                          \
  DGS_MULTIVERSION double dot(const T* x, const F* w, int64_t size) { return dot_loop(x, w, size); }               \
  DGS_MULTIVERSION Dots dots(const T* x, const F* w, const F* v, int64_t size) { return dots_loop(x, w, v, size); } \
  DGS_MULTIVERSION void add(const T* x, F factor, F* sums, int64_t size) { add_loop(x, factor, sums, size); }
DGS_KERNELS(float, float)
DGS_KERNELS(double, double)
DGS_KERNELS(bf16, float)
#undef DGS_KERNELS

#define DGS_KERNELS(T, F)                                                            \
  DGS_MULTIVERSION void mix(const Mix<F>& m, T* out, int64_t size) {                 \
    return m.u ? mix_loop<true>(m, out, size) : mix_loop<false>(m, out, size);       \
  }
DGS_KERNELS(float, float)
DGS_KERNELS(double, float)
DGS_KERNELS(bf16, float)
DGS_KERNELS(float, double)
DGS_KERNELS(double, double)
DGS_KERNELS(bf16, double)
#undef DGS_KERNELS

// body(begin, size) for the blocks of a row.
template <typename Body>
void for_blocks(int64_t dim, Body body) {
  for (int64_t begin = 0; begin < dim; begin += block) body(begin, std::min(block, dim - begin));
}

template <typename T>
class Forward {
  using Row = Widened<T, block>;
  using F = decltype(load(typename Row::Seen()));
  const SurgeryHead& a_;
  const double reference_;

  // What a run of samples adds to the results. Samples are cut into runs by their number alone: sums inside a
  // run and over the runs are in the same order on any number of threads.
  struct Run {
    double losses[3] = {}, biases[2] = {};
    std::vector<F> grads;  // [2, dim]
  };

 public:
  explicit Forward(const SurgeryHead& a)
      : a_(a), reference_(a.reference_batch_size ? a.reference_batch_size : std::max<int64_t>(a.batch, 1)) {}

  void run(ParallelFor parallel_for) const {
    const int64_t samples = a_.batch <= 1024 ? 16 : 128, count = (a_.batch + samples - 1) / samples;
    std::vector<Run> runs(count);
    parallel(parallel_for, count, std::max<int64_t>(1, work_per_thread / (samples * a_.dim)), [&](int64_t i) {
      runs[i].grads.assign(2 * a_.dim, F(0));
      for (int64_t sample = i * samples; sample < std::min(a_.batch, (i + 1) * samples); ++sample)
        add_sample(sample, runs[i]);
    });
    const double mean = 1.0 / std::max<int64_t>(a_.batch, 1);
    Run total;
    for (const Run& run : runs) {
      for (int n = 0; n < 3; ++n) total.losses[n] += run.losses[n];
      for (int n = 0; n < 2; ++n) total.biases[n] += run.biases[n];
    }
    for (int n = 0; n < 3; ++n) static_cast<F*>(a_.losses)[n] = F(total.losses[n] * mean);
    F* grads = static_cast<F*>(a_.head_grads);
    for (int n = 0; n < 2; ++n) grads[n * (a_.dim + 1) + a_.dim] = F(total.biases[n] * mean);
    // One run's gradients after the other, as they lie in memory.
    parallel(parallel_for, (a_.dim + block - 1) / block * 2, std::max<int64_t>(1, work_per_thread / block / (count + 1)),
             [&](int64_t i) {
      const int64_t head = i % 2, begin = i / 2 * block, end = std::min(a_.dim, begin + block);
      double sums[block] = {};
      for (const Run& run : runs)
        for (int64_t d = begin; d < end; ++d) sums[d - begin] += run.grads[head * a_.dim + d];
      for (int64_t d = begin; d < end; ++d) grads[head * (a_.dim + 1) + d] = F(sums[d - begin] * mean);
    });
  }

 private:
  static const F* vector(const void* x) { return static_cast<const F*>(x); }

  // Writes a sample's logit and residual and returns (residual, loss).
  struct Branch {
    double residual, loss;
  };
  Branch branch(int which, int64_t sample, double logit) const {
    const double label = vector(a_.labels)[sample];
    const F residual = F(1 / (1 + std::exp(-logit)) - label);
    static_cast<F*>(a_.logits)[which * a_.batch + sample] = F(logit);
    static_cast<F*>(a_.residuals)[which * a_.batch + sample] = residual;
    return {double(residual), positive_part(logit) - logit * label + std::log1p(std::exp(-std::fabs(logit)))};
  }

  double dot_of(const void* rows, int64_t stride, int64_t sample, const void* weight, const void* bias) const {
    double sum = *vector(bias);
    for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
      const Row row(rows, sample * stride + begin, size);
      sum += dot(row.data, vector(weight) + begin, size);
    });
    return sum;
  }

  void add_row(const void* rows, int64_t stride, int64_t sample, double residual, F* grads) const {
    for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
      const Row row(rows, sample * stride + begin, size);
      add(row.data, F(residual), grads + begin, size);
    });
  }

  void add_sample(int64_t sample, Run& run) const {
    Dots total{double(*vector(a_.image_bias)), 0, 0};
    for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
      const Row row(a_.features, sample * a_.features_stride + begin, size);
      const Dots part = dots(row.data, vector(a_.image_weight) + begin, vector(a_.teacher_weight) + begin, size);
      total.head += part.head, total.rises += part.rises, total.falls += part.falls;
    });
    const Branch image = branch(0, sample, total.head);
    run.losses[0] += image.loss, run.biases[0] += image.residual;
    add_row(a_.features, a_.features_stride, sample, image.residual, run.grads.data());

    if (a_.text_features) {
      const Branch text =
          branch(1, sample, dot_of(a_.text_features, a_.text_stride, sample, a_.text_weight, a_.text_bias));
      run.losses[1] += text.loss, run.biases[1] += text.residual;
      add_row(a_.text_features, a_.text_stride, sample, text.residual, run.grads.data() + a_.dim);
    } else {
      static_cast<F*>(a_.logits)[a_.batch + sample] = static_cast<F*>(a_.residuals)[a_.batch + sample] = 0;
    }

    const Branch teacher =
        branch(2, sample, dot_of(a_.teacher_features, a_.teacher_stride, sample, a_.teacher_weight, a_.teacher_bias));
    run.losses[2] += std::fabs(teacher.residual) / reference_ * (teacher.residual > 0 ? total.rises : total.falls);
  }
};

// The backward's inner products of the heads' weights with h = relu(+-u): five numbers for each sign.
struct Products {
  double image = 0, rises = 0, falls = 0, square = 0;
};

template <typename T, typename F>
void backward(const SurgeryHeadBackward& a, ParallelFor parallel_for) {
  const auto vector = [](const void* x) { return static_cast<const F*>(x); };
  const F *w = vector(a.image_weight), *v = vector(a.teacher_weight), *u = vector(a.text_weight);
  const double reference = a.reference_batch_size ? a.reference_batch_size : std::max<int64_t>(a.batch, 1);
  const double image_scale = *vector(a.image_scale) / double(a.batch);
  const double pull_scale = *vector(a.alignment_scale) / (reference * a.batch);
  Products products[2];  // [u is negative]
  for (int64_t i = 0; u && i < a.dim; ++i)
    for (int negative = 0; negative < 2; ++negative) {
      const double h = positive_part(negative ? -double(u[i]) : double(u[i]));
      Products& p = products[negative];
      p.image += w[i] * h;
      p.rises += negative_part(double(v[i])) * h;
      p.falls += negative_part(-double(v[i])) * h;
      p.square += h * h;
    }
  parallel(parallel_for, a.batch, std::max<int64_t>(1, work_per_thread / a.dim), [&](int64_t sample) {
    const auto residual = [&](int which) { return double(vector(a.residuals)[which * a.batch + sample]); };
    const double image = residual(0) * image_scale, pull = std::fabs(residual(2)) * pull_scale;
    double push = 0;
    if (u) {
      const Products& p = products[!(residual(1) > 0)];
      double inner = image * p.image;
      if (a.order == Order::align_first) inner += pull * (residual(2) > 0 ? p.rises : p.falls);
      const double c = std::fabs(residual(1)) / reference, k = c / (c * std::sqrt(p.square) + a.eps);
      push = -inner * k * k;
    }
    const F v_sign = residual(2) > 0 ? 1 : -1, u_sign = residual(1) > 0 ? 1 : -1;
    for_blocks(a.dim, [&](int64_t begin, int64_t size) {
      Widened<T, block> out(a.grad_features, sample * a.dim + begin, size, /*read=*/false);
      mix(Mix<F>{w + begin, v + begin, u ? u + begin : nullptr, F(image), F(pull), F(push), v_sign, u_sign}, out.data,
          size);
      out.write_back();
    });
  });
}

}  // namespace

void surgery_head(const SurgeryHead& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&](auto zero) { Forward<decltype(zero)>(a).run(parallel_for); });
}

void surgery_head_backward(const SurgeryHeadBackward& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    return a.wide ? backward<T, double>(a, parallel_for) : backward<T, float>(a, parallel_for);
  });
}

}  // namespace dgs::cpu
