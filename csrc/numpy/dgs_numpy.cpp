// dgs_numpy: the CPU kernels on NumPy arrays, for those who have no torch. A matrix is never copied, so a layout that
// the kernels cannot read is an error; what fits, and the words where it does not, is in calls.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "calls.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

std::atomic<int64_t> num_threads = std::max(1u, std::thread::hardware_concurrency());

struct Numpy {
  static void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    const int64_t parts = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads);
    const int64_t each = (count + parts - 1) / parts;
    std::vector<std::jthread> others;
    for (int64_t begin = each; begin < count; begin += each)
      others.emplace_back(body, begin, std::min(count, begin + each), context);
    body(0, std::min(each, count), context);
  }

  // Other Python threads go on while a kernel runs.
  template <typename Cpu, typename Cuda>
  static bool launch(dgs::calls::Call&, dgs::calls::Device, Cpu on_cpu, Cuda) {
    py::gil_scoped_release release;
    on_cpu();
    return true;
  }
};

// Calls an operation; where it is refused, raises the error in the name of `function`.
template <typename... Arguments>
void serve(bool (*operation)(dgs::calls::Call&), const char* function, const Arguments&... arguments) {
  const py::tuple objects = py::make_tuple(arguments...);
  dgs::calls::Call call(PySequence_Fast_ITEMS(objects.ptr()));
  if (operation(call)) return;
  PyErr_SetString(call.error, (std::string(function) + ": " + call.reason).c_str());
  throw py::error_already_set();
}

// An array if it is one, and else an empty one: what is none is refused by name later.
py::array array_of(py::handle x) {
  return py::isinstance<py::array>(x) ? py::reinterpret_borrow<py::array>(x) : py::array();
}

// What inner products and scalars are held in.
py::dtype computing_type(const py::array& x) {
  return x.dtype().equal(py::dtype::of<double>()) ? py::dtype::of<double>() : py::dtype::of<float>();
}

constexpr const char* project_align_doc =
    R"(Project the harmful direction out of every gradient row and align it with the beneficial one, into a new array.

The formula and the options are those of dgs_kernels.project_align (docs/method.md); arithmetic is float32 (float64 for
float64), rounded once.

Args:
    grad: [..., D], D >= 1: float32, float64, float16, or bfloat16 of the package ml_dtypes. The numbers of a
        row lie next to each other; rows of a matrix may be any stride apart.
    harmful, beneficial: of grad's dtype and shape, or one row [D] for all.

Raises:
    ValueError, TypeError: a shape, dtype, layout or option that does not fit, saying what was expected.

Example:
    >>> import numpy, dgs_numpy
    >>> print(dgs_numpy.project_align(numpy.array([[3.0, 4.0]]), numpy.array([1.0, -1.0]), eps=1e-12).round(9))
    [[0. 4.]]
)";

py::array project_align(py::object grad, py::object harmful, py::object beneficial, double alignment, double eps,
                        py::object order, py::object rule) {
  const py::array model = array_of(grad);
  py::array out(model.dtype(), std::vector<py::ssize_t>(model.shape(), model.shape() + model.ndim()));
  serve(dgs::calls::project_align<Numpy>, "project_align", grad, harmful, beneficial, py::none(), alignment, eps, order,
        rule, out);
  return out;
}

// Layers numbered as they first appear, and room for their sums.
struct Layers {
  py::ssize_t count;
  py::list groups;
  py::array sums;

  Layers(const py::object& given, const py::object& grads) : count(py::len(grads)) {
    py::dict numbers;
    for (const py::handle name : given.is_none() ? py::module_::import("builtins").attr("range")(count) : given)
      groups.append(numbers.attr("setdefault")(name, numbers.size()));
    const py::dtype type = computing_type(count ? array_of(py::object(grads[py::int_(0)])) : py::array_t<float>());
    sums = py::module_::import("numpy").attr("zeros")(py::make_tuple(numbers.size(), dgs::group_sums), type);
  }
};

constexpr const char* project_align__doc =
    R"(`project_align` on whole layers, in place: lists of C-contiguous arrays of any shapes and one dtype. `groups` are equal
for arrays of one layer; None: every array is its own. Returns sums [G, 6], as dgs_kernels.project_align_ does.

Example:
    >>> import numpy, dgs_numpy
    >>> grads = [numpy.array([3.0]), numpy.array([4.0])]
    >>> sums = dgs_numpy.project_align_(grads, [numpy.array([1.0]), numpy.array([0.0])], groups=[0, 0], eps=1e-12)
    >>> print(grads[0].round(9), grads[1].round(9))
    [0.] [4.]
)";

py::array project_align_(py::object grads, py::object harmful, py::object beneficial, py::object groups,
                         double alignment, double eps, py::object order, py::object rule) {
  const Layers layers(groups, grads);
  if (layers.count)
    serve(dgs::calls::project_align_<Numpy>, "project_align_", grads, harmful, beneficial, layers.groups, layers.sums,
          py::none(), alignment, eps, order, rule, "all");
  return layers.sums;
}

