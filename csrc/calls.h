// What Python hands to an operation, taken apart and checked: the same for torch's tensors and for NumPy's arrays.
//
// A call is served whose arrays are dense, of fitting shapes, and of one dtype and device. Any other is left alone, and
// `reason` says why: to the user of dgs_numpy; and to dgs_kernels/operation.py, which then makes tensors that fit, or
// raises an error by the rules of dgs_kernels/ops. Options are checked there (dgs_kernels/options.py), not here.
//
// Each function takes its arguments in the order of the implementations that dgs_kernels/ops documents. `Runtime`
// says where it runs: launch(device, on_cpu, on_cuda) calls one of them, and parallel_for shares the CPU's work.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "objectives.h"
#include "project_align.h"
#include "spectral_entropy.h"
#include "surgery_head.h"
#include "tensor_list.h"

namespace dgs::calls {

struct Device {
  bool cuda = false;
  int32_t index = 0;
  bool operator==(const Device&) const = default;
};

enum class Element : uint8_t { f32, f64, bf16, f16, u8, other };  // the first four as DType has them
constexpr const char* element_names[] = {"float32", "float64", "bfloat16", "float16", "uint8"};

inline Element computing_type(Element x) { return x == Element::f64 ? Element::f64 : Element::f32; }
inline int64_t size_of(Element x) { return x == Element::f64 ? 8 : x == Element::f32 ? 4 : x == Element::u8 ? 1 : 2; }

class Call;

// What an array is, as long as it lives.
struct View {
  PyObject* object = nullptr;
  const char* name = nullptr;  // and its place in a list of that name
  int64_t place = -1;
  void* data = nullptr;
  bool absent = false;  // None
  Element element = Element::other;
  Device device;
  int ndim = 0;
  const int64_t *shape = nullptr, *strides = nullptr;  // strides in elements

  // Each module has its own: false, and a reason, where no kernel could read the object.
  bool of(PyObject* object, Call& call);

  std::string called() const { return place < 0 ? name : std::string(name) + "[" + std::to_string(place) + "]"; }

  std::string possessive() const { return called() + (called().back() == 's' ? "'" : "'s"); }

  std::string shape_text() const {
    std::string text = "(";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (ndim == 1 ? ",)" : ")");
  }

  std::string type_text() const {
    if (element != Element::other) return element_names[int(element)];
    std::string text = "another type";
    PyObject* const dtype = PyObject_GetAttrString(object, "dtype");
    PyObject* const words = dtype ? PyObject_Str(dtype) : nullptr;
    PyObject* const bytes = words ? PyUnicode_AsUTF8String(words) : nullptr;
    if (bytes) text = PyBytes_AsString(bytes);
    Py_XDECREF(bytes), Py_XDECREF(words), Py_XDECREF(dtype);
    PyErr_Clear();
    return text;
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
  int64_t last() const { return shape[ndim - 1]; }
  bool like(const View& x) const { return ndim == x.ndim && std::equal(shape, shape + ndim, x.shape); }
  DType dtype() const { return static_cast<DType>(element); }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
};

// A call's arguments, taken one after the other, and why it is not served.
class Call {
  PyObject* const* next_;

 public:
  std::string reason;                            // empty: it is
  std::vector<std::unique_ptr<int64_t[]>> kept;  // of arrays whose strides are not there in elements
  PyObject* error = nullptr;

  explicit Call(PyObject* const* arguments) : next_(arguments) {}

  bool refuse(std::string words, PyObject* kind = PyExc_ValueError) {
    if (reason.empty()) reason = std::move(words), error = kind;
    return false;
  }
  bool fine() const { return reason.empty(); }

  bool view(View& x, const char* name, bool optional = false) {
    PyObject* const object = *next_++;
    x.name = name;
    x.absent = object == Py_None;
    if (x.absent) return optional || refuse(x.called() + " is needed");
    return x.of(object, *this);
  }
  bool optional(View& x, const char* name) { return view(x, name, true); }

  double real() {
    PyObject* const number = *next_++;
    if (PyFloat_Check(number) || PyLong_Check(number)) return PyFloat_AsDouble(number);
    refuse("an option is no number");  // a tensor, which would have to be waited for
    return 0;
  }
  int64_t integer() { return integer(*next_++); }
  bool truth() { return PyObject_IsTrue(*next_++) == 1; }

