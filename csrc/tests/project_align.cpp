// project_align on the CPU against plain loops in long double: types, options, shapes, strides, NaN and
// infinity.
#include "project_align.h"

#include "check.h"

namespace {

using check::expect;
using dgs::DType;
using dgs::Order;
using dgs::Rule;

const char* const names[] = {"f32", "f64", "bf16", "f16"};

struct Case {
  DType dtype;
  // The padding is in elements, between rows.
  int64_t rows, dim, padding;
  bool aligned, one_direction, scaled;
  Order order;
  Rule rule;
};

void compare(const Case& c, check::Random& random) {
  const size_t width = check::size_of(c.dtype);
  const int64_t stride = c.dim + c.padding, size = c.rows * stride + 1;
  // From the second element on, so that nothing is aligned to more than one element.
  std::vector<char> memory[3];
  for (auto& m : memory) {
    m.resize(size * width);
    for (int64_t i = 0; i < size; ++i) check::set(m.data(), i, c.dtype, random());
  }
  // All ones is NaN.
  std::vector<char> out(c.rows * c.dim * width + 1, char(0xff));
  const int64_t direction_stride = c.one_direction ? 0 : stride;
  const float scale32 = 0.5f;
  const double scale64 = 0.5;
  const double alignment = 0.375, eps = 1e-6;
  dgs::ProjectAlign a{};
  a.grad = memory[0].data() + width;
  a.harmful = memory[1].data() + width;
  a.beneficial = c.aligned ? memory[2].data() + width : nullptr;
  if (c.scaled) a.scale = c.dtype == DType::f64 ? static_cast<const void*>(&scale64) : &scale32;
  a.out = out.data();
  a.rows = c.rows, a.dim = c.dim;
  a.grad_stride = stride, a.harmful_stride = a.beneficial_stride = direction_stride, a.out_stride = c.dim;
  a.alignment = alignment, a.eps = eps, a.order = c.order, a.rule = c.rule, a.dtype = c.dtype;
  dgs::cpu::project_align(a, check::parallel_for);

  for (int64_t row = 0; row < c.rows; ++row) {
    const auto x = [&](int64_t i) -> long double { return check::get(a.grad, row * stride + i, c.dtype); };
    const auto h = [&](int64_t i) -> long double {
      const double value = check::get(a.harmful, row * direction_stride + i, c.dtype);
      return c.rule == Rule::positive ? std::max(value, 0.0) : value;
    };
    const auto pull = [&](int64_t i) -> long double {
      if (!c.aligned) return 0;
      const double value = check::get(a.beneficial, row * direction_stride + i, c.dtype);
      return alignment * (c.scaled ? 0.5 : 1.0) * std::min(value, 0.0);
    };
    const auto before = [&](int64_t i) { return c.order == Order::align_first ? x(i) + pull(i) : x(i); };
    long double inner = 0, square = 0;
    for (int64_t i = 0; i < c.dim; ++i) inner += before(i) * h(i), square += h(i) * h(i);
    const long double norm = std::sqrt(square) + eps;
    const long double k = c.rule == Rule::conflict && inner >= 0 ? 0 : inner / (norm * norm);
    for (int64_t i = 0; i < c.dim; ++i) {
      const long double exact = before(i) - k * h(i) + (c.order == Order::project_first ? pull(i) : 0);
      const double got = check::get(a.out, row * c.dim + i, c.dtype);
      // The computing type's roundoff on values of about 4 and of sums, which grows as the root of their length where
      // numbers are added one by one; and one rounding to the storage type.
      const double computing = c.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
      const double tolerance =
          (32 + 2 * std::sqrt(double(c.dim))) * computing + check::unit_roundoff(c.dtype) * std::fabs(double(exact));
      expect(std::fabs(double(got - exact)) <= tolerance,
             "%s rows %ld dim %ld order %d rule %d aligned %d: out[%ld][%ld] = %.9g, expected %.9Lg",
             names[int(c.dtype)], long(c.rows), long(c.dim), int(c.order), int(c.rule), c.aligned, long(row), long(i),
             got, exact);
    }
  }
}

// Every half-precision value goes through unchanged where nothing is projected.
void every_half(DType dtype) {
  std::vector<uint16_t> in(65536), zero(1, 0), out(65536, 0x1234);
  for (int i = 0; i < 65536; ++i) in[i] = uint16_t(i);
  dgs::ProjectAlign a{};
  a.grad = in.data(), a.harmful = zero.data(), a.out = out.data();
  a.rows = 65536, a.dim = 1, a.grad_stride = a.out_stride = 1;
  a.eps = 1e-6, a.rule = Rule::full, a.dtype = dtype;
  dgs::cpu::project_align(a, check::parallel_for);
  for (int i = 0; i < 65536; ++i) {
    const double x = check::get(in.data(), i, dtype), y = check::get(out.data(), i, dtype);
    // infinity times the zero direction is NaN: an overflow stays visible
    expect(std::isfinite(x) ? x == y : std::isnan(y), "%s %04x became %04x", names[int(dtype)], i, out[i]);
  }
}

// A NaN or an infinity anywhere in a row shows in that row, and in no other.
void visible(float poison, int stream, Rule rule, Order order) {
  constexpr int64_t rows = 3, dim = 37;
  std::vector<float> in[3], out(rows * dim);
  for (int s = 0; s < 3; ++s) in[s].assign(rows * dim, s == 1 ? 0.5f : -0.5f);
  in[stream][dim + 5] = poison;
  dgs::ProjectAlign a{};
  a.grad = in[0].data(), a.harmful = in[1].data(), a.out = out.data();
  a.beneficial = in[2].data();
  a.rows = rows, a.dim = dim, a.grad_stride = a.harmful_stride = a.beneficial_stride = a.out_stride = dim;
  a.alignment = 1, a.eps = 1e-6, a.order = order, a.rule = rule, a.dtype = DType::f32;
  dgs::cpu::project_align(a, check::parallel_for);
  for (int64_t row = 0; row < rows; ++row) {
    const bool finite = std::all_of(&out[row * dim], &out[row * dim] + dim, [](float x) { return std::isfinite(x); });
    expect(finite == (row != 1), "%f in stream %d, rule %d, order %d: row %ld is %sfinite", poison, stream, int(rule),
           int(order), long(row), finite ? "" : "not ");
  }
}

}  // namespace

int main() {
  check::Random random;
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (Order order : {Order::align_first, Order::project_first})
      for (Rule rule : {Rule::positive, Rule::full, Rule::conflict})
        for (bool aligned : {true, false})
          for (auto [rows, dim] :
               {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {9, 123}, {65, 768}, {3, 1023}, {1, 65537}, {9, 4097}})
            compare({dtype, rows, dim, rows % 4, aligned, rows == 9, rows == 65, order, rule}, random);
  every_half(DType::bf16);
  every_half(DType::f16);
  for (float poison : {NAN, INFINITY, -INFINITY})
    for (int stream : {0, 1, 2})
      for (Rule rule : {Rule::positive, Rule::full, Rule::conflict})
        for (Order order : {Order::align_first, Order::project_first}) {
          // Its positive part is 0.
          if (stream == 1 && rule == Rule::positive && poison == -INFINITY) continue;
          // Its negative part is 0.
          if (stream == 2 && poison == INFINITY) continue;
          visible(poison, stream, rule, order);
        }
  return check::result();
}
