// The CUDA kernels' entry points: raw device pointers and a stream, no torch and no CUDA header. Every function
// only enqueues work, returns nullptr or what went wrong, and is safe under CUDA-graph capture.
//
// "Compute type" is double for float64 storage and float for the other three.
#pragma once

#include <cstdint>

#include "../project_align.h"
#include "../spectral_entropy.h"
#include "../surgery_head.h"

namespace dgs::cuda {

// One tensor of a list; lives in device memory. What an operation does not use is null.
struct TensorEntry {
  void* grad;
  const void *harmful, *beneficial;
  void *param, *exp_avg, *exp_avg_sq;
  double step_size, correction_root;  // lr / (1 - beta1^step), sqrt(1 - beta2^step)
  int64_t numel;
  int64_t aligned;  // whether every pointer divides by 16 bytes
};

// What one block works on: consecutive elements of one tensor.
struct Chunk {
  int64_t offset;
  int32_t tensor, group;
};

constexpr int kGroupSums = 6;  // <g, h>, <h, h>, <g, g>, <b, h>, <b, b>, <g, b> with b = min(beneficial, 0)

// Make a group's sums and apply them, or one of the two: sharded training adds up its sums in between.
enum class Part { all, sums, apply };

// A list of tensors, cut into chunks that are sorted by group. plan_chunks() makes the last three tables.
struct TensorList {
  DType dtype;
  Order order;
  Rule rule;
  Part part;
  int32_t aligned;                // every pointer and every tensor's size in bytes divides by 16
  const TensorEntry* tensors;     // device
  const Chunk* chunks;            // device, [num_chunks]
  const int64_t* group_begin;     // device, [num_groups + 1]: a group's chunks are group_begin[g] to group_begin[g + 1]
  int64_t num_chunks, num_groups, max_group_chunks;
  void* partials;                 // device, [num_chunks, kGroupSums] of the compute type
  void* sums;                     // device, [num_groups, kGroupSums]
  const void* scale;              // one number of the compute type, or null
  double alignment, eps;
};

// torch.optim.AdamW's arguments, as far as they are the same for all tensors and steps.
struct AdamW {
  double lr, beta1, beta2, weight_decay, eps;
  int32_t maximize;
};

const char* project_align(const ProjectAlign&, void* stream);
const char* surgery_head(const SurgeryHead&, void* stream);
const char* surgery_head_backward(const SurgeryHeadBackward&, void* stream);
int64_t surgery_head_workspace(int64_t batch, int64_t dim);
// On the host: fills chunks and group_begin (host memory) if chunks is not null; returns the number of chunks.
int64_t plan_chunks(DType, bool aligned, const int64_t* numel, const int64_t* groups, int64_t num_tensors,
                    int64_t num_groups, Chunk* chunks, int64_t* group_begin);
const char* project_align_(const TensorList&, void* stream);
const char* surgery_adamw_(const TensorList&, const AdamW&, void* stream);
const char* spectral_entropy(const SpectralEntropy&, void* stream);

}  // namespace dgs::cuda
