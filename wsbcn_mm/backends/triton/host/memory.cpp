#include "memory.h"

#include <ATen/ops/empty.h>

#include "../../nodes/checks.h"
#include "../../nodes/memory.h"

namespace wsbcn::gpu {
namespace {

// Scratch that may be kept with results, in values: a fraction of what a layer saves.
constexpr int64_t kLittle = 16384;

// So that what follows starts at a multiple of 16 bytes: Triton compiles a kernel for the alignment
// of its pointers.
int64_t padded(int64_t size) {
  return (size + 3) / 4 * 4;
}

int64_t size_of(at::IntArrayRef sizes) {
  int64_t size = 0;
  for (const int64_t wanted : sizes) size += padded(wanted);
  return size;
}

int64_t size_of(Shapes shapes) {
  int64_t size = 0;
  for (const at::IntArrayRef shape : shapes) size += padded(c10::multiply_integers(shape));
  return size;
}

Tensor memory_of(const Tensor& x, int64_t size) {
  return at::empty({size}, x.options().dtype(accumulation_dtype(x)).memory_format(std::nullopt));
}

std::vector<Tensor> results_in(const Tensor& memory, Shapes shapes) {
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

}  // namespace

Scratch::Scratch(const Tensor& x, at::IntArrayRef sizes)
    : Scratch(memory_of(x, size_of(sizes)), 0, sizes) {}

Scratch::Scratch(const Tensor& memory, int64_t first, at::IntArrayRef sizes) : memory_(memory) {
  const int64_t itemsize = memory.element_size();
  for (const int64_t wanted : sizes) {
    starts_.push_back(first * itemsize);
    first += padded(wanted);
  }
}

Pointer Scratch::operator[](size_t index) const {
  return {static_cast<char*>(memory_.mutable_data_ptr()) + starts_[index], memory_.scalar_type()};
}

std::vector<Tensor> small_results(const Tensor& x, Shapes shapes) {
  return results_in(memory_of(x, size_of(shapes)), shapes);
}

std::pair<std::vector<Tensor>, Scratch> small_results(const Tensor& x, Shapes shapes,
                                                      at::IntArrayRef scratch) {
  const int64_t first = size_of(shapes), more = size_of(scratch);
  const bool together = more <= kLittle;
  const Tensor memory = memory_of(x, together ? first + more : first);
  return {results_in(memory, shapes),
          together ? Scratch(memory, first, scratch) : Scratch(x, scratch)};
}

}  // namespace wsbcn::gpu
