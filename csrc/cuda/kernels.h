// The CUDA kernels' entry points: raw device pointers and a stream, no torch and no CUDA header. Every function
// only enqueues work, returns nullptr or what went wrong, and is safe under CUDA-graph capture.
//
// "Compute type" is double for float64 storage and float for the other three.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "../objectives.h"
#include "../project_align.h"
#include "../spectral_entropy.h"
#include "../surgery_head.h"
#include "../tensor_list.h"

namespace dgs::cuda {

// Device memory that lasts as long as the pointer. It may be used again as soon as nothing holds it, by what is
// enqueued after that. Memory for longer than the call comes from outside of the pools that captured graphs and
// torch.compile allocate from.
enum class Lifetime { call, longer };
using Allocate = std::function<std::shared_ptr<void>(int64_t bytes, Lifetime)>;

const char* project_align(const ProjectAlign&, const Allocate&, void* stream);
const char* surgery_head(const SurgeryHead&, void* stream);
const char* surgery_head_backward(const SurgeryHeadBackward&, void* stream);
int64_t surgery_head_workspace(int64_t batch, int64_t dim);
// The first call on a list of tensors makes tables of it on the device; see tables.cu.
const char* project_align_(const TensorList&, const Allocate&, void* stream);
// Under capture, a graph contains the steps that `rates` were made from.
const char* surgery_adamw_(const TensorList&, const AdamW&, const Allocate&, void* stream);
const char* gramian(const Objectives&, const Allocate&, void* stream);
const char* combine_(const Objectives&, const Allocate&, void* stream);
const char* spectral_entropy(const SpectralEntropy&, void* stream);

}  // namespace dgs::cuda
