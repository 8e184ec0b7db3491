// dgs_numpy: the CPU kernels on NumPy arrays, for those who have no torch. It checks the arrays and hands the kernels
// their pointers; a matrix is never copied, so a layout that the kernels cannot read is an error.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "project_align.h"
#include "spectral_entropy.h"
#include "surgery_head.h"
#include "tensor_list.h"

namespace py = pybind11;
using namespace pybind11::literals;
using dgs::DType;

namespace {

std::atomic<int64_t> num_threads = std::max(1u, std::thread::hardware_concurrency());

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t parts = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads);
  const int64_t each = (count + parts - 1) / parts;
  std::vector<std::jthread> others;
  for (int64_t begin = each; begin < count; begin += each)
    others.emplace_back(body, begin, std::min(count, begin + each), context);
  body(0, std::min(each, count), context);
}

// Other Python threads go on while a kernel runs. It must not touch Python objects.
template <typename Run>
void without_gil(Run run) {
  py::gil_scoped_release release;
  run();
}

// Unless `ok`, raises Error with a message in Python's format syntax.
template <typename Error = py::value_error, typename... Parts>
void require(bool ok, const char* message, Parts&&... parts) {
  if (!ok) throw Error(py::str(message).format(std::forward<Parts>(parts)...).template cast<std::string>());
}

// The name that errors begin with, and how it calls an argument.
struct Argument {
  const char* function;
  std::string name;
};

py::array array_of(const Argument& at, py::handle x) {
  require<py::type_error>(py::isinstance<py::array>(x), "{}: {} must be a numpy array, got {}", at.function, at.name,
                          py::type::of(x).attr("__name__"));
  const auto array = py::reinterpret_borrow<py::array>(x);
  require(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_,
          "{}: {} is not aligned to its dtype; pass numpy.ascontiguousarray of it", at.function, at.name);
  return array;
}

// bfloat16 is no type of NumPy's own; that of the package ml_dtypes is known by its name.
DType dtype_of(const Argument& at, const py::array& x) {
  const py::dtype type = x.dtype();
  const std::string name = py::str(type);
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "float16") return DType::f16;
  require<py::type_error>(name == "bfloat16", "{}: {} must be float32, float64, float16 or bfloat16, got {}",
                          at.function, at.name, type);
  return DType::bf16;
}

// What inner products and scalars are held in.
py::dtype computing_type(DType type) { return type == DType::f64 ? py::dtype::of<double>() : py::dtype::of<float>(); }

dgs::Order order_of(const char* function, const std::string& order) {
  require(order == "align_first" || order == "project_first",
          "{}: order must be one of align_first, project_first, got {!r}", function, order);
  return order == "align_first" ? dgs::Order::align_first : dgs::Order::project_first;
}

dgs::Rule rule_of(const char* function, const std::string& rule) {
  require(rule == "positive" || rule == "full" || rule == "conflict",
          "{}: rule must be one of positive, full, conflict, got {!r}", function, rule);
  return rule == "positive" ? dgs::Rule::positive : rule == "full" ? dgs::Rule::full : dgs::Rule::conflict;
}

void check_eps(const char* function, const char* name, double eps) {
  require(eps > 0, "{}: {} must be > 0, got {}", function, name, eps);
}

// Rows of `dim` numbers that lie next to each other; the stride, in elements, leads from row to row.
struct Rows {
  const void* data;
  int64_t stride;
};

Rows rows_of(const Argument& at, const py::array& x) {
  const int64_t axes = x.ndim(), dim = x.shape(axes - 1), item = x.itemsize();
  const bool contiguous = x.flags() & py::array::c_style;
  require(x.size() == 0 || contiguous || (axes <= 2 && (dim == 1 || x.strides(axes - 1) == item)),
          "{}: the numbers of a row of {} must lie next to each other; pass numpy.ascontiguousarray of it", at.function,
          at.name);
  const bool one_row = axes == 1 || x.size() == dim;
  return {x.data(), one_row ? 0 : axes == 2 ? x.strides(0) / item : dim};
}

