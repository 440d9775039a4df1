// What layers/plans.py asks of a model's layers in each forward pass.
#include "plans.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <utility>

namespace wsbcn {
namespace {

THPObjectPtr attribute(PyObject* object, PyObject* name) {
  THPObjectPtr found(PyObject_GetAttr(object, name));
  if (!found) throw python_error();
  return found;
}

THPObjectPtr dict_of(PyObject* object) {
  static PyObject* const kDict = PyUnicode_InternFromString("__dict__");
  THPObjectPtr own = attribute(object, kDict);
  TORCH_CHECK_TYPE(PyDict_Check(own.get()), "expected a dict of attributes");
  return own;
}

// Whether one of several names is in an object's own dict.
template <size_t size>
bool has_of_its_own(PyObject* object, PyObject* const (&names)[size]) {
  THPObjectPtr own = dict_of(object);
  for (PyObject* const name : names) {
    const int found = PyDict_Contains(own, name);
    if (found < 0) throw python_error();
    if (found == 1) return true;
  }
  return false;
}

bool is_transposed(PyObject* layer) {
  static PyObject* const kTransposed = PyUnicode_InternFromString("transposed");
  THPObjectPtr own = dict_of(layer);
  PyObject* const found = PyDict_GetItemWithError(own, kTransposed);
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  const int is_true = found == nullptr ? 0 : PyObject_IsTrue(found);
  if (is_true < 0) throw python_error();
  return is_true == 1;
}

PyObject* name_of_rows() {
  static PyObject* const name = PyUnicode_InternFromString("standardizes_rows");
  return name;
}

// Whether it is WS of rows that layers compute, as they say themselves. Those of a class that have
// nothing of their own say the same, but for being transposed or not, unless a class of somebody
// else's answers in its own way.
class Kinds {
 public:
  bool standardize_rows(PyObject* layer) {
    static PyObject* const kMethods[] = {PyUnicode_InternFromString("standardize"),
                                         name_of_rows()};
    if (has_of_its_own(layer, kMethods)) return ask(layer);
    const std::pair kind(Py_TYPE(layer), is_transposed(layer));
    for (const auto& [known, answer] : answers_) {
      if (known == kind) return answer;
    }
    const bool answer = ask(layer);
    if (answers_as_ours(kind.first)) answers_.emplace_back(kind, answer);
    return answer;
  }

 private:
  static bool ask(PyObject* layer) {
    THPObjectPtr rows(PyObject_CallMethodNoArgs(layer, name_of_rows()));
    if (!rows) throw python_error();
    return rows.get() == Py_True;
  }

  static bool answers_as_ours(PyTypeObject* type) {
    static PyObject* const kModule = PyUnicode_InternFromString("__module__");
    static PyObject* const kOurs = PyUnicode_InternFromString("wsbcn_mm.layers.conv");
    THPObjectPtr method = attribute(reinterpret_cast<PyObject*>(type), name_of_rows());
    THPObjectPtr module(PyObject_GetAttr(method, kModule));
    if (!module) PyErr_Clear();  // what is no function need not have one
    return module && PyUnicode_Check(module.get()) && PyUnicode_Compare(module, kOurs) == 0;
  }

