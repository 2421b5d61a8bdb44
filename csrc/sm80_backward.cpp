#include "sm80_backward.h"

#include <stdexcept>

#include "device_guard.h"
#include "sm80_kernels.h"

namespace loge {

void sm80_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream) {
    const std::string reason = sm80_why_not(problem);
    if (!reason.empty()) throw std::invalid_argument("sm80_backward: " + reason);
    if (problem.M == 0) return;
    const DeviceGuard guard(device);
    sm80::with_tiles(problem, [&](auto rank, auto adapter) {
        if (problem.dtype == DType::kFloat16)
            sm80::launch<DType::kFloat16, rank(), adapter()>(problem, plan, stream);
        else
            sm80::launch<DType::kBFloat16, rank(), adapter()>(problem, plan, stream);
    });
}

}  // namespace loge