Rows direction_of(const Argument& at, py::handle object, const py::array& grad) {
  const py::array x = array_of(at, object);
  const int64_t dim = grad.shape(grad.ndim() - 1);
  const bool one_row = x.ndim() >= 1 && x.ndim() <= grad.ndim() && x.shape(x.ndim() - 1) == dim && x.size() == dim;
  require(one_row || x.attr("shape").equal(grad.attr("shape")),
          "{}: {} must have grad's shape {.shape} or be one row [D], got {.shape}", at.function, at.name, grad, x);
  require<py::type_error>(x.dtype().equal(grad.dtype()), "{}: {} must have grad's dtype {}, got {}", at.function,
                          at.name, grad.dtype(), x.dtype());
  return rows_of(at, x);
}

constexpr const char* project_align_doc = R"(project_align(grad, harmful, beneficial=None, *, alignment=1.0, eps=1e-6,
              order='align_first', rule='positive') -> numpy.ndarray

Project the harmful direction out of every gradient row and align it with the beneficial one.

With h the harmful row (its positive part under rule='positive'), u = h / (||h|| + eps) and
b = min(beneficial, 0) (gradient surgery of DGS-Net, arXiv 2511.13108)::

    align_first:    a = grad + alignment * b;   out = a - <a, u> u      (the published code)
    project_first:  out = grad - <grad, u> u + alignment * b            (the paper's formula)

Args:
    grad: [..., D], D >= 1: float32, float64, float16, or bfloat16 of the package ml_dtypes. The numbers of a
        row lie next to each other; rows of a matrix may be any stride apart.
    harmful: direction to remove, of grad's dtype and shape, or one row [D] for all. A zero row removes nothing.
    beneficial: direction to align with, likewise; None aligns with nothing.
    alignment: weight of the alignment.
    eps: added to the norm, > 0.
    order: 'align_first' or 'project_first'.
    rule: how h is made. 'positive': the positive part (DGS-Net). 'full': all of it. 'conflict': all of it, and
        only in rows whose inner product with it is negative (PCGrad, A-GEM).

Returns:
    A new array of grad's shape and dtype; arithmetic in float32 (float64 for float64), rounded once.

Raises:
    ValueError, TypeError: a shape, dtype, layout or option that does not fit, saying what was expected.

Example:
    >>> import numpy, dgs_numpy
    >>> print(dgs_numpy.project_align(numpy.array([[3.0, 4.0]]), numpy.array([1.0, -1.0]), eps=1e-12).round(9))
    [[0. 4.]]
)";

py::array project_align(py::object grad_object, py::object harmful, py::object beneficial, double alignment, double eps,
                        const std::string& order, const std::string& rule) {
  const char* const name = "project_align";
  const py::array grad = array_of({name, "grad"}, grad_object);
  const int64_t axes = grad.ndim();
  require(axes >= 1 && grad.shape(axes - 1) >= 1, "{}: grad must be [..., D] with D >= 1, got {.shape}", name, grad);
  const int64_t dim = grad.shape(axes - 1);
  check_eps(name, "eps", eps);
  dgs::ProjectAlign a{.alignment = alignment,
                      .eps = eps,
                      .order = order_of(name, order),
                      .rule = rule_of(name, rule),
                      .dtype = dtype_of({name, "grad"}, grad)};
  const Rows g = rows_of({name, "grad"}, grad), h = direction_of({name, "harmful"}, harmful, grad);
  const Rows b = beneficial.is_none() ? Rows{} : direction_of({name, "beneficial"}, beneficial, grad);
  py::array out(grad.dtype(), std::vector<py::ssize_t>(grad.shape(), grad.shape() + axes));
  if (out.size() == 0) return out;
  a.grad = g.data, a.harmful = h.data, a.beneficial = b.data, a.out = out.mutable_data();
  a.rows = grad.size() / dim, a.dim = dim, a.out_stride = dim;
  a.grad_stride = g.stride, a.harmful_stride = h.stride, a.beneficial_stride = b.stride;
  without_gil([&] { dgs::cpu::project_align(a, parallel_for); });
  return out;
}

