// What the functions of the compiled extension that Python calls directly have in common.
#pragma once

#include <Python.h>

#include "carriers.h"

namespace wsbcn {

// Whether results are what they seem: no mode watches, no transform wraps, no tangent goes along.
bool nothing_unusual();

// A tensor, None, or neither of the two as they should be.
bool read(PyObject* object, OptionalTensor& tensor);

// The attributes of a layer that say how it standardizes.
PyObject* name_of_eps();
PyObject* name_of_formula();

// Whether an attribute is what it was.
bool is_still(PyObject* layer, PyObject* name, PyObject* value);

// Not `layer.weight`: reading a parametrized weight computes it. None: it has no plain one.
OptionalTensor own_weight(PyObject* layer);

// Whether there are kernels and nodes for a tensor.
bool is_of_ours(const Tensor& x);

// The dtype in which a weight is standardized: its own, or that of autocast.
at::ScalarType dtype_for(const Tensor& weight);

// state(weight, one_pass): the bytes of its state, or None.
PyObject* state_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number);

// get_usual(held, used, frame, order, left_out, open_table, one_pass, layer): the standardized
// weight of a layer in a scope; None where that is not for C++ to say: hooks watch it, what is held
// holds no longer, something is unusual. Where nothing is held, those behind it come along.
//   held: layer -> (results, index, eps, formula), of each the last one
//   used: the layers whose result was used
//   frame: the function call that the scope ends with, or None
//   order: layers
//   left_out: those that are not for here
//   open_table(weight): where to note results too, as in `held`, and how many bytes may be
//     standardized together; None: nothing may
//   one_pass: whether a backward pass ends what is held
PyObject* get_usual(PyObject*, PyObject* const* arguments, Py_ssize_t number);

// survey(layers, below, opener): the classes of layers; None where somebody's own code may run
// before one of them is used, or one has no plain weight: a method set on it, a forward pre-hook.
//   layers: weak references
//   below: tuples, each with a weak reference to a module that a layer lies in, or is
//   opener: a module whose hooks do not count, or None
PyObject* survey(PyObject*, PyObject* const* arguments, Py_ssize_t number);

// gather(order, place, left_out, layer, weight, most_bytes): what is standardized together with the
// weight of a layer, two lists: layers, itself the first, and their weights.
//   order: layers, of which those behind `place` may come along
//   left_out: containers of layers that do not
PyObject* gather(PyObject*, PyObject* const* arguments, Py_ssize_t number);

// note_change(): ends whatever results hold for.
PyObject* note_change(PyObject*, PyObject*);

// weight_standardize_all(weights, eps, formula, dtype, one_pass): StandardizedWeights, or None.
PyObject* weight_standardize_all_or_none(PyObject*, PyObject* const* arguments, Py_ssize_t number);

}  // namespace wsbcn
