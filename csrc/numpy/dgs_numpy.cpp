// dgs_numpy: the CPU kernels on NumPy arrays, for those who have no torch. A matrix is never copied, so a layout that
// the kernels cannot read is an error; what fits, and the words where it does not, is in calls.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
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

}  // namespace

bool dgs::calls::View::of(PyObject* given, Call& call) {
  object = given;
  if (!py::isinstance<py::array>(given))
    return call.refuse(
        called() + " must be a numpy array, got " + py::type::of(given).attr("__name__").cast<std::string>(),
        PyExc_TypeError);
  const auto array = py::reinterpret_borrow<py::array>(given);
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    return call.refuse(called() + " is not aligned to its dtype; pass numpy.ascontiguousarray of it");
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
  return true;
}

namespace {

// Unless `ok`, raises Error with a message in Python's format syntax.
template <typename Error = py::value_error, typename... Parts>
void require(bool ok, const char* message, Parts&&... parts) {
  if (!ok) throw Error(py::str(message).format(std::forward<Parts>(parts)...).template cast<std::string>());
}

// Calls an operation; where it is refused, raises the error in the name of `function`.
template <typename... Arguments>
void serve(bool (*operation)(dgs::calls::Call&), const char* function, const Arguments&... arguments) {
  const py::tuple objects = py::make_tuple(arguments...);
  PyObject* given[sizeof...(arguments)];
  for (size_t i = 0; i < objects.size(); ++i) given[i] = py::object(objects[i]).ptr();
  dgs::calls::Call call(given);
  if (operation(call)) return;
  PyErr_SetString(call.error, (std::string(function) + ": " + call.reason).c_str());
  throw py::error_already_set();
}

py::array array_of(const char* function, const char* name, py::handle x) {
  require<py::type_error>(py::isinstance<py::array>(x), "{}: {} must be a numpy array, got {}", function, name,
                          py::type::of(x).attr("__name__"));
  return py::reinterpret_borrow<py::array>(x);
}

py::array zeros(const py::dtype& type, std::vector<py::ssize_t> shape) {
  py::array made(type, std::move(shape));
  std::fill_n(static_cast<char*>(made.mutable_data()), made.nbytes(), 0);
  return made;
}

// What inner products and scalars are held in.
py::dtype computing_type(const py::array& x) {
  return x.dtype().equal(py::dtype::of<double>()) ? py::dtype::of<double>() : py::dtype::of<float>();
}

// Places in the enumerations of surgery_math.h.
int order_of(const char* function, const std::string& order) {
  require(order == "align_first" || order == "project_first",
          "{}: order must be one of align_first, project_first, got {!r}", function, order);
  return order == "project_first";
}

int rule_of(const char* function, const std::string& rule) {
  require(rule == "positive" || rule == "full" || rule == "conflict",
          "{}: rule must be one of positive, full, conflict, got {!r}", function, rule);
  return rule == "positive" ? 0 : rule == "full" ? 1 : 2;
}

void check_eps(const char* function, const char* name, double eps) {
  require(eps > 0, "{}: {} must be > 0, got {}", function, name, eps);
}

constexpr const char* project_align_doc = R"(project_align(grad, harmful, beneficial=None, *, alignment=1.0, eps=1e-6,
              order='align_first', rule='positive') -> numpy.ndarray

Project the harmful direction out of every gradient row and align it with the beneficial one, into a new array.

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
                        const std::string& order, const std::string& rule) {
  const char* const name = "project_align";
  check_eps(name, "eps", eps);
  const py::array model = array_of(name, "grad", grad);
  py::array out(model.dtype(), std::vector<py::ssize_t>(model.shape(), model.shape() + model.ndim()));
  serve(dgs::calls::project_align<Numpy>, name, grad, harmful, beneficial, py::none(), alignment, eps,
        order_of(name, order), rule_of(name, rule), out);
  return out;
}