using Arrays = std::vector<py::array>;

// A list of arrays that lie in memory without gaps; `like` says with which lengths, shapes and dtype.
Arrays list_of(const char* function, const char* name, py::handle object, const Arrays* like, bool edited) {
  require<py::type_error>(py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object),
                          "{}: {} must be a list of numpy arrays, got {}", function, name,
                          py::type::of(object).attr("__name__"));
  Arrays arrays;
  for (const py::handle x : object)
    arrays.push_back(array_of({function, std::string(name) + "[" + std::to_string(arrays.size()) + "]"}, x));
  const Arrays& model = like ? *like : arrays;
  require(arrays.size() == model.size(), "{}: {} must have {} arrays, got {}", function, name, model.size(),
          arrays.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    const py::array& x = arrays[i];
    require(x.flags() & py::array::c_style, "{}: {}[{}] must be C-contiguous", function, name, i);
    require(!edited || x.writeable(), "{}: {}[{}] is edited in place, but it is read-only", function, name, i);
    require(x.attr("shape").equal(model[i].attr("shape")), "{}: {}[{}] must have shape {.shape}, got {.shape}",
            function, name, i, model[i], x);
    require<py::type_error>(x.dtype().equal(model[0].dtype()), "{}: {}[{}] must be {} as the others, got {}", function,
                            name, i, model[0].dtype(), x.dtype());
  }
  return arrays;
}

// The lists that project_align_ and surgery_adamw_ have in common, and what the kernels are told about them.
struct List {
  Arrays grads, harmful, beneficial;
  std::vector<dgs::ListTensor> tensors;
  py::array sums;
  dgs::TensorList list;
};

List list_of(const char* function, py::handle grads, bool edited, py::handle harmful, py::handle beneficial,
             py::handle groups, double alignment, const char* eps_name, double eps, const std::string& order,
             const std::string& rule) {
  check_eps(function, eps_name, eps);
  List made{.list = {.order = order_of(function, order),
                     .rule = rule_of(function, rule),
                     .part = dgs::Part::all,
                     .alignment = alignment,
                     .eps = eps}};
  made.grads = list_of(function, "grads", grads, nullptr, edited);
  made.harmful = list_of(function, "harmful", harmful, &made.grads, false);
  if (!beneficial.is_none()) made.beneficial = list_of(function, "beneficial", beneficial, &made.grads, false);
  const size_t count = made.grads.size();
  require(groups.is_none() || py::len(groups) == count, "{}: groups must name the layer of {} arrays", function, count);
  py::dict numbers;  // layers are numbered as they first appear
  for (size_t i = 0; i < count; ++i) {
    const py::object group = groups.is_none() ? py::object(py::int_(i)) : py::object(groups[py::int_(i)]);
    made.tensors.push_back({.numel = made.grads[i].size(),
                            .group = numbers.attr("setdefault")(group, numbers.size()).cast<int64_t>(),
                            .grad = const_cast<void*>(made.grads[i].data()),
                            .harmful = made.harmful[i].data(),
                            .beneficial = made.beneficial.empty() ? nullptr : made.beneficial[i].data()});
  }
  made.list.dtype = count ? dtype_of({function, "grads"}, made.grads[0]) : DType::f32;
  made.list.num_tensors = count, made.list.num_groups = numbers.size();
  made.sums = py::module_::import("numpy").attr("zeros")(py::make_tuple(numbers.size(), dgs::group_sums),
                                                         computing_type(made.list.dtype));
  made.list.tensors = made.tensors.data(), made.list.sums = made.sums.mutable_data();
  return made;
}

constexpr const char* project_align__doc =
    R"(project_align_(grads, harmful, beneficial=None, *, groups=None, alignment=1.0,
               eps=1e-6, order='align_first', rule='positive') -> numpy.ndarray

Project the harmful direction out of whole layers, and align them, in place: `project_align` on lists.

All arrays of a layer are one vector: inner products and norms run over it.

