// surgery_head on the CPU. Forward: the features are read from memory once, four samples at a time; their inner
// products make their residuals, and while the rows are still in the cache they are added to the head gradients, and
// those that are next are on their way.
// Backward: a row of the result is a sum of three vectors that stay in the cache, so memory is only written, and
// read only where a distillation loss has left what it needs.
#include "../surgery_head.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace dgs::cpu {
namespace {

// Elements that are summed in vector lanes, and in double beyond.
constexpr int64_t block = 1024;
// So many samples at a time: a weight, or a head gradient, is loaded once for all of them.
constexpr int at_once = 4;

struct Four {
  double of[at_once];
};

// Samples far apart, so that each is the next of a sequence that the processor sees and reads ahead in.
struct Group {
  int64_t first, step;
  int count;

  int64_t sample(int n) const { return first + n * step; }
};

template <typename T>
struct Rows {
  const T *a, *b, *c, *d;
};

template <typename T, typename F>
DGS_INLINE Four dot_loop(const Rows<T> x, const F* w, int64_t size) {
  F a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < size; ++i) {
    a += F(load(x.a[i])) * w[i];
    b += F(load(x.b[i])) * w[i];
    c += F(load(x.c[i])) * w[i];
    d += F(load(x.d[i])) * w[i];
  }
  return {a, b, c, d};
}

template <typename T, typename F>
DGS_INLINE void add_loop(const T* x, F factor, F* sums, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sums[i] += factor * F(load(x[i]));
}

// Rows that memory sends while a loop works on others, at its pace: `bytes` of each for a strip of elements.
constexpr int64_t strip = 64;
struct Ahead {
  const char* rows[2 * at_once];
  int count;
  int64_t bytes;
};

template <typename T, typename F>
DGS_INLINE void add_loop(const Rows<T> x, F a, F b, F c, F d, F* sums, int64_t size, const Ahead& ahead) {
  int64_t line = 0;
  for (int64_t begin = 0; begin < size; begin += strip) {
    for (const int64_t end = line + ahead.bytes; line < end; line += 64)
      for (int n = 0; n < ahead.count; ++n) __builtin_prefetch(ahead.rows[n] + line);
#pragma omp simd
    for (int64_t i = begin; i < (begin + strip < size ? begin + strip : size); ++i)
      sums[i] += a * F(load(x.a[i])) + b * F(load(x.b[i])) + c * F(load(x.c[i])) + d * F(load(x.d[i]));
  }
}

// Leaves x - y in `out`; the sum of the squares.
template <typename T>
DGS_INLINE double subtract_loop(const T* x, const T* y, T* out, int64_t size) {
  using F = decltype(load(T()));
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const F difference = load(x[i]) - load(y[i]);
    sum += difference * difference;
    store(&out[i], difference);
  }
  return sum;
}

// A row of the backward's result: image * w + pull * min(+-v, 0) + push * relu(+-u) + distill * d, the signs of v
// and u given.
template <typename T, typename F>
struct Mix {
  // u may be null.
  const F *w, *v, *u;
  // d may be null.
  const T* d;
  F image, pull, push, distill, v_sign, u_sign;
};

template <bool text, bool distills, typename T, typename F>
DGS_INLINE void mix_loop(const Mix<T, F> m, T* out, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    F x = m.image * m.w[i] + m.pull * negative_part(m.v_sign * m.v[i]);
    if constexpr (text) x += m.push * positive_part(m.u_sign * m.u[i]);
    if constexpr (distills) x += m.distill * F(load(m.d[i]));
    store(&out[i], decltype(load(T()))(x));
  }
}

#define DGS_KERNELS(T, F)                                                                                        \
  DGS_MULTIVERSION Four dot(const Rows<T>& x, const F* w, int64_t size) { return dot_loop(x, w, size); }         \
  DGS_MULTIVERSION void add(const Rows<T>& x, int count, const F* factors, F* sums, int64_t size,                \
                            const Ahead& ahead) {                                                                \
    if (count == at_once) return add_loop(x, factors[0], factors[1], factors[2], factors[3], sums, size, ahead); \
    for (int n = 0; n < count; ++n) add_loop(n == 0 ? x.a : n == 1 ? x.b : x.c, factors[n], sums, size);         \
  }                                                                                                              \
  DGS_MULTIVERSION double subtract(const T* x, const T* y, T* out, int64_t size) {                               \
    return subtract_loop(x, y, out, size);                                                                       \
  }
