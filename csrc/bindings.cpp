// The only file that knows torch, through its stable ABI: checks tensors, allocates results, calls the kernels.
// Operators are called by dgs_kernels/ops, which documents them and knows autograd.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "project_align.h"
#include "spectral_entropy.h"
#include "surgery_head.h"
#include "tensor_list.h"

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

using Tensors = std::vector<Tensor>;

ScalarType computing_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// The operators on lists return whether they served the call. They take lists as they mostly are: contiguous tensors
// of the right shapes, of one dtype and device. Where anything else comes they do nothing; their caller then finds
// out what it is, and raises an error or makes lists that fit. So the usual call looks at each tensor once, here.
struct Likeness {
  ScalarType type;
  torch::stable::accelerator::DeviceIndex device;
  bool on_cpu;

  bool fits(const Tensor& x) const {
    return x.scalar_type() == type && x.is_cpu() == on_cpu && x.get_device_index() == device;
  }
};

bool fits(const Likeness& kind, const Tensors& list, const Tensors& like) {
  if (list.size() != like.size()) return false;
  for (size_t i = 0; i < list.size(); ++i) {
    const auto sizes = list[i].sizes(), wanted = like[i].sizes();
    if (!kind.fits(list[i]) || !list[i].is_contiguous() || sizes.size() != wanted.size() ||
        !std::equal(sizes.begin(), sizes.end(), wanted.begin()))
      return false;
  }
  return true;
}

// What both operators are given, and what the kernels are told of it. `grads` has at least one tensor.
struct List {
  std::vector<dgs::ListTensor> tensors;
  Likeness kind;
  dgs::TensorList list;

  // False where it does not fit.
  bool make(const Tensors& grads, const Tensors& harmful, const Tensors& beneficial, const std::vector<int64_t>& groups,
            const Tensor& sums, const std::optional<Tensor>& scale, double alignment, double eps, int64_t order,
            int64_t rule, int64_t part) {
    const ScalarType type = grads[0].scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::BFloat16 &&
        type != ScalarType::Half)
      return false;
    const DType dtype = dtype_of(grads[0]);
    kind = {type, sums.get_device_index(), sums.is_cpu()};
    const Likeness computing{computing_type(dtype), kind.device, kind.on_cpu};
    if (!fits(kind, grads, grads) || !fits(kind, harmful, grads) ||
        (!beneficial.empty() && !fits(kind, beneficial, grads)) || groups.size() != grads.size() ||
        !computing.fits(sums) || sums.dim() != 2 || sums.size(1) != dgs::group_sums || !sums.is_contiguous() ||
        (scale && (!computing.fits(*scale) || scale->dim() != 0)) || order < 0 || order > 1 || rule < 0 || rule > 2 ||
        part < 0 || part > 2 || !(eps > 0))
      return false;
    const int64_t num_groups = sums.size(0);
    tensors.resize(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      if (groups[i] < 0 || groups[i] >= num_groups) return false;
      tensors[i] = {.grad = grads[i].mutable_data_ptr(),
                    .harmful = harmful[i].const_data_ptr(),
                    .beneficial = beneficial.empty() ? nullptr : beneficial[i].const_data_ptr(),
                    .numel = grads[i].numel(),
                    .group = groups[i]};
    }
    list = {.dtype = dtype,
            .order = static_cast<dgs::Order>(order),
            .rule = static_cast<dgs::Rule>(rule),
            .part = static_cast<dgs::Part>(part),
            .tensors = tensors.data(),
            .num_tensors = int64_t(tensors.size()),
            .num_groups = num_groups,
            .sums = sums.mutable_data_ptr(),
            .scale = scale ? scale->const_data_ptr() : nullptr,
            .alignment = alignment,
            .eps = eps};
    return true;
  }
};

// `launch(list)` runs the kernels of one device.
template <typename Launch>
bool project_align_(const Tensors& grads, const Tensors& harmful, const Tensors& beneficial,
                    const std::vector<int64_t>& groups, const Tensor& sums, const std::optional<Tensor>& scale,
                    double alignment, double eps, int64_t order, int64_t rule, int64_t part, Launch launch) {
  List made;
  if (grads.empty() || !made.make(grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part))
    return false;
  launch(made.list);
  return true;
}