Args:
    grads: list of T C-contiguous arrays of any shapes and one dtype (see `project_align`); edited in place.
    harmful: T arrays of the same shapes: the directions to remove.
    beneficial: T arrays of the same shapes to align with; None aligns with nothing.
    groups: T values, equal for arrays of one layer; None: every array is its own layer.
    alignment, eps, order, rule: see `project_align`.

Returns:
    sums [G, 6], layers in order of first appearance, before the surgery: the inner products <g, h>, <h, h>,
    <g, g>, <b, h>, <b, b>, <g, b> of gradient, direction h and b = min(beneficial, 0); float64 for float64
    arrays, else float32.

Raises:
    ValueError, TypeError: lists, shapes, dtypes, layouts or options that do not fit.

Example:
    >>> import numpy, dgs_numpy
    >>> grads = [numpy.array([3.0]), numpy.array([4.0])]
    >>> sums = dgs_numpy.project_align_(grads, [numpy.array([1.0]), numpy.array([0.0])], groups=[0, 0], eps=1e-12)
    >>> print(grads[0].round(9), grads[1].round(9))
    [0.] [4.]
)";

py::array project_align_(py::object grads, py::object harmful, py::object beneficial, py::object groups,
                         double alignment, double eps, const std::string& order, const std::string& rule) {
  const List made =
      list_of("project_align_", grads, true, harmful, beneficial, groups, alignment, "eps", eps, order, rule);
  without_gil([&] { dgs::cpu::project_align_(made.list, parallel_for); });
  return made.sums;
}

constexpr const char* surgery_adamw__doc = R"(surgery_adamw_(params, grads, exp_avgs, exp_avg_sqs, step, harmful,
               beneficial=None, *, groups=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
               maximize=False, alignment=1.0, surgery_eps=1e-6, order='align_first',
               rule='positive') -> numpy.ndarray

One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on surgered gradients, which are never written.

Args:
    params, exp_avgs, exp_avg_sqs: T C-contiguous arrays each, of the shapes and dtype of grads; edited in place.
        Both averages start as zeros.
    grads: list of T arrays, only read.
    step: which step this is, counted from 1.
    harmful, beneficial, groups, alignment, surgery_eps, order, rule: see `project_align_`; surgery_eps is its eps.
    lr, betas, eps, weight_decay, maximize: see `torch.optim.AdamW`.

Returns:
    sums [G, 6], as `project_align_` does.

Raises:
    ValueError, TypeError: lists, shapes, dtypes, layouts or options that do not fit.

Example:
    >>> import numpy, dgs_numpy
    >>> param, grad, average, square, harmful = numpy.split(numpy.array([1.0, 2.0, 0.0, 0.0, -1.0]), 5)
    >>> sums = dgs_numpy.surgery_adamw_([param], [grad], [average], [square], 1, [harmful], lr=0.1)
    >>> print(param.round(3))
    [0.899]
)";

