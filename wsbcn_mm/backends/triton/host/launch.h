// Starts the kernels of triton/jit through the driver of the GPU.
//
// A variant of a kernel is what Triton compiles it for: the dtypes and the alignment of its
// pointers, the width of its numbers, its constants. The first use of a variant asks Python for it
// (`compile_kernel` in triton/variants.py); from then on no Python runs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>

#include "../../nodes/carriers.h"

namespace wsbcn::gpu {

// How work is cut; the values and their reasons stand in triton/cuts.py and triton/weights.py.
struct Limits {
  int64_t tile, reducing, applying, held, held_backward, held_at_once, held_samples;
  int64_t weights_at_once, weights_tile;
};

const Limits& limits();

// An argument of a kernel; without an address: None.
struct Pointer {
  void* address = nullptr;
  at::ScalarType dtype = at::kFloat;
};

// What a kernel reads. Tensors that are not there, or empty, are None.
Pointer read(const Tensor& tensor);
Pointer read(const OptionalTensor& tensor);
// What it writes.
Pointer written(const Tensor& tensor);

// A constant that a kernel is compiled for. Python knows choices by their place.
struct Constant {
  const char* name;
  int64_t value;
};

struct Grid {
  int64_t x = 1, y = 1;
};

// What `start` takes: the arguments of a kernel as its Python function lists them, all pointers
// first.
struct Arguments {
  at::ArrayRef<Pointer> pointers;
  at::ArrayRef<int64_t> numbers;
  at::ArrayRef<Constant> constants;
  // The first pointers are so many tuples of so many.
  int64_t tuples = 0, tuple_size = 0;
};

// Launches a kernel on the current stream of a device, which must be the current one.
void start(const char* kernel, Grid grid, c10::Device device, const Arguments& arguments);

// A float as the kernels take it: its 64 bits.
int64_t bits(double value);

}  // namespace wsbcn::gpu