bool project_align__cpu(Tensors grads, Tensors harmful, Tensors beneficial, std::vector<int64_t> groups, Tensor sums,
                        std::optional<Tensor> scale, double alignment, double eps, int64_t order, int64_t rule,
                        int64_t part) {
  return project_align_(grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part,
                        [](const dgs::TensorList& list) { dgs::cpu::project_align_(list, torch_parallel_for); });
}

// The steps that are about to be taken, counted from 1; nothing where one is not a number on the CPU.
std::optional<std::vector<double>> next_steps(const Tensors& steps) {
  std::vector<double> next;
  next.reserve(steps.size());
  for (const Tensor& step : steps) {
    if (!step.is_cpu() || step.dim() != 0) return std::nullopt;
    const ScalarType type = step.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double) return std::nullopt;
    next.push_back(1 + (type == ScalarType::Float ? *static_cast<const float*>(step.const_data_ptr())
                                                  : *static_cast<const double*>(step.const_data_ptr())));
  }
  return next;
}

void count(const Tensor& step, double taken) {
  if (step.scalar_type() == ScalarType::Float)
    *static_cast<float*>(step.mutable_data_ptr()) = float(taken);
  else
    *static_cast<double*>(step.mutable_data_ptr()) = taken;
}

// `launch(list, options)` runs the kernels of one device.
template <typename Launch>
bool surgery_adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                    const Tensors& steps, const Tensors& harmful, const Tensors& beneficial,
                    const std::vector<int64_t>& groups, const Tensor& sums, const std::optional<Tensor>& scale,
                    double alignment, double surgery_eps, int64_t order, int64_t rule, int64_t part, double lr,
                    double beta1, double beta2, double weight_decay, double eps, bool maximize, Launch launch) {
  List made;
  if (grads.empty() || part == 1 ||
      !made.make(grads, harmful, beneficial, groups, sums, scale, alignment, surgery_eps, order, rule, part) ||
      !fits(made.kind, params, grads) || !fits(made.kind, exp_avgs, grads) || !fits(made.kind, exp_avg_sqs, grads) ||
      steps.size() != grads.size())
    return false;
  const auto next = next_steps(steps);
  if (!next) return false;
  for (size_t i = 0; i < grads.size(); ++i) {
    made.tensors[i].param = params[i].mutable_data_ptr();
    made.tensors[i].exp_avg = exp_avgs[i].mutable_data_ptr();
    made.tensors[i].exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
  }
  dgs::AdamW options{lr, beta1, beta2, weight_decay, eps, maximize};
  std::vector<dgs::Rates> rates{options.at_step((*next)[0])};
  options.all_alike = std::all_of(next->begin(), next->end(), [&](double step) { return step == (*next)[0]; });
  for (size_t i = 1; i < grads.size() && !options.all_alike; ++i) rates.push_back(options.at_step((*next)[i]));
  options.rates = rates.data();
  launch(made.list, options);
  for (size_t i = 0; i < steps.size(); ++i) count(steps[i], (*next)[i]);
  return true;
}

bool surgery_adamw__cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
                        Tensors harmful, Tensors beneficial, std::vector<int64_t> groups, Tensor sums,
                        std::optional<Tensor> scale, double alignment, double surgery_eps, int64_t order, int64_t rule,
                        int64_t part, double lr, double beta1, double beta2, double weight_decay, double eps,
                        bool maximize) {
  return surgery_adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, harmful, beneficial, groups, sums, scale,
                        alignment, surgery_eps, order, rule, part, lr, beta1, beta2, weight_decay, eps, maximize,
                        [](const dgs::TensorList& list, const dgs::AdamW& options) {
                          dgs::cpu::surgery_adamw_(list, options, torch_parallel_for);
                        });
}

template <typename Launch>
Tensor spectral_entropy(const Tensor& images, int64_t patch_size, Launch launch) {
  const ScalarType type = images.scalar_type();
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && patch_size == dgs::entropy_patch &&
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
                          [](const dgs::SpectralEntropy& a) { dgs::cpu::spectral_entropy(a, torch_parallel_for); });
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
                      [](const dgs::SurgeryHead& a) { dgs::cpu::surgery_head(a, torch_parallel_for); });
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
  surgery_head_backward(
      residuals, image_weight, teacher_weight, text_weight, image_scale, alignment_scale, out, eps, order,
      reference_batch_size,
      [](const dgs::SurgeryHeadBackward& a) { dgs::cpu::surgery_head_backward(a, torch_parallel_for); });
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