// A list, of arrays that may be written to if it is edited.
py::list list_of(const char* function, const char* name, py::handle object, bool edited = false) {
  if (object.is_none()) return py::list();
  require<py::type_error>(py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object),
                          "{}: {} must be a list of numpy arrays, got {}", function, name,
                          py::type::of(object).attr("__name__"));
  const py::list list(py::reinterpret_borrow<py::object>(object));
  for (size_t i = 0; edited && i < list.size(); ++i)
    require(!py::isinstance<py::array>(list[i]) || py::array(list[i]).writeable(),
            "{}: {}[{}] is edited in place, but it is read-only", function, name, i);
  return list;
}

// Layers numbered as they first appear, and room for their sums.
struct Layers {
  py::list groups;
  py::array sums;

  Layers(const char* function, py::handle given, const py::list& grads) {
    const size_t count = grads.size();
    require(given.is_none() || py::len(given) == count, "{}: groups must name the layer of {} arrays", function, count);
    py::dict numbers;
    for (size_t i = 0; i < count; ++i) {
      const py::object group = given.is_none() ? py::object(py::int_(i)) : py::object(given[py::int_(i)]);
      groups.append(numbers.attr("setdefault")(group, numbers.size()));
    }
    const bool first = count && py::isinstance<py::array>(grads[0]);
    const py::dtype type = first ? computing_type(py::array(grads[0])) : py::dtype::of<float>();
    sums = zeros(type, {py::ssize_t(numbers.size()), dgs::group_sums});
  }
};

constexpr const char* project_align__doc =
    R"(project_align_(grads, harmful, beneficial=None, *, groups=None, alignment=1.0,
               eps=1e-6, order='align_first', rule='positive') -> numpy.ndarray

`project_align` on whole layers, in place: lists of C-contiguous arrays of any shapes and one dtype. `groups` are equal
for arrays of one layer; None: every array is its own. Returns sums [G, 6], as dgs_kernels.project_align_ does.

Example:
    >>> import numpy, dgs_numpy
    >>> grads = [numpy.array([3.0]), numpy.array([4.0])]
    >>> sums = dgs_numpy.project_align_(grads, [numpy.array([1.0]), numpy.array([0.0])], groups=[0, 0], eps=1e-12)
    >>> print(grads[0].round(9), grads[1].round(9))
    [0.] [4.]
)";

py::array project_align_(py::object grads_, py::object harmful, py::object beneficial, py::object groups,
                         double alignment, double eps, const std::string& order, const std::string& rule) {
  const char* const name = "project_align_";
  check_eps(name, "eps", eps);
  const py::list grads = list_of(name, "grads", grads_, true);
  const Layers layers(name, groups, grads);
  if (!grads.empty())
    serve(dgs::calls::project_align_<Numpy>, name, grads, list_of(name, "harmful", harmful),
          list_of(name, "beneficial", beneficial), layers.groups, layers.sums, py::none(), alignment, eps,
          order_of(name, order), rule_of(name, rule), int(dgs::Part::all));
  return layers.sums;
}

constexpr const char* surgery_adamw__doc = R"(surgery_adamw_(params, grads, exp_avgs, exp_avg_sqs, step, harmful,
               beneficial=None, *, groups=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
               maximize=False, alignment=1.0, surgery_eps=1e-6, order='align_first',
               rule='positive') -> numpy.ndarray

One step of AdamW (arXiv 1711.05101) on surgered gradients, which are never written: params and both averages, which
start as zeros, are edited in place. `step` counts from 1; `surgery_eps` is the eps of `project_align_`, whose sums are
returned.

Example:
    >>> import numpy, dgs_numpy
    >>> param, grad, average, square, harmful = numpy.split(numpy.array([1.0, 2.0, 0.0, 0.0, -1.0]), 5)
    >>> sums = dgs_numpy.surgery_adamw_([param], [grad], [average], [square], 1, [harmful], lr=0.1)
    >>> print(param.round(3))
    [0.899]
)";

