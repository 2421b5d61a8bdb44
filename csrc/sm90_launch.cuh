// The launch of one compiled kernel of the Hopper family.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda_check.h"
#include "sm90_expand.cuh"
#include "sm90_kernel.cuh"

namespace loge::sm90 {

inline std::string describe(const Plan& plan) {
    return "block_m " + std::to_string(plan.block_m) + ", cluster " + std::to_string(plan.cluster) + ", stages " +
           std::to_string(plan.stages) + ", shared_bytes " + std::to_string(plan.shared_bytes) + ", threads " +
           std::to_string(plan.threads) + ", grid " + std::to_string(plan.grid);
}

template <DType kType>
using ElementOf = std::conditional_t<kType == DType::kFloat16, cute::half_t, cute::bfloat16_t>;

// The launch and its attributes, which it points at.
struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2]{};

    Launch(int cluster, std::int64_t grid, int shared_bytes, bool early = false) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        config.gridDim = dim3(static_cast<unsigned>(grid));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = shared_bytes;
        config.attrs = attributes;
        config.numAttrs = early ? 2 : 1;
    }
    Launch(const Launch&) = delete;
};

// kEarly: it may start while the launch before it ends, and waits for that by itself.
template <class Arguments, void (*kKernel)(Arguments), int kStages, int kBytes, bool kEarly = false>
struct Instance {
    static Residency prepare() {
        // Loads the kernel, which CUDA would otherwise do at the first launch: that may be inside a graph's capture.
        cudaFuncAttributes loaded{};
        check_cuda(cudaFuncGetAttributes(&loaded, kKernel), "cudaFuncGetAttributes(sm90_backward)");
        check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(kBytes) + ")");
        // How many multiprocessors a GPC has differs from part to part, and MIG or MPS may leave less of them: a
        // cluster that does not fit would be refused at the launch, and one too many takes a second wave.
        Residency resident{};
        for (int i = 0; i < static_cast<int>(resident.size()); ++i) {
            const Launch asked(cluster_of(i), cluster_of(i), kBytes);
            if (cudaOccupancyMaxActiveClusters(&resident[i], kKernel, &asked.config) != cudaSuccess) {
                cudaGetLastError();  // what is refused does not fit
                resident[i] = 0;
            }
        }
        return resident;
    }

    static void launch(const Arguments& arguments, const Plan& plan, int cluster, std::int64_t grid, int stages,
                       int shared_bytes, void* stream) {
        if (shared_bytes != kBytes || stages != kStages || plan.threads != kThreads)
            throw CudaError("sm90_backward: the plan (" + describe(plan) + ") is not one for this problem");
        Launch asked(cluster, grid, kBytes, kEarly);
        asked.config.stream = static_cast<cudaStream_t>(stream);
        const cudaError_t code = cudaLaunchKernelEx(&asked.config, kKernel, arguments);
        if (code != cudaSuccess)  // the words cost more than the launch
            check_cuda(code, "cudaLaunchKernelExC(sm90_backward; " + describe(plan) + ")");
    }
    static void launch(const Arguments& arguments, const Plan& plan, void* stream) {
        launch(arguments, plan, plan.cluster, plan.grid, plan.stages, plan.shared_bytes, stream);
    }
    static void launch_second(const Arguments& arguments, const Plan& plan, void* stream) {
        launch(arguments, plan, plan.rows, plan.second.grid, plan.second.stages, plan.second.shared_bytes, stream);
    }
};

template <class Layouts>
Compiled compiled_for() {
    constexpr SharedMap kMap = Layouts::kMap;
    using Kernel = Instance<Arguments, sm90_backward_kernel<Layouts>, kMap.stages, kMap.bytes>;
    return {Kernel::prepare, Kernel::launch};
}

template <DType kType, int kRank, int kAdapter>
Compiled compiled() {
    return compiled_for<Layouts<ElementOf<kType>, kRank, kAdapter>>();
}
template <DType kType, int kAdapter>
Compiled compiled_project() {
    return compiled_for<Layouts<ElementOf<kType>, kTileColumns, kAdapter, true>>();
}
template <DType kType, int kAdapter>
CompiledExpand compiled_expand() {
    constexpr SharedMap kMap = Expand<ElementOf<kType>, kAdapter>::kMap;
    using Kernel =
        Instance<ExpandArguments, sm90_expand_kernel<ElementOf<kType>, kAdapter>, kMap.stages, kMap.bytes, true>;
    return {Kernel::prepare, Kernel::launch_second};
}

}  // namespace loge::sm90
