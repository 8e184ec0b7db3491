// What a project_align kernel is given: raw pointers, sizes and options, the same on every device.
#pragma once

#include "surgery_math.h"
#include "types.h"

namespace dgs {

// Rows are contiguous inside; the strides, in elements, lead from one row to the next (0: one row for all).
struct ProjectAlign {
  const void* grad;
  const void* harmful;
  // Null: nothing to align with.
  const void* beneficial;
  // Null, or one number of the computing type (f64 for f64, else f32).
  const void* scale;
  void* out;
  int64_t rows, dim;
  int64_t grad_stride, harmful_stride, beneficial_stride, out_stride;
  // It is multiplied by *scale.
  double alignment;
  double eps;
  Order order;
  Rule rule;
  // The type of grad, harmful, beneficial and out.
  DType dtype;
};

namespace cpu {

void project_align(const ProjectAlign&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
