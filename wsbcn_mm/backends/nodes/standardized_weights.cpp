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
#include <torch/csrc/utils/object_ptr.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "../triton/host/register.h"
#include "python.h"
#include "weight_standardize.h"

namespace wsbcn {
namespace {

// See backends/states.py, `note_change`.
std::atomic<int64_t> changes_so_far{0};

// What a standardized weight depends on beside the weight: of this thread, and of the device.
struct Context {
  int64_t stream, capture, graph_task, backward_calls, changes;
  int8_t grad_mode, inference_mode;
};

// Whatever it depends on, but for eps, formula and the writes that torch does not count.
struct State {
  Context context;
  const void *tensor, *data;
  int64_t version, size;
  int8_t requires_grad, dtype, result_dtype;
};

// Nothing where it cannot be known.
std::optional<Context> context_of(c10::Device device, bool one_pass) {
  Context context;
  std::memset(&context, 0, sizeof context);  // what lies between the values is compared too
  if (device.is_cuda()) {
    context.stream = c10::impl::getDeviceGuardImpl(at::kCUDA)->getStream(device).id();
    if (gpu::is_registered()) {
      const std::optional<int64_t> capture = gpu::capture_on(device);
      if (!capture) return {};
      context.capture = *capture;
    }
  }
  context.graph_task = torch::autograd::get_current_graph_task_id();
  context.backward_calls = one_pass ? backward_calls() : 0;
  context.changes = changes_so_far;
  context.grad_mode = at::GradMode::is_enabled();
  context.inference_mode = c10::InferenceMode::is_enabled();
  return context;
}

bool has_state(const Tensor& weight) {
  return !weight.is_inference() && weight.layout() == at::kStrided && !weight.is_meta();
}

// Its bytes are equal as long as a result holds; of a weight that has one.
State state_of(const Tensor& weight, const Context& context) {
  State state;
  std::memset(&state, 0, sizeof state);
  std::memcpy(&state.context, &context, sizeof context);
  state.tensor = weight.unsafeGetTensorImpl();
  state.data = weight.has_storage() ? weight.storage().data() : nullptr;
  state.version = weight._version();
  state.size = c10::get_hash(weight.sizes(), weight.strides(), weight.storage_offset());
  state.requires_grad = weight.requires_grad();
  state.dtype = static_cast<int8_t>(weight.scalar_type());
  state.result_dtype = static_cast<int8_t>(dtype_for(weight));
  return state;
}

std::optional<State> state_of(const Tensor& weight, bool one_pass) {
  if (!has_state(weight)) return {};
  const std::optional<Context> context = context_of(weight.device(), one_pass);
  if (!context) return {};
  return state_of(weight, *context);
}

bool are_equal(const State& one, const State& other) {
  return std::memcmp(&one, &other, sizeof one) == 0;
}

// What weight_standardize_all gave, in the order of its weights.
struct Held {
  std::vector<Tensor> weights, w_hats;
  std::vector<State> states;
  std::vector<bool> used;
  bool one_pass;

  // See `take`; without a value where the result does not hold.
  OptionalTensor result_for(const Tensor& weight, size_t index) {
    if (!weight.is_same(weights[index]) || !nothing_unusual()) return {};
    const std::optional<State> state = state_of(weight, one_pass);
    if (!state || !are_equal(*state, states[index])) return {};
    return w_hats[index];
  }
};

struct StandardizedWeights {
  PyObject_HEAD Held* held;
};

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<StandardizedWeights*>(self)->held;
  type->tp_free(self);
  Py_DECREF(type);
}

// The place of a result; -1 with an exception where there is none.
Py_ssize_t place_of(PyObject* index, const Held& held) {
  const Py_ssize_t place = PyLong_AsSsize_t(index);
  if (PyErr_Occurred()) return -1;
  const Py_ssize_t size = held.weights.size();
  TORCH_CHECK_INDEX(place >= 0 && place < size, "expected an index below ", size, "\n  got ",
                    place);
  return place;
}

// take(index, weight): the result for a weight; None where it is not, or no longer, that of this
// weight as it is.
PyObject* take(PyObject* self, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 2, "expected 2 arguments\n  got ", number);
  Held& held = *reinterpret_cast<StandardizedWeights*>(self)->held;
  const Py_ssize_t place = place_of(arguments[0], held);
  if (place < 0) return nullptr;
  OptionalTensor weight;
  if (!read(arguments[1], weight) || !weight) Py_RETURN_NONE;
  const OptionalTensor w_hat = held.result_for(*weight, place);
  if (!w_hat) Py_RETURN_NONE;
  return THPVariable_Wrap(*w_hat);
  END_HANDLE_TH_ERRORS
}

