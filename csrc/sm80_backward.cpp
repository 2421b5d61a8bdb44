#include "sm80_backward.h"

#include <stdexcept>

#include "sm80_kernels.h"

namespace loge {

namespace {

// Calls `use(dtype, rank, adapter)` with what the kernel for `p` is compiled for, as integral constants.
template <class Use>
void with_kernel(const BackwardParams& p, Use use) {
    sm80::with_tiles(p, [&](auto rank, auto adapter) {
        if (p.dtype == DType::kFloat16)
            use(std::integral_constant<DType, DType::kFloat16>{}, rank, adapter);
        else
            use(std::integral_constant<DType, DType::kBFloat16>{}, rank, adapter);
    });
}

}  // namespace

Plan sm80_prepare(const BackwardParams& problem, int) {
    const Plan plan = sm80_plan(problem);
    with_kernel(problem, [&](auto dtype, auto rank, auto adapter) { sm80::prepare<dtype(), rank(), adapter()>(plan); });
    return plan;
}

void sm80_backward(const BackwardParams& problem, const Plan& plan, int, void* stream) {
    const std::string reason = sm80_why_not(problem);
    if (!reason.empty()) throw std::invalid_argument("sm80: " + reason);
    if (problem.M == 0) return;
    with_kernel(problem, [&](auto dtype, auto rank, auto adapter) {
        sm80::launch<dtype(), rank(), adapter()>(problem, plan, stream);
    });
}

}  // namespace loge
