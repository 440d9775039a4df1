#include "memory.h"

#include <ATen/ops/empty.h>

#include "../../nodes/checks.h"
#include "../../nodes/memory.h"

namespace wsbcn::gpu {
namespace {

// So that what follows starts at a multiple of 16 bytes: Triton compiles a kernel for the alignment
// of its pointers.
int64_t padded(int64_t size) {
  return (size + 3) / 4 * 4;
}

Tensor memory_of(const Tensor& x, int64_t size) {
  return at::empty({size}, x.options().dtype(accumulation_dtype(x)).memory_format(std::nullopt));
}

}  // namespace

std::vector<Tensor> small_results(const Tensor& x, std::initializer_list<at::IntArrayRef> shapes) {
  int64_t size = 0;
  for (const at::IntArrayRef shape : shapes) size += padded(c10::multiply_integers(shape));
  const Tensor memory = memory_of(x, size);
  std::vector<Tensor> results;
  results.reserve(shapes.size());
  int64_t start = 0;
  for (const at::IntArrayRef shape : shapes) {
    c10::SmallVector<int64_t, 2> strides(shape.size(), 1);
    for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
    results.push_back(part_of(memory, shape, strides, start));
    start += padded(c10::multiply_integers(shape));
  }
  return results;
}

Scratch::Scratch(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const int64_t itemsize = c10::elementSize(accumulation_dtype(x));
  int64_t size = 0;
  for (const int64_t wanted : sizes) {
    starts_.push_back(size * itemsize);
    size += padded(wanted);
  }
  memory_ = memory_of(x, size);
}

Pointer Scratch::operator[](size_t index) const {
  return {static_cast<char*>(memory_.mutable_data_ptr()) + starts_[index], memory_.scalar_type()};
}

}  // namespace wsbcn::gpu