  bool list(std::vector<View>& views, const char* name) {
    return list(
        name, [&](Py_ssize_t size) { views.resize(size); },
        [&](PyObject* item, Py_ssize_t i) {
          views[i].name = name;
          views[i].place = i;
          return views[i].of(item, *this);
        });
  }
  bool list(std::vector<int64_t>& numbers, const char* name) {
    return list(
        name, [&](Py_ssize_t size) { numbers.resize(size); },
        [&](PyObject* item, Py_ssize_t i) {
          numbers[i] = integer(item);
          return fine();
        });
  }

 private:
  int64_t integer(PyObject* number) {
    const int64_t value = PyLong_AsLongLong(number);
    if (value != -1 || !PyErr_Occurred()) return value;
    PyErr_Clear();
    refuse("an option is no whole number");
    return 0;
  }

  template <typename Resize, typename Take>
  bool list(const char* name, Resize resize, Take take) {
    PyObject* const items = *next_++;
    if (!PyList_Check(items)) return refuse(std::string(name) + " must be a list");
    const Py_ssize_t size = PyList_Size(items);
    resize(size);
    for (Py_ssize_t i = 0; i < size; ++i)
      if (!take(PyList_GetItem(items, i), i)) return false;
    return true;
  }
};

// Checks that several operations share

inline bool same_device(Call& call, const View& x, const View& model) {
  return x.device == model.device || call.refuse(x.called() + " is not where " + model.called() + " is");
}

inline bool floating(Call& call, const View& x) {
  return x.element < Element::u8 ||
         call.refuse(x.called() + " must be float32, float64, float16 or bfloat16, got " + x.type_text(),
                     PyExc_TypeError);
}

inline bool gapless(Call& call, const View& x) {
  return x.contiguous() || call.refuse(x.called() + " must be C-contiguous");
}

// Whether x is without gaps and as `model` is.
inline bool alike(Call& call, const View& x, const View& model) {
  if (!gapless(call, x)) return false;
  if (!x.like(model))
    return call.refuse(x.called() + " must have shape " + model.shape_text() + ", got " + x.shape_text());
  if (x.element != model.element)
    return call.refuse(x.called() + " must be " + model.type_text() + " as the others, got " + x.type_text(),
                       PyExc_TypeError);
  return same_device(call, x, model);
}

inline bool alike(Call& call, const char* name, const std::vector<View>& list, const std::vector<View>& wanted) {
  if (list.size() != wanted.size())
    return call.refuse(std::string(name) + " must have " + std::to_string(wanted.size()) + " arrays, got " +
                       std::to_string(list.size()));
  for (size_t i = 0; i < list.size(); ++i)
    if (!alike(call, list[i], wanted[i])) return false;
  return true;
}

// Whether it is `count` numbers of this type in a row.
inline bool numbers(Call& call, const View& x, int64_t count, Element type, const View& model) {
  if (x.numel() != count)
    return call.refuse(x.called() + " must be " + std::to_string(count) + " numbers, got shape " + x.shape_text());
  if (x.element != type)
    return call.refuse(x.called() + " must be " + element_names[int(type)] + ", got " + x.type_text(), PyExc_TypeError);
  return gapless(call, x) && same_device(call, x, model);
}

inline bool axes(Call& call, const View& x, int count) {
  return x.ndim == count || call.refuse(x.called() + " must have " + std::to_string(count) + " axes");
}

inline bool scalar(Call& call, const View& x, Element type, const View& model) {
  return x.absent || (axes(call, x, 0) && numbers(call, x, 1, type, model));
}

// The number of rows, of x.last() numbers in a row, and the way from one to the next.
inline bool rows(Call& call, const View& x, int64_t& count, int64_t& stride) {
  if (x.ndim == 0 || x.last() == 0)
    return call.refuse(x.called() + " must be [..., D] with D >= 1, got " + x.shape_text());
  count = x.numel() / x.last();
  stride = x.ndim == 2 ? x.strides[0] : x.last();
  return x.contiguous() || (x.ndim <= 2 && (x.strides[x.ndim - 1] == 1 || x.last() == 1)) ||
         call.refuse("the numbers of a row of " + x.called() +
                     " must lie next to each other; pass numpy.ascontiguousarray of it");
}

// Whether it has the model's rows, or with `one_row` a single one for all.
inline bool direction(Call& call, const View& x, const View& model, int64_t& stride, bool one_row = true) {
  const bool alike = x.like(model);
  const bool is_one =
      one_row && x.ndim >= 1 && x.ndim <= model.ndim && x.last() == model.last() && x.numel() == x.last();
  if (!alike && !is_one)
    return call.refuse(x.called() + " must have " + model.possessive() + " shape " + model.shape_text() +
                       (one_row ? " or be one row [D]" : "") + ", got " + x.shape_text());
  if (x.element != model.element)
    return call.refuse(
        x.called() + " must have " + model.possessive() + " dtype " + model.type_text() + ", got " + x.type_text(),
        PyExc_TypeError);
  int64_t count;
  if (!same_device(call, x, model) || !rows(call, x, count, stride)) return false;
  if (!alike) stride = 0;
  return true;
}

struct Span {
  const char *begin, *end;
};
inline Span span(const void* data, int64_t bytes) {
  const char* const begin = static_cast<const char*>(data);
  return {begin, begin + bytes};
}

// What is written to, in the order of memory.
struct Written {
  std::vector<Span> spans;

