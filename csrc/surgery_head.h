// What the surgery_head kernels are given: shapes as in dgs_kernels/ops/surgery_head.py.
#pragma once

#include "surgery_math.h"
#include "types.h"

namespace dgs {

// All but the three feature matrices are contiguous and of the computing type (f64 for f64, else f32).
struct SurgeryHead {
  DType dtype;
  int32_t expert;  // whether the text's logits are added to the image's in the image loss
  const void *features, *teacher_features, *text_features;  // [batch, dim]; text_features may be null
  int64_t features_stride, teacher_stride, text_stride;     // in elements, from row to row
  const void *labels, *offsets;                             // [batch]; offsets may be null
  const void *image_weight, *teacher_weight, *text_weight;  // [dim]
  const void *image_bias, *teacher_bias, *text_bias;        // [1]
  int64_t batch, dim;
  double reference_batch_size;                     // 0: the batch's own
  double distillation;                             // the weight in the distillation loss
  void *losses, *logits, *residuals, *head_grads;  // [4], [3, batch], [3, batch], [2, dim + 1]
  void* differences;                               // [batch, dim] of dtype; null without distillation
  void* workspace;                                 // CUDA: surgery_head_workspace(batch, dim) numbers
};

struct SurgeryHeadBackward {
  DType dtype;  // of grad_features
  Order order;
  const void* residuals;                                    // [3, batch]
  const void *image_weight, *teacher_weight, *text_weight;  // [dim]; text_weight may be null
  const void *image_scale, *alignment_scale;                // one number each
  const void *differences, *distillation_scale;             // [batch, dim] of dtype, one number; both may be null
  int64_t batch, dim;
  double reference_batch_size, eps, distillation;
  void* grad_features;  // [batch, dim], contiguous; on the CPU, differences may be the same memory
  int32_t wide;         // CPU: whether everything else is f64; CUDA: as dtype has it
};

namespace cpu {

void surgery_head(const SurgeryHead&, ParallelFor);
void surgery_head_backward(const SurgeryHeadBackward&, ParallelFor);

}  // namespace cpu
}  // namespace dgs
