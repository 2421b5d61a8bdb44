// The launch of one compiled kernel of the Hopper family.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <string>

#include "cuda_check.h"
#include "sm90_kernel.cuh"

namespace loge::sm90 {

inline std::string describe(const Plan& plan) {
    return "block_m " + std::to_string(plan.block_m) + ", cluster " + std::to_string(plan.cluster) + ", stages " +
           std::to_string(plan.stages) + ", shared_bytes " + std::to_string(plan.shared_bytes) + ", threads " +
           std::to_string(plan.threads) + ", grid " + std::to_string(plan.grid);
}

template <DType kType, int kRank, int kAdapter>
void launch(const Arguments& arguments, const Plan& plan, int device, void* stream) {
    using Element = std::conditional_t<kType == DType::kFloat16, cute::half_t, cute::bfloat16_t>;
    constexpr SharedMap map = Layouts<Element, kRank, kAdapter>::kMap;
    if (plan.shared_bytes != map.bytes || plan.stages != map.stages || plan.threads != kThreads)
        throw CudaError("sm90_backward: the plan (" + describe(plan) + ") is not one for this problem");
    const auto kernel = sm90_backward_kernel<Element, kRank, kAdapter>;
    const auto allow_shared = [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, map.bytes),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(map.bytes) + ")");
    };
    constexpr int kKnownDevices = 64;
    static std::once_flag allowed[kKnownDevices];
    if (device >= 0 && device < kKnownDevices) {
        std::call_once(allowed[device], allow_shared);
    } else {
        allow_shared();
    }

    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.grid));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = map.bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments),
               "cudaLaunchKernelExC(sm90_backward, R tile " + std::to_string(kRank) + ", P tile " +
                   std::to_string(kAdapter) + "; " + describe(plan) + ")");
}

}  // namespace loge::sm90
