// What layers call where nothing is unusual: a call of an operator through torch.ops takes longer
// than a small map, most of it to look at the arguments.
//
// Whatever is not usual (subclasses of tensors, modes, transforms, traces, tensors that do not fit)
// is answered with None: the layer then goes the way in which everything is checked and refused.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

#include "../triton/host/register.h"
#include "batch_channel_norm.h"
#include "python.h"
#include "weight_standardize.h"

namespace wsbcn {

namespace {

// Whether a mode sees what Python calls, other than that of `torch.set_default_device`, which says
// where factories make tensors and nothing else.
bool is_watched_by_a_mode() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  static PyObject* const of_devices = [] {
    THPObjectPtr module(PyImport_ImportModule("torch.utils._device"));
    if (!module) throw python_error();
    PyObject* const found = PyObject_GetAttrString(module, "DeviceContext");
    if (found == nullptr) throw python_error();
    return found;
  }();
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); ++i) {
    PyObject* const mode =
        at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != of_devices) return true;
  }
  return false;
}

}  // namespace

bool nothing_unusual() {
  return !is_watched_by_a_mode() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !torch::jit::tracer::isTracing() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr;
}

bool read(PyObject* object, OptionalTensor& tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

PyObject* name_of_eps() {
  static PyObject* const name = PyUnicode_InternFromString("eps");
  return name;
}

PyObject* name_of_formula() {
  static PyObject* const name = PyUnicode_InternFromString("formula");
  return name;
}

bool is_still(PyObject* layer, PyObject* name, PyObject* value) {
  THPObjectPtr now(PyObject_GetAttr(layer, name));
  if (!now) throw python_error();
  const int equal = PyObject_RichCompareBool(now, value, Py_EQ);  // identity counts
  if (equal < 0) throw python_error();
  return equal == 1;
}

OptionalTensor own_weight(PyObject* layer) {
  static PyObject* const kParameters = PyUnicode_InternFromString("_parameters");
  static PyObject* const kWeight = PyUnicode_InternFromString("weight");
  OptionalTensor weight;
  THPObjectPtr parameters(PyObject_GetAttr(layer, kParameters));
  if (!parameters) throw python_error();
  if (PyDict_Check(parameters.get())) {
    PyObject* const own = PyDict_GetItemWithError(parameters, kWeight);
    if (own == nullptr && PyErr_Occurred()) throw python_error();
    if (own != nullptr && !read(own, weight)) return {};
  }
  return weight;
}

bool is_of_ours(const Tensor& x) {
  if (x.layout() != at::kStrided || x.is_nested()) return false;
  switch (x.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
      return x.is_cpu() || (x.is_cuda() && gpu::is_registered());
    default:
      return false;
  }
}

at::ScalarType dtype_for(const Tensor& weight) {
  const auto device = weight.device().type();
  const bool autocast = weight.scalar_type() != at::kDouble && is_of_ours(weight) &&
                        at::autocast::is_autocast_enabled(device);
  return autocast ? at::autocast::get_autocast_dtype(device) : weight.scalar_type();
}

namespace {

bool is_usual(const Tensor& x, const Running& running) {
  const auto& [mean, var, counts, tracked] = running;
  return is_of_ours(x) && x.size(1) == mean.numel() && x.numel() > 0 &&
         x.device() == mean.device() && is_dense(x) &&
         !(counts && (counts->device() != x.device() || counts->numel() != 2 * mean.numel())) &&
         !(tracked && !(tracked->device() == x.device() && tracked->scalar_type() == at::kLong &&
                        tracked->numel() == 1));
}

// What torch's versions give for the hooks on saved tensors.
template <typename Hooks>
bool are_there(const std::optional<Hooks>& hooks) {
  return hooks.has_value();
}

[[maybe_unused]] bool are_there(const std::pair<PyObject*, PyObject*>& hooks) {
  return hooks.first != nullptr;
}

// Whether activation checkpointing may be at work, and layers/recomputation.py must be asked: it
// records without gradients or with hooks on saved tensors, and repeats in a backward pass.
bool may_be_checkpointed() {
  return !at::GradMode::is_enabled() || are_there(at::SavedTensorDefaultHooks::get_hooks()) ||
         torch::autograd::get_current_graph_task_id() != -1;
}

// batch_channel_norm(x, num_groups, running_mean, running_var, counts, num_batches_tracked,
//                    batch_weight, batch_bias, weight, bias, rate, eps, from_batch, least_dim,
//                    most_dim)
// rate and num_batches_tracked are None in evaluation; otherwise the update is counted.
PyObject* batch_channel_norm_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 15, "expected 15 arguments\n  got ", number);
  enum { kX, kGroups, kMean, kVar, kCounts, kTracked, kBatchWeight, kBatchBias, kWeight, kBias };
  enum { kRate = kBias + 1, kEps, kFromBatch, kLeastDim, kMostDim };
  OptionalTensor x, mean, var, counts, tracked, batch_weight, batch_bias, weight, bias;
  const bool readable =
      read(arguments[kX], x) && read(arguments[kMean], mean) && read(arguments[kVar], var) &&
      read(arguments[kCounts], counts) && read(arguments[kTracked], tracked) &&
      read(arguments[kBatchWeight], batch_weight) && read(arguments[kBatchBias], batch_bias) &&
      read(arguments[kWeight], weight) && read(arguments[kBias], bias);
  const int64_t groups = PyLong_AsLongLong(arguments[kGroups]);
  const double eps = PyFloat_AsDouble(arguments[kEps]);
  std::optional<double> rate;
  if (arguments[kRate] != Py_None) rate = PyFloat_AsDouble(arguments[kRate]);
  const int64_t least_dim = PyLong_AsLongLong(arguments[kLeastDim]);
  const int64_t most_dim = PyLong_AsLongLong(arguments[kMostDim]);
  if (PyErr_Occurred()) return nullptr;
  const bool from_batch = arguments[kFromBatch] == Py_True;
  if (!readable || !x || !mean || !var || x->dim() < least_dim || x->dim() > most_dim ||
      (from_batch && x->numel() == x->size(1)) || !nothing_unusual() ||
      (rate && may_be_checkpointed()) || !is_usual(*x, {*mean, *var, counts, tracked})) {
    Py_RETURN_NONE;
  }
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("wsbcn_mm::batch_channel_norm", c10::ArrayRef<const c10::IValue>{});
    y = batch_channel_norm(*x, groups, *mean, *var, counts, tracked, batch_weight, batch_bias,
                           weight, bias, rate, std::nullopt, eps, from_batch);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// weight_standardize(weight, eps, formula): what a convolution computes with, or None.
PyObject* weight_standardize_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 3, "expected 3 arguments\n  got ", number);
  OptionalTensor weight;
  const double eps = PyFloat_AsDouble(arguments[1]);
  Py_ssize_t length = 0;
  const char* const formula = PyUnicode_AsUTF8AndSize(arguments[2], &length);
  if (PyErr_Occurred()) return nullptr;
  if (!read(arguments[0], weight) || !weight || !nothing_unusual() || !is_of_ours(*weight) ||
      weight->numel() == 0 || !is_dense(*weight)) {
    Py_RETURN_NONE;
  }
  Tensor w_hat;
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("wsbcn_mm::weight_standardize", c10::ArrayRef<const c10::IValue>{});
    w_hat = weight_standardize(*weight, eps, {formula, static_cast<size_t>(length)},
                               dtype_for(*weight));
  }
  return THPVariable_Wrap(w_hat);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"batch_channel_norm", reinterpret_cast<PyCFunction>(batch_channel_norm_or_none), METH_FASTCALL,
     "The result, or None where something is unusual."},
    {"weight_standardize", reinterpret_cast<PyCFunction>(weight_standardize_or_none), METH_FASTCALL,
     "The result, or None where something is unusual."},
    {"weight_standardize_all", reinterpret_cast<PyCFunction>(weight_standardize_all_or_none),
     METH_FASTCALL, "StandardizedWeights, or None where something is unusual."},
    {"get_usual", reinterpret_cast<PyCFunction>(get_usual), METH_FASTCALL,
     "The standardized weight of a layer in a scope, or None where something is unusual."},
    {"note_change", note_change, METH_NOARGS, "Ends whatever results hold for."},
    {"state", reinterpret_cast<PyCFunction>(state_or_none), METH_FASTCALL,
     "What a standardized weight depends on, or None where something is unusual."},
    {"survey", reinterpret_cast<PyCFunction>(survey), METH_FASTCALL,
     "The classes of layers before whose use nothing unusual runs, or None."},
    {"gather", reinterpret_cast<PyCFunction>(gather), METH_FASTCALL,
     "Layers that are standardized together, and their weights."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods};

}  // namespace
}  // namespace wsbcn

PyMODINIT_FUNC PyInit__kernels() {
  return PyModule_Create(&wsbcn::module);
}
