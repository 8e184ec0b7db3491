// The Python module dgs_kernels._native: the kernels on torch's tensors. Hundreds of tensors a call take torch's
// dispatcher longer than the kernels, and a call on a small batch as long. So tensors come past it, through DLPack's C
// exchange API and Python's limited API; one binary serves all versions of both. dgs_kernels/ops documents the
// operators, and registers them with torch for whoever wants to see them there.
//
// Every function returns whether it served the call. It takes tensors as they mostly are: dense, of fitting shapes, of
// one dtype and device, of no subclass. Where anything else comes it does nothing; its caller then finds out what it
// is, and raises an error or makes tensors that fit. So the usual call looks at each tensor once, here.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <ATen/dlpack.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "objectives.h"
#include "runtime.h"
#include "tensor_list.h"

namespace {

using dgs::DType;

const DLPackExchangeAPI* exchange;
PyObject *tensor_type, *parameter_type, *is_neg;

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
bool same(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }

std::optional<DType> dtype_of(DLDataType type) {
  if (same(type, {kDLFloat, 32, 1})) return DType::f32;
  if (same(type, {kDLFloat, 64, 1})) return DType::f64;
  if (same(type, {kDLBfloat, 16, 1})) return DType::bf16;
  if (same(type, {kDLFloat, 16, 1})) return DType::f16;
  return std::nullopt;
}

// What a tensor is, as long as it lives.
struct View : DLTensor {
  bool absent = false;  // None

  // False where no kernel could read it.
  bool of(PyObject* object) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) return false;
    if (exchange->dltensor_from_py_object_no_sync(object, this) == 0) return !negated(object);
    PyErr_Clear();  // it has no memory, or none that it could show
    return false;
  }

  // Whether torch reads the numbers with their signs changed, as in the imaginary part of a conjugate. Those lie two
  // apart in memory, so of contiguous tensors only one of a single number can be such a view.
  bool negated(PyObject* object) const {
    if (numel() != 1) return false;
    PyObject* const answer = PyObject_CallFunctionObjArgs(is_neg, object, nullptr);
    Py_XDECREF(answer);
    return answer != Py_False;
  }

  bool of_optional(PyObject* object) {
    absent = object == Py_None;
    return absent || of(object);
  }

  void* at() const { return absent ? nullptr : static_cast<char*>(data) + byte_offset; }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // The number of rows, of shape[ndim - 1] numbers in a row, and the way from one to the next; false if it has none.
  bool rows(int64_t& count, int64_t& stride) const {
    if (ndim == 0 || shape[ndim - 1] == 0) return false;
    count = numel() / shape[ndim - 1];
    stride = ndim == 2 ? strides[0] : shape[ndim - 1];
    return contiguous() || (ndim == 2 && strides[1] == 1);
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
};

// Python's arguments, taken one after the other. One of a wrong type leaves a Python error behind.
class Arguments {
  PyObject* const* next_;

 public:
  explicit Arguments(PyObject* const* arguments) : next_(arguments) {}

  PyObject* object() { return *next_++; }
  bool view(View& view) { return view.of(object()); }
  bool optional(View& view) { return view.of_optional(object()); }
  double real() {
    PyObject* const number = object();
    if (PyFloat_Check(number) || PyLong_Check(number)) return PyFloat_AsDouble(number);
    PyErr_SetString(PyExc_TypeError, "expected a number");  // not a tensor, which would have to be waited for
    return 0;
  }
  int64_t integer() { return PyLong_AsLongLong(object()); }
  bool truth() { return PyObject_IsTrue(object()) == 1; }

  template <typename Item, typename Read>
  bool list(std::vector<Item>& into, Read read) {
    PyObject* items = object();
    if (!PyList_Check(items)) return false;
    into.resize(PyList_Size(items));
    for (size_t i = 0; i < into.size(); ++i)
      if (!read(PyList_GetItem(items, i), into[i])) return false;
    return true;
  }

