// What the nodes of autograd's graph ask of the launcher.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <optional>

namespace wsbcn::gpu {

// Whether its operators are those of CUDA tensors.
bool is_registered();

// Which CUDA graph the current stream of a device is captured into; 0: none. Nothing where the
// driver cannot say.
std::optional<int64_t> capture_on(c10::Device device);

}  // namespace wsbcn::gpu
