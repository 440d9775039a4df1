// Which operators are differentiated when they are called by themselves, as programs of
// torch.export and compiled code call them; see backends/exported.py, which has the derivatives.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

namespace wsbcn {
namespace {

bool is_differentiated(c10::ArrayRef<c10::IValue> arguments) {
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) return true;
  return at::GradMode::is_enabled() &&
         std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& argument) {
           return argument.isTensor() && argument.toTensor().defined() &&
                  argument.toTensor().requires_grad();
         });
}

// Compiled code comes here in every step, with nothing to be differentiated: not in Python. The
// names are `DIFFERENTIATED` of backends/schemas.py.
void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (is_differentiated(torch::jit::last(*stack, schema.arguments().size()))) {
    const std::string name = schema.name() + "_differentiated";
    c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").callBoxed(stack);
    return;
  }
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

TORCH_LIBRARY_IMPL(wsbcn_mm, Autograd, library) {
  for (const char* const name : {"standardize", "normalize_with_estimates", "normalize_with_given",
                                 "normalize_with_batch", "evaluate"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

}  // namespace
}  // namespace wsbcn