py::array surgery_adamw_(py::object params, py::object grads_, py::object exp_avgs, py::object exp_avg_sqs,
                         int64_t step, py::object harmful, py::object beneficial, py::object groups, double lr,
                         std::pair<double, double> betas, double eps, double weight_decay, bool maximize,
                         double alignment, double surgery_eps, const std::string& order, const std::string& rule) {
  const char* const name = "surgery_adamw_";
  require(step >= 1, "{}: step counts from 1, got {}", name, step);
  check_eps(name, "surgery_eps", surgery_eps);
  const py::list grads = list_of(name, "grads", grads_);
  const Layers layers(name, groups, grads);
  py::list steps;
  for (size_t i = 0; i < grads.size(); ++i) steps.append(py::module_::import("numpy").attr("array")(step - 1.0));
  if (!grads.empty())
    serve(dgs::calls::surgery_adamw_<Numpy>, name, list_of(name, "params", params, true), grads,
          list_of(name, "exp_avgs", exp_avgs, true), list_of(name, "exp_avg_sqs", exp_avg_sqs, true), steps,
          list_of(name, "harmful", harmful), list_of(name, "beneficial", beneficial), layers.groups, layers.sums,
          py::none(), alignment, surgery_eps, order_of(name, order), rule_of(name, rule), int(dgs::Part::all), lr,
          betas.first, betas.second, weight_decay, eps, maximize);
  return layers.sums;
}

constexpr const char* surgery_head_doc =
    R"(surgery_head(features, teacher_features, text_features, labels, image_weight,
             image_bias, teacher_weight, teacher_bias, text_weight, text_bias, *, alignment=0.2,
             order='align_first', eps=1e-6, reference_batch_size=None, text='project', offsets=None,
             distillation=0.0) -> SurgeryHeadOutput

DGS-Net's three branches on linear heads (arXiv 2511.13108) in closed form: losses, logits and gradients.

Features are [B, D] matrices of one dtype, as `project_align` takes them; labels, offsets, weights (D numbers) and
biases are converted to float64 if features are, else to float32. Without text_features, text_weight and text_bias are
None too. The options are those of dgs_kernels.surgery_head; `alignment` is the weight of the alignment loss.

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

// Real numbers in the computing type: few, so they may be copied.
py::object numbers_of(const char* function, const char* name, py::handle object, const py::dtype& type,
                      const py::tuple& shape) {
  if (object.is_none()) return py::none();
  const py::module_ numpy = py::module_::import("numpy");
  const py::array given = numpy.attr("asarray")(object);
  require<py::type_error>(std::string("biuf").find(given.dtype().kind()) != std::string::npos ||
                              std::string(py::str(py::object(given.dtype()))) == "bfloat16",
                          "{}: {} must be real numbers, got {}", function, name, given.dtype());
  return numpy.attr("ascontiguousarray")(given.attr("reshape")(*shape), type);
}

