// The standardized weights of a scope: each with what it holds for. What layers/scopes.py asks at
// every use of a layer.
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/hash.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <vector>

#include "../triton/host/register.h"
#include "python.h"
#include "weight_standardize.h"

namespace wsbcn {
namespace {

// Whatever a standardized weight depends on, but for eps, formula and the writes that torch does
// not count.
struct State {
  const void *tensor, *data;
  int64_t version, size, stream, capture, graph_task, backward_calls;
  int8_t requires_grad, grad_mode, inference_mode, dtype, result_dtype;
};

// Its bytes are equal as long as a result holds; nothing where it cannot be known.
std::optional<State> state_of(const Tensor& weight, bool one_pass) {
  if (weight.is_inference() || weight.layout() != at::kStrided || weight.is_meta()) return {};
  State state;
  std::memset(&state, 0, sizeof state);  // what lies between the values is compared too
  state.tensor = weight.unsafeGetTensorImpl();
  state.data = weight.has_storage() ? weight.storage().data() : nullptr;
  state.version = weight._version();
  state.size = c10::get_hash(weight.sizes(), weight.strides(), weight.storage_offset());
  if (weight.is_cuda()) {
    state.stream = c10::impl::getDeviceGuardImpl(at::kCUDA)->getStream(weight.device()).id();
    if (gpu::is_registered()) {
      const std::optional<int64_t> capture = gpu::capture_on(weight.device());
      if (!capture) return {};
      state.capture = *capture;
    }
  }
  state.graph_task = torch::autograd::get_current_graph_task_id();
  state.backward_calls = one_pass ? backward_calls() : 0;
  state.requires_grad = weight.requires_grad();
  state.grad_mode = at::GradMode::is_enabled();
  state.inference_mode = c10::InferenceMode::is_enabled();
  state.dtype = static_cast<int8_t>(weight.scalar_type());
  state.result_dtype = static_cast<int8_t>(dtype_for(weight));
  return state;
}

bool are_equal(const State& one, const State& other) {
  return std::memcmp(&one, &other, sizeof one) == 0;
}

// What weight_standardize_all gave, in the order of its weights.
struct Held {
  std::vector<Tensor> weights, w_hats;
  std::vector<State> states;
  std::vector<bool> joined;  // whether a result belongs to the graph
  bool one_pass, differentiable;
};

struct StandardizedWeights {
  PyObject_HEAD
  Held* held;
};

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<StandardizedWeights*>(self)->held;
  type->tp_free(self);
  Py_DECREF(type);
}

// take(index, weight): the result for a weight, which from the first time on belongs to the graph;
// None where it is not, or no longer, that of this weight as it is.
PyObject* take(PyObject* self, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 2, "expected 2 arguments\n  got ", number);
  Held& held = *reinterpret_cast<StandardizedWeights*>(self)->held;
  const size_t index = PyLong_AsSize_t(arguments[0]);
  if (PyErr_Occurred()) return nullptr;
  TORCH_CHECK_INDEX(index < held.weights.size(), "expected an index below ", held.weights.size(),
                    "\n  got ", index);
  OptionalTensor weight;
  if (!read(arguments[1], weight) || !weight || !weight->is_same(held.weights[index]) ||
      !nothing_unusual()) {
    Py_RETURN_NONE;
  }
  const std::optional<State> state = state_of(*weight, held.one_pass);
  if (!state || !are_equal(*state, held.states[index])) Py_RETURN_NONE;
  if (held.differentiable && !held.joined[index]) {
    held.joined[index] = true;
    join(held.w_hats[index], *weight);
  }
  return THPVariable_Wrap(held.w_hats[index]);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"take", reinterpret_cast<PyCFunction>(take), METH_FASTCALL,
                          "The result for a weight, or None where it does not hold."},
                         {nullptr, nullptr, 0, nullptr}};

PyTypeObject* type() {
  static PyTypeObject* const made = [] {
    static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
                                  {Py_tp_methods, methods},
                                  {0, nullptr}};
    static PyType_Spec spec = {
        "wsbcn_mm.backends.cpu._kernels.StandardizedWeights", sizeof(StandardizedWeights), 0,
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  }();
  return made;
}

PyObject* wrap(Held held) {
  if (type() == nullptr) return nullptr;
  PyObject* const result = type()->tp_alloc(type(), 0);
  if (result != nullptr) {
    reinterpret_cast<StandardizedWeights*>(result)->held = new Held(std::move(held));
  }
  return result;
}

}  // namespace

PyObject* state_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 2, "expected 2 arguments\n  got ", number);
  OptionalTensor weight;
  if (!read(arguments[0], weight) || !weight || !nothing_unusual()) Py_RETURN_NONE;
  const std::optional<State> state = state_of(*weight, arguments[1] == Py_True);
  if (!state) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&*state), sizeof *state);
  END_HANDLE_TH_ERRORS
}

PyObject* weight_standardize_all_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 5 && PyList_CheckExact(arguments[0]),
                   "expected a list and 4 other arguments");
  const double eps = PyFloat_AsDouble(arguments[1]);
  Py_ssize_t length = 0;
  const char* const formula = PyUnicode_AsUTF8AndSize(arguments[2], &length);
  if (PyErr_Occurred()) return nullptr;
  const at::ScalarType dtype = reinterpret_cast<THPDtype*>(arguments[3])->scalar_type;
  Held held;
  held.one_pass = arguments[4] == Py_True;
  const Py_ssize_t count = PyList_GET_SIZE(arguments[0]);
  held.weights.reserve(count);
  held.states.reserve(count);
  for (Py_ssize_t k = 0; k < count; ++k) {
    OptionalTensor weight;
    if (!read(PyList_GET_ITEM(arguments[0], k), weight) || !weight || !is_of_ours(*weight)) {
      Py_RETURN_NONE;
    }
    const std::optional<State> state = state_of(*weight, held.one_pass);
    if (!state) Py_RETURN_NONE;
    held.weights.push_back(std::move(*weight));
    held.states.push_back(*state);
  }
  if (held.weights.empty() || !nothing_unusual() || dtype_for(held.weights[0]) != dtype) {
    Py_RETURN_NONE;
  }
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("wsbcn_mm::weight_standardize_all", c10::ArrayRef<const c10::IValue>{});
    held.w_hats = weight_standardize_all(held.weights, eps,
                                         {formula, static_cast<size_t>(length)}, dtype);
  }
  held.joined.resize(count, false);
  held.differentiable = held.w_hats[0].grad_fn() != nullptr;
  return wrap(std::move(held));
  END_HANDLE_TH_ERRORS
}

}  // namespace wsbcn
