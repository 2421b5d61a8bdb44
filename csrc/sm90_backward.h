// The Hopper backward kernel (TMA, wgmma, clusters): no CUDA header, no torch.
#pragma once

#include "cuda_error.h"
#include "params.h"
#include "sm90_plan.h"

namespace loge {

// Computes the gradients whose pointers are not null, in one launch on `stream` (a cudaStream_t) of `device`. `plan` is
// sm90_plan's for `problem`. dA and dB are added to, or with `deterministic` stored for each slab. Neither waits for
// the device nor allocates: it may be captured in a CUDA graph. M = 0 launches nothing. Throws std::invalid_argument
// with sm90_why_not's reason, and CudaError where CUDA refuses. What goes wrong later, on the device, is left to the
// next call that asks for it.
void sm90_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream);

}  // namespace loge
