// surgery_adamw_ on the CPU: project_align_'s walk over the list, with the AdamW update in place of the write.
// The projected gradient stays in registers.
#include <cmath>

#include "../tensor_list.h"
#include "parallel.h"
#include "simd.h"

namespace dgs::cpu {
namespace {

// One block of one tensor, and every number of the update in the computing type.
template <typename T>
struct Step {
  using F = decltype(load(T()));
  const T *grad, *harmful, *beneficial;
  T *param, *exp_avg, *exp_avg_sq;
  int64_t size;
  F alignment, k, sign, decay, fresh1, beta2, fresh2, step_size, eps;
};

// Taken by value: a store through a pointer cannot change it then, and the loop vectorises.
template <bool positive, bool aligned, typename T>
DGS_INLINE void update_loop(const Step<T> s) {
  using F = typename Step<T>::F;
#pragma omp simd
  for (int64_t i = 0; i < s.size; ++i) {
    F g = load(s.grad[i]);
    if constexpr (aligned) g += s.alignment * negative_part(load(s.beneficial[i]));
    g = s.sign * (g - s.k * direction<positive>(load(s.harmful[i])));
    F first = load(s.exp_avg[i]), second = load(s.exp_avg_sq[i]);
    first += s.fresh1 * (g - first);
    second = s.beta2 * second + s.fresh2 * g * g;
    store(&s.param[i], s.decay * load(s.param[i]) - s.step_size * first / (std::sqrt(second) + s.eps));
    store(&s.exp_avg[i], first);
    store(&s.exp_avg_sq[i], second);
  }
}

template <typename T>
DGS_INLINE void update_any(const Step<T>& s, bool positive) {
  if (positive) return s.beneficial ? update_loop<true, true>(s) : update_loop<true, false>(s);
  return s.beneficial ? update_loop<false, true>(s) : update_loop<false, false>(s);
}

DGS_MULTIVERSION void update(const Step<float>& s, bool positive) { update_any(s, positive); }
DGS_MULTIVERSION void update(const Step<double>& s, bool positive) { update_any(s, positive); }
DGS_MULTIVERSION void update(const Step<bf16>& s, bool positive) { update_any(s, positive); }

struct Context {
  const TensorList& list;
  const AdamW& options;
};

template <typename T>
void update_block(const ListBlock& b, const Context& context) {
  const ListTensor& t = b.tensor;
  const AdamW& o = context.options;
  const Rates& rates = o.rates[o.all_alike ? 0 : &t - context.list.tensors];
  using Array = Widened<T, list_block>;
  using Seen = typename Array::Seen;
  using F = typename Step<Seen>::F;
  const Array grad(t.grad, b.begin, b.size), harmful(t.harmful, b.begin, b.size),
      beneficial(t.beneficial, b.begin, b.size);
  Array param(t.param, b.begin, b.size), exp_avg(t.exp_avg, b.begin, b.size), exp_avg_sq(t.exp_avg_sq, b.begin, b.size);
  update(Step<Seen>{.grad = grad.data,
                    .harmful = harmful.data,
                    .beneficial = beneficial.data,
                    .param = param.data,
                    .exp_avg = exp_avg.data,
                    .exp_avg_sq = exp_avg_sq.data,
                    .size = b.size,
                    .alignment = F(b.alignment),
                    .k = F(b.k),
                    .sign = F(o.maximize ? -1 : 1),
                    .decay = F(1 - o.lr * o.weight_decay),
                    .fresh1 = F(1 - o.beta1),
                    .beta2 = F(o.beta2),
                    .fresh2 = F(1 - o.beta2),
                    .step_size = F(rates.size),
                    .eps = F(rates.eps)},
         context.list.rule == Rule::positive);
  param.write_back();
  exp_avg.write_back();
  exp_avg_sq.write_back();
}

}  // namespace

void surgery_adamw_(const TensorList& list, const AdamW& options, ParallelFor parallel_for) {
  const Context context{list, options};
  dispatch(list.dtype, [&](auto zero) {
    surgery_on_list(
        list, parallel_for,
        [](const ListBlock& block, const void* context) {
          update_block<decltype(zero)>(block, *static_cast<const Context*>(context));
        },
        &context);
  });
}

}  // namespace dgs::cpu