py::object surgery_head(py::object features_, py::object teacher, py::object text, py::object labels,
                        py::object image_weight_, py::object image_bias, py::object teacher_weight_,
                        py::object teacher_bias, py::object text_weight_, py::object text_bias, double alignment,
                        const std::string& order, double eps, std::optional<int64_t> reference_batch_size,
                        const std::string& role, py::object offsets, double distillation) {
  const char* const name = "surgery_head";
  require(role == "project" || role == "expert" || role == "both",
          "{}: text must be 'project', 'expert' or 'both', got '{}'", name, role);
  require(distillation >= 0 && distillation < std::numeric_limits<double>::infinity(),
          "{}: distillation must be a finite number >= 0, got {}", name, distillation);
  check_eps(name, "eps", eps);
  require(reference_batch_size.value_or(1) >= 1, "{}: reference_batch_size must be >= 1, got {}", name,
          reference_batch_size.value_or(0));
  const py::array features = array_of(name, "features", features_);
  const bool is_matrix = features.ndim() == 2, has_text = !text.is_none();
  const py::ssize_t batch = is_matrix ? features.shape(0) : 0, dim = is_matrix ? features.shape(1) : 0;
  const py::dtype type = computing_type(features);
  const auto vector = [&](const char* of, py::handle x) { return numbers_of(name, of, x, type, py::make_tuple(-1)); };
  const auto row = [&](const char* of, py::handle x) { return numbers_of(name, of, x, type, py::make_tuple(1, -1)); };
  const py::object image_weight = row("image_weight", image_weight_),
                   teacher_weight = row("teacher_weight", teacher_weight_),
                   text_weight = row("text_weight", text_weight_);
  const auto made = [&](std::vector<py::ssize_t> shape) { return py::array(type, std::move(shape)); };
  py::array losses = made({4}), logits = made({3, batch}), residuals = made({3, batch}), grads = made({2, dim + 1});
  // The forward leaves the differences where the backward finds them, and replaces them by the gradient.
  py::array features_grad(features.dtype(), std::vector<py::ssize_t>{batch, dim});
  py::array nothing(features.dtype(), std::vector<py::ssize_t>{0, dim});
  const double counted = double(reference_batch_size.value_or(0));
  serve(dgs::calls::surgery_head<Numpy>, name, features, teacher, text, vector("labels", labels), image_weight,
        vector("image_bias", image_bias), teacher_weight, vector("teacher_bias", teacher_bias), text_weight,
        vector("text_bias", text_bias), vector("offsets", offsets), counted, role != "project", distillation, losses,
        logits, residuals, grads, distillation ? features_grad : nothing);
  const auto pull = [&](py::object x) { return distillation ? x : py::object(py::none()); };
  const py::object one = vector("one", py::float_(1.0));
  serve(dgs::calls::surgery_head_backward<Numpy>, name, residuals, image_weight, teacher_weight,
        role == "expert" ? py::none() : text_weight, one, vector("alignment", py::float_(alignment)),
        pull(features_grad), pull(one), eps, order_of(name, order), counted, distillation, features_grad);
  const auto weights = [&](int head) { return grads[py::make_tuple(head, py::slice(0, dim, 1))]; };
  const auto none_without_text = [&](py::object x) { return has_text ? x : py::object(py::none()); };
  const py::object output = py::module_::import("dgs_numpy").attr("SurgeryHeadOutput");
  return output(losses[py::int_(0)], losses[py::int_(1)], losses[py::int_(2)], logits[py::int_(0)],
                none_without_text(logits[py::int_(1)]), logits[py::int_(2)], features_grad, weights(0),
                grads[py::make_tuple(0, dim)], none_without_text(weights(1)),
                none_without_text(grads[py::make_tuple(1, dim)]), losses[py::int_(3)]);
}

constexpr const char* spectral_entropy_doc = R"(spectral_entropy(images) -> numpy.ndarray

Entropy in bits of the normalised power spectrum of the luma of every patch of 32 x 32 pixels, float32 [B, patches].

`images` are [B, 3, H, W] RGB, uint8 in 0..255 or float32 in 0..1; planar, or interleaved as decoders leave them. H and
W are cut from the bottom and the right to multiples of 32.

Example:
    >>> import numpy, dgs_numpy
    >>> image = numpy.full((64, 96, 3), 255, numpy.uint8)
    >>> dgs_numpy.spectral_entropy(image.transpose(2, 0, 1)[None]).shape
    (1, 6)
)";

py::array spectral_entropy(py::object object) {
  const py::array images = array_of("spectral_entropy", "images", object);
  const auto patches = [&](int axis) { return images.ndim() == 4 ? images.shape(axis) / dgs::entropy_patch : 0; };
  const py::ssize_t batch = images.ndim() ? images.shape(0) : 0;
  py::array_t<float> entropy({batch, patches(2) * patches(3)});
  serve(dgs::calls::spectral_entropy<Numpy>, "spectral_entropy", images, dgs::entropy_patch, entropy);
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
  m.def("surgery_head", &surgery_head, "features"_a, "teacher_features"_a, "text_features"_a, "labels"_a,
        "image_weight"_a, "image_bias"_a, "teacher_weight"_a, "teacher_bias"_a, "text_weight"_a, "text_bias"_a,
        py::kw_only(), "alignment"_a = 0.2, surgery[2], surgery[1], "reference_batch_size"_a = py::none(),
        "text"_a = "project", "offsets"_a = py::none(), "distillation"_a = 0.0, surgery_head_doc);
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