  bool list(std::vector<View>& views) {
    return list(views, [](PyObject* item, View& view) { return view.of(item); });
  }

  bool list(std::vector<int64_t>& numbers) {
    return list(numbers, [](PyObject* item, int64_t& number) {
      number = PyLong_AsLongLong(item);
      return !(number == -1 && PyErr_Occurred());
    });
  }
};

bool alike(const View& x, const View& y) {
  return same(x.dtype, y.dtype) && same(x.device, y.device) && x.contiguous() && x.ndim == y.ndim &&
         std::equal(x.shape, x.shape + x.ndim, y.shape);
}

bool alike(const std::vector<View>& list, const std::vector<View>& wanted) {
  return std::equal(list.begin(), list.end(), wanted.begin(), wanted.end(),
                    [](const View& x, const View& y) { return alike(x, y); });
}

// Whether some of these contiguous tensors share memory.
bool overlap(const std::vector<View>& list) {
  std::vector<std::pair<char*, char*>> spans;
  spans.reserve(list.size());
  for (const View& x : list)
    if (char* const begin = static_cast<char*>(x.at()); x.numel())
      spans.emplace_back(begin, begin + x.numel() * (x.dtype.bits / 8));
  std::sort(spans.begin(), spans.end());
  return std::adjacent_find(spans.begin(), spans.end(),
                            [](const auto& x, const auto& y) { return y.first < x.second; }) != spans.end();
}

bool positive(double x) { return x > 0 && std::isfinite(x); }

// The type that kernels compute in, and that their scalars have.
DLDataType computing_type(DType dtype) { return {kDLFloat, uint8_t(dtype == DType::f64 ? 64 : 32), 1}; }

// Whether it is a number of this type.
bool scalar(const View& x, DLDataType type, DLDevice device) {
  return x.ndim == 0 && same(x.dtype, type) && same(x.device, device);
}

// Whether it is `count` numbers of this type in a row.
bool numbers(const View& x, int64_t count, DLDataType type, DLDevice device) {
  return same(x.dtype, type) && same(x.device, device) && x.numel() == count && x.contiguous();
}

// What both operators on lists are given besides, and what the kernels are told of it.
struct List {
  std::vector<dgs::ListTensor> tensors;
  dgs::TensorList list;
  DLDevice device;

  // Takes harmful, beneficial, groups, sums, scale, alignment, eps, order, rule and part; false where they do not fit.
  bool read(const std::vector<View>& grads, Arguments& arguments) {
    std::vector<View> harmful, beneficial;
    std::vector<int64_t> groups;
    View sums, scale;
    if (grads.empty() || !arguments.list(harmful) || !arguments.list(beneficial) || !arguments.list(groups) ||
        !sums.of(arguments.object()))
      return false;
    if (!arguments.optional(scale)) return false;
    const double alignment = arguments.real(), eps = arguments.real();
    const int64_t order = arguments.integer(), rule = arguments.integer(), part = arguments.integer();
    if (PyErr_Occurred()) return false;

    const auto dtype = dtype_of(grads[0].dtype);
    if (!dtype || order < 0 || order > 1 || rule < 0 || rule > 2 || part < 0 || part > 2 || !positive(eps) ||
        !std::isfinite(alignment))
      return false;
    device = grads[0].device;
    const DLDataType computing = computing_type(*dtype);
    if (sums.ndim != 2 || !numbers(sums, sums.shape[0] * dgs::group_sums, computing, device) ||
        !(scale.absent || scalar(scale, computing, device)) || groups.size() != grads.size() ||
        !alike(harmful, grads) || !(beneficial.empty() || alike(beneficial, grads)))
      return false;

    if (overlap(grads)) return false;
    const int64_t num_groups = sums.shape[0];
    tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!same(grads[i].dtype, grads[0].dtype) || !same(grads[i].device, device) || !grads[i].contiguous() ||
          groups[i] < 0 || groups[i] >= num_groups)
        return false;
      tensors.push_back({.numel = grads[i].numel(),
                         .group = groups[i],
                         .grad = grads[i].at(),
                         .harmful = harmful[i].at(),
                         .beneficial = beneficial.empty() ? nullptr : beneficial[i].at()});
    }
    list = {.dtype = *dtype,
            .order = static_cast<dgs::Order>(order),
            .rule = static_cast<dgs::Rule>(rule),
            .part = static_cast<dgs::Part>(part),
            .tensors = tensors.data(),
            .num_tensors = int64_t(tensors.size()),
            .num_groups = num_groups,
            .sums = sums.at(),
            .scale = scale.at(),
            .alignment = alignment,
            .eps = eps};
    return true;
  }
};