py::array surgery_adamw_(py::object params, py::object grads, py::object exp_avgs, py::object exp_avg_sqs, int64_t step,
                         py::object harmful, py::object beneficial, py::object groups, double lr,
                         std::pair<double, double> betas, double eps, double weight_decay, bool maximize,
                         double alignment, double surgery_eps, const std::string& order, const std::string& rule) {
  const char* const name = "surgery_adamw_";
  require(step >= 1, "{}: step counts from 1, got {}", name, step);
  List made =
      list_of(name, grads, false, harmful, beneficial, groups, alignment, "surgery_eps", surgery_eps, order, rule);
  Arrays lists[3];
  const std::pair<const char*, py::object*> edited[] = {
      {"params", &params}, {"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}};
  for (int n = 0; n < 3; ++n) lists[n] = list_of(name, edited[n].first, *edited[n].second, &made.grads, true);
  for (size_t i = 0; i < made.tensors.size(); ++i) {
    dgs::ListTensor& t = made.tensors[i];
    t.param = lists[0][i].mutable_data();
    t.exp_avg = lists[1][i].mutable_data(), t.exp_avg_sq = lists[2][i].mutable_data();
  }
  dgs::AdamW options{lr, betas.first, betas.second, weight_decay, eps, maximize};
  const dgs::Rates rates = options.at_step(double(step));
  options.rates = &rates, options.all_alike = true;
  without_gil([&] { dgs::cpu::surgery_adamw_(made.list, options, parallel_for); });
  return made.sums;
}

constexpr const char* surgery_head_doc =
    R"(surgery_head(features, teacher_features, text_features, labels, image_weight,
             image_bias, teacher_weight, teacher_bias, text_weight, text_bias, *, alignment=0.2,
             order='align_first', eps=1e-6, reference_batch_size=None, text='project', offsets=None,
             distillation=0.0) -> SurgeryHeadOutput

DGS-Net's three branches on linear heads (arXiv 2511.13108) in closed form: losses, logits and gradients.

Args:
    features: [B, D] student features, D >= 1, of a dtype that `project_align` takes. Rows may be any stride apart.
    teacher_features: [B, D] of the same dtype.
    text_features: [B, D] caption features of the same dtype, or None with text_weight and text_bias None: the
        text loss is 0 and nothing is projected.
    labels: [B], 0 real and 1 generated; values between are soft labels.
    image_weight, teacher_weight, text_weight: D numbers; image_bias, teacher_bias, text_bias: one. They and the
        labels are converted to float64 if features are, else to float32.
    alignment: weight of the alignment loss in the sum whose gradients are returned.
    order: 'align_first' or 'project_first'.
    eps: added to the norm of the harmful gradient, > 0.
    reference_batch_size: the batch size as which the strength of the surgery counts; None: B.
    text: 'project' removes the text's harmful direction; 'expert' instead adds the text's logits, as constants, to
        the image's in the image loss; 'both' does both.
    offsets: [B] further constants that are added to the image's logits in the image loss, or None.
    distillation: weight >= 0 of distillation / (2 D) * mean of ||f - f_teacher||^2, whose gradient comes after the
        surgery.

Returns:
    SurgeryHeadOutput, a named tuple. image_loss, text_loss, alignment_loss and distillation_loss are numbers, means
    over the batch; image_logits, text_logits and teacher_logits [B] are of each head alone; features_grad [B, D] of
    features' dtype, image_weight_grad [D], image_bias_grad, text_weight_grad [D] and text_bias_grad are the gradients
    of image_loss + text_loss + alignment * alignment_loss + distillation_loss, that of features after the surgery.

Raises:
    ValueError, TypeError: a shape, dtype, layout or option that does not fit.

Example:
    >>> import numpy, dgs_numpy
    >>> f, t, c = numpy.random.default_rng(0).normal(size=(3, 8, 16))
    >>> w = numpy.ones(16)
    >>> out = dgs_numpy.surgery_head(f, t, c, numpy.arange(8) % 2, w, 0, w, 0, w, 0)
    >>> out.features_grad.shape
    (8, 16)
)";

py::array matrix_of(const Argument& at, py::handle object, const py::array* like) {
  const py::array x = array_of(at, object);
  require(x.ndim() == 2 && x.shape(1) >= 1, "{}: {} must be [B, D] with D >= 1, got {.shape}", at.function, at.name, x);
  if (like) {
    require(x.attr("shape").equal(like->attr("shape")), "{}: {} must have features' shape {.shape}, got {.shape}",
            at.function, at.name, *like, x);
    require<py::type_error>(x.dtype().equal(like->dtype()), "{}: {} must have features' dtype {}, got {}", at.function,
                            at.name, like->dtype(), x.dtype());
  }
  return x;
}

// `count` real numbers in the computing type: few, so they may be copied.
py::array numbers_of(const Argument& at, py::handle object, int64_t count, const py::dtype& type) {
  const py::module_ numpy = py::module_::import("numpy");
  const py::array given = numpy.attr("asarray")(object);
  require<py::type_error>(std::string("biuf").find(given.dtype().kind()) != std::string::npos ||
                              std::string(py::str(given.dtype())) == "bfloat16",
                          "{}: {} must be real numbers, got {}", at.function, at.name, given.dtype());
  require(given.size() == count, "{}: {} must be {} numbers, got shape {.shape}", at.function, at.name, count, given);
  return numpy.attr("ascontiguousarray")(given.attr("reshape")(-1), type);
}