  void add(const void* data, int64_t bytes) {
    if (bytes) spans.push_back(span(data, bytes));
  }
  // Whether no two share memory.
  bool apart(Call& call) {
    std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
    for (size_t i = 1; i < spans.size(); ++i)
      if (spans[i].begin < spans[i - 1].end) return call.refuse("arrays that are written share memory");
    return true;
  }
  bool meets(const Span& read) const {
    const auto behind = std::lower_bound(spans.begin(), spans.end(), read.end,
                                         [](const Span& x, const char* end) { return x.begin < end; });
    return behind != spans.begin() && behind[-1].end > read.begin;
  }
};

// Rows

template <typename Runtime>
bool project_align(Call& call) {
  View grad, harmful, beneficial, scale, out;
  if (!call.view(grad, "grad") || !call.view(harmful, "harmful") || !call.optional(beneficial, "beneficial") ||
      !call.optional(scale, "scale"))
    return false;
  ProjectAlign a{};
  a.alignment = call.real(), a.eps = call.real();
  a.order = static_cast<Order>(call.integer()), a.rule = static_cast<Rule>(call.integer());
  if (!call.fine() || !call.view(out, "out") || !rows(call, grad, a.rows, a.grad_stride) || !floating(call, grad) ||
      !direction(call, harmful, grad, a.harmful_stride) ||
      !(beneficial.absent || direction(call, beneficial, grad, a.beneficial_stride)) ||
      !scalar(call, scale, computing_type(grad.element), grad) || !alike(call, out, grad))
    return false;
  a.grad = grad.data, a.harmful = harmful.data, a.beneficial = beneficial.data, a.scale = scale.data, a.out = out.data;
  a.dim = a.out_stride = grad.last();
  a.dtype = grad.dtype();
  return a.rows == 0 ||
         Runtime::launch(
             call, grad.device, [&] { cpu::project_align(a, Runtime::parallel_for); },
             [&](const auto& allocate, auto stream) { return cuda::project_align(a, allocate, stream); });
}

// Whether all are in [0, 1]; of numbers on a GPU the kernel finds out.
inline bool probabilities(Call& call, const View& x) {
  const auto within = [&](const auto* numbers) {
    return std::all_of(numbers, numbers + x.numel(), [](auto p) { return p >= 0 && p <= 1; });
  };
  return x.device.cuda ||
         (x.element == Element::f64 ? within(static_cast<double*>(x.data)) : within(static_cast<float*>(x.data))) ||
         call.refuse(x.called() + " must lie in 0 to 1");
}

template <typename Runtime>
bool surgery_head(Call& call) {
  View features, teacher, text, labels, offsets, losses, logits, residuals, head_grads, differences;
  if (!call.view(features, "features") || !call.view(teacher, "teacher_features") ||
      !call.optional(text, "text_features") || !call.view(labels, "labels"))
    return false;
  constexpr const char* names[][2] = {
      {"image_weight", "image_bias"}, {"teacher_weight", "teacher_bias"}, {"text_weight", "text_bias"}};
  View heads[3][2];  // weight and bias of image, teacher and text
  for (int head = 0; head < 3; ++head)
    for (int part = 0; part < 2; ++part)
      if (!call.view(heads[head][part], names[head][part], head == 2)) return false;
  if (!call.optional(offsets, "offsets")) return false;
  SurgeryHead a{};
  a.reference_batch_size = call.real(), a.expert = call.truth(), a.distillation = call.real();
  if (!call.fine() || !call.view(losses, "losses") || !call.view(logits, "logits") ||
      !call.view(residuals, "residuals") || !call.view(head_grads, "head_grads") ||
      !call.view(differences, "differences"))
    return false;

  if (features.ndim != 2 || features.last() == 0)
    return call.refuse("features must be [B, D] with D >= 1, got " + features.shape_text());
  if (!floating(call, features) || !rows(call, features, a.batch, a.features_stride) ||
      !direction(call, teacher, features, a.teacher_stride, false) ||
      !(text.absent || direction(call, text, features, a.text_stride, false)))
    return false;
  if (text.absent != heads[2][0].absent || text.absent != heads[2][1].absent)
    return call.refuse("text_features, text_weight and text_bias must be given together or be None together");
  a.dim = features.last();
  const auto fit = [&](const View& x, int64_t count) {
    return numbers(call, x, count, computing_type(features.element), features);
  };
  for (const auto& [weight, bias] : heads) {
    if (weight.absent) continue;
    if (!axes(call, weight, 2) || !fit(weight, a.dim) || !axes(call, bias, 1) || !fit(bias, 1)) return false;
    if (weight.shape[0] != 1) return call.refuse(weight.called() + " must be one row");
  }
  if (!axes(call, labels, 1) || !fit(labels, a.batch) || !probabilities(call, labels) ||
      !(offsets.absent || (axes(call, offsets, 1) && fit(offsets, a.batch))) || !fit(losses, 4) ||
      !fit(logits, 3 * a.batch) || !fit(residuals, 3 * a.batch) || !fit(head_grads, 2 * (a.dim + 1)) ||
      !numbers(call, differences, a.distillation ? a.batch * a.dim : 0, features.element, features))
    return false;
  a.dtype = features.dtype();
  a.features = features.data, a.teacher_features = teacher.data, a.text_features = text.data;
  a.labels = labels.data, a.offsets = offsets.data;
  a.image_weight = heads[0][0].data, a.teacher_weight = heads[1][0].data, a.text_weight = heads[2][0].data;
  a.image_bias = heads[0][1].data, a.teacher_bias = heads[1][1].data, a.text_bias = heads[2][1].data;
  a.losses = losses.data, a.logits = logits.data, a.residuals = residuals.data, a.head_grads = head_grads.data;
  a.differences = a.distillation ? differences.data : nullptr;
  return Runtime::launch(
      call, features.device, [&] { cpu::surgery_head(a, Runtime::parallel_for); },
      [&](const auto& allocate, auto stream) {
        const int64_t size = cuda::surgery_head_workspace(a.batch, a.dim);
        const auto workspace = allocate(size * size_of(computing_type(features.element)), cuda::Lifetime::call);
        a.workspace = workspace.get();
        return cuda::surgery_head(a, stream);
      });
}

template <typename Runtime>
bool surgery_head_backward(Call& call) {
  View residuals, image_weight, teacher_weight, text_weight, image_scale, alignment_scale, differences;
  View distillation_scale, out;
  if (!call.view(residuals, "residuals") || !call.view(image_weight, "image_weight") ||
      !call.view(teacher_weight, "teacher_weight") || !call.optional(text_weight, "text_weight") ||
      !call.view(image_scale, "image_scale") || !call.view(alignment_scale, "alignment_scale") ||
      !call.optional(differences, "differences") || !call.optional(distillation_scale, "distillation_scale"))
    return false;
  SurgeryHeadBackward a{};
  a.eps = call.real(), a.order = static_cast<Order>(call.integer());
  a.reference_batch_size = call.real(), a.distillation = call.real();
  if (!call.fine() || !call.view(out, "out") || !floating(call, out) || !gapless(call, out) || !axes(call, out, 2))
    return false;
  a.batch = out.shape[0], a.dim = out.shape[1];
  const auto fit = [&](const View& x, int64_t count) {
    return numbers(call, x, count, computing_type(out.element), out);
  };
  if (!fit(residuals, 3 * a.batch) || !fit(image_weight, a.dim) || !fit(teacher_weight, a.dim) ||
      !(text_weight.absent || fit(text_weight, a.dim)) || !fit(image_scale, 1) || !fit(alignment_scale, 1) ||
      !(differences.absent ? distillation_scale.absent || call.refuse("differences are needed")
                           : alike(call, differences, out) && fit(distillation_scale, 1)))
    return false;
  a.dtype = out.dtype();
  a.residuals = residuals.data;
  a.image_weight = image_weight.data, a.teacher_weight = teacher_weight.data, a.text_weight = text_weight.data;
  a.image_scale = image_scale.data, a.alignment_scale = alignment_scale.data;
  a.differences = differences.data, a.distillation_scale = distillation_scale.data;
  a.grad_features = out.data;
  a.wide = out.element == Element::f64;
  return out.numel() == 0 || Runtime::launch(
                                 call, out.device, [&] { cpu::surgery_head_backward(a, Runtime::parallel_for); },
                                 [&](const auto&, auto stream) { return cuda::surgery_head_backward(a, stream); });
}

template <typename Runtime>
bool spectral_entropy(Call& call) {
  View images, out;
  if (!call.view(images, "images")) return false;
  const int64_t patch_size = call.integer();
  if (!call.fine() || !call.view(out, "out")) return false;
  if (images.ndim != 4 || images.shape[1] != 3)
    return call.refuse("images must be [B, 3, H, W], got " + images.shape_text());
  if (images.element != Element::u8 && images.element != Element::f32)
    return call.refuse("images must be uint8 or float32, got " + images.type_text(), PyExc_TypeError);
  const int64_t patches = images.shape[0] * (images.shape[2] / entropy_patch) * (images.shape[3] / entropy_patch);
  if (patch_size != entropy_patch) return call.refuse("patches must have " + std::to_string(entropy_patch) + " pixels");
  if (!numbers(call, out, patches, Element::f32, images)) return false;
  if (patches == 0) return true;
  if (images.strides[3] != 1 && !(images.strides[1] == 1 && images.strides[3] == 3))
    return call.refuse(
        "images must be planar or have the three channels of a pixel side by side; pass numpy.ascontiguousarray of "
        "them");
  const SpectralEntropy a{.is_uint8 = images.element == Element::u8,
                          .images = images.data,
                          .batch = images.shape[0],
                          .height = images.shape[2],
                          .width = images.shape[3],
                          .batch_stride = images.strides[0],
                          .channel_stride = images.strides[1],
                          .row_stride = images.strides[2],
                          .pixel_stride = images.strides[3],
                          .entropy = static_cast<float*>(out.data)};
  return Runtime::launch(
      call, images.device, [&] { cpu::spectral_entropy(a, Runtime::parallel_for); },
      [&](const auto&, auto stream) { return cuda::spectral_entropy(a, stream); });
}

// Lists

// What both operations of surgery on lists are given besides, and what the kernels are told of it.
struct SurgeryLists {
  std::vector<View> grads;
  std::vector<ListTensor> tensors;
  TensorList list;

