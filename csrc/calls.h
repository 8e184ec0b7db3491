// What Python hands to an operation, taken apart and checked: the same for torch's tensors and for NumPy's arrays.
//
// A call is served whose arrays are dense, of fitting shapes, and of one dtype and device. Any other is left alone, and
// `reason` says why. Here stands what a kernel can read, and nothing else: dgs_numpy has no other rules, and raises the
// reason as its error. What dgs_kernels' public functions take is more, and is said in Python alone: where a call is
// refused here, dgs_kernels/operation.py makes tensors that fit, or raises an error.
//
// Each function takes the arguments of the operator of its name, and then its results, as dgs_kernels/ops documents.
// `Runtime` says where it runs: launch(device, on_cpu, on_cuda) calls one of them, and parallel_for shares the CPU's
// work.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
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

// The first four as DType has them.
enum class Element : uint8_t { f32, f64, bf16, f16, u8, other };
constexpr const char* element_names[] = {"float32", "float64", "bfloat16", "float16", "uint8"};

// As users write the options; the places are those in their enumerations.
constexpr const char* orders[] = {"align_first", "project_first"};
constexpr const char* rules[] = {"positive", "full", "conflict"};
constexpr const char* parts[] = {"all", "sums", "apply"};
constexpr const char* text_roles[] = {"project", "expert", "both"};
enum class TextRole { project, expert, both };

inline Element computing_type(Element x) { return x == Element::f64 ? Element::f64 : Element::f32; }
inline int64_t size_of(Element x) { return x == Element::f64 ? 8 : x == Element::f32 ? 4 : x == Element::u8 ? 1 : 2; }

