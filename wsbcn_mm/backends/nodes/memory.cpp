#include "memory.h"

#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace wsbcn {
namespace {

// Below, the C library does not map memory of its own for a block.
constexpr size_t kLarge = 1 << 16;
// Blocks that were not asked for during so many calls are freed: a few passes of a large model.
constexpr int64_t kPatience = 4096;
constexpr int64_t kSweep = 256;

class Pool {
 public:
  void* take(size_t size) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      if (++calls_ % kSweep == 0) free_older_than(calls_ - kPatience);
      auto& blocks = blocks_[size];
      if (!blocks.empty()) {
        void* data = blocks.back().data;
        blocks.pop_back();
        return data;
      }
    }
    return c10::alloc_cpu(size);
  }

  void give(void* data, size_t size) {
    std::lock_guard<std::mutex> guard(mutex_);
    blocks_[size].push_back({data, calls_});
  }

  void release() {
    std::lock_guard<std::mutex> guard(mutex_);
    free_older_than(calls_ + 1);
  }

 private:
  struct Block {
    void* data;
    int64_t since;
  };

  // Of one size the oldest come first.
  void free_older_than(int64_t call) {
    for (auto& [size, blocks] : blocks_) {
      auto kept = blocks.begin();
      while (kept != blocks.end() && kept->since < call) c10::free_cpu((kept++)->data);
      blocks.erase(blocks.begin(), kept);
    }
  }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<Block>> blocks_;
  int64_t calls_ = 0;
};

// Never destroyed: tensors may outlive whatever else ends with the process.
Pool& pool() {
  static Pool* const shared = new Pool;
  return *shared;
}

// Of the pool, until somebody resizes it (as who frees a gradient does).
c10::Storage storage_of(size_t size) {
  void* const data = pool().take(size);
  const auto give = [size](void* block) { pool().give(block, size); };
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), size,
      c10::InefficientStdFunctionContext::makeDataPtr(data, give, at::kCPU),
      c10::GetAllocator(at::kCPU), /*resizable=*/true));
}

// Where the allocator of a GPU lets a tensor start, in bytes: convolutions count on a part of it.
constexpr int64_t kStart = 512;

}  // namespace

at::Tensor part_of(const at::Tensor& memory, at::IntArrayRef shape, at::IntArrayRef strides,
                   int64_t start) {
  auto part =
      c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(memory.storage()),
                                           memory.key_set(), memory.dtype());
  part->set_storage_offset(memory.storage_offset() + start);
  part->set_sizes_and_strides(shape, strides);
  return at::Tensor(std::move(part));
}

at::Tensor result_like(const at::Tensor& like, at::ScalarType dtype) {
  const auto options = like.options().dtype(dtype);
  const size_t size = like.numel() * c10::elementSize(dtype);
  if (!like.is_cpu() || size < kLarge) return at::empty_like(like, options);
  auto result = c10::make_intrusive<c10::TensorImpl>(storage_of(size),
                                                     c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                     c10::scalarTypeToTypeMeta(dtype));
  result->set_sizes_and_strides(like.sizes(), like.strides());
  return at::Tensor(std::move(result));
}

std::vector<at::Tensor> results_like(at::TensorList like, at::ScalarType dtype) {
  std::vector<at::Tensor> results;
  results.reserve(like.size());
  if (like.size() < 2 || like[0].is_cpu()) {
    for (const at::Tensor& tensor : like) results.push_back(result_like(tensor, dtype));
    return results;
  }
  const int64_t step = kStart / c10::elementSize(dtype);
  const auto room = [&](const at::Tensor& t) { return (t.numel() + step - 1) / step * step; };
  int64_t size = 0;
  for (const at::Tensor& tensor : like) size += room(tensor);
  const at::Tensor memory = at::empty({size}, like[0].options().dtype(dtype));
  int64_t start = 0;
  for (const at::Tensor& tensor : like) {
    results.push_back(part_of(memory, tensor.sizes(), tensor.strides(), start));
    start += room(tensor);
  }
  return results;
}

void release_memory() {
  pool().release();
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeExplicitAutograd, library) {
  library.impl("release_memory", release_memory);
}

}  // namespace wsbcn