  // Takes harmful, beneficial, groups, sums, scale, alignment, eps, order, rule and part.
  bool read(Call& call, bool edited) {
    std::vector<View> harmful, beneficial;
    std::vector<int64_t> groups;
    View sums, scale;
    if (!call.list(harmful, "harmful") || !call.list(beneficial, "beneficial") || !call.list(groups, "groups") ||
        !call.view(sums, "sums") || !call.optional(scale, "scale"))
      return false;
    list.alignment = call.real(), list.eps = call.real();
    list.order = static_cast<Order>(call.integer()), list.rule = static_cast<Rule>(call.integer());
    list.part = static_cast<Part>(call.integer());
    if (!call.fine()) return false;
    if (grads.empty()) return call.refuse("there are no arrays");
    const View& first = grads[0];
    if (!floating(call, first)) return false;
    Written written;
    for (const View& x : grads) {
      if (!gapless(call, x) || !same_device(call, x, first)) return false;
      if (x.element != first.element)
        return call.refuse(x.called() + " must be " + first.type_text() + " as the others, got " + x.type_text(),
                           PyExc_TypeError);
      if (edited) written.add(x.data, x.numel() * size_of(x.element));
    }
    if (!alike(call, "harmful", harmful, grads) ||
        !(beneficial.empty() || alike(call, "beneficial", beneficial, grads)) || !written.apart(call))
      return false;
    if (!axes(call, sums, 2)) return false;
    const int64_t num_groups = sums.shape[0];
    const Element computing = computing_type(first.element);
    if (!numbers(call, sums, num_groups * group_sums, computing, first) || !scalar(call, scale, computing, first))
      return false;
    if (groups.size() != grads.size()) return call.refuse("groups must name the layer of every array");
    tensors.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      if (groups[i] < 0 || groups[i] >= num_groups) return call.refuse("there is no such group");
      tensors.push_back({.numel = grads[i].numel(),
                         .group = groups[i],
                         .grad = grads[i].data,
                         .harmful = harmful[i].data,
                         .beneficial = beneficial.empty() ? nullptr : beneficial[i].data});
    }
    list.dtype = first.dtype();
    list.tensors = tensors.data(), list.num_tensors = tensors.size(), list.num_groups = num_groups;
    list.sums = sums.data, list.scale = scale.data;
    return true;
  }
};

template <typename Runtime>
bool project_align_(Call& call) {
  SurgeryLists made;
  return call.list(made.grads, "grads") && made.read(call, true) &&
         Runtime::launch(
             call, made.grads[0].device, [&] { cpu::project_align_(made.list, Runtime::parallel_for); },
             [&](const auto& allocate, auto stream) { return cuda::project_align_(made.list, allocate, stream); });
}

// A number on the CPU that counts an array's steps.
struct Step {
  View view;

