// Turns the CUDA runtime's error codes into exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda_error.h"

namespace loge {

// Throws CudaError unless `code` is success; `call` says what was called, and with what.
inline void check_cuda(cudaError_t code, const std::string& call) {
    if (code != cudaSuccess)
        throw CudaError(call + ": " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")");
}

}  // namespace loge
