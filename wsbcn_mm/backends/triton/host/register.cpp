// Makes the operators those of CUDA tensors. At run time, and not when this is loaded, because
// only Python knows whether there is a driver, and because ROCm has another one.
#include "register.h"

#include <torch/library.h>

#include <atomic>

#include "operators.h"

namespace wsbcn::gpu {
namespace {

void implement(torch::Library& library) {
  library.impl("row_moments", row_moments);
  library.impl("normalize_with_estimates", normalize_with_estimates);
  library.impl("normalize_with_batch", normalize_with_batch);
  library.impl("evaluate", evaluate);
  library.impl("normalize", normalize);
  library.impl("normalize_backward", normalize_backward);
  library.impl("standardize", standardize);
  library.impl("standardize_backward", standardize_backward);
  library.impl("standardize_all", standardize_all);
  library.impl("standardize_all_backward", standardize_all_backward);
}

std::atomic<bool> registered{false};

// Never destroyed: tensors may outlive whatever else ends with the process.
void register_launcher(bool cpu) {
  const auto key = cpu ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  implement(*new torch::Library(torch::Library::IMPL, "wsbcn_mm", key, __FILE__, __LINE__));
  if (!cpu) registered = true;
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeExplicitAutograd, library) {
  library.impl("register_launcher", register_launcher);
}

// For tests without a GPU: the same functions on tensors of any device.
TORCH_LIBRARY_IMPL(wsbcn_mm_launcher, CompositeExplicitAutograd, library) {
  implement(library);
}

}  // namespace

bool is_registered() {
  return registered;
}

}  // namespace wsbcn::gpu
