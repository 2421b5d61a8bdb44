// What a kernel family throws when CUDA refuses: the call, CUDA's name and words for it, and what was asked for.
#pragma once

#include <stdexcept>
#include <string>

namespace loge {

struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace loge
