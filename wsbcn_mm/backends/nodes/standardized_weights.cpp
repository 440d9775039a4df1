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
#include "plans.h"
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

// StandardizedWeights; None where something is unusual.
PyObject* standardize_together(std::vector<Tensor> weights, double eps, std::string_view formula,
                               std::optional<at::ScalarType> dtype, bool one_pass) {
  Held held;
  held.one_pass = one_pass;
  held.weights = std::move(weights);
  if (held.weights.empty() || !nothing_unusual()) Py_RETURN_NONE;
  const c10::Device device = held.weights[0].device();
  for (const Tensor& weight : held.weights) {
    if (!is_of_ours(weight) || !has_state(weight) || weight.device() != device) Py_RETURN_NONE;
  }
  const std::optional<Context> context = context_of(device, one_pass);
  const at::ScalarType of_results = dtype_for(held.weights[0]);
  if (!context || dtype.value_or(of_results) != of_results) Py_RETURN_NONE;
  held.states.reserve(held.weights.size());
  for (const Tensor& weight : held.weights) held.states.push_back(state_of(weight, *context));
  {
    pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("wsbcn_mm::weight_standardize_all", c10::ArrayRef<const c10::IValue>{});
    held.w_hats = weight_standardize_all(held.weights, eps, formula, of_results);
  }
  held.used.resize(held.weights.size(), false);
  return wrap(std::move(held));
}

std::string_view text_of(PyObject* object) {
  Py_ssize_t length = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(object, &length);
  if (text == nullptr) throw python_error();
  return {text, static_cast<size_t>(length)};
}

Py_ssize_t place_in(PyObject* order, PyObject* layer) {
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(order); ++k) {
    if (PyList_GET_ITEM(order, k) == layer) return k;
  }
  return -1;
}

// Of a scope; see python.h, `get_usual`.
struct ScopeArguments {
  PyObject *held, *used, *frame, *order, *left_out, *open_table;
  bool one_pass;
};

// Adds to what is held the weight of a layer, and those that are used after it.
void standardize_now(const ScopeArguments& scope, PyObject* layer) {
  const Py_ssize_t place = place_in(scope.order, layer);
  const OptionalTensor weight = own_weight(layer);
  if (place < 0 || !weight || !nothing_unusual() || contains(scope.left_out, layer)) return;
  THPObjectPtr wrapped(THPVariable_Wrap(*weight));
  THPObjectPtr opened(PyObject_CallOneArg(scope.open_table, wrapped));
  if (!opened) throw python_error();
  if (opened.get() == Py_None) return;
  PyObject* table;
  Py_ssize_t most_bytes;
  if (!PyArg_ParseTuple(opened, "O!n", &PyDict_Type, &table, &most_bytes)) throw python_error();
  if (contains(table, layer)) return;  // it holds no longer
  THPObjectPtr left_out(PyTuple_Pack(2, table, scope.left_out));
  if (!left_out) throw python_error();
  Chunk chunk = chunk_of(scope.order, place, left_out, layer, *weight, most_bytes);
  if (chunk.layers.empty()) return;
  const double eps = PyFloat_AsDouble(chunk.eps);
  if (PyErr_Occurred()) throw python_error();
  THPObjectPtr results(standardize_together(std::move(chunk.weights), eps, text_of(chunk.formula),
                                            std::nullopt, scope.one_pass));
  if (!results) throw python_error();
  if (results.get() == Py_None) return;
  for (size_t k = 0; k < chunk.layers.size(); ++k) {
    THPObjectPtr entry(Py_BuildValue("(OnOO)", results.get(), static_cast<Py_ssize_t>(k),
                                     chunk.eps.get(), chunk.formula.get()));
    if (!entry || PyDict_SetItem(table, chunk.layers[k], entry) != 0 ||
        PyDict_SetItem(scope.held, chunk.layers[k], entry) != 0) {
      throw python_error();
    }
  }
}

// Borrowed; null where there is none.
PyObject* entry_of(PyObject* held, PyObject* layer) {
  PyObject* const found = PyDict_GetItemWithError(held, layer);
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

}  // namespace

PyObject* get_usual(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(number == 8 && PyDict_CheckExact(arguments[0]) &&
                       PyDict_CheckExact(arguments[1]) && PyList_CheckExact(arguments[3]),
                   "expected two dicts, a frame or None, a list and 4 other arguments");
  static PyObject* const kHooks = PyUnicode_InternFromString("standardized_hooks");
  const ScopeArguments scope{arguments[0], arguments[1], arguments[2],           arguments[3],
                             arguments[4], arguments[5], arguments[6] == Py_True};
  PyObject* const layer = arguments[7];
  if (scope.frame != Py_None && !is_running(scope.frame)) Py_RETURN_NONE;
  if (entry_of(scope.held, layer) == nullptr) standardize_now(scope, layer);
  THPObjectPtr found(Py_XNewRef(entry_of(scope.held, layer)));
  if (!found) Py_RETURN_NONE;
  PyObject *results, *eps, *formula;
  Py_ssize_t place;
  if (!PyArg_ParseTuple(found, "OnOO", &results, &place, &eps, &formula)) return nullptr;
  // Other results have their methods in Python.
  if (!Py_IS_TYPE(results, type())) Py_RETURN_NONE;
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
    if (PyDict_SetItem(scope.used, layer, Py_None) != 0) return nullptr;
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
  if (PyErr_Occurred()) return nullptr;
  const at::ScalarType dtype = reinterpret_cast<THPDtype*>(arguments[3])->scalar_type;
  std::vector<Tensor> weights;
  weights.reserve(PyList_GET_SIZE(arguments[0]));
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(arguments[0]); ++k) {
    OptionalTensor weight;
    if (!read(PyList_GET_ITEM(arguments[0], k), weight) || !weight) Py_RETURN_NONE;
    weights.push_back(std::move(*weight));
  }
  return standardize_together(std::move(weights), eps, text_of(arguments[2]), dtype,
                              arguments[4] == Py_True);
  END_HANDLE_TH_ERRORS
}

}  // namespace wsbcn
