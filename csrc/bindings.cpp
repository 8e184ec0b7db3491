// The operators that go through torch's dispatcher (module.cpp has the others), in its stable ABI: checks tensors,
// allocates results, calls the kernels. Operators are called by dgs_kernels/ops, which documents them and knows
// autograd.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "spectral_entropy.h"
#include "surgery_head.h"
#include "torch_runtime.h"

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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
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

namespace {

using dgs::DType;
using dgs::torch_runtime::parallel_for;
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

ScalarType computing_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

template <typename Launch>
Tensor spectral_entropy(const Tensor& images, int64_t patch_size, Launch launch) {
  const ScalarType type = images.scalar_type();
  STD_TORCH_CHECK(
      images.dim() == 4 && images.size(1) == 3 && patch_size == dgs::entropy_patch &&
          (type == ScalarType::Byte || type == ScalarType::Float) &&
          (images.stride(3) == 1 || (images.stride(1) == 1 && images.stride(3) == 3)),
      "dgs_native::spectral_entropy: expected [B, 3, H, W] images, uint8 or float32, planar or interleaved, "
      "and patches of 32 pixels");
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3);
  const std::vector<int64_t> shape{batch, height / patch_size * (width / patch_size)};
  Tensor out = torch::stable::new_empty(images, shape, ScalarType::Float);
  if (out.numel() == 0) return out;
  launch(dgs::SpectralEntropy{.is_uint8 = type == ScalarType::Byte,
                              .images = images.const_data_ptr(),
                              .batch = batch,
                              .height = height,
                              .width = width,
                              .batch_stride = images.stride(0),
                              .channel_stride = images.stride(1),
                              .row_stride = images.stride(2),
                              .pixel_stride = images.stride(3),
                              .entropy = static_cast<float*>(out.mutable_data_ptr())});
  return out;
}

Tensor spectral_entropy_cpu(Tensor images, int64_t patch_size) {
  return spectral_entropy(images, patch_size,
                          [](const dgs::SpectralEntropy& a) { dgs::cpu::spectral_entropy(a, parallel_for); });
}

// A contiguous tensor of this many numbers of the computing type; null if there is none.
const void* numbers_of(const std::optional<Tensor>& x, int64_t count, ScalarType type) {
  STD_TORCH_CHECK(!x || (x->numel() == count && x->scalar_type() == type && x->is_contiguous()),
                  "dgs_native::surgery_head: expected contiguous tensors of the computing type and of fitting sizes");
  return x ? x->const_data_ptr() : nullptr;
}

using HeadResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename Launch>
HeadResults surgery_head(const Tensor& features, const Tensor& teacher_features,
                         const std::optional<Tensor>& text_features, const Tensor& labels, const Tensor& image_weight,
                         const Tensor& image_bias, const Tensor& teacher_weight, const Tensor& teacher_bias,
                         const std::optional<Tensor>& text_weight, const std::optional<Tensor>& text_bias,
                         std::optional<int64_t> reference_batch_size, Launch launch) {
  const DType dtype = dtype_of(features);
  const ScalarType type = computing_type(dtype);
  STD_TORCH_CHECK(features.dim() == 2 && text_features.has_value() == text_weight.has_value() &&
                      text_features.has_value() == text_bias.has_value(),
                  "dgs_native::surgery_head: expected [B, D] features; text features, weight and bias go together");
  const int64_t batch = features.size(0), dim = features.size(1);
  for (const Tensor* x : {&features, &teacher_features, text_features ? &*text_features : &features})
    STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == batch && x->size(1) == dim && (x->stride(1) == 1 || dim == 1) &&
                        x->scalar_type() == features.scalar_type(),
                    "dgs_native::surgery_head: the feature matrices must agree in shape and dtype, with unit stride");
  const auto made = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(labels, shape, type); };
  HeadResults results{made({3}), made({3, batch}), made({3, batch}), made({2, dim + 1})};
  auto& [losses, logits, residuals, head_grads] = results;
  launch(dgs::SurgeryHead{.dtype = dtype,
                          .features = features.const_data_ptr(),
                          .teacher_features = teacher_features.const_data_ptr(),
                          .text_features = text_features ? text_features->const_data_ptr() : nullptr,
                          .features_stride = features.stride(0),
                          .teacher_stride = teacher_features.stride(0),
                          .text_stride = text_features ? text_features->stride(0) : 0,
                          .labels = numbers_of(labels, batch, type),
                          .image_weight = numbers_of(image_weight, dim, type),
                          .teacher_weight = numbers_of(teacher_weight, dim, type),
                          .text_weight = numbers_of(text_weight, dim, type),
                          .image_bias = numbers_of(image_bias, 1, type),
                          .teacher_bias = numbers_of(teacher_bias, 1, type),
                          .text_bias = numbers_of(text_bias, 1, type),
                          .batch = batch,
                          .dim = dim,
                          .reference_batch_size = double(reference_batch_size.value_or(0)),
                          .losses = losses.mutable_data_ptr(),
                          .logits = logits.mutable_data_ptr(),
                          .residuals = residuals.mutable_data_ptr(),
                          .head_grads = head_grads.mutable_data_ptr(),
                          .workspace = nullptr});
  return results;
}