DGS_KERNELS(float, float)
DGS_KERNELS(double, double)
DGS_KERNELS(bf16, float)
#undef DGS_KERNELS

#define DGS_KERNELS(T, F)                                                                           \
  DGS_MULTIVERSION void mix(const Mix<T, F>& m, T* out, int64_t size) {                             \
    if (m.d) return m.u ? mix_loop<true, true>(m, out, size) : mix_loop<false, true>(m, out, size); \
    return m.u ? mix_loop<true, false>(m, out, size) : mix_loop<false, false>(m, out, size);        \
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
  using Seen = typename Widened<T, block>::Seen;
  using F = decltype(load(Seen()));
  const SurgeryHead& a_;
  const double reference_;
  // They are min(v, 0) and min(-v, 0) of the teacher's weight v.
  std::vector<F> rises_, falls_;

  // What a run of samples adds to the results. Samples are cut into runs by their number alone: sums inside a
  // run and over the runs are in the same order on any number of threads.
  struct Run {
    double losses[4] = {}, biases[2] = {};
    // [2, dim].
    std::vector<F> grads;
  };

 public:
  explicit Forward(const SurgeryHead& a)
      : a_(a),
        reference_(a.reference_batch_size ? a.reference_batch_size : std::max<int64_t>(a.batch, 1)),
        rises_(a.dim),
        falls_(a.dim) {
    const F* v = vector(a.teacher_weight);
    for (int64_t i = 0; i < a.dim; ++i) rises_[i] = negative_part(v[i]), falls_[i] = negative_part(-v[i]);
  }

  void run(ParallelFor parallel_for) const {
    const int64_t samples = a_.batch <= 1024 ? 16 : 128, count = (a_.batch + samples - 1) / samples;
    std::vector<Run> runs(count);
    parallel(parallel_for, count, std::max<int64_t>(1, work_per_thread / (samples * a_.dim)), [&](int64_t i) {
      runs[i].grads.assign(2 * a_.dim, F(0));
      const int64_t end = std::min(a_.batch, (i + 1) * samples);
      const int64_t begin = i * samples, step = (end - begin + at_once - 1) / at_once;
      const auto group = [&](int64_t first) { return Group{first, step, int((end - first + step - 1) / step)}; };
      for (int64_t first = begin; first < begin + step; ++first)
        add_samples(group(first), first + 1 < begin + step ? group(first + 1) : Group{}, runs[i]);
    });
    const double mean = 1.0 / std::max<int64_t>(a_.batch, 1);
    Run total;
    for (const Run& run : runs) {
      for (int n = 0; n < 4; ++n) total.losses[n] += run.losses[n];
      for (int n = 0; n < 2; ++n) total.biases[n] += run.biases[n];
    }
    for (int n = 0; n < 4; ++n) static_cast<F*>(a_.losses)[n] = F(total.losses[n] * mean);
    F* grads = static_cast<F*>(a_.head_grads);
    for (int n = 0; n < 2; ++n) grads[n * (a_.dim + 1) + a_.dim] = F(total.biases[n] * mean);
    // One run's gradients after the other, as they lie in memory.
    parallel(parallel_for, (a_.dim + block - 1) / block * 2,
             std::max<int64_t>(1, work_per_thread / block / (count + 1)), [&](int64_t i) {
               const int64_t head = i % 2, begin = i / 2 * block, end = std::min(a_.dim, begin + block);
               double sums[block] = {};
               for (const Run& run : runs)
                 for (int64_t d = begin; d < end; ++d) sums[d - begin] += run.grads[head * a_.dim + d];
               for (int64_t d = begin; d < end; ++d) grads[head * (a_.dim + 1) + d] = F(sums[d - begin] * mean);
             });
  }

 private:
  static const F* vector(const void* x) { return static_cast<const F*>(x); }

  // A block of some samples' rows. The last sample stands in for those that are missing.
  struct Block {
    Rows<Seen> rows;
    Widened<T, block> each[at_once];

    Block(const void* matrix, int64_t stride, const Group& group, int64_t begin, int64_t size) {
      const auto row = [&](int n) {
        return each[n].of(matrix, group.sample(std::min(n, group.count - 1)) * stride + begin, size);
      };
      rows = {row(0), row(1), row(2), row(3)};
    }
  };

  // A feature matrix's rows of some samples; the results of `at_once` inner products with each of some vectors.
  template <int count>
  void dots(const void* matrix, int64_t stride, const Group& group, const F* const (&vectors)[count],
            Four (&sums)[count]) const {
    for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
      const Block x(matrix, stride, group, begin, size);
      for (int k = 0; k < count; ++k) {
        const Four part = dot(x.rows, vectors[k] + begin, size);
        for (int n = 0; n < at_once; ++n) sums[k].of[n] += part.of[n];
      }
    });
  }

  // Writes the samples' logits and residuals, in the order image, text, teacher; adds up the losses, to which the
  // logits are shifted.
  struct Branch {
    F residuals[at_once] = {};
    Four logits = {};
  };
  Branch branch(int which, const Group& group, const Four& dots, const Four& shifts, const void* bias, Run& run) const {
    Branch result;
    for (int n = 0; n < group.count; ++n) {
      const double own = result.logits.of[n] = dots.of[n] + double(*vector(bias)), logit = own + shifts.of[n];
      const double label = vector(a_.labels)[group.sample(n)];
      const double small = std::exp(-std::fabs(logit)), sigmoid = (logit < 0 ? small : 1) / (1 + small);
      const F residual = result.residuals[n] = F(sigmoid - label);
      static_cast<F*>(a_.logits)[which * a_.batch + group.sample(n)] = F(own);
      static_cast<F*>(a_.residuals)[which * a_.batch + group.sample(n)] = residual;
      if (which == 2) continue;
      run.losses[which] += positive_part(logit) - logit * label + std::log1p(small);
      run.biases[which] += residual;
    }
    return result;
  }

  struct Matrix {
    const void* rows;
    int64_t stride;
    // Without samples, nothing is added.
    Group group;
  };
  // What is read after these rows comes meanwhile: memory would wait otherwise, while they are added.
  void add_rows(const void* matrix, int64_t stride, const Group& group, const Branch& of, F* grads,
                std::initializer_list<Matrix> next) const {
    for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
      const Block x(matrix, stride, group, begin, size);
      Ahead ahead{{}, 0, strip * int64_t(sizeof(T))};
      for (const Matrix& that : next) {
        if (!that.rows || !that.group.count) continue;
        for (int n = 0; n < at_once; ++n)
          ahead.rows[ahead.count++] =
              static_cast<const char*>(that.rows) +
              (that.group.sample(std::min(n, that.group.count - 1)) * that.stride + begin) * sizeof(T);
      }
      add(x.rows, group.count, of.residuals, grads + begin, size, ahead);
    });
  }

  // Keeps features - teacher_features; the sum of the squares.
  double differences(const Group& group) const {
    double sum = 0;
    for (int n = 0; n < group.count; ++n)
      for_blocks(a_.dim, [&](int64_t begin, int64_t size) {
        const int64_t sample = group.sample(n);
        const Widened<T, block> x(a_.features, sample * a_.features_stride + begin, size);
        const Widened<T, block> y(a_.teacher_features, sample * a_.teacher_stride + begin, size);
        Widened<T, block> out(a_.differences, sample * a_.dim + begin, size, /*read=*/false);
        sum += subtract(x.data, y.data, out.data, size);
        out.write_back();
      });
    return sum;
  }

  // What is added to the image's logits in its loss.
  Four shifts(const Group& group, const Branch& text) const {
    Four shifts = a_.expert ? text.logits : Four{};
    for (int n = 0; a_.offsets && n < group.count; ++n) shifts.of[n] += vector(a_.offsets)[group.sample(n)];
    return shifts;
  }

  void add_samples(const Group& group, const Group& following, Run& run) const {
    Four image[3] = {}, text[1] = {}, teacher[1] = {};
    Branch of_text;
    if (a_.text_features) {
      dots(a_.text_features, a_.text_stride, group, {vector(a_.text_weight)}, text);
      of_text = branch(1, group, text[0], {}, a_.text_bias, run);
      add_rows(a_.text_features, a_.text_stride, group, of_text, run.grads.data() + a_.dim,
               {{a_.features, a_.features_stride, group}});
    } else {
      for (int n = 0; n < group.count; ++n)
        static_cast<F*>(a_.logits)[a_.batch + group.sample(n)] =
            static_cast<F*>(a_.residuals)[a_.batch + group.sample(n)] = 0;
    }

    dots(a_.features, a_.features_stride, group, {vector(a_.image_weight), rises_.data(), falls_.data()}, image);
    add_rows(a_.features, a_.features_stride, group,
             branch(0, group, image[0], shifts(group, of_text), a_.image_bias, run), run.grads.data(),
             {{a_.teacher_features, a_.teacher_stride, group}, {a_.text_features, a_.text_stride, following}});

    dots(a_.teacher_features, a_.teacher_stride, group, {vector(a_.teacher_weight)}, teacher);
    const Branch of = branch(2, group, teacher[0], {}, a_.teacher_bias, run);
    for (int n = 0; n < group.count; ++n) {
      const double residual = of.residuals[n];
      run.losses[2] += std::fabs(residual) / reference_ * image[residual > 0 ? 1 : 2].of[n];
    }
    if (a_.differences) run.losses[3] += a_.distillation / (2.0 * a_.dim) * differences(group);
  }
};