// While it exists, other Python threads run.
class WithoutLock {
  PyThreadState* const state_ = PyEval_SaveThread();

 public:
  ~WithoutLock() { PyEval_RestoreThread(state_); }
};

// on_cpu(), or on_cuda(allocate, stream) on torch's current stream there; false if it is neither's device.
template <typename Cpu, typename Cuda>
bool launch(DLDevice device, Cpu on_cpu, Cuda on_cuda) {
  const WithoutLock unlocked;
  if (device.device_type == kDLCPU) {
    on_cpu();
    return true;
  }
#ifdef DGS_CUDA
  if (device.device_type == kDLCUDA) {
    const auto allocate = dgs::torch_runtime::memory_on(device.device_id);
    dgs::torch_runtime::on_stream(device.device_id, [&](void* stream) { return on_cuda(allocate, stream); });
    return true;
  }
#endif
  return false;
}

bool launch_rows(const dgs::ProjectAlign& call, DLDevice device) {
  return call.rows == 0 ||
         launch(
             device, [&] { dgs::cpu::project_align(call, dgs::torch_runtime::parallel_for); },
             [&](const auto& allocate, void* stream) { return dgs::cuda::project_align(call, allocate, stream); });
}

bool same_shape(const View& x, const View& y) {
  return x.ndim == y.ndim && std::equal(x.shape, x.shape + x.ndim, y.shape);
}

// A direction of grad's shape, or one row for all; false if it is neither.
bool direction_of(const View& grad, const View& direction, int64_t& stride) {
  int64_t count;
  if (!same(direction.dtype, grad.dtype) || !same(direction.device, grad.device) || !direction.rows(count, stride) ||
      direction.ndim > grad.ndim || direction.shape[direction.ndim - 1] != grad.shape[grad.ndim - 1])
    return false;
  if (same_shape(direction, grad)) return true;
  stride = 0;
  return count == 1;
}

bool project_align(Arguments arguments) {
  View grad, harmful, beneficial, scale, out;
  if (!arguments.view(grad) || !arguments.view(harmful) || !arguments.optional(beneficial) ||
      !arguments.optional(scale) || !arguments.view(out))
    return false;
  dgs::ProjectAlign call{.alignment = arguments.real(), .eps = arguments.real()};
  const int64_t order = arguments.integer(), rule = arguments.integer();
  const auto dtype = dtype_of(grad.dtype);
  if (PyErr_Occurred() || !dtype || !grad.rows(call.rows, call.grad_stride) || !alike(out, grad) ||
      !direction_of(grad, harmful, call.harmful_stride) ||
      !(beneficial.absent || direction_of(grad, beneficial, call.beneficial_stride)) ||
      !(scale.absent || scalar(scale, computing_type(*dtype), grad.device)) || order < 0 || order > 1 || rule < 0 ||
      rule > 2 || !positive(call.eps) || !std::isfinite(call.alignment))
    return false;
  call.grad = grad.at();
  call.harmful = harmful.at();
  call.beneficial = beneficial.at();
  call.scale = scale.at();
  call.out = out.at();
  call.dim = call.out_stride = grad.shape[grad.ndim - 1];
  call.order = static_cast<dgs::Order>(order);
  call.rule = static_cast<dgs::Rule>(rule);
  call.dtype = *dtype;
  return launch_rows(call, grad.device);
}