  std::vector<std::pair<std::pair<PyTypeObject*, bool>, bool>> answers_;
};

// Not of a weight whose memory somebody has freed: a layer that this pass does not use.
bool has_its_memory(const Tensor& weight) {
  const size_t values = weight.storage_offset() + weight.numel();
  return weight.storage().nbytes() >= values * weight.itemsize();
}

// Whether weights can be standardized in one call. Not one of a single value per output channel,
// which is refused when it is used.
bool fit_together(const Tensor& weight, const Tensor& other) {
  return !other.is_inference() && is_of_ours(other) &&
         other.scalar_type() == weight.scalar_type() && other.device() == weight.device() &&
         other.requires_grad() == weight.requires_grad() && other.dim() > 0 &&
         other.numel() > other.size(0) && is_dense(other) && has_its_memory(other);
}

// What a weak reference points to; nothing where that is gone.
THPObjectPtr target(PyObject* ref) {
  THPObjectPtr found(PyObject_CallNoArgs(ref));
  if (!found) throw python_error();
  if (found.get() == Py_None) return {};
  return found;
}

// Whether an object has its own value for one of the methods that a layer is called by.
bool has_methods_of_its_own(PyObject* object) {
  static PyObject* const kMethods[] = {PyUnicode_InternFromString("forward"),
                                       PyUnicode_InternFromString("standardized_weight")};
  return has_of_its_own(object, kMethods);
}

bool has_pre_hooks(PyObject* module) {
  static PyObject* const kHooks = PyUnicode_InternFromString("_forward_pre_hooks");
  THPObjectPtr hooks = attribute(module, kHooks);
  const int found = PyObject_IsTrue(hooks);
  if (found < 0) throw python_error();
  return found == 1;
}

}  // namespace

bool contains(PyObject* container, PyObject* layer) {
  const int found = PySequence_Contains(container, layer);
  if (found < 0) throw python_error();
  return found == 1;
}

Chunk chunk_of(PyObject* order, Py_ssize_t place, PyObject* left_out, PyObject* layer,
               const Tensor& weight, size_t most_bytes) {
  Chunk chunk;
  THPObjectPtr eps = attribute(layer, name_of_eps()), formula = attribute(layer, name_of_formula());
  Kinds kinds;
  if (!fit_together(weight, weight) || !kinds.standardize_rows(layer)) return chunk;
  chunk.layers.emplace_back(Py_NewRef(layer));
  chunk.weights.push_back(weight);
  size_t size = weight.nbytes();
  for (Py_ssize_t k = place + 1; k < PyList_GET_SIZE(order); ++k) {
    THPObjectPtr member(Py_NewRef(PyList_GET_ITEM(order, k)));
    bool stays = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(left_out); ++i) {
      stays |= contains(PyTuple_GET_ITEM(left_out, i), member);
    }
    if (stays) continue;
    OptionalTensor own = own_weight(member);
    if (!own || !fit_together(weight, *own) || !is_still(member, name_of_eps(), eps) ||
        !is_still(member, name_of_formula(), formula) || !kinds.standardize_rows(member)) {
      continue;
    }
    size += own->nbytes();
    if (size > most_bytes) break;
    chunk.layers.push_back(std::move(member));
    chunk.weights.push_back(std::move(*own));
  }
  chunk.eps = std::move(eps);
  chunk.formula = std::move(formula);
  return chunk;
}

PyObject* survey(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      number == 3 && PyList_CheckExact(arguments[0]) && PyList_CheckExact(arguments[1]),
      "expected two lists and a module or None");
  PyObject *const layers = arguments[0], *const below = arguments[1], *const opener = arguments[2];
  THPObjectPtr kinds(PyList_New(0));
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(layers); ++k) {
    THPObjectPtr layer = target(PyList_GET_ITEM(layers, k));
    if (!layer) continue;
    if (has_methods_of_its_own(layer) || !own_weight(layer)) Py_RETURN_NONE;
    PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(layer.get()));
    if (!contains(kinds, kind) && PyList_Append(kinds, kind) != 0) return nullptr;
  }
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(below); ++k) {
    PyObject* const pair = PyList_GET_ITEM(below, k);
    TORCH_CHECK_TYPE(PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) > 0, "expected tuples");
    THPObjectPtr module = target(PyTuple_GET_ITEM(pair, 0));
    if (module && module.get() != opener && has_pre_hooks(module)) Py_RETURN_NONE;
  }
  return kinds.release();
  END_HANDLE_TH_ERRORS
}

PyObject* gather(PyObject*, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      number == 6 && PyList_CheckExact(arguments[0]) && PyTuple_CheckExact(arguments[2]),
      "expected a list, a place, a tuple, a layer, its weight and a number of bytes");
  const Py_ssize_t place = PyLong_AsSsize_t(arguments[1]);
  const size_t most_bytes = PyLong_AsSize_t(arguments[5]);
  if (PyErr_Occurred()) return nullptr;
  OptionalTensor weight;
  Chunk chunk;
  if (read(arguments[4], weight) && weight) {
    chunk = chunk_of(arguments[0], place, arguments[2], arguments[3], *weight, most_bytes);
  }
  THPObjectPtr layers(PyList_New(0)), weights(PyList_New(0));
  const auto append = [&](PyObject* member, PyObject* own) {
    if (PyList_Append(layers, member) != 0 || PyList_Append(weights, own) != 0) {
      throw python_error();
    }
  };
  append(arguments[3], arguments[4]);
  for (size_t k = 1; k < chunk.layers.size(); ++k) {
    THPObjectPtr wrapped(THPVariable_Wrap(chunk.weights[k]));
    append(chunk.layers[k], wrapped);
  }
  return PyTuple_Pack(2, layers.get(), weights.get());
  END_HANDLE_TH_ERRORS
}

}  // namespace wsbcn