// The backward's inner products of the heads' weights with h = relu(+-u): five numbers for each sign.
struct Products {
  double image = 0, rises = 0, falls = 0, square = 0;
};

template <typename T>
bool streamable(const SurgeryHeadBackward& a) {
  const int64_t row = a.dim * sizeof(T);
  return DGS_X86 && row % 64 == 0 && reinterpret_cast<uintptr_t>(a.grad_features) % 64 == 0 &&
         a.batch * row >= beyond_cache;
}

template <typename T, typename F>
void backward(const SurgeryHeadBackward& a, ParallelFor parallel_for) {
  const auto vector = [](const void* x) { return static_cast<const F*>(x); };
  const F *w = vector(a.image_weight), *v = vector(a.teacher_weight), *u = vector(a.text_weight);
  const double reference = a.reference_batch_size ? a.reference_batch_size : std::max<int64_t>(a.batch, 1);
  const double image_scale = *vector(a.image_scale) / double(a.batch);
  const double pull_scale = *vector(a.alignment_scale) / (reference * a.batch);
  const double distill = a.differences ? a.distillation / (double(a.dim) * a.batch) * *vector(a.distillation_scale) : 0;
  // The index says whether u is negative.
  Products products[2];
  for (int64_t i = 0; u && i < a.dim; ++i)
    for (int negative = 0; negative < 2; ++negative) {
      const double h = positive_part(negative ? -double(u[i]) : double(u[i]));
      Products& p = products[negative];
      p.image += w[i] * h;
      p.rises += negative_part(double(v[i])) * h;
      p.falls += negative_part(-double(v[i])) * h;
      p.square += h * h;
    }
  const bool streamed = streamable<T>(a);
  const auto write_row = [&](int64_t sample) {
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
      const Widened<T, block> d(a.differences, sample * a.dim + begin, size);
      const Mix<std::remove_pointer_t<decltype(d.data)>, F> row{
          w + begin, v + begin, u ? u + begin : nullptr, d.data, F(image), F(pull), F(push), F(distill),
          v_sign,    u_sign};
      alignas(64) T cached[block];
      Widened<T, block> out(streamed ? cached : a.grad_features, streamed ? 0 : sample * a.dim + begin, size,
                            /*read=*/false);
      mix(row, out.data, size);
      out.write_back();
      if (streamed) stream(cached, static_cast<T*>(a.grad_features) + sample * a.dim + begin, size * sizeof(T));
    });
  };
  constexpr int64_t rows = 16;
  parallel(parallel_for, (a.batch + rows - 1) / rows, std::max<int64_t>(1, work_per_thread / (rows * a.dim)),
           [&](int64_t i) {
             for (int64_t sample = i * rows; sample < std::min(a.batch, (i + 1) * rows); ++sample) write_row(sample);
             if (streamed) stream_end();
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