// Whether all are in [0, 1]; of numbers on a GPU the kernel finds out.
bool probabilities(const View& x) {
  if (x.device.device_type != kDLCPU) return true;
  const auto within = [&](const auto* numbers) {
    return std::all_of(numbers, numbers + x.numel(), [](auto p) { return p >= 0 && p <= 1; });
  };
  return x.dtype.bits == 64 ? within(static_cast<double*>(x.at())) : within(static_cast<float*>(x.at()));
}

bool surgery_head(Arguments arguments) {
  View features, teacher, text, labels, image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias;
  View losses, logits, residuals, head_grads, differences, offsets;
  if (!arguments.view(features) || !arguments.view(teacher) || !arguments.optional(text) || !arguments.view(labels))
    return false;
  for (View* head : {&image_weight, &image_bias, &teacher_weight, &teacher_bias})
    if (!arguments.view(*head)) return false;
  if (!arguments.optional(text_weight) || !arguments.optional(text_bias)) return false;
  for (View* result : {&losses, &logits, &residuals, &head_grads, &differences})
    if (!arguments.view(*result)) return false;
  const double reference_batch_size = arguments.real();
  const bool expert = arguments.truth();
  if (!arguments.optional(offsets)) return false;
  const double distillation = arguments.real();
  const auto dtype = dtype_of(features.dtype);
  dgs::SurgeryHead call{};
  if (PyErr_Occurred() || !dtype || features.ndim != 2 || !features.rows(call.batch, call.features_stride) ||
      !direction_of(features, teacher, call.teacher_stride) || teacher.ndim != 2 || teacher.shape[0] != call.batch ||
      !(text.absent ||
        (direction_of(features, text, call.text_stride) && text.ndim == 2 && text.shape[0] == call.batch)))
    return false;
  call.dim = features.shape[1];
  const auto fit = [&](const View& x, int64_t count) {
    return numbers(x, count, computing_type(*dtype), features.device);
  };
  const auto fit_head = [&](const View& weight, const View& bias) {
    return weight.ndim == 2 && weight.shape[0] == 1 && fit(weight, call.dim) && bias.ndim == 1 && fit(bias, 1);
  };
  const bool fit_text = text.absent ? text_weight.absent && text_bias.absent
                                    : !text_weight.absent && !text_bias.absent && fit_head(text_weight, text_bias);
  if (labels.ndim != 1 || !fit(labels, call.batch) || !probabilities(labels) || !fit_head(image_weight, image_bias) ||
      !fit_head(teacher_weight, teacher_bias) || !fit_text ||
      !(offsets.absent || (offsets.ndim == 1 && fit(offsets, call.batch))) || !fit(losses, 4) ||
      !fit(logits, 3 * call.batch) || !fit(residuals, 3 * call.batch) || !fit(head_grads, 2 * (call.dim + 1)) ||
      !same(differences.dtype, features.dtype) || !same(differences.device, features.device) ||
      !differences.contiguous() || differences.numel() != (distillation ? call.batch * call.dim : 0))
    return false;
  call.dtype = *dtype;
  call.expert = expert;
  call.features = features.at();
  call.teacher_features = teacher.at();
  call.text_features = text.at();
  call.labels = labels.at();
  call.offsets = offsets.at();
  call.image_weight = image_weight.at();
  call.teacher_weight = teacher_weight.at();
  call.text_weight = text_weight.at();
  call.image_bias = image_bias.at();
  call.teacher_bias = teacher_bias.at();
  call.text_bias = text_bias.at();
  call.reference_batch_size = reference_batch_size;
  call.distillation = distillation;
  call.losses = losses.at();
  call.logits = logits.at();
  call.residuals = residuals.at();
  call.head_grads = head_grads.at();
  call.differences = distillation ? differences.at() : nullptr;
  return launch(
      features.device, [&] { dgs::cpu::surgery_head(call, dgs::torch_runtime::parallel_for); },
      [&](const auto& allocate, void* stream) {
        const int64_t size = dgs::cuda::surgery_head_workspace(call.batch, call.dim);
        const auto workspace = allocate(size * (computing_type(call.dtype).bits / 8), dgs::cuda::Lifetime::call);
        call.workspace = workspace.get();
        return dgs::cuda::surgery_head(call, stream);
      });
}