HeadResults surgery_head_cpu(Tensor features, Tensor teacher_features, std::optional<Tensor> text_features,
                             Tensor labels, Tensor image_weight, Tensor image_bias, Tensor teacher_weight,
                             Tensor teacher_bias, std::optional<Tensor> text_weight, std::optional<Tensor> text_bias,
                             std::optional<int64_t> reference_batch_size) {
  return surgery_head(features, teacher_features, text_features, labels, image_weight, image_bias, teacher_weight,
                      teacher_bias, text_weight, text_bias, reference_batch_size,
                      [](const dgs::SurgeryHead& a) { dgs::cpu::surgery_head(a, parallel_for); });
}

template <typename Launch>
void surgery_head_backward(const Tensor& residuals, const Tensor& image_weight, const Tensor& teacher_weight,
                           const std::optional<Tensor>& text_weight, const Tensor& image_scale,
                           const Tensor& alignment_scale, const Tensor& out, double eps, int64_t order,
                           std::optional<int64_t> reference_batch_size, Launch launch) {
  const ScalarType type = residuals.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && out.dim() == 2 && out.is_contiguous() &&
                      order >= 0 && order <= 1,
                  "dgs_native::surgery_head_backward: expected float32 or float64 residuals, a contiguous [B, D] "
                  "result, and order 0 or 1");
  const int64_t batch = out.size(0), dim = out.size(1);
  if (out.numel() == 0) return;
  launch(dgs::SurgeryHeadBackward{.dtype = dtype_of(out),
                                  .order = static_cast<dgs::Order>(order),
                                  .residuals = numbers_of(residuals, 3 * batch, type),
                                  .image_weight = numbers_of(image_weight, dim, type),
                                  .teacher_weight = numbers_of(teacher_weight, dim, type),
                                  .text_weight = numbers_of(text_weight, dim, type),
                                  .image_scale = numbers_of(image_scale, 1, type),
                                  .alignment_scale = numbers_of(alignment_scale, 1, type),
                                  .batch = batch,
                                  .dim = dim,
                                  .reference_batch_size = double(reference_batch_size.value_or(0)),
                                  .eps = eps,
                                  .grad_features = out.mutable_data_ptr(),
                                  .wide = type == ScalarType::Double});
}

void surgery_head_backward_cpu(Tensor residuals, Tensor image_weight, Tensor teacher_weight,
                               std::optional<Tensor> text_weight, Tensor image_scale, Tensor alignment_scale,
                               Tensor out, double eps, int64_t order, std::optional<int64_t> reference_batch_size) {
  surgery_head_backward(residuals, image_weight, teacher_weight, text_weight, image_scale, alignment_scale, out, eps,
                        order, reference_batch_size,
                        [](const dgs::SurgeryHeadBackward& a) { dgs::cpu::surgery_head_backward(a, parallel_for); });
}