  bool fits() const {
    return !view.device.cuda && view.ndim == 0 && (view.element == Element::f32 || view.element == Element::f64);
  }
  double get() const {
    return view.element == Element::f32 ? *static_cast<float*>(view.data) : *static_cast<double*>(view.data);
  }
  void set(double taken) const {
    if (view.element == Element::f32)
      *static_cast<float*>(view.data) = float(taken);
    else
      *static_cast<double*>(view.data) = taken;
  }
};

template <typename Runtime>
bool surgery_adamw_(Call& call) {
  std::vector<View> params, exp_avgs, exp_avg_sqs, steps;
  SurgeryLists made;
  if (!call.list(params, "params") || !call.list(made.grads, "grads") || !call.list(exp_avgs, "exp_avgs") ||
      !call.list(exp_avg_sqs, "exp_avg_sqs") || !call.list(steps, "steps") || !made.read(call, false))
    return false;
  AdamW options{.lr = call.real(),
                .beta1 = call.real(),
                .beta2 = call.real(),
                .weight_decay = call.real(),
                .eps = call.real(),
                .maximize = call.truth()};
  if (!call.fine() || !alike(call, "params", params, made.grads) || !alike(call, "exp_avgs", exp_avgs, made.grads) ||
      !alike(call, "exp_avg_sqs", exp_avg_sqs, made.grads))
    return false;
  if (made.list.part == Part::sums) return call.refuse("it does not make sums alone");
  if (steps.size() != params.size()) return call.refuse("there must be a step for every array");
  std::vector<double> next;
  for (const View& x : steps) {
    if (!Step{x}.fits()) return call.refuse(x.called() + " must be a number on the CPU");
    next.push_back(Step{x}.get() + 1);
  }
  options.all_alike = std::all_of(next.begin(), next.end(), [&](double step) { return step == next[0]; });
  std::vector<Rates> rates;
  for (size_t i = 0; i < (options.all_alike ? 1 : next.size()); ++i) rates.push_back(options.at_step(next[i]));
  options.rates = rates.data();
  for (size_t i = 0; i < params.size(); ++i) {
    made.tensors[i].param = params[i].data;
    made.tensors[i].exp_avg = exp_avgs[i].data;
    made.tensors[i].exp_avg_sq = exp_avg_sqs[i].data;
  }
  if (!Runtime::launch(
          call, params[0].device, [&] { cpu::surgery_adamw_(made.list, options, Runtime::parallel_for); },
          [&](const auto& allocate, auto stream) {
            return cuda::surgery_adamw_(made.list, options, allocate, stream);
          }))
    return false;
  for (size_t i = 0; i < steps.size(); ++i) Step{steps[i]}.set(next[i]);
  return true;
}

// Several gradients of the same arrays: objective k's array i is view k * T + i.
struct ObjectiveLists {
  std::vector<View> views;
  std::vector<ObjectivesTensor> tensors;
  Objectives objectives{};