bool surgery_head_backward(Arguments arguments) {
  View residuals, image_weight, teacher_weight, text_weight, image_scale, alignment_scale, out;
  View differences, distillation_scale;
  if (!arguments.view(residuals) || !arguments.view(image_weight) || !arguments.view(teacher_weight) ||
      !arguments.optional(text_weight) || !arguments.view(image_scale) || !arguments.view(alignment_scale) ||
      !arguments.view(out))
    return false;
  const double eps = arguments.real();
  const int64_t order = arguments.integer();
  const double reference_batch_size = arguments.real();
  if (!arguments.optional(differences) || !arguments.optional(distillation_scale)) return false;
  const double distillation = arguments.real();
  const auto dtype = dtype_of(out.dtype);
  if (PyErr_Occurred() || !dtype || out.ndim != 2 || !out.contiguous() || order < 0 || order > 1 || !positive(eps))
    return false;
  const int64_t batch = out.shape[0], dim = out.shape[1];
  const auto fit = [&](const View& x, int64_t count) { return numbers(x, count, computing_type(*dtype), out.device); };
  if (!fit(residuals, 3 * batch) || !fit(image_weight, dim) || !fit(teacher_weight, dim) ||
      !(text_weight.absent || fit(text_weight, dim)) || !fit(image_scale, 1) || !fit(alignment_scale, 1) ||
      !(differences.absent ? distillation_scale.absent : alike(differences, out) && fit(distillation_scale, 1)))
    return false;
  const dgs::SurgeryHeadBackward call{.dtype = *dtype,
                                      .order = static_cast<dgs::Order>(order),
                                      .residuals = residuals.at(),
                                      .image_weight = image_weight.at(),
                                      .teacher_weight = teacher_weight.at(),
                                      .text_weight = text_weight.at(),
                                      .image_scale = image_scale.at(),
                                      .alignment_scale = alignment_scale.at(),
                                      .differences = differences.at(),
                                      .distillation_scale = distillation_scale.at(),
                                      .batch = batch,
                                      .dim = dim,
                                      .reference_batch_size = reference_batch_size,
                                      .eps = eps,
                                      .distillation = distillation,
                                      .grad_features = out.at(),
                                      .wide = *dtype == DType::f64};
  return out.numel() == 0 ||
         launch(
             out.device, [&] { dgs::cpu::surgery_head_backward(call, dgs::torch_runtime::parallel_for); },
             [&](const auto&, void* stream) { return dgs::cuda::surgery_head_backward(call, stream); });
}

bool spectral_entropy(Arguments arguments) {
  View images, out;
  if (!arguments.view(images) || !arguments.view(out)) return false;
  const int64_t patch_size = arguments.integer();
  const bool is_uint8 = same(images.dtype, {kDLUInt, 8, 1});
  if (PyErr_Occurred() || patch_size != dgs::entropy_patch || images.ndim != 4 || images.shape[1] != 3 ||
      !(is_uint8 || same(images.dtype, {kDLFloat, 32, 1})) ||
      !(images.strides[3] == 1 || (images.strides[1] == 1 && images.strides[3] == 3)))
    return false;
  const dgs::SpectralEntropy call{.is_uint8 = is_uint8,
                                  .images = images.at(),
                                  .batch = images.shape[0],
                                  .height = images.shape[2],
                                  .width = images.shape[3],
                                  .batch_stride = images.strides[0],
                                  .channel_stride = images.strides[1],
                                  .row_stride = images.strides[2],
                                  .pixel_stride = images.strides[3],
                                  .entropy = static_cast<float*>(out.at())};
  const int64_t patches = call.batch * (call.height / patch_size) * (call.width / patch_size);
  if (!numbers(out, patches, {kDLFloat, 32, 1}, images.device)) return false;
  return patches == 0 || launch(
                             images.device, [&] { dgs::cpu::spectral_entropy(call, dgs::torch_runtime::parallel_for); },
                             [&](const auto&, void* stream) { return dgs::cuda::spectral_entropy(call, stream); });
}

