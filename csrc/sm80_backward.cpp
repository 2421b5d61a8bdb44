#include "sm80_backward.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda_check.h"
#include "sm80_kernels.h"

namespace loge {

namespace {

// Calls `use` with what a kernel for `p` is compiled for, as integral constants: the dtype and the tiles.
template <class Use>
void with_project(const BackwardParams& p, const Plan& plan, Use use) {
    const int adapter = sm80::adapter_tile(p.P);
    sm80::with_project(plan.block_m, plan.block_r, adapter, [&](auto rows, auto columns, auto kAdapter) {
        if (p.dtype == DType::kFloat16)
            use(std::integral_constant<DType, DType::kFloat16>{}, rows, columns, kAdapter);
        else
            use(std::integral_constant<DType, DType::kBFloat16>{}, rows, columns, kAdapter);
    });
}
template <class Use>
void with_expand(const BackwardParams& p, const Plan& plan, Use use) {
    sm80::with_expand(plan.block_k, sm80::adapter_tile(p.P), [&](auto width, auto adapter) {
        if (p.dtype == DType::kFloat16)
            use(std::integral_constant<DType, DType::kFloat16>{}, width, adapter);
        else
            use(std::integral_constant<DType, DType::kBFloat16>{}, width, adapter);
    });
}

int attribute(cudaDeviceAttr which, const char* name, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), std::string("cudaDeviceGetAttribute(") + name + ")");
    return value;
}

}  // namespace

Plan sm80_prepare(const BackwardParams& problem, int device) {
    const Plan plan =
        sm80_plan(problem, attribute(cudaDevAttrMultiProcessorCount, "MultiProcessorCount", device),
                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "MaxSharedMemoryPerBlockOptin", device));
    with_project(problem, plan, [&](auto dtype, auto rows, auto columns, auto adapter) {
        sm80::prepare_project<dtype(), rows(), columns(), adapter()>(plan);
    });
    with_expand(problem, plan,
                [&](auto dtype, auto width, auto adapter) { sm80::prepare_expand<dtype(), width(), adapter()>(plan); });
    return plan;
}

void sm80_backward(const BackwardParams& problem, const Plan& plan, int, void* stream) {
    const std::string reason = sm80_why_not(problem);
    if (!reason.empty()) throw std::invalid_argument("sm80: " + reason);
    if (problem.M == 0) return;
    const sm80::Arguments arguments = sm80::arguments_in(problem, plan);
    with_project(problem, plan, [&](auto dtype, auto rows, auto columns, auto adapter) {
        sm80::launch_project<dtype(), rows(), columns(), adapter()>(arguments, plan, stream);
    });
    with_expand(problem, plan, [&](auto dtype, auto width, auto adapter) {
        sm80::launch_expand<dtype(), width(), adapter()>(arguments, plan, stream);
    });
}

}  // namespace loge