  bool read(Call& call, const std::vector<int64_t>& groups, int64_t count, int64_t num_groups) {
    const size_t size = groups.size();
    if (size == 0 || count < 2 || count > max_objectives || views.size() != size * count)
      return call.refuse("objectives must be 2 to 16 lists of as many arrays as groups has");
    if (!floating(call, views[0])) return false;
    tensors.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const View& model = views[i];
      if (!gapless(call, model) || !same_device(call, model, views[0])) return false;
      if (model.element != views[0].element) return call.refuse(model.called() + " is of another type than the first");
      if (groups[i] < 0 || groups[i] >= num_groups) return call.refuse("there is no such group");
      tensors[i] = {.numel = model.numel(), .group = groups[i], .grad = nullptr, .objectives = {}};
      for (int64_t k = 0; k < count; ++k) {
        const View& x = views[k * size + i];
        if (k && !alike(call, x, model)) return false;
        tensors[i].objectives[k] = x.data;
      }
    }
    objectives.dtype = views[0].dtype();
    objectives.count = int32_t(count);
    objectives.tensors = tensors.data(), objectives.num_tensors = int64_t(size), objectives.num_groups = num_groups;
    return true;
  }

  // Whether what is written to is read only at the same place.
  bool written_apart(Call& call) const {
    const int64_t width = size_of(views[0].element);
    Written written;
    for (const auto& t : tensors) written.add(t.grad, t.numel * width);
    if (!written.apart(call)) return false;
    for (const auto& t : tensors)
      for (int k = 0; k < objectives.count; ++k)
        if (t.objectives[k] != t.grad && t.numel && written.meets(span(t.objectives[k], t.numel * width)))
          return call.refuse("an objective shares memory with what is written");
    return true;
  }
};

