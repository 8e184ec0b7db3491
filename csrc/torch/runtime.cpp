// What module.cpp takes from torch, through libtorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <future>
#include <memory>
#include <vector>

#include "runtime.h"

#ifdef DGS_CUDA
// Weak: absent in a CPU-only torch, where this library loads all the same and no CUDA tensor ever comes.
extern "C" {
struct CUDAStreamGuardOpaque;
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_stream_guard(void* stream, int32_t device,
                                                                         CUDAStreamGuardOpaque** guard);
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_stream_guard(CUDAStreamGuardOpaque* guard);
}
#endif

namespace dgs::torch_runtime {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

#ifdef DGS_CUDA
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "dgs_kernels: no stream on cuda:", device);
  return stream;
}

std::shared_ptr<void> allocate(int32_t device, int64_t bytes) {
  const std::vector<int64_t> size{bytes};
  const torch::stable::Tensor memory =
      torch::stable::empty(size, torch::headeronly::ScalarType::Byte, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
  return std::shared_ptr<void>(memory.mutable_data_ptr(), [memory](void*) {});
}

// A pool, such as torch.compile has for its CUDA graphs, takes what the thread allocates that opened it, and may raise
// an error if any of that outlives a call. A thread of its own is in no pool.
std::shared_ptr<void> allocate_outside_of_pools(int32_t device, int64_t bytes) {
  void* const stream = current_stream(device);
  return std::async(
             std::launch::async,
             [=] {
               CUDAStreamGuardOpaque* guard = nullptr;
               STD_TORCH_CHECK(aoti_torch_create_cuda_stream_guard(stream, device, &guard) == 0,
                               "dgs_kernels: no stream on cuda:", device);
               const std::unique_ptr<CUDAStreamGuardOpaque, decltype(&aoti_torch_delete_cuda_stream_guard)> on_stream(
                   guard, aoti_torch_delete_cuda_stream_guard);
               return allocate(device, bytes);
             })
      .get();
}

}  // namespace

void on_stream(int32_t device, const std::function<const char*(void* stream)>& launch) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = launch(current_stream(device));
  STD_TORCH_CHECK(!error, "dgs_kernels: CUDA kernel launch failed: ", error);
}

cuda::Allocate memory_on(int32_t device) {
  return [device](int64_t bytes, cuda::Lifetime lifetime) {
    return lifetime == cuda::Lifetime::call ? allocate(device, bytes) : allocate_outside_of_pools(device, bytes);
  };
}
#endif

}  // namespace dgs::torch_runtime
