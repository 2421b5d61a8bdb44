// The current device of this thread, set back on the way out. It is set even where it is current already: that binds
// the device's context to the thread, which the driver's own functions need and a thread of autograd may not have yet.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda_check.h"

namespace loge {

class DeviceGuard {
 public:
    explicit DeviceGuard(int device) : device_(device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        check_cuda(cudaSetDevice(device_), "cudaSetDevice(" + std::to_string(device_) + ")");
    }
    ~DeviceGuard() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
    int device_, previous_ = 0;
};

}  // namespace loge