template <typename Runtime>
bool gramian(Call& call) {
  ObjectiveLists lists;
  std::vector<int64_t> groups;
  View out;
  if (!call.list(lists.views, "objectives") || !call.list(groups, "groups") || !call.view(out, "out") ||
      !axes(call, out, 3))
    return false;
  const int64_t count = out.shape[2];
  if (!lists.read(call, groups, count, out.shape[0]) ||
      !numbers(call, out, out.shape[0] * count * count, computing_type(lists.views[0].element), lists.views[0]))
    return false;
  lists.objectives.gramian = out.data;
  return Runtime::launch(
      call, out.device, [&] { cpu::gramian(lists.objectives, Runtime::parallel_for); },
      [&](const auto& allocate, auto stream) { return cuda::gramian(lists.objectives, allocate, stream); });
}

template <typename Runtime>
bool combine_(Call& call) {
  std::vector<View> grads;
  ObjectiveLists lists;
  std::vector<int64_t> groups;
  View weights;
  if (!call.list(grads, "grads") || !call.list(lists.views, "objectives") || !call.view(weights, "weights") ||
      !call.list(groups, "groups"))
    return false;
  if (groups.empty() || grads.size() != groups.size() || weights.ndim < 1 || weights.ndim > 2)
    return call.refuse("grads, groups and weights do not fit");
  const int64_t count = weights.last(), rows = weights.ndim == 1 ? 1 : weights.shape[0];
  const int64_t num_groups = *std::max_element(groups.begin(), groups.end()) + 1;
  if (weights.ndim == 2 && rows < num_groups) return call.refuse("there are fewer weights than groups");
  if (!lists.read(call, groups, count, num_groups) ||
      !numbers(call, weights, rows * count, computing_type(lists.views[0].element), lists.views[0]))
    return false;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!alike(call, grads[i], lists.views[i])) return false;
    lists.tensors[i].grad = grads[i].data;
  }
  if (!lists.written_apart(call)) return false;
  lists.objectives.weights = weights.data;
  lists.objectives.weights_stride = weights.ndim == 1 ? 0 : count;
  return Runtime::launch(
      call, weights.device, [&] { cpu::combine_(lists.objectives, Runtime::parallel_for); },
      [&](const auto& allocate, auto stream) { return cuda::combine_(lists.objectives, allocate, stream); });
}

}  // namespace dgs::calls