py::object surgery_head(const py::object& output, py::object features_, py::object teacher_, py::object text_,
                        py::object labels_, const std::vector<py::object>& heads, double alignment,
                        const std::string& order, double eps, std::optional<int64_t> reference_batch_size,
                        const std::string& role, const py::object& offsets_, double distillation) {
  const char* const name = "surgery_head";
  require(role == "project" || role == "expert" || role == "both",
          "{}: text must be 'project', 'expert' or 'both', got '{}'", name, role);
  require(distillation >= 0 && distillation < std::numeric_limits<double>::infinity(),
          "{}: distillation must be a finite number >= 0, got {}", name, distillation);
  check_eps(name, "eps", eps);
  require(reference_batch_size.value_or(1) >= 1, "{}: reference_batch_size must be >= 1, got {}", name,
          reference_batch_size.value_or(0));
  const py::array features = matrix_of({name, "features"}, features_, nullptr);
  const py::array teacher = matrix_of({name, "teacher_features"}, teacher_, &features);
  const bool has_text = !text_.is_none();
  const py::array text = has_text ? matrix_of({name, "text_features"}, text_, &features) : features;
  require(has_text == !heads[4].is_none() && has_text == !heads[5].is_none(),
          "{}: text_features, text_weight and text_bias must be given together or be None together", name);
  const DType dtype = dtype_of({name, "features"}, features);
  const py::dtype type = computing_type(dtype);
  const int64_t batch = features.shape(0), dim = features.shape(1);
  const Rows f = rows_of({name, "features"}, features), t = rows_of({name, "teacher_features"}, teacher),
             c = rows_of({name, "text_features"}, text);

  const py::array labels = numbers_of({name, "labels"}, labels_, batch, type);
  const py::array offsets = offsets_.is_none() ? labels : numbers_of({name, "offsets"}, offsets_, batch, type);
  static const char* const names[] = {"image_weight", "image_bias",  "teacher_weight",
                                      "teacher_bias", "text_weight", "text_bias"};
  std::vector<py::array> kept;
  const void* at[6] = {};
  for (int n = 0; n < (has_text ? 6 : 4); ++n) {
    kept.push_back(numbers_of({name, names[n]}, heads[n], n % 2 ? 1 : dim, type));
    at[n] = kept.back().data();
  }
  const auto made = [&](std::vector<py::ssize_t> shape) { return py::array(type, std::move(shape)); };
  py::array losses = made({4}), logits = made({3, batch}), residuals = made({3, batch}), grads = made({2, dim + 1});
  py::array features_grad(features.dtype(), std::vector<py::ssize_t>{batch, dim});
  const py::array scales = numbers_of({name, "alignment"}, py::make_tuple(1.0, alignment), 2, type);
  // The forward leaves the differences where the backward finds them, and replaces them by the gradient.
  void* const differences = distillation ? features_grad.mutable_data() : nullptr;
  const dgs::SurgeryHead forward{.dtype = dtype,
                                 .expert = role != "project",
                                 .features = f.data,
                                 .teacher_features = t.data,
                                 .text_features = has_text ? c.data : nullptr,
                                 .features_stride = f.stride,
                                 .teacher_stride = t.stride,
                                 .text_stride = c.stride,
                                 .labels = labels.data(),
                                 .offsets = offsets_.is_none() ? nullptr : offsets.data(),
                                 .image_weight = at[0],
                                 .teacher_weight = at[2],
                                 .text_weight = at[4],
                                 .image_bias = at[1],
                                 .teacher_bias = at[3],
                                 .text_bias = at[5],
                                 .batch = batch,
                                 .dim = dim,
                                 .reference_batch_size = double(reference_batch_size.value_or(0)),
                                 .distillation = distillation,
                                 .losses = losses.mutable_data(),
                                 .logits = logits.mutable_data(),
                                 .residuals = residuals.mutable_data(),
                                 .head_grads = grads.mutable_data(),
                                 .differences = differences,
                                 .workspace = nullptr};
  const dgs::SurgeryHeadBackward backward{.dtype = dtype,
                                          .order = order_of(name, order),
                                          .residuals = residuals.data(),
                                          .image_weight = at[0],
                                          .teacher_weight = at[2],
                                          .text_weight = role == "expert" ? nullptr : at[4],
                                          .image_scale = scales.data(0),
                                          .alignment_scale = scales.data(1),
                                          .differences = differences,
                                          .distillation_scale = scales.data(0),
                                          .batch = batch,
                                          .dim = dim,
                                          .reference_batch_size = forward.reference_batch_size,
                                          .eps = eps,
                                          .distillation = distillation,
                                          .grad_features = features_grad.mutable_data(),
                                          .wide = dtype == DType::f64};
  without_gil([&] {
    dgs::cpu::surgery_head(forward, parallel_for);
    if (batch) dgs::cpu::surgery_head_backward(backward, parallel_for);
  });
  const auto weights = [&](int head) { return grads[py::make_tuple(head, py::slice(0, dim, 1))]; };
  const auto none_without_text = [&](py::object x) { return has_text ? x : py::object(py::none()); };
  return output(losses[py::int_(0)], losses[py::int_(1)], losses[py::int_(2)], logits[py::int_(0)],
                none_without_text(logits[py::int_(1)]), logits[py::int_(2)], features_grad, weights(0),
                grads[py::make_tuple(0, dim)], none_without_text(weights(1)),
                none_without_text(grads[py::make_tuple(1, dim)]), losses[py::int_(3)]);
}