constexpr const char* surgery_adamw__doc =
    R"(One step of AdamW (arXiv 1711.05101) on surgered gradients, which are never written: params and both averages, which
start as zeros, are edited in place. `step` counts from 1; `surgery_eps` is the eps of `project_align_`, whose sums are
returned.

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
                         double alignment, double surgery_eps, py::object order, py::object rule) {
  if (step < 1) throw py::value_error("surgery_adamw_: step counts from 1, got " + std::to_string(step));
  const Layers layers(groups, grads);
  py::list steps;
  while (py::ssize_t(steps.size()) < layers.count)
    steps.append(py::module_::import("numpy").attr("array")(double(step - 1)));
  if (layers.count)
    serve(dgs::calls::surgery_adamw_<Numpy>, "surgery_adamw_", params, grads, exp_avgs, exp_avg_sqs, steps, harmful,
          beneficial, layers.groups, layers.sums, py::none(), alignment, surgery_eps, order, rule, "all", lr,
          betas.first, betas.second, weight_decay, eps, maximize);
  return layers.sums;
}

constexpr const char* surgery_head_doc =
    R"(DGS-Net's three branches on linear heads (arXiv 2511.13108) in closed form: losses, logits and gradients.

Features are [B, D] matrices of one dtype, as `project_align` takes them; labels, offsets, weights (D numbers) and
biases are converted to float64 if features are, else to float32. Without text_features, text_weight and text_bias
are not looked at. The options are those of dgs_kernels.surgery_head; `alignment` is the weight of the alignment loss.

Returns:
    SurgeryHeadOutput, a named tuple: losses, logits [B] of each head alone, and the gradients of image_loss + text_loss
    + alignment * alignment_loss + distillation_loss; that of the features, [B, D] of their dtype, is after the surgery.

Example:
    >>> import numpy, dgs_numpy
    >>> f, t, c = numpy.random.default_rng(0).normal(size=(3, 8, 16))
    >>> w = numpy.ones(16)
    >>> out = dgs_numpy.surgery_head(f, t, c, numpy.arange(8) % 2, w, 0, w, 0, w, 0)
    >>> out.features_grad.shape
    (8, 16)
)";

py::object surgery_head(py::object features_, py::object teacher, py::object text, py::object labels,
                        py::object image_weight, py::object image_bias, py::object teacher_weight,
                        py::object teacher_bias, py::object text_weight, py::object text_bias, double alignment,
                        py::object order, double eps, py::object reference_batch_size, py::object role,
                        py::object offsets, double distillation) {
  const py::array features = array_of(features_);
  const bool is_matrix = features.ndim() == 2, has_text = !text.is_none();
  const py::ssize_t batch = is_matrix ? features.shape(0) : 0, dim = is_matrix ? features.shape(1) : 0;
  const py::dtype type = computing_type(features);
  // Few real numbers, so they may be copied.
  const auto row = [&](const char* name, py::object x, int axes = 2) -> py::object {
    if (x.is_none()) return x;
    const py::module_ numpy = py::module_::import("numpy");
    py::array given = numpy.attr("asarray")(x);
    const std::string given_type = py::str(py::object(given.dtype()));
    if (std::string("biuf").find(given.dtype().kind()) == std::string::npos && given_type != "bfloat16")
      throw py::type_error("surgery_head: " + std::string(name) + " must be real numbers, got " + given_type);
    return numpy.attr("ascontiguousarray")(axes == 2 ? given.reshape({1, -1}) : given.reshape({-1}), type);
  };
  const auto vector = [&](const char* name, py::object x) { return row(name, x, 1); };
  image_weight = row("image_weight", image_weight), teacher_weight = row("teacher_weight", teacher_weight);
  text_weight = row("text_weight", text_weight);
  const auto made = [&](std::vector<py::ssize_t> shape) { return py::array(type, std::move(shape)); };
  py::array losses = made({4}), logits = made({3, batch}), residuals = made({3, batch}), grads = made({2, dim + 1});
  // The forward leaves the differences where the backward finds them, and replaces them by the gradient.
  py::array features_grad(features.dtype(), std::vector<py::ssize_t>{batch, dim});
  py::array nothing(features.dtype(), std::vector<py::ssize_t>{0, dim});
  serve(dgs::calls::surgery_head<Numpy>, "surgery_head", features_, teacher, text, vector("labels", labels),
        image_weight, vector("image_bias", image_bias), teacher_weight, vector("teacher_bias", teacher_bias),
        text_weight, vector("text_bias", text_bias), eps, order, reference_batch_size, role, vector("offsets", offsets),
        distillation, losses, logits, residuals, grads, distillation ? features_grad : nothing);
  const py::object none = py::none(), one = vector("one", py::float_(1.0));
  const bool projects = has_text && !role.equal(py::str("expert"));
  serve(dgs::calls::surgery_head_backward<Numpy>, "surgery_head", residuals, image_weight, teacher_weight,
        projects ? text_weight : none, one, vector("alignment", py::float_(alignment)), none, eps, order,
        reference_batch_size, distillation ? features_grad : none, distillation ? one : none, distillation,
        features_grad);
  const auto item = [](const py::object& x, auto... places) { return py::object(x[py::make_tuple(places...)]); };
  const auto of_text = [&](py::object x) { return has_text ? x : none; };
  const auto weights = [&](int head) { return item(grads, head, py::slice(0, dim, 1)); };
  return py::module_::import("dgs_numpy")
      .attr("SurgeryHeadOutput")(item(losses, 0), item(losses, 1), item(losses, 2), item(logits, 0),
                                 of_text(item(logits, 1)), item(logits, 2), features_grad, weights(0),
                                 item(grads, 0, dim), of_text(weights(1)), of_text(item(grads, 1, dim)),
                                 item(losses, 3));
}

