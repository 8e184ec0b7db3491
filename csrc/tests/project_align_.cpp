// project_align_ on the CPU against plain loops in long double: types, options, parts, layers of every size.
#include "lists.h"

namespace {

using check::expect;
using dgs::DType;
using dgs::Order;
using dgs::Part;
using dgs::Rule;

constexpr int64_t groups = 5;
// A layer of many tensors, one without any, an empty tensor, and one too large for a core's cache.
const std::vector<int64_t> sizes{41, 1, 0, 5, 140000, 1023, 4097, 6, 7}, layer_of{0, 1, 1, 2, 4, 2, 0, 4, 1};

void compare(check::Lists l, const check::Surgery& want, Order order, Rule rule, bool aligned, bool parts) {
  const DType dtype = l.dtype;
  check::Lists again = l;
  const auto tensors = check::tensors_of(l, aligned), tensors_again = check::tensors_of(again, aligned);
  std::vector<double> sums, sums_again;
  auto list = check::list_of(dtype, tensors, groups, sums, order, rule);
  if (parts) {
    list.part = Part::sums;
    dgs::cpu::project_align_(list, check::parallel_for);
    list.part = Part::apply;
  }
  dgs::cpu::project_align_(list, check::parallel_for);
  dgs::cpu::project_align_(check::list_of(dtype, tensors_again, groups, sums_again, order, rule), check::single_thread);
  expect(l.memory == again.memory, "dtype %d: the result depends on threads or parts", int(dtype));
  l.expect_ends_untouched("project_align_");

  const double computing = dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  for (int64_t n = 0; n < groups * 6; ++n) {
    const double got = check::get(sums.data(), n, dtype == DType::f64 ? DType::f64 : DType::f32);
    // A sum of products is as wrong as the sum of their sizes, here at most four times as large as <g, g>.
    const double size = 4 * double(want.sums[n / 6 * 6 + 2] + want.sums[n / 6 * 6 + 1]);
    expect(std::fabs(got - double(want.sums[n])) <= 64 * computing * size,
           "dtype %d rule %d: sums[%ld] %.9g, not %.9Lg", int(dtype), int(rule), long(n), got, want.sums[n]);
  }
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; ++i) {
      const double got = double(l.value(0, t, i)), exact = double(want.grads[t][i]);
      expect(std::fabs(got - exact) <= 64 * computing + check::unit_roundoff(dtype) * std::fabs(exact),
             "dtype %d order %d rule %d aligned %d: tensor %ld[%ld] = %.9g, not %.9g", int(dtype), int(order),
             int(rule), aligned, long(t), long(i), got, exact);
    }
}

// A NaN or an infinity shows in all of its layer, and nowhere else.
void visible(float poison, int stream, Rule rule) {
  check::Random random;
  check::Lists l(DType::f32, {9, 140000, 3, 5}, {0, 1, 1, 2}, 3, random);
  static_cast<float*>(l.at(stream, 2))[1] = poison;
  const auto tensors = check::tensors_of(l, true);
  std::vector<double> sums;
  dgs::cpu::project_align_(check::list_of(DType::f32, tensors, 3, sums, Order::align_first, rule), check::parallel_for);
  for (size_t t = 0; t < 4; ++t) {
    bool finite = true;
    for (int64_t i = 0; i < l.sizes[t]; ++i) finite &= std::isfinite(double(l.value(0, t, i)));
    expect(finite == (l.groups[t] != 1), "%f in stream %d, rule %d: tensor %ld is %sfinite", poison, stream, int(rule),
           long(t), finite ? "" : "not ");
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    check::Random random;
    const check::Lists l(dtype, sizes, layer_of, 3, random);
    for (Order order : {Order::align_first, Order::project_first})
      for (Rule rule : {Rule::positive, Rule::full, Rule::conflict})
        for (bool aligned : {true, false}) {
          const auto want = check::plain_surgery(l, groups, aligned, order, rule);
          for (bool parts : {true, false}) compare(l, want, order, rule, aligned, parts);
        }
  }
  for (float poison : {NAN, -INFINITY})
    for (int stream : {0, 1, 2})
      for (Rule rule : {Rule::positive, Rule::full})
        if (stream != 1 || rule != Rule::positive || std::isnan(poison)) visible(poison, stream, rule);
  return check::result();
}