#ifdef DGS_CUDA
using dgs::torch_runtime::on_stream;

Tensor spectral_entropy_cuda(Tensor images, int64_t patch_size) {
  return spectral_entropy(images, patch_size, [&](const dgs::SpectralEntropy& a) {
    on_stream(images.get_device_index(), [&](void* stream) { return dgs::cuda::spectral_entropy(a, stream); });
  });
}

HeadResults surgery_head_cuda(Tensor features, Tensor teacher_features, std::optional<Tensor> text_features,
                              Tensor labels, Tensor image_weight, Tensor image_bias, Tensor teacher_weight,
                              Tensor teacher_bias, std::optional<Tensor> text_weight, std::optional<Tensor> text_bias,
                              std::optional<int64_t> reference_batch_size) {
  return surgery_head(features, teacher_features, text_features, labels, image_weight, image_bias, teacher_weight,
                      teacher_bias, text_weight, text_bias, reference_batch_size, [&](dgs::SurgeryHead a) {
                        const std::vector<int64_t> size{dgs::cuda::surgery_head_workspace(a.batch, a.dim)};
                        const Tensor workspace = torch::stable::new_empty(labels, size, computing_type(a.dtype));
                        a.workspace = workspace.mutable_data_ptr();
                        on_stream(features.get_device_index(),
                                  [&](void* stream) { return dgs::cuda::surgery_head(a, stream); });
                      });
}

void surgery_head_backward_cuda(Tensor residuals, Tensor image_weight, Tensor teacher_weight,
                                std::optional<Tensor> text_weight, Tensor image_scale, Tensor alignment_scale,
                                Tensor out, double eps, int64_t order, std::optional<int64_t> reference_batch_size) {
  // The kernel computes in the type that goes with what it writes.
  const ScalarType type = residuals.scalar_type();
  const bool direct = computing_type(dtype_of(out)) == type;
  const Tensor result = direct ? out : torch::stable::new_empty(out, out.sizes(), type);
  surgery_head_backward(residuals, image_weight, teacher_weight, text_weight, image_scale, alignment_scale, result, eps,
                        order, reference_batch_size, [&](const dgs::SurgeryHeadBackward& a) {
                          on_stream(out.get_device_index(),
                                    [&](void* stream) { return dgs::cuda::surgery_head_backward(a, stream); });
                        });
  if (!direct) torch::stable::copy_(out, result);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(dgs_native, m) {
  m.def(
      "surgery_head(Tensor features, Tensor teacher_features, Tensor? text_features, Tensor labels, "
      "Tensor image_weight, Tensor image_bias, Tensor teacher_weight, Tensor teacher_bias, Tensor? text_weight, "
      "Tensor? text_bias, int? reference_batch_size) -> (Tensor losses, Tensor logits, Tensor residuals, "
      "Tensor head_grads)");
  m.def(
      "surgery_head_backward(Tensor residuals, Tensor image_weight, Tensor teacher_weight, Tensor? text_weight, "
      "Tensor image_scale, Tensor alignment_scale, Tensor(a!) out, float eps, int order, int? reference_batch_size) "
      "-> ()");
  m.def("spectral_entropy(Tensor images, int patch_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dgs_native, CPU, m) {
  m.impl("surgery_head", TORCH_BOX(&surgery_head_cpu));
  m.impl("surgery_head_backward", TORCH_BOX(&surgery_head_backward_cpu));
  m.impl("spectral_entropy", TORCH_BOX(&spectral_entropy_cpu));
}

#ifdef DGS_CUDA
STABLE_TORCH_LIBRARY_IMPL(dgs_native, CUDA, m) {
  m.impl("surgery_head", TORCH_BOX(&surgery_head_cuda));
  m.impl("surgery_head_backward", TORCH_BOX(&surgery_head_backward_cuda));
  m.impl("spectral_entropy", TORCH_BOX(&spectral_entropy_cuda));
}
#endif
