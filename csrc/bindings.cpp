// The only file that knows torch, through its stable ABI: checks tensors, allocates results, calls the kernels.
// Operators are called by dgs_kernels/ops, which documents them and knows autograd.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>

#include "project_align.h"

#ifdef DGS_CUDA
#include "cuda/kernels.h"

// Weak: absent in a CPU-only torch, where this library loads all the same and no CUDA tensor ever comes.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using dgs::DType;
using dgs::ProjectAlign;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "dgs_native: expected float32, float64, bfloat16 or float16");
  }
}

// A [rows, D] tensor whose rows are contiguous inside.
Tensor rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "dgs_native: expected a [rows, D] tensor, got ", x.dim(), " dimensions");
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor direction_of(const Tensor& x, const Tensor& grad, const char* name) {
  const Tensor rows = rows_of(x);
  STD_TORCH_CHECK(rows.size(0) == grad.size(0) && rows.size(1) == grad.size(1) &&
                      rows.scalar_type() == grad.scalar_type() && rows.device() == grad.device(),
                  "dgs_native::project_align: ", name, " must have grad's shape, dtype and device");
  return rows;
}

// `launch(arguments)` runs the kernel of one device.
template <typename Launch>
Tensor project_align(const Tensor& grad_, const Tensor& harmful_, const std::optional<Tensor>& beneficial_,
                     const std::optional<Tensor>& scale, double alignment, double eps, int64_t order, int64_t rule,
                     Launch launch) {
  const Tensor grad = rows_of(grad_), harmful = direction_of(harmful_, grad, "harmful");
  std::optional<Tensor> beneficial;
  if (beneficial_) beneficial = direction_of(*beneficial_, grad, "beneficial");
  STD_TORCH_CHECK(order >= 0 && order <= 1 && rule >= 0 && rule <= 2,
                  "dgs_native::project_align: order must be 0 or 1 and rule 0, 1 or 2");
  const DType dtype = dtype_of(grad);
  STD_TORCH_CHECK(!scale || (scale->dim() == 0 && scale->device() == grad.device() &&
                             scale->scalar_type() == (dtype == DType::f64 ? ScalarType::Double : ScalarType::Float)),
                  "dgs_native::project_align: scale must be 0-dim, on grad's device, and float32 (float64 where "
                  "grad is)");

  Tensor out = torch::stable::new_empty(grad, grad.sizes());
  if (out.numel() == 0) return out;
  launch(ProjectAlign{
      .grad = grad.const_data_ptr(),
      .harmful = harmful.const_data_ptr(),
      .beneficial = beneficial ? beneficial->const_data_ptr() : nullptr,
      .scale = scale ? scale->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .rows = grad.size(0),
      .dim = grad.size(1),
      .grad_stride = grad.stride(0),
      .harmful_stride = harmful.stride(0),
      .beneficial_stride = beneficial ? beneficial->stride(0) : 0,
      .out_stride = grad.size(1),
      .alignment = alignment,
      .eps = eps,
      .order = static_cast<dgs::Order>(order),
      .rule = static_cast<dgs::Rule>(rule),
      .dtype = dtype,
  });
  return out;
}

// torch's own threads, so that torch.set_num_threads holds.
void torch_parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor project_align_cpu(Tensor grad, Tensor harmful, std::optional<Tensor> beneficial, std::optional<Tensor> scale,
                         double alignment, double eps, int64_t order, int64_t rule) {
  return project_align(grad, harmful, beneficial, scale, alignment, eps, order, rule,
                       [](const ProjectAlign& a) { dgs::cpu::project_align(a, torch_parallel_for); });
}

#ifdef DGS_CUDA
// Runs launch(stream) on the tensor's device and torch's current stream there.
template <typename Launch>
void on_stream_of(const Tensor& x, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = launch(stream);
  STD_TORCH_CHECK(!error, "dgs_native: CUDA kernel launch failed: ", error);
}

Tensor project_align_cuda(Tensor grad, Tensor harmful, std::optional<Tensor> beneficial, std::optional<Tensor> scale,
                          double alignment, double eps, int64_t order, int64_t rule) {
  return project_align(grad, harmful, beneficial, scale, alignment, eps, order, rule, [&](const ProjectAlign& a) {
    on_stream_of(grad, [&](void* stream) { return dgs::cuda::project_align(a, stream); });
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(dgs_native, m) {
  m.def(
      "project_align(Tensor grad, Tensor harmful, Tensor? beneficial, Tensor? scale, float alignment, float eps, "
      "int order, int rule) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgs_native, CPU, m) { m.impl("project_align", TORCH_BOX(&project_align_cpu)); }

#ifdef DGS_CUDA
STABLE_TORCH_LIBRARY_IMPL(dgs_native, CUDA, m) { m.impl("project_align", TORCH_BOX(&project_align_cuda)); }
#endif