Tensor spectral_entropy_cuda(Tensor images, int64_t patch_size) {
  return spectral_entropy(images, patch_size, [&](const dgs::SpectralEntropy& a) {
    on_stream_of(images, [&](void* stream) { return dgs::cuda::spectral_entropy(a, stream); });
  });
}

// Memory from torch's allocator, which gives it away again in the order of the current stream.
dgs::cuda::Allocate bytes_beside(const Tensor& x) {
  return [&x](int64_t bytes) {
    const std::vector<int64_t> size{bytes};
    const Tensor memory = torch::stable::new_empty(x, size, ScalarType::Byte);
    return std::shared_ptr<void>(memory.mutable_data_ptr(), [memory](void*) {});
  };
}

bool project_align__cuda(Tensors grads, Tensors harmful, Tensors beneficial, std::vector<int64_t> groups, Tensor sums,
                         std::optional<Tensor> scale, double alignment, double eps, int64_t order, int64_t rule,
                         int64_t part) {
  return project_align_(grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, part,
                        [&](const dgs::TensorList& list) {
                          on_stream_of(sums, [&](void* stream) {
                            return dgs::cuda::project_align_(list, bytes_beside(sums), stream);
                          });
                        });
}

bool surgery_adamw__cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
                         Tensors harmful, Tensors beneficial, std::vector<int64_t> groups, Tensor sums,
                         std::optional<Tensor> scale, double alignment, double surgery_eps, int64_t order, int64_t rule,
                         int64_t part, double lr, double beta1, double beta2, double weight_decay, double eps,
                         bool maximize) {
  return surgery_adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, harmful, beneficial, groups, sums, scale,
                        alignment, surgery_eps, order, rule, part, lr, beta1, beta2, weight_decay, eps, maximize,
                        [&](const dgs::TensorList& list, const dgs::AdamW& options) {
                          on_stream_of(sums, [&](void* stream) {
                            return dgs::cuda::surgery_adamw_(list, options, bytes_beside(sums), stream);
                          });
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
                        on_stream_of(features, [&](void* stream) { return dgs::cuda::surgery_head(a, stream); });
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
                          on_stream_of(out, [&](void* stream) { return dgs::cuda::surgery_head_backward(a, stream); });
                        });
  if (!direct) torch::stable::copy_(out, result);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(dgs_native, m) {
  m.def(
      "project_align(Tensor grad, Tensor harmful, Tensor? beneficial, Tensor? scale, float alignment, float eps, "
      "int order, int rule) -> Tensor");
  m.def(
      "project_align_(Tensor(a!)[] grads, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(b!) sums, "
      "Tensor? scale, float alignment, float eps, int order, int rule, int part) -> bool");
  m.def(
      "surgery_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, Tensor[] harmful, Tensor[] beneficial, int[] groups, Tensor(e!) sums, Tensor? scale, "
      "float alignment, float surgery_eps, int order, int rule, int part, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize) -> bool");
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
  m.impl("project_align", TORCH_BOX(&project_align_cpu));
  m.impl("project_align_", TORCH_BOX(&project_align__cpu));
  m.impl("surgery_adamw_", TORCH_BOX(&surgery_adamw__cpu));
  m.impl("surgery_head", TORCH_BOX(&surgery_head_cpu));
  m.impl("surgery_head_backward", TORCH_BOX(&surgery_head_backward_cpu));
  m.impl("spectral_entropy", TORCH_BOX(&spectral_entropy_cpu));
}

#ifdef DGS_CUDA
STABLE_TORCH_LIBRARY_IMPL(dgs_native, CUDA, m) {
  m.impl("project_align", TORCH_BOX(&project_align_cuda));
  m.impl("project_align_", TORCH_BOX(&project_align__cuda));
  m.impl("surgery_adamw_", TORCH_BOX(&surgery_adamw__cuda));
  m.impl("surgery_head", TORCH_BOX(&surgery_head_cuda));
  m.impl("surgery_head_backward", TORCH_BOX(&surgery_head_backward_cuda));
  m.impl("spectral_entropy", TORCH_BOX(&spectral_entropy_cuda));
}
#endif
