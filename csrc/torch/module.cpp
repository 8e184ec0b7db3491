// The Python module dgs_kernels._native: the kernels on torch's tensors. Hundreds of tensors a call take torch's
// dispatcher longer than the kernels, and a call on a small batch as long. So tensors come past it, through DLPack's C
// exchange API and Python's limited API; one binary serves all versions of both. dgs_kernels/ops documents the
// operators, and registers them with torch for whoever wants to see them there.
//
// Every function returns None, or in words why it has left the call alone (calls.h). Of a subclass of tensors, and of
// one whose numbers are not those that lie in memory, nothing is known here. So the usual call looks at each tensor
// once, here.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <ATen/dlpack.h>

#include <exception>
#include <initializer_list>

#include "calls.h"
#include "runtime.h"

namespace dgs::calls {
namespace {

const DLPackExchangeAPI* exchange;
PyObject *tensor_type, *parameter_type;
// Methods of torch's tensors, as functions of C: through Python each would take several times as long.
PyCFunction is_neg, storage_offset;

Element element_of(DLDataType type) {
  if (type.lanes != 1) return Element::other;
  if (type.code == kDLFloat && type.bits == 32) return Element::f32;
  if (type.code == kDLFloat && type.bits == 64) return Element::f64;
  if (type.code == kDLBfloat && type.bits == 16) return Element::bf16;
  if (type.code == kDLFloat && type.bits == 16) return Element::f16;
  return type.code == kDLUInt && type.bits == 8 ? Element::u8 : Element::other;
}

// Whether torch reads the numbers with their signs changed, as in the imaginary part of a conjugate.
bool negated(const View& x) {
  PyObject* const answer = is_neg(x.object, nullptr);
  Py_XDECREF(answer);
  return answer != Py_False;
}

// Whether the numbers lie in memory. Those of zero tensors (autograd makes them where a derivative is zero), of tensors
// under functionalize and of a freed storage do not: their address is no more than the way from the storage's start.
// Torch is asked only of addresses below a tebibyte, where few memories lie.
bool in_memory(const View& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.data);
  if (address >> 40 || x.numel() == 0) return true;
  PyObject* const offset = storage_offset(x.object, nullptr);
  const int64_t way = offset ? PyLong_AsLongLong(offset) * size_of(x.element) : -1;
  Py_XDECREF(offset);
  PyErr_Clear();
  return address && way != int64_t(address);
}

struct Torch {
  static constexpr cpu::ParallelFor parallel_for = torch_runtime::parallel_for;

  // on_cpu(), or on_cuda(allocate, stream) on torch's current stream there; other Python threads run meanwhile.
  template <typename Cpu, typename Cuda>
  static bool launch(Call& call, Device device, Cpu on_cpu, Cuda on_cuda) {
#ifndef DGS_CUDA
    if (device.cuda) return call.refuse("this library was built without CUDA kernels");
#endif
    struct WithoutLock {
      PyThreadState* const state = PyEval_SaveThread();
      ~WithoutLock() { PyEval_RestoreThread(state); }
    } unlocked;
    if (!device.cuda) {
      on_cpu();
      return true;
    }
#ifdef DGS_CUDA
    const auto allocate = torch_runtime::memory_on(device.index);
    torch_runtime::on_stream(device.index, [&](void* stream) { return on_cuda(allocate, stream); });
#endif
    return true;
  }
};

}  // namespace

void View::of(PyObject* given, Call& call) {
  object = given;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(given));
  DLTensor found;
  if (type != tensor_type && type != parameter_type) {
    call.refuse(called() + " is no plain tensor");
  } else if (exchange->dltensor_from_py_object_no_sync(given, &found) != 0) {
    PyErr_Clear();
    call.refuse(called() + " has no memory, or none that it could show");
  } else {
    data = static_cast<char*>(found.data) + found.byte_offset;
    element = element_of(found.dtype);
    device = {found.device.device_type == kDLCUDA, found.device.device_id};
    ndim = found.ndim, shape = found.shape, strides = found.strides;
    if (!device.cuda && found.device.device_type != kDLCPU) call.refuse(called() + " is on another device");
    if (!in_memory(*this)) call.refuse(called() + " has no memory of its own");
    if (negated(*this)) call.refuse(called() + " is a negated view");
  }
}

namespace {

// As Python calls it, with `count` arguments in a row.
template <bool (*serve)(Call&), Py_ssize_t count>
PyObject* function(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "dgs_kernels._native: expected %zd arguments, got %zd", count, given);
    return nullptr;
  }
  try {
    Call call(arguments);
    if (!serve(call)) return PyUnicode_FromString(call.reason.c_str());
    Py_RETURN_NONE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <bool (*serve)(Call&), Py_ssize_t count>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function<serve, count>)), METH_FASTCALL,
          "See dgs_kernels/ops: the operator's arguments there, and then its results."};
}

PyMethodDef methods[] = {
    method<project_align<Torch>, 9>("project_align"),
    method<surgery_head<Torch>, 21>("surgery_head"),
    method<surgery_head_backward<Torch>, 14>("surgery_head_backward"),
    method<spectral_entropy<Torch>, 3>("spectral_entropy"),
    method<project_align_<Torch>, 11>("project_align_"),
    method<gramian<Torch>, 4>("gramian"),
    method<combine_<Torch>, 4>("combine_"),
    method<surgery_adamw_<Torch>, 21>("surgery_adamw_"),
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

// A method of a tensor without arguments; null and a Python error if there is none.
PyCFunction method_of(PyObject* tensor, const char* name) {
  PyObject* const method = tensor ? PyObject_GetAttrString(tensor, name) : nullptr;
  const PyCFunction found =
      method && PyCFunction_GetFlags(method) == METH_NOARGS ? PyCFunction_GetFunction(method) : nullptr;
  if (!found && !PyErr_Occurred()) PyErr_Format(PyExc_ImportError, "this torch has another Tensor.%s", name);
  Py_XDECREF(method);
  return found;
}

}  // namespace
}  // namespace dgs::calls

PyMODINIT_FUNC PyInit__native() {
  using namespace dgs::calls;
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native",
                                   "The kernels on torch's tensors; `devices` says for which.", -1, methods};
  tensor_type = find("torch", {"Tensor"});
  parameter_type = find("torch", {"nn", "Parameter"});
  PyObject* const tensor = tensor_type ? PyObject_CallFunctionObjArgs(tensor_type, nullptr) : nullptr;
  is_neg = method_of(tensor, "is_neg"), storage_offset = method_of(tensor, "storage_offset");
  Py_XDECREF(tensor);
  PyObject* const capsule = find("torch", {"Tensor", "__dlpack_c_exchange_api__"});
  if (!parameter_type || !is_neg || !storage_offset || !capsule) return nullptr;
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
