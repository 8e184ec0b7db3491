// What gramian and combine_ are given: several gradients of the same list of tensors, the same on every device.
#pragma once

#include "surgery_math.h"
#include "types.h"

namespace dgs {

constexpr int max_objectives = 16;

// numel numbers in a row behind each pointer.
struct ObjectivesTensor {
  int64_t numel, group;
  void* grad;  // null for gramian; may be one of the objectives
  const void* objectives[max_objectives];
};

struct Objectives {
  DType dtype;
  int32_t count;                    // of the objectives, 2 to max_objectives
  const ObjectivesTensor* tensors;  // in the host's memory
  int64_t num_tensors, num_groups;
  // Of the computing type (f64 for f64, else f32):
  void* gramian;           // [num_groups, count, count], written by gramian
  const void* weights;     // of each group, read by combine_
  int64_t weights_stride;  // from one group's weights to the next: count, or 0 for the same ones
};

DGS_INLINE constexpr int pairs(int count) { return count * (count + 1) / 2; }

namespace cpu {

void gramian(const Objectives&, ParallelFor);
void combine_(const Objectives&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
