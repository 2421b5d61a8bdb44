// The Hopper backward kernel (TMA, wgmma, clusters): no CUDA header, no torch.
#pragma once

#include "cuda_error.h"
#include "params.h"
#include "sm90_plan.h"

namespace loge {

// sm90_plan on the current device, number `device`, by how many clusters it can hold; loads the kernel. Throws
// CudaError.
Plan sm90_prepare(const BackwardParams& problem, int device);

// Computes the gradients whose pointers are not null, in one launch, or two for R beyond 256, on `stream` (a
// cudaStream_t) of the current device, number `device`. `plan` is sm90_prepare's for `problem`; the sums that slabs
// share are zeros. Neither waits for the device nor allocates: it may be captured in a CUDA graph. M = 0 launches
// nothing. Throws std::invalid_argument with sm90_why_not's reason, and CudaError where CUDA refuses. What goes wrong
// later, on the device, is left to the next call that asks for it.
void sm90_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream);

}  // namespace loge
