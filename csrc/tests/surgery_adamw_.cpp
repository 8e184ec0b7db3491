// surgery_adamw_ on the CPU against plain loops in long double.
#include "lists.h"

namespace {

using check::expect;
using dgs::DType;
using dgs::Order;
using dgs::Rule;

constexpr dgs::AdamW adamw{.lr = 0.03, .beta1 = 0.8, .beta2 = 0.95, .weight_decay = 0.1, .eps = 0.25};
constexpr int64_t groups = 3;
const std::vector<int64_t> sizes{41, 1, 0, 140000, 1023, 6}, layer_of{0, 1, 1, 2, 0, 2};

// The tensors' steps are one number, or one each.
void compare(DType dtype, Order order, Rule rule, bool aligned, bool maximize, bool all_alike) {
  check::Random random;
  check::Lists l(dtype, sizes, layer_of, 6, random);
  // Second moments are not negative.
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; ++i) check::set(l.at(5, t), i, dtype, std::fabs(double(l.value(5, t, i))));
  const check::Lists before = l;
  const auto want = check::plain_surgery(l, groups, aligned, order, rule);
  const auto step_of = [&](size_t t) { return all_alike ? 5 : 1 + 2 * double(t); };
  std::vector<dgs::Rates> rates;
  for (size_t t = 0; t < (all_alike ? 1 : sizes.size()); ++t) rates.push_back(adamw.at_step(step_of(t)));
  dgs::AdamW options = adamw;
  options.maximize = maximize, options.rates = rates.data(), options.all_alike = all_alike;
  const auto tensors = check::tensors_of(l, aligned);
  std::vector<double> sums;
  dgs::cpu::surgery_adamw_(check::list_of(dtype, tensors, groups, sums, order, rule), options, check::parallel_for);
  l.expect_ends_untouched("surgery_adamw_");
  for (size_t n = 0; n < 3 * sizes.size(); ++n)
    expect(l.memory[n] == before.memory[n], "array %ld, which is only read, was written", long(n));

  for (size_t t = 0; t < sizes.size(); ++t) {
    const double bias1 = 1 - std::pow(adamw.beta1, step_of(t)), bias2 = 1 - std::pow(adamw.beta2, step_of(t));
    for (int64_t i = 0; i < sizes[t]; ++i) {
      const long double g = (maximize ? -1 : 1) * want.grads[t][i], m0 = before.value(4, t, i);
      const long double m = m0 + (1 - adamw.beta1) * (g - m0);
      const long double v = adamw.beta2 * before.value(5, t, i) + (1 - adamw.beta2) * g * g;
      const long double x = (1 - adamw.lr * adamw.weight_decay) * before.value(3, t, i) -
                            adamw.lr / bias1 * m / (std::sqrt(v) / std::sqrt(bias2) + adamw.eps);
      const long double exact[] = {x, m, v};
      for (int s = 0; s < 3; ++s) {
        const double got = double(l.value(3 + s, t, i)), wanted = double(exact[s]);
        const double computing = dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
        expect(std::fabs(got - wanted) <= 128 * computing + 1.01 * check::unit_roundoff(dtype) * std::fabs(wanted),
               "dtype %d order %d rule %d aligned %d: array %d of tensor %ld[%ld] = %.9g, not %.9g", int(dtype),
               int(order), int(rule), aligned, 3 + s, long(t), long(i), got, wanted);
      }
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (Order order : {Order::align_first, Order::project_first})
      for (Rule rule : {Rule::positive, Rule::full, Rule::conflict})
        for (bool aligned : {true, false}) compare(dtype, order, rule, aligned, !aligned, rule != Rule::full);
  return check::result();
}
