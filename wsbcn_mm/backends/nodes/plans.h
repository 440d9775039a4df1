// Which weights are standardized together; see layers/plans.py.
#pragma once

#include <torch/csrc/utils/object_ptr.h>

#include <vector>

#include "python.h"

namespace wsbcn {

// Layers that compute WS of rows alike, and their weights; empty where the first one does not.
struct Chunk {
  std::vector<THPObjectPtr> layers;
  std::vector<Tensor> weights;
  THPObjectPtr eps, formula;
};

// A layer, and those behind its place in `order` that are in none of the containers `left_out`, a
// tuple: of `most_bytes` in all, but for a first one that is larger.
Chunk chunk_of(PyObject* order, Py_ssize_t place, PyObject* left_out, PyObject* layer,
               const Tensor& weight, size_t most_bytes);

bool contains(PyObject* container, PyObject* layer);

}  // namespace wsbcn
