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
  // [streams * tensors].
  std::vector<std::vector<char>> memory;

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

// Streams 0, 1 and 2 are gradient, harmful and beneficial; 3, 4 and 5 where there are so many, what AdamW edits.
inline std::vector<dgs::ListTensor> tensors_of(Lists& l, bool aligned) {
  std::vector<dgs::ListTensor> tensors;
  const bool adamw = l.memory.size() > 3 * l.sizes.size();
  for (size_t t = 0; t < l.sizes.size(); ++t)
    tensors.push_back({.numel = l.sizes[t],
                       .group = l.groups[t],
                       .grad = l.at(0, t),
                       .harmful = l.at(1, t),
                       .beneficial = aligned ? l.at(2, t) : nullptr,
                       .param = adamw ? l.at(3, t) : nullptr,
                       .exp_avg = adamw ? l.at(4, t) : nullptr,
                       .exp_avg_sq = adamw ? l.at(5, t) : nullptr});
  return tensors;
}

constexpr double alignment = 0.375, eps = 1e-6;

inline dgs::TensorList list_of(dgs::DType dtype, const std::vector<dgs::ListTensor>& tensors, int64_t groups,
                               std::vector<double>& sums, dgs::Order order, dgs::Rule rule) {
  sums.assign(groups * 6, NAN);
  if (dtype != dgs::DType::f64) std::fill_n(reinterpret_cast<float*>(sums.data()), groups * 6, NAN);
  return {.dtype = dtype,
          .order = order,
          .rule = rule,
          .part = dgs::Part::all,
          .tensors = tensors.data(),
          .num_tensors = int64_t(tensors.size()),
          .num_groups = groups,
          .sums = sums.data(),
          .scale = nullptr,
          .alignment = alignment,
          .eps = eps};
}

struct Surgery {
  // [groups, 6].
  std::vector<long double> sums;
  // The edited gradients.
  std::vector<std::vector<long double>> grads;
};

inline Surgery plain_surgery(const Lists& l, int64_t groups, bool aligned, dgs::Order order, dgs::Rule rule) {
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