bool project_align_(Arguments arguments) {
  std::vector<View> grads;
  List made;
  if (!arguments.list(grads) || !made.read(grads, arguments)) return false;
  return launch(
      made.device, [&] { dgs::cpu::project_align_(made.list, dgs::torch_runtime::parallel_for); },
      [&](const auto& allocate, void* stream) { return dgs::cuda::project_align_(made.list, allocate, stream); });
}

// Several gradients of the same tensors: objective k's tensor i is view k * T + i.
struct ObjectiveLists {
  std::vector<dgs::ObjectivesTensor> tensors;
  dgs::Objectives call{};
  DLDevice device;

  // False where they do not fit.
  bool of(const std::vector<View>& objectives, const std::vector<int64_t>& groups, int64_t count, int64_t num_groups) {
    const size_t size = groups.size();
    if (size == 0 || count < 2 || count > dgs::max_objectives || objectives.size() != size * count) return false;
    const auto dtype = dtype_of(objectives[0].dtype);
    if (!dtype) return false;
    device = objectives[0].device;
    tensors.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const View& model = objectives[i];
      if (!same(model.dtype, objectives[0].dtype) || !same(model.device, device) || !model.contiguous() ||
          groups[i] < 0 || groups[i] >= num_groups)
        return false;
      tensors[i] = {.numel = model.numel(), .group = groups[i], .grad = nullptr, .objectives = {}};
      for (int64_t k = 0; k < count; ++k) {
        const View& x = objectives[k * size + i];
        if (k && !alike(x, model)) return false;
        tensors[i].objectives[k] = x.at();
      }
    }
    call = {.dtype = *dtype,
            .count = int32_t(count),
            .tensors = tensors.data(),
            .num_tensors = int64_t(size),
            .num_groups = num_groups,
            .gramian = nullptr,
            .weights = nullptr,
            .weights_stride = 0};
    return true;
  }

  // Whether what is written to is read only at the same place.
  bool written_apart() const {
    const int64_t width = computing_type(call.dtype).bits == 64 ? 8 : call.dtype == DType::f32 ? 4 : 2;
    struct Span {
      const char *begin, *end;
      const dgs::ObjectivesTensor* of;
    };
    const auto span = [&](const void* data, const dgs::ObjectivesTensor& t) {
      const char* const begin = static_cast<const char*>(data);
      return Span{begin, begin + t.numel * width, &t};
    };
    std::vector<Span> written;
    for (const auto& t : tensors)
      if (t.numel) written.push_back(span(t.grad, t));
    std::sort(written.begin(), written.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
    for (size_t i = 1; i < written.size(); ++i)
      if (written[i].begin < written[i - 1].end) return false;
    for (const auto& t : tensors)
      for (int k = 0; k < call.count; ++k) {
        if (t.objectives[k] == t.grad || !t.numel) continue;
        const Span read = span(t.objectives[k], t);
        const auto behind = std::lower_bound(written.begin(), written.end(), read.end,
                                             [](const Span& x, const char* end) { return x.begin < end; });
        if (behind != written.begin() && behind[-1].end > read.begin) return false;
      }
    return true;
  }
};

bool gramian(Arguments arguments) {
  std::vector<View> objectives;
  std::vector<int64_t> groups;
  View out;
  ObjectiveLists lists;
  if (!arguments.list(objectives) || !arguments.list(groups) || !arguments.view(out) || out.ndim != 3 ||
      !lists.of(objectives, groups, out.shape[2], out.shape[0]) ||
      !numbers(out, out.shape[0] * out.shape[2] * out.shape[2], computing_type(lists.call.dtype), lists.device))
    return false;
  lists.call.gramian = out.at();
  return launch(
      lists.device, [&] { dgs::cpu::gramian(lists.call, dgs::torch_runtime::parallel_for); },
      [&](const auto& allocate, void* stream) { return dgs::cuda::gramian(lists.call, allocate, stream); });
}

