// What gramian and combine_ are given: several gradients of the same list of tensors, the same on every device.
#pragma once

#include "surgery_math.h"
#include "types.h"

namespace dgs {

constexpr int max_objectives = 16;

// numel numbers in a row behind each pointer.
struct ObjectivesTensor {
  int64_t numel, group;
  // Null for gramian; may be one of the objectives.
  void* grad;
  const void* objectives[max_objectives];
};

struct Objectives {
  DType dtype;
  // How many objectives there are, 2 to max_objectives.
  int32_t count;
  // They lie in the host's memory.
  const ObjectivesTensor* tensors;
  int64_t num_tensors, num_groups;
  // Of the computing type (f64 for f64, else f32):
  // gramian writes it, [num_groups, count, count].
  void* gramian;
  // combine_ reads them, those of each group.
  const void* weights;
  // From one group's weights to the next: count, or 0 for the same ones.
  int64_t weights_stride;
};

DGS_INLINE constexpr int pairs(int count) { return count * (count + 1) / 2; }

namespace cpu {

void gramian(const Objectives&, ParallelFor);
void combine_(const Objectives&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