// use(index): whether this is the first use of a result.
PyObject* use(PyObject* self, PyObject* index) {
  HANDLE_TH_ERRORS
  Held& held = *reinterpret_cast<StandardizedWeights*>(self)->held;
  const Py_ssize_t place = place_of(index, held);
  if (place < 0) return nullptr;
  const bool first = !held.used[place];
  held.used[place] = true;
  return PyBool_FromLong(first);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"take", reinterpret_cast<PyCFunction>(take), METH_FASTCALL,
                          "The result for a weight, or None where it does not hold."},
                         {"use", use, METH_O, "Whether this is the first use of a result."},
                         {nullptr, nullptr, 0, nullptr}};

PyTypeObject* type() {
  static PyTypeObject* const made = [] {
    static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
                                  {Py_tp_methods, methods},
                                  {0, nullptr}};
    static PyType_Spec spec = {"wsbcn_mm.backends.cpu._kernels.StandardizedWeights",
                               sizeof(StandardizedWeights), 0,
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

// Whether a function call runs in this thread.
bool is_running(PyObject* frame) {
  PyObject* current = Py_XNewRef(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (current != nullptr && current != frame) {
    PyObject* const caller =
        reinterpret_cast<PyObject*>(PyFrame_GetBack(reinterpret_cast<PyFrameObject*>(current)));
    Py_DECREF(current);
    current = caller;
  }
  Py_XDECREF(current);
  return current != nullptr;
}

}  // namespace

PyObject* find_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      number == 4 && PyDict_CheckExact(arguments[0]) && PyDict_CheckExact(arguments[1]),
      "expected two dicts, a frame or None and a layer");
  static PyObject* const kHooks = PyUnicode_InternFromString("standardized_hooks");
  PyObject *const used = arguments[1], *const frame = arguments[2], *const layer = arguments[3];
  THPObjectPtr found(Py_XNewRef(PyDict_GetItemWithError(arguments[0], layer)));
  if (!found) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  PyObject *results, *eps, *formula;
  Py_ssize_t place;
  if (!PyArg_ParseTuple(found, "OnOO", &results, &place, &eps, &formula)) return nullptr;
  // Other results have their methods in Python.
  if (!Py_IS_TYPE(results, type()) || (frame != Py_None && !is_running(frame))) Py_RETURN_NONE;
  const bool computes_the_same =
      is_still(layer, name_of_eps(), eps) && is_still(layer, name_of_formula(), formula);
  Held& held = *reinterpret_cast<StandardizedWeights*>(results)->held;
  if (!held.used[place]) {
    THPObjectPtr hooks(PyObject_GetAttr(layer, kHooks));
    if (!hooks) return nullptr;
    const int is_watched = PyObject_IsTrue(hooks);
    if (is_watched < 0) return nullptr;
    if (is_watched) Py_RETURN_NONE;
  }
  const OptionalTensor weight = own_weight(layer);
  if (!computes_the_same || !weight) Py_RETURN_NONE;
  const OptionalTensor w_hat = held.result_for(*weight, place);
  if (!w_hat) Py_RETURN_NONE;
  if (!held.used[place]) {
    held.used[place] = true;
    if (PyDict_SetItem(used, layer, Py_None) != 0) return nullptr;
  }
  return THPVariable_Wrap(*w_hat);
  END_HANDLE_TH_ERRORS
}

PyObject* note_change(PyObject*, PyObject*) {
  ++changes_so_far;
  Py_RETURN_NONE;
}

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
  std::optional<c10::Device> device;
  std::optional<Context> context;
  for (Py_ssize_t k = 0; k < count; ++k) {
    OptionalTensor weight;
    if (!read(PyList_GET_ITEM(arguments[0], k), weight) || !weight || !is_of_ours(*weight) ||
        !has_state(*weight)) {
      Py_RETURN_NONE;
    }
    if (!device) {
      device = weight->device();
      context = context_of(*device, held.one_pass);
    }
    if (!context || weight->device() != *device) Py_RETURN_NONE;
    held.states.push_back(state_of(*weight, *context));
    held.weights.push_back(std::move(*weight));
  }
  if (held.weights.empty() || !nothing_unusual() || dtype_for(held.weights[0]) != dtype) {
    Py_RETURN_NONE;
  }
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("wsbcn_mm::weight_standardize_all", c10::ArrayRef<const c10::IValue>{});
    held.w_hats =
        weight_standardize_all(held.weights, eps, {formula, static_cast<size_t>(length)}, dtype);
  }
  held.used.resize(count, false);
  return wrap(std::move(held));
  END_HANDLE_TH_ERRORS
}

}  // namespace wsbcn