bool combine_(Arguments arguments) {
  std::vector<View> grads, objectives;
  std::vector<int64_t> groups;
  View weights;
  ObjectiveLists lists;
  if (!arguments.list(grads) || !arguments.list(objectives) || !arguments.view(weights) || !arguments.list(groups) ||
      groups.empty() || grads.size() != groups.size() || weights.ndim < 1 || weights.ndim > 2)
    return false;
  const int64_t count = weights.shape[weights.ndim - 1];
  const int64_t num_groups = *std::max_element(groups.begin(), groups.end()) + 1;
  const int64_t rows = weights.ndim == 1 ? 1 : weights.shape[0];
  if (!lists.of(objectives, groups, count, num_groups) || (weights.ndim == 2 && rows < num_groups) ||
      !numbers(weights, rows * count, computing_type(lists.call.dtype), lists.device) ||
      !std::equal(grads.begin(), grads.end(), objectives.begin(),
                  [](const View& x, const View& wanted) { return alike(x, wanted); }))
    return false;
  for (size_t i = 0; i < grads.size(); ++i) lists.tensors[i].grad = grads[i].at();
  if (!lists.written_apart()) return false;
  lists.call.weights = weights.at();
  lists.call.weights_stride = weights.ndim == 1 ? 0 : count;
  return launch(
      lists.device, [&] { dgs::cpu::combine_(lists.call, dgs::torch_runtime::parallel_for); },
      [&](const auto& allocate, void* stream) { return dgs::cuda::combine_(lists.call, allocate, stream); });
}

// A number on the CPU that counts a tensor's steps.
struct Step {
  View view;

  bool fits() const {
    const auto dtype = dtype_of(view.dtype);
    return view.device.device_type == kDLCPU && view.ndim == 0 && (dtype == DType::f32 || dtype == DType::f64);
  }
  double get() const {
    return view.dtype.bits == 32 ? *static_cast<float*>(view.at()) : *static_cast<double*>(view.at());
  }
  void set(double taken) const {
    if (view.dtype.bits == 32)
      *static_cast<float*>(view.at()) = float(taken);
    else
      *static_cast<double*>(view.at()) = taken;
  }
};

bool surgery_adamw_(Arguments arguments) {
  std::vector<View> params, grads, exp_avgs, exp_avg_sqs;
  std::vector<Step> steps;
  List made;
  if (!arguments.list(params) || !arguments.list(grads) || !arguments.list(exp_avgs) || !arguments.list(exp_avg_sqs) ||
      !arguments.list(steps, [](PyObject* item, Step& step) { return step.view.of(item) && step.fits(); }) ||
      !made.read(grads, arguments) || made.list.part == dgs::Part::sums || !alike(params, grads) ||
      !alike(exp_avgs, grads) || !alike(exp_avg_sqs, grads) || steps.size() != grads.size())
    return false;
  dgs::AdamW options{.lr = arguments.real(),
                     .beta1 = arguments.real(),
                     .beta2 = arguments.real(),
                     .weight_decay = arguments.real(),
                     .eps = arguments.real(),
                     .maximize = arguments.truth()};
  if (PyErr_Occurred()) return false;

  std::vector<double> next;
  for (const Step& step : steps) next.push_back(step.get() + 1);
  options.all_alike = std::all_of(next.begin(), next.end(), [&](double step) { return step == next[0]; });
  std::vector<dgs::Rates> rates;
  for (size_t i = 0; i < (options.all_alike ? 1 : next.size()); ++i) rates.push_back(options.at_step(next[i]));
  options.rates = rates.data();
  for (size_t i = 0; i < grads.size(); ++i) {
    made.tensors[i].param = params[i].at();
    made.tensors[i].exp_avg = exp_avgs[i].at();
    made.tensors[i].exp_avg_sq = exp_avg_sqs[i].at();
  }
  if (!launch(
          made.device, [&] { dgs::cpu::surgery_adamw_(made.list, options, dgs::torch_runtime::parallel_for); },
          [&](const auto& allocate, void* stream) {
            return dgs::cuda::surgery_adamw_(made.list, options, allocate, stream);
          }))
    return false;
  for (size_t i = 0; i < steps.size(); ++i) steps[i].set(next[i]);
  return true;
}

