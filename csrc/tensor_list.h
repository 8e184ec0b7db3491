// What the kernels on lists of tensors are given: project_align_ and surgery_adamw_, the same on every device.
#pragma once

#include <cmath>

#include "surgery_math.h"
#include "types.h"

namespace dgs {

// <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b> with b = min(beneficial, 0).
constexpr int group_sums = 6;

// Make a group's sums and apply them, or one of the two: sharded training adds up its sums in between.
enum class Part { all, sums, apply };

// One tensor of a list: numel numbers in a row behind each pointer. project_align_ has no use for the last three.
struct ListTensor {
  int64_t numel, group;
  void* grad;
  // Null as beneficial: nothing to align with.
  const void *harmful, *beneficial;
  void *param = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr;
};

struct TensorList {
  DType dtype;
  Order order;
  Rule rule;
  Part part;
  // They lie in the host's memory.
  const ListTensor* tensors;
  int64_t num_tensors, num_groups;
  // [num_groups, group_sums] of the computing type (f64 for f64, else f32).
  void* sums;
  // Null, or one number of the computing type.
  const void* scale;
  // It is multiplied by *scale.
  double alignment;
  double eps;
};

// What a tensor's step number makes of the arguments of torch.optim.AdamW. The update
//   param - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)
// is param - size * exp_avg / (sqrt(exp_avg_sq) + eps), with one division instead of two.
struct Rates {
  double size, eps;
};

struct AdamW {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize;
  // Those of every tensor, or of all alike; in the host's memory.
  const Rates* rates = nullptr;
  bool all_alike = false;

  Rates at_step(double step) const {
    const double root = std::sqrt(1 - std::pow(beta2, step));
    return {lr / (1 - std::pow(beta1, step)) * root, eps * root};
  }
};

namespace cpu {

void project_align_(const TensorList&, ParallelFor);
void surgery_adamw_(const TensorList&, const AdamW&, ParallelFor);

// At most list_block elements of one tensor, and what its group's surgery does: g <- g + alignment b - k h.
constexpr int64_t list_block = 4096;
struct ListBlock {
  const ListTensor& tensor;
  int64_t begin, size;
  double alignment, k;
};

// Makes the sums and calls apply(block, context) for every block, as list.part says.
void surgery_on_list(const TensorList&, ParallelFor, void (*apply)(const ListBlock&, const void* context),
                     const void* context);

}  // namespace cpu
}  // namespace dgs
