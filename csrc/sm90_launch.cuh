// The launch of one compiled kernel of the Hopper family.
#pragma once

#include <cuda_runtime_api.h>

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
struct Instance {
    using Element = std::conditional_t<kType == DType::kFloat16, cute::half_t, cute::bfloat16_t>;
    static constexpr SharedMap kMap = Layouts<Element, kRank, kAdapter>::kMap;
    static constexpr auto kKernel = sm90_backward_kernel<Element, kRank, kAdapter>;

    static cudaLaunchConfig_t config(int cluster, std::int64_t grid, cudaLaunchAttribute& attribute) {
        attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(grid));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = kMap.bytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return config;
    }

    static Residency prepare() {
        // Loads the kernel, which CUDA would otherwise do at the first launch: that may be inside a graph's capture.
        cudaFuncAttributes loaded{};
        check_cuda(cudaFuncGetAttributes(&loaded, kKernel), "cudaFuncGetAttributes(sm90_backward)");
        check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMap.bytes),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(kMap.bytes) + ")");
        // How many multiprocessors a GPC has differs from part to part, and MIG or MPS may leave less of them: a
        // cluster that does not fit would be refused at the launch, and one too many takes a second wave.
        Residency resident{};
        for (int i = 0; i < static_cast<int>(resident.size()); ++i) {
            cudaLaunchAttribute attribute;
            const cudaLaunchConfig_t asked = config(cluster_of(i), cluster_of(i), attribute);
            if (cudaOccupancyMaxActiveClusters(&resident[i], kKernel, &asked) != cudaSuccess) {
                cudaGetLastError();  // what is refused does not fit
                resident[i] = 0;
            }
        }
        return resident;
    }

    static void launch(const Arguments& arguments, const Plan& plan, void* stream) {
        if (plan.shared_bytes != kMap.bytes || plan.stages != kMap.stages || plan.threads != kThreads)
            throw CudaError("sm90_backward: the plan (" + describe(plan) + ") is not one for this problem");
        cudaLaunchAttribute attribute;
        cudaLaunchConfig_t asked = config(plan.cluster, plan.grid, attribute);
        asked.stream = static_cast<cudaStream_t>(stream);
        const cudaError_t code = cudaLaunchKernelEx(&asked, kKernel, arguments);
        if (code != cudaSuccess)  // the words cost more than the launch
            check_cuda(code, "cudaLaunchKernelExC(sm90_backward, R tile " + std::to_string(kRank) + ", P tile " +
                                 std::to_string(kAdapter) + "; " + describe(plan) + ")");
    }
};

template <DType kType, int kRank, int kAdapter>
Compiled compiled() {
    using Kernel = Instance<kType, kRank, kAdapter>;
    return {Kernel::prepare, Kernel::launch};
}

}  // namespace loge::sm90