constexpr const char* spectral_entropy_doc =
    R"(Entropy in bits of the normalised power spectrum of the luma of every patch of 32 x 32 pixels, float32 [B, patches].

`images` are [B, 3, H, W] RGB, uint8 in 0..255 or float32 in 0..1; planar, or interleaved as decoders leave them. H and
W are cut from the bottom and the right to multiples of 32.

Example:
    >>> import numpy, dgs_numpy
    >>> image = numpy.full((64, 96, 3), 255, numpy.uint8)
    >>> dgs_numpy.spectral_entropy(image.transpose(2, 0, 1)[None]).shape
    (1, 6)
)";

py::array spectral_entropy(py::object object) {
  const py::array images = array_of(object);
  const auto patches = [&](int axis) { return images.ndim() == 4 ? images.shape(axis) / dgs::entropy_patch : 0; };
  const py::ssize_t batch = images.ndim() ? images.shape(0) : 0;
  py::array_t<float> entropy({batch, patches(2) * patches(3)});
  serve(dgs::calls::spectral_entropy<Numpy>, "spectral_entropy", object, dgs::entropy_patch, entropy);
  return entropy;
}

}  // namespace

void dgs::calls::View::of(PyObject* given, Call& call) {
  object = given;
  if (!py::isinstance<py::array>(given)) {
    call.refuse(called() + " must be a numpy array, got " + type_name(given), PyExc_TypeError);
    return;
  }
  const auto array = py::reinterpret_borrow<py::array>(given);
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    call.refuse(called() + " is not aligned to its dtype; pass numpy.ascontiguousarray of it");
  read_only = !array.writeable();
  // bfloat16 is no type of NumPy's own; that of the package ml_dtypes is known by its name.
  const std::string type = py::str(py::object(array.dtype()));
  const auto* const known = std::find(std::begin(element_names), std::end(element_names), type);
  element = static_cast<Element>(known - std::begin(element_names));
  data = const_cast<void*>(array.data());
  ndim = int(array.ndim());
  shape = reinterpret_cast<const int64_t*>(array.shape());
  int64_t* const steps = call.kept.emplace_back(new int64_t[ndim]).get();
  for (int i = 0; i < ndim; ++i) steps[i] = array.strides(i) / std::max<int64_t>(1, array.itemsize());
  strides = steps;
}

PYBIND11_MODULE(dgs_numpy, m) {
  m.doc() = "Gradient surgery on NumPy arrays: the CPU kernels of dgs_kernels, without torch.";
  const py::arg_v surgery[] = {"alignment"_a = 1.0, "eps"_a = 1e-6, "order"_a = "align_first", "rule"_a = "positive"};

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
  m.def("surgery_head", &surgery_head, "features"_a, "teacher_features"_a, "text_features"_a, "labels"_a,
        "image_weight"_a, "image_bias"_a, "teacher_weight"_a, "teacher_bias"_a, "text_weight"_a, "text_bias"_a,
        py::kw_only(), "alignment"_a = 0.2, surgery[2], surgery[1], "reference_batch_size"_a = py::none(),
        "text"_a = "project", "offsets"_a = py::none(), "distillation"_a = 0.0, surgery_head_doc);
  m.def("spectral_entropy", &spectral_entropy, "images"_a, spectral_entropy_doc);

  m.def(
      "set_num_threads",
      [](int64_t count) {
        if (count < 1) throw py::value_error("set_num_threads: expected at least 1, got " + std::to_string(count));
        num_threads = count;
      },
      "count"_a, "Use at most this many threads; at first, as many as processors.");
  m.def("get_num_threads", [] { return num_threads.load(); }, "How many threads a call uses at most.");
}
