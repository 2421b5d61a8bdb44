// The Ampere backward kernels (cp.async, mma.sync): no CUDA header, no torch.
#pragma once

#include "cuda_error.h"
#include "params.h"
#include "sm80_plan.h"

namespace loge {

// sm80_plan on the current device, number `device`; loads the kernels. Throws CudaError.
Plan sm80_prepare(const BackwardParams& problem, int device);

// As sm90_backward, with sm80_prepare's plan.
void sm80_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream);

}  // namespace loge