// A Python object in words: what `in_words` makes of it, of which this takes possession.
inline std::string text(PyObject* words) {
  PyObject* const bytes = words ? PyUnicode_AsUTF8String(words) : nullptr;
  std::string found = bytes ? PyBytes_AsString(bytes) : "what has no words";
  Py_XDECREF(bytes), Py_XDECREF(words);
  PyErr_Clear();
  return found;
}
inline std::string type_name(PyObject* object) {
  return text(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
}

class Call;

// What an array is, as long as it lives.
struct View {
  PyObject* object = nullptr;
  // What the argument is called, and its place in a list of that name.
  const char* name = nullptr;
  int64_t place = -1;
  void* data = nullptr;
  // Whether it is None.
  bool absent = false;
  bool read_only = false;
  Element element = Element::other;
  Device device;
  int ndim = 0;
  // Strides are in elements.
  const int64_t *shape = nullptr, *strides = nullptr;

  // Each module has its own: fills in the rest, or refuses the call where no kernel could read the object.
  void of(PyObject* object, Call& call);

  std::string called() const { return place < 0 ? name : std::string(name) + "[" + std::to_string(place) + "]"; }

  std::string possessive() const { return called() + (called().back() == 's' ? "'" : "'s"); }

  std::string shape_text() const {
    std::string text = "(";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + (ndim == 1 ? ",)" : ")");
  }

  std::string type_text() const {
    if (element != Element::other) return element_names[int(element)];
    PyObject* const dtype = PyObject_GetAttrString(object, "dtype");
    std::string found = text(dtype ? PyObject_Str(dtype) : nullptr);
    Py_XDECREF(dtype);
    return found;
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

// A call's arguments, taken one after the other, and why it is not served. What is taken after a refusal means nothing.
class Call {
  PyObject* const* next_;

 public:
  // Empty: it is served.
  std::string reason;
  // Strides of arrays that have none in elements.
  std::vector<std::unique_ptr<int64_t[]>> kept;
  PyObject* error = nullptr;

  explicit Call(PyObject* const* arguments) : next_(arguments) {}

  bool refuse(std::string words, PyObject* kind = PyExc_ValueError) {
    if (reason.empty()) reason = std::move(words), error = kind;
    return false;
  }
  bool fine() const { return reason.empty(); }

  View needed(const char* name) {
    const View x = optional(name);
    if (x.absent) refuse(x.called() + " is needed");
    return x;
  }
  View optional(const char* name) {
    View x{.name = name, .absent = *next_ == Py_None};
    if (!x.absent) x.of(*next_, *this);
    ++next_;
    return x;
  }
  void skip() { ++next_; }

  // None is an empty list.
  std::vector<View> list(const char* name, bool edited = false) {
    std::vector<View> views(length(name));
    for (size_t i = 0; i < views.size() && fine(); ++i) {
      views[i].name = name, views[i].place = int64_t(i);
      views[i].of(item(i), *this);
      if (edited && views[i].read_only) refuse(views[i].called() + " is edited in place, but it is read-only");
    }
    ++next_;
    return views;
  }
  std::vector<int64_t> whole_numbers(const char* name) {
    std::vector<int64_t> numbers(length(name));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = whole(name, item(i));
    ++next_;
    return numbers;
  }

  double number(const char* name) {
    PyObject* const given = *next_++;
    if (PyFloat_Check(given) || PyLong_Check(given)) return PyFloat_AsDouble(given);
    // A tensor's number would have to be waited for.
    refuse(std::string(name) + " must be a number");
    return 0;
  }
  double finite(const char* name) {
    const double x = number(name);
    if (!(std::abs(x) < std::numeric_limits<double>::infinity())) refuse_option(name, "must be finite");
    return x;
  }
  double positive(const char* name) {
    const double x = number(name);
    if (!(x > 0)) refuse_option(name, "must be > 0");
    if (x == std::numeric_limits<double>::infinity()) refuse_option(name, "must be finite");
    return x;
  }
  double weight(const char* name) {
    const double x = number(name);
    if (!(x >= 0 && x < std::numeric_limits<double>::infinity())) refuse_option(name, "must be a finite number >= 0");
    return x;
  }
  int64_t whole(const char* name, int64_t least) {
    const int64_t x = whole(name, *next_++);
    if (x < least) refuse_option(name, ("must be >= " + std::to_string(least)).c_str());
    return x;
  }
  // 0 is None.
  int64_t count_or_none(const char* name) {
    if (*next_ != Py_None) return whole(name, 1);
    ++next_;
    return 0;
  }
  bool truth() { return PyObject_IsTrue(*next_++) == 1; }

  template <typename Choice, size_t count>
  Choice choice(const char* name, const char* const (&names)[count]) {
    PyObject* const given = *next_++;
    std::string expected;
    for (size_t i = 0; i < count; ++i)
      if (PyUnicode_Check(given) && PyUnicode_CompareWithASCIIString(given, names[i]) == 0)
        return static_cast<Choice>(i);
    for (const char* known : names) expected += (expected.empty() ? "" : ", ") + std::string(known);
    refuse_option(name, ("must be one of " + expected).c_str());
    return {};
  }

  // The options of gradient surgery, wherever they are kept.
  template <typename Arguments>
  void surgery(Arguments& a, const char* eps = "eps") {
    a.alignment = finite("alignment"), a.eps = positive(eps);
    a.order = choice<Order>("order", orders), a.rule = choice<Rule>("rule", rules);
  }

 private:
  // Of the option that was taken last.
  void refuse_option(const char* name, const char* rule) {
    refuse(std::string(name) + " " + rule + ", got " + text(PyObject_Repr(next_[-1])));
  }

  int64_t whole(const char* name, PyObject* number) {
    const int64_t value = PyLong_AsLongLong(number);
    if (value != -1 || !PyErr_Occurred()) return value;
    PyErr_Clear();
    refuse(std::string(name) + " must be whole numbers");
    return 0;
  }

  size_t length(const char* name) {
    if (*next_ == Py_None) return 0;
    if (PyList_Check(*next_) || PyTuple_Check(*next_)) return size_t(PySequence_Size(*next_));
    refuse(std::string(name) + " must be a list of numpy arrays, got " + type_name(*next_), PyExc_TypeError);
    return 0;
  }
  PyObject* item(size_t i) const {
    return PyList_Check(*next_) ? PyList_GetItem(*next_, Py_ssize_t(i)) : PyTuple_GetItem(*next_, Py_ssize_t(i));
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

inline bool same_type(Call& call, const View& x, const View& model) {
  return x.element == model.element ||
         call.refuse(x.called() + " must be " + model.type_text() + " as the others, got " + x.type_text(),
                     PyExc_TypeError);
}

// Whether x is without gaps and as `model` is.
inline bool alike(Call& call, const View& x, const View& model) {
  if (!gapless(call, x)) return false;
  if (!x.like(model))
    return call.refuse(x.called() + " must have shape " + model.shape_text() + ", got " + x.shape_text());
  return same_type(call, x, model) && same_device(call, x, model);
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
  const View grad = call.needed("grad"), harmful = call.needed("harmful"), beneficial = call.optional("beneficial");
  const View scale = call.optional("scale");
  ProjectAlign a{};
  call.surgery(a);
  const View out = call.needed("out");
  if (!call.fine() || !rows(call, grad, a.rows, a.grad_stride) || !floating(call, grad) ||
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
  const View features = call.needed("features"), teacher = call.needed("teacher_features");
  const View text = call.optional("text_features"), labels = call.needed("labels");
  const View image_weight = call.needed("image_weight"), image_bias = call.needed("image_bias");
  const View teacher_weight = call.needed("teacher_weight"), teacher_bias = call.needed("teacher_bias");
  const View text_weight = call.optional("text_weight"), text_bias = call.optional("text_bias");
  // Only the backward needs them.
  call.positive("eps"), call.choice<Order>("order", orders);
  SurgeryHead a{};
  a.reference_batch_size = double(call.count_or_none("reference_batch_size"));
  a.expert = call.choice<TextRole>("text", text_roles) != TextRole::project;
  const View offsets = call.optional("offsets");
  a.distillation = call.weight("distillation");
  const View losses = call.needed("losses"), logits = call.needed("logits"), residuals = call.needed("residuals");
  const View head_grads = call.needed("head_grads"), differences = call.needed("differences");
  if (!call.fine()) return false;

  if (features.ndim != 2 || features.last() == 0)
    return call.refuse("features must be [B, D] with D >= 1, got " + features.shape_text());
  if (!floating(call, features) || !rows(call, features, a.batch, a.features_stride) ||
      !direction(call, teacher, features, a.teacher_stride, false) ||
      !(text.absent || direction(call, text, features, a.text_stride, false)))
    return false;
  if (!text.absent && (text_weight.absent || text_bias.absent))
    return call.refuse("text_features, text_weight and text_bias must be given together");
  a.dim = features.last();
  const auto fit = [&](const View& x, int64_t count) {
    return numbers(call, x, count, computing_type(features.element), features);
  };
  const auto vector = [&](const View& x, int64_t count) { return axes(call, x, 1) && fit(x, count); };
  const auto row = [&](const View& x) {
    return axes(call, x, 2) && fit(x, a.dim) && (x.shape[0] == 1 || call.refuse(x.called() + " must be one row"));
  };
  if (!row(image_weight) || !vector(image_bias, 1) || !row(teacher_weight) || !vector(teacher_bias, 1) ||
      !(text.absent || (row(text_weight) && vector(text_bias, 1))) || !vector(labels, a.batch) ||
      !probabilities(call, labels) || !(offsets.absent || vector(offsets, a.batch)) || !fit(losses, 4) ||
      !fit(logits, 3 * a.batch) || !fit(residuals, 3 * a.batch) || !fit(head_grads, 2 * (a.dim + 1)) ||
      !numbers(call, differences, a.distillation ? a.batch * a.dim : 0, features.element, features))
    return false;
  a.dtype = features.dtype();
  a.features = features.data, a.teacher_features = teacher.data, a.text_features = text.data;
  a.labels = labels.data, a.offsets = offsets.data;
  a.image_weight = image_weight.data, a.teacher_weight = teacher_weight.data;
  a.image_bias = image_bias.data, a.teacher_bias = teacher_bias.data;
  if (!text.absent) a.text_weight = text_weight.data, a.text_bias = text_bias.data;
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
  const View residuals = call.needed("residuals"), image_weight = call.needed("image_weight");
  const View teacher_weight = call.needed("teacher_weight"), text_weight = call.optional("text_weight");
  const View image_scale = call.needed("image_scale"), alignment_scale = call.needed("alignment_scale");
  // The type of the result, which the result itself has.
  call.skip();
  SurgeryHeadBackward a{};
  a.eps = call.positive("eps"), a.order = call.choice<Order>("order", orders);
  a.reference_batch_size = double(call.count_or_none("reference_batch_size"));
  const View differences = call.optional("differences"), distillation_scale = call.optional("distillation_scale");
  a.distillation = call.weight("distillation");
  const View out = call.needed("out");
  if (!call.fine() || !floating(call, out) || !gapless(call, out) || !axes(call, out, 2)) return false;
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
  const View images = call.needed("images");
  const int64_t patch_size = call.whole("patch_size", 1);
  const View out = call.needed("out");
  if (!call.fine()) return false;
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
  std::vector<ListTensor> tensors{};
  TensorList list{};

  // Takes harmful, beneficial, groups, sums, scale and the options, the last of them `part`.
  bool read(Call& call, bool edited) {
    const std::vector<View> harmful = call.list("harmful"), beneficial = call.list("beneficial");
    const std::vector<int64_t> groups = call.whole_numbers("groups");
    const View sums = call.needed("sums"), scale = call.optional("scale");
    call.surgery(list, edited ? "eps" : "surgery_eps");
    list.part = call.choice<Part>("part", parts);
    if (!call.fine()) return false;
    if (grads.empty()) return call.refuse("there are no arrays");
    const View& first = grads[0];
    if (!floating(call, first)) return false;
    Written written;
    for (const View& x : grads) {
      if (!gapless(call, x) || !same_device(call, x, first) || !same_type(call, x, first)) return false;
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
    if (groups.size() != grads.size())
      return call.refuse("groups must name the layer of " + std::to_string(grads.size()) + " arrays");
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
  SurgeryLists made{.grads = call.list("grads", true)};
  return made.read(call, true) &&
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
  const std::vector<View> params = call.list("params", true);
  SurgeryLists made{.grads = call.list("grads")};
  const std::vector<View> exp_avgs = call.list("exp_avgs", true), exp_avg_sqs = call.list("exp_avg_sqs", true);
  const std::vector<View> steps = call.list("steps", true);
  if (!made.read(call, false)) return false;
  AdamW options{.lr = call.number("lr"),
                .beta1 = call.number("beta1"),
                .beta2 = call.number("beta2"),
                .weight_decay = call.number("weight_decay"),
                .eps = call.number("eps"),
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
  std::vector<ObjectivesTensor> tensors{};
  Objectives objectives{};

  bool read(Call& call, const std::vector<int64_t>& groups, int64_t count, int64_t num_groups) {
    const size_t size = groups.size();
    if (size == 0 || count < 2 || count > max_objectives || views.size() != size * count)
      return call.refuse("objectives must be 2 to 16 lists of as many arrays as groups has");
    if (!floating(call, views[0])) return false;
    tensors.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const View& model = views[i];
      if (!gapless(call, model) || !same_device(call, model, views[0]) || !same_type(call, model, views[0]))
        return false;
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
  ObjectiveLists lists{.views = call.list("objectives")};
  const std::vector<int64_t> groups = call.whole_numbers("groups");
  const int64_t count = call.whole("num_objectives", 2);
  const View out = call.needed("out");
  if (!call.fine() || !axes(call, out, 3) || !lists.read(call, groups, count, out.shape[0]) ||
      !numbers(call, out, out.shape[0] * count * count, computing_type(lists.views[0].element), lists.views[0]))
    return false;
  lists.objectives.gramian = out.data;
  return Runtime::launch(
      call, out.device, [&] { cpu::gramian(lists.objectives, Runtime::parallel_for); },
      [&](const auto& allocate, auto stream) { return cuda::gramian(lists.objectives, allocate, stream); });
}

template <typename Runtime>
bool combine_(Call& call) {
  const std::vector<View> grads = call.list("grads", true);
  ObjectiveLists lists{.views = call.list("objectives")};
  const View weights = call.needed("weights");
  const std::vector<int64_t> groups = call.whole_numbers("groups");
  if (!call.fine()) return false;
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