constexpr const char* spectral_entropy_doc = R"(spectral_entropy(images) -> numpy.ndarray

Entropy in bits of the normalised power spectrum of the luma of every patch of 32 x 32 pixels.

With x the luma of a patch in 0..1 and E = |FFT2(x)|^2, p = E / (sum E + 1e-12) and the result is
-sum p log2(p + 1e-12) (the patch selection of DGS-Net, arXiv 2511.13108). A constant patch has 0.

Args:
    images: [B, 3, H, W] RGB, uint8 in 0..255 or float32 in 0..1; planar, or interleaved as decoders leave
        images: `image.transpose(2, 0, 1)[None]` of an [H, W, 3] image is read without a copy. H and W are cut
        from the bottom and the right to multiples of 32.

Returns:
    float32 [B, rows * columns], patches in row-major order.

Raises:
    ValueError, TypeError: the shape, the dtype or the layout does not fit.

Example:
    >>> import numpy, dgs_numpy
    >>> image = numpy.full((64, 96, 3), 255, numpy.uint8)
    >>> dgs_numpy.spectral_entropy(image.transpose(2, 0, 1)[None]).shape
    (1, 6)
)";

py::array spectral_entropy(py::object object) {
  const char* const name = "spectral_entropy";
  const py::array images = array_of({name, "images"}, object);
  require(images.ndim() == 4 && images.shape(1) == 3, "{}: images must be [B, 3, H, W], got {.shape}", name, images);
  const bool is_uint8 = images.dtype().equal(py::dtype::of<uint8_t>());
  require<py::type_error>(is_uint8 || images.dtype().equal(py::dtype::of<float>()),
                          "{}: images must be uint8 or float32, got {}", name, images.dtype());
  const int64_t item = images.itemsize(), patch = dgs::entropy_patch;
  dgs::SpectralEntropy a{.is_uint8 = is_uint8,
                         .images = images.data(),
                         .batch = images.shape(0),
                         .height = images.shape(2),
                         .width = images.shape(3),
                         .batch_stride = images.strides(0) / item,
                         .channel_stride = images.strides(1) / item,
                         .row_stride = images.strides(2) / item,
                         .pixel_stride = images.strides(3) / item};
  py::array_t<float> entropy({a.batch, a.height / patch * (a.width / patch)});
  if (entropy.size() == 0) return entropy;
  require(a.pixel_stride == 1 || (a.channel_stride == 1 && a.pixel_stride == 3),
          "{}: images must be planar or have the three channels of a pixel side by side; pass "
          "numpy.ascontiguousarray of them",
          name);
  a.entropy = entropy.mutable_data();
  without_gil([&] { dgs::cpu::spectral_entropy(a, parallel_for); });
  return entropy;
}

}  // namespace

