// What the surgery_head kernels are given: shapes as in dgs_kernels/ops/surgery_head.py.
#pragma once

#include "surgery_math.h"
#include "types.h"

namespace dgs {

// All but the three feature matrices are contiguous and of the computing type (f64 for f64, else f32).
struct SurgeryHead {
  DType dtype;
  // Whether the text's logits are added to the image's in the image loss.
  int32_t expert;
  // [batch, dim]; text_features may be null.
  const void *features, *teacher_features, *text_features;
  // In elements, from one row to the next.
  int64_t features_stride, teacher_stride, text_stride;
  // [batch]; offsets may be null.
  const void *labels, *offsets;
  // [dim].
  const void *image_weight, *teacher_weight, *text_weight;
  // [1].
  const void *image_bias, *teacher_bias, *text_bias;
  int64_t batch, dim;
  // 0: the batch's own.
  double reference_batch_size;
  // The weight of the distillation loss.
  double distillation;
  // [4], [3, batch], [3, batch], [2, dim + 1].
  void *losses, *logits, *residuals, *head_grads;
  // [batch, dim] of dtype; null without distillation.
  void* differences;
  // CUDA: surgery_head_workspace(batch, dim) numbers.
  void* workspace;
};

struct SurgeryHeadBackward {
  // The type of grad_features.
  DType dtype;
  Order order;
  // [3, batch].
  const void* residuals;
  // [dim]; text_weight may be null.
  const void *image_weight, *teacher_weight, *text_weight;
  // One number each.
  const void *image_scale, *alignment_scale;
  // [batch, dim] of dtype, one number; both may be null.
  const void *differences, *distillation_scale;
  int64_t batch, dim;
  double reference_batch_size, eps, distillation;
  // [batch, dim], contiguous; on the CPU, differences may be the same memory.
  void* grad_features;
  // On the CPU: whether everything else is f64; CUDA goes by dtype.
  int32_t wide;
};

namespace cpu {

void surgery_head(const SurgeryHead&, ParallelFor);
void surgery_head_backward(const SurgeryHeadBackward&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
