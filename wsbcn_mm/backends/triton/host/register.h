#pragma once

namespace wsbcn::gpu {

// Whether the operators of triton/host are those of CUDA tensors.
bool is_registered();

}  // namespace wsbcn::gpu