PYBIND11_MODULE(dgs_numpy, m) {
  py::options options;
  options.disable_function_signatures();  // the docstrings begin with them
  m.doc() = "Gradient surgery on NumPy arrays: the CPU kernels of dgs_kernels, without torch.";
  const py::str align_first("align_first"), positive("positive");
  const py::arg_v surgery[] = {"alignment"_a = 1.0, "eps"_a = 1e-6, "order"_a = align_first, "rule"_a = positive};

  m.def("project_align", &project_align, "grad"_a, "harmful"_a, "beneficial"_a = py::none(), py::kw_only(), surgery[0],
        surgery[1], surgery[2], surgery[3], project_align_doc);
  m.def("project_align_", &project_align_, "grads"_a, "harmful"_a, "beneficial"_a = py::none(), py::kw_only(),
        "groups"_a = py::none(), surgery[0], surgery[1], surgery[2], surgery[3], project_align__doc);
  m.def("surgery_adamw_", &surgery_adamw_, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "step"_a, "harmful"_a,
        "beneficial"_a = py::none(), py::kw_only(), "groups"_a = py::none(), "lr"_a = 1e-3,
        "betas"_a = py::make_tuple(0.9, 0.999), "eps"_a = 1e-8, "weight_decay"_a = 0.01, "maximize"_a = false,
        surgery[0], "surgery_eps"_a = 1e-6, surgery[2], surgery[3], surgery_adamw__doc);

  const py::object output = py::module_::import("collections")
                                .attr("namedtuple")("SurgeryHeadOutput",
                                                    "image_loss text_loss alignment_loss image_logits text_logits "
                                                    "teacher_logits features_grad image_weight_grad image_bias_grad "
                                                    "text_weight_grad text_bias_grad distillation_loss",
                                                    "module"_a = "dgs_numpy");
  output.attr("__doc__") = "What surgery_head returns; see there.";
  m.attr("SurgeryHeadOutput") = output;
  m.def(
      "surgery_head",
      [output](py::object features, py::object teacher, py::object text, py::object labels, py::object image_weight,
               py::object image_bias, py::object teacher_weight, py::object teacher_bias, py::object text_weight,
               py::object text_bias, double alignment, const std::string& order, double eps,
               std::optional<int64_t> reference_batch_size, const std::string& role, const py::object& offsets,
               double distillation) {
        return surgery_head(output, features, teacher, text, labels,
                            {image_weight, image_bias, teacher_weight, teacher_bias, text_weight, text_bias}, alignment,
                            order, eps, reference_batch_size, role, offsets, distillation);
      },
      "features"_a, "teacher_features"_a, "text_features"_a, "labels"_a, "image_weight"_a, "image_bias"_a,
      "teacher_weight"_a, "teacher_bias"_a, "text_weight"_a, "text_bias"_a, py::kw_only(), "alignment"_a = 0.2,
      surgery[2], surgery[1], "reference_batch_size"_a = py::none(), "text"_a = "project", "offsets"_a = py::none(),
      "distillation"_a = 0.0, surgery_head_doc);
  m.def("spectral_entropy", &spectral_entropy, "images"_a, spectral_entropy_doc);

  m.def(
      "set_num_threads",
      [](int64_t count) {
        require(count >= 1, "set_num_threads: expected at least 1, got {}", count);
        num_threads = count;
      },
      "count"_a, "set_num_threads(count) -> None\n\nUse at most this many threads; at first, as many as processors.");
  m.def(
      "get_num_threads", [] { return num_threads.load(); },
      "get_num_threads() -> int\n\nHow many threads a call uses at most.");
}