// As Python calls it, with `count` arguments in a row.
template <bool (*serve)(Arguments), Py_ssize_t count>
PyObject* function(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "dgs_kernels._native: expected %zd arguments, got %zd", count, given);
    return nullptr;
  }
  try {
    const bool served = serve(Arguments(arguments));
    PyErr_Clear();  // an argument of a wrong type, which the caller will find
    return PyBool_FromLong(served);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <auto function>
PyMethodDef method(const char* name, const char* signature) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, signature};
}

PyMethodDef methods[] = {
    method<function<project_align, 9>>(
        "project_align", "project_align(grad, harmful, beneficial, scale, out, alignment, eps, order, rule) -> bool"),
    method<function<surgery_head, 19>>(
        "surgery_head",
        "surgery_head(features, teacher_features, text_features, labels, image_weight, image_bias, "
        "teacher_weight, teacher_bias, text_weight, text_bias, losses, logits, residuals, head_grads, "
        "differences, reference_batch_size, expert, offsets, distillation) -> bool"),
    method<function<surgery_head_backward, 13>>(
        "surgery_head_backward",
        "surgery_head_backward(residuals, image_weight, teacher_weight, text_weight, image_scale, "
        "alignment_scale, out, eps, order, reference_batch_size, differences, distillation_scale, "
        "distillation) -> bool"),
    method<function<spectral_entropy, 3>>("spectral_entropy", "spectral_entropy(images, out, patch_size) -> bool"),
    method<function<project_align_, 11>>(
        "project_align_",
        "project_align_(grads, harmful, beneficial, groups, sums, scale, alignment, eps, order, rule, "
        "part) -> bool"),
    method<function<gramian, 3>>("gramian", "gramian(objectives, groups, out) -> bool"),
    method<function<combine_, 4>>("combine_", "combine_(grads, objectives, weights, groups) -> bool"),
    method<function<surgery_adamw_, 21>>(
        "surgery_adamw_",
        "surgery_adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, harmful, beneficial, groups, "
        "sums, scale, alignment, surgery_eps, order, rule, part, lr, beta1, beta2, weight_decay, eps, "
        "maximize) -> bool"),
    {},
};

// An attribute of a module, at the end of a path of names; null and a Python error if there is none.
PyObject* find(const char* module, std::initializer_list<const char*> path) {
  PyObject* object = PyImport_ImportModule(module);
  for (const char* name : path) {
    if (!object) break;
    PyObject* const next = PyObject_GetAttrString(object, name);
    Py_DECREF(object);
    object = next;
  }
  return object;
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native",
                                   "The kernels on torch's tensors; `devices` says for which.", -1, methods};
  tensor_type = find("torch", {"Tensor"});
  parameter_type = find("torch", {"nn", "Parameter"});
  is_neg = find("torch", {"Tensor", "is_neg"});
  PyObject* const capsule = find("torch", {"Tensor", "__dlpack_c_exchange_api__"});
  if (!tensor_type || !parameter_type || !is_neg || !capsule) return nullptr;
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    PyErr_SetString(PyExc_ImportError, "this torch speaks another version of DLPack");
    return nullptr;
  }
  PyObject* const module = PyModule_Create(&definition);
#ifdef DGS_CUDA
  constexpr const char* devices = "cpu cuda";
#else
  constexpr const char* devices = "cpu";
#endif
  if (module) PyModule_AddStringConstant(module, "devices", devices);
  return module;
}
