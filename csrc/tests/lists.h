// Lists of tensors for the tests of project_align_ and surgery_adamw_, and a layer's surgery by plain loops.
#pragma once

#include "tensor_list.h"

#include "check.h"

namespace check {

// A list of tensors with `streams` arrays each, of numbers that are exact in every type. What lies behind a
// tensor's end is known, so that a write beyond it is seen.
struct Lists {
  dgs::DType dtype;
  std::vector<int64_t> sizes, groups;
  std::vector<std::vector<char>> memory;  // [streams * tensors]

  Lists(dgs::DType dtype_, std::vector<int64_t> sizes_, std::vector<int64_t> groups_, int streams, Random& random)
      : dtype(dtype_), sizes(std::move(sizes_)), groups(std::move(groups_)) {
    for (int s = 0; s < streams; ++s)
      for (int64_t size : sizes) {
        auto& array = memory.emplace_back((size + 2) * size_of(dtype), char(0x55));
        for (int64_t i = 0; i < size; ++i) set(array.data(), 1 + i, dtype, random());
      }
  }
  // From the second element on, so that nothing is aligned to more than one element.
  void* at(int stream, size_t tensor) { return memory[stream * sizes.size() + tensor].data() + size_of(dtype); }
  long double value(int stream, size_t tensor, int64_t i) const {
    return get(memory[stream * sizes.size() + tensor].data(), 1 + i, dtype);
  }
  void expect_ends_untouched(const char* what) const {
    for (size_t n = 0; n < memory.size(); ++n)
      for (size_t i = 0; i < size_of(dtype); ++i)
        expect(memory[n][i] == 0x55 && memory[n][memory[n].size() - 1 - i] == 0x55, "%s: written beside array %ld",
               what, long(n));
  }
};

struct Surgery {
  std::vector<long double> sums;                // [groups, 6]
  std::vector<std::vector<long double>> grads;  // the edited gradients
};

// Streams 0, 1, 2 of the lists are gradient, harmful and beneficial.
inline Surgery plain_surgery(const Lists& l, int64_t groups, bool aligned, dgs::Order order, dgs::Rule rule,
                             long double alignment, long double eps) {
  Surgery result{std::vector<long double>(groups * 6), {}};
  const auto h = [&](size_t t, int64_t i) {
    return rule == dgs::Rule::positive ? std::max(l.value(1, t, i), 0.0L) : l.value(1, t, i);
  };
  const auto b = [&](size_t t, int64_t i) { return aligned ? std::min(l.value(2, t, i), 0.0L) : 0.0L; };
  for (size_t t = 0; t < l.sizes.size(); ++t)
    for (int64_t i = 0; i < l.sizes[t]; ++i) {
      const long double x = l.value(0, t, i), y = h(t, i), z = b(t, i);
      const long double products[6] = {x * y, y * y, x * x, z * y, z * z, x * z};
      for (int n = 0; n < 6; ++n) result.sums[l.groups[t] * 6 + n] += products[n];
    }
  for (size_t t = 0; t < l.sizes.size(); ++t) {
    const long double* sums = &result.sums[l.groups[t] * 6];
    long double inner = sums[0] + (order == dgs::Order::align_first ? alignment * sums[3] : 0);
    if (rule == dgs::Rule::conflict) inner = std::min(inner, 0.0L);
    const long double norm = std::sqrt(sums[1]) + eps;
    auto& grads = result.grads.emplace_back();
    for (int64_t i = 0; i < l.sizes[t]; ++i)
      grads.push_back(l.value(0, t, i) + alignment * b(t, i) - inner / norm / norm * h(t, i));
  }
  return result;
}

}  // namespace check
