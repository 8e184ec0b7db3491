// What module.cpp takes from torch, through libtorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <vector>

#include "runtime.h"

#ifdef DGS_CUDA
// Weak: absent in a CPU-only torch, where this library loads all the same and no CUDA tensor ever comes.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace dgs::torch_runtime {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

#ifdef DGS_CUDA
void on_stream(int32_t device, const std::function<const char*(void* stream)>& launch) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "dgs_kernels: no stream on cuda:", device);
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, "dgs_kernels: CUDA kernel launch failed: ", error);
}

cuda::Allocate memory_on(int32_t device) {
  return [device](int64_t bytes) {
    const std::vector<int64_t> size{bytes};
    const torch::stable::Tensor memory =
        torch::stable::empty(size, torch::headeronly::ScalarType::Byte, std::nullopt,
                             torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
    return std::shared_ptr<void>(memory.mutable_data_ptr(), [memory](void*) {});
  };
}
#endif

}  // namespace dgs::torch_runtime
