// What the Python module takes from torch beside tensors: its threads, its streams and its memory.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda/kernels.h"

namespace dgs::torch_runtime {

// torch's own threads, so that torch.set_num_threads holds.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

#ifdef DGS_CUDA
// Runs launch(stream) on this device and torch's current stream there; throws what it says went wrong.
void on_stream(int32_t device, const std::function<const char*(void* stream)>& launch);

// Memory from torch's allocator, which gives it away again in the order of the current stream.
cuda::Allocate memory_on(int32_t device);
#endif

}  // namespace dgs::torch_runtime
