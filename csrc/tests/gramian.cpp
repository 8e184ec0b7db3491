// gramian and combine_ on the CPU against plain loops in long double: types, numbers of objectives, layers of any size.
#include "objectives.h"

#include "lists.h"

namespace {

using check::expect;
using dgs::DType;

constexpr int64_t groups = 5;
// A layer of many tensors, one without any, an empty tensor, and layers that are cut into pieces.
const std::vector<int64_t> sizes{41, 1, 0, 5, 70000, 1023, 4097, 6, 7}, layer_of{0, 1, 1, 2, 4, 2, 0, 4, 1};

// Streams 0 to count - 1 of the lists are the objectives; `written` is the stream of the results.
std::vector<dgs::ObjectivesTensor> tensors_of(check::Lists& l, int count, int written) {
  std::vector<dgs::ObjectivesTensor> tensors;
  for (size_t t = 0; t < l.sizes.size(); ++t) {
    tensors.push_back({.numel = l.sizes[t], .group = l.groups[t], .grad = l.at(written, t), .objectives = {}});
    for (int k = 0; k < count; ++k) tensors.back().objectives[k] = l.at(k, t);
  }
  return tensors;
}

void compare(DType dtype, int count, bool in_place) {
  check::Random random;
  check::Lists l(dtype, sizes, layer_of, count + 1, random);
  const check::Lists before = l;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const double computing = check::unit_roundoff(wide);
  std::vector<double> room(groups * count * count, NAN), room_again = room, weights(groups * count);
  for (int64_t n = 0; n < groups * count; ++n) check::set(weights.data(), n, wide, random());
  const auto tensors = tensors_of(l, count, in_place ? 0 : count);
  dgs::Objectives o{.dtype = dtype,
                    .count = count,
                    .tensors = tensors.data(),
                    .num_tensors = int64_t(tensors.size()),
                    .num_groups = groups,
                    .gramian = room.data(),
                    .weights = weights.data(),
                    .weights_stride = count};
  dgs::cpu::gramian(o, check::parallel_for);
  o.gramian = room_again.data();
  dgs::cpu::gramian(o, check::single_thread);
  expect(!std::memcmp(room.data(), room_again.data(), room.size() * check::size_of(wide)),
         "dtype %d: the Gramian depends on threads", int(dtype));
  for (int64_t group = 0; group < groups; ++group) {
    const auto inner = [&](int i, int j) {
      long double sum = 0;
      for (size_t t = 0; t < sizes.size(); ++t)
        for (int64_t n = 0; layer_of[t] == group && n < sizes[t]; ++n)
          sum += before.value(i, t, n) * before.value(j, t, n);
      return sum;
    };
    std::vector<long double> squares;
    for (int k = 0; k < count; ++k) squares.push_back(inner(k, k));
    for (int i = 0; i < count; ++i)
      for (int j = i; j < count; ++j) {
        const long double want = i == j ? squares[i] : inner(i, j), size = squares[i] + squares[j];
        const double got = check::get(room.data(), (group * count + i) * count + j, wide);
        expect(got == check::get(room.data(), (group * count + j) * count + i, wide), "gramian is not symmetric");
        expect(std::fabs(got - double(want)) <= 64 * computing * double(size),
               "dtype %d, %d objectives: gramian[%ld, %d, %d] = %.9g, not %.9Lg", int(dtype), count, long(group), i, j,
               got, want);
      }
  }

  dgs::cpu::combine_(o, check::parallel_for);
  l.expect_ends_untouched("combine_");
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t n = 0; n < sizes[t]; ++n) {
      long double want = 0, size = 0;
      for (int k = 0; k < count; ++k) {
        const long double term = check::get(weights.data(), layer_of[t] * count + k, wide) * before.value(k, t, n);
        want += term;
        size += std::fabs(term);
      }
      const double got = double(l.value(in_place ? 0 : count, t, n));
      expect(std::fabs(got - double(want)) <=
                 2 * count * computing * double(size) + check::unit_roundoff(dtype) * std::fabs(double(want)),
             "dtype %d, %d objectives: tensor %ld[%ld] = %.9g, not %.9Lg", int(dtype), count, long(t), long(n), got,
             want);
    }
}

// Results that are stored past the caches, from addresses that do and do not allow it.
void past_caches(DType dtype) {
  check::Random random;
  const int64_t size = (9 << 20) / check::size_of(dtype);
  check::Lists l(dtype, {size}, {0}, 3, random);
  std::vector<char> room(size * check::size_of(dtype) + 32);
  std::vector<double> want;
  for (int64_t n = 0; n < size; ++n) want.push_back(double(l.value(0, 0, n) + l.value(1, 0, n)));
  for (int64_t shift : {0, 16, 8}) {
    char* const to = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & 15) + shift;
    auto tensors = tensors_of(l, 2, 2);
    tensors[0].grad = to;
    const double ones[] = {1, 1};
    const float float_ones[] = {1, 1};
    dgs::cpu::combine_({.dtype = dtype,
                        .count = 2,
                        .tensors = tensors.data(),
                        .num_tensors = 1,
                        .num_groups = 1,
                        .gramian = nullptr,
                        .weights = dtype == DType::f64 ? static_cast<const void*>(ones) : float_ones,
                        .weights_stride = 0},
                       check::parallel_for);
    // The numbers are multiples of 1/64 below 4: of 9 bits, they may have to be rounded to bfloat16's 8.
    for (int64_t n = 0; n < size; ++n) {
      const double got = check::get(to, n, dtype);
      expect(std::fabs(got - want[n]) <= check::unit_roundoff(dtype) * std::fabs(want[n]),
             "past caches: [%ld] = %g, not %g", long(n), got, want[n]);
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (int count : {2, 3, 5, 16})
      for (bool in_place : {false, true})
        if (!in_place || count == 3) compare(dtype, count, in_place);
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) past_caches(dtype);
  return check::result();
}
