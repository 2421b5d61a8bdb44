// The Ampere backward kernel and its launch.
#pragma once

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "sm80_block.h"
#include "sm80_kernels.h"
#include "sm80_ptx.cuh"

namespace loge::sm80 {

template <DType kType, int kRank, int kAdapter>
__global__ void __launch_bounds__(kThreads, Shared<kRank, kAdapter>::kBlocksPerMultiprocessor)
    backward_kernel(const __grid_constant__ BackwardParams problem) {
    extern __shared__ __align__(128) unsigned char shared[];
    PtxMachine machine(shared);
    Block<kType, kRank, kAdapter, PtxMachine>(problem, blockIdx.x, machine).run();
}

template <DType kType, int kRank, int kAdapter>
void prepare(const Plan& plan) {
    const auto kernel = backward_kernel<kType, kRank, kAdapter>;
    // Loads the kernel, which CUDA would otherwise do at the first launch: that may be inside a graph's capture.
    cudaFuncAttributes loaded{};
    check_cuda(cudaFuncGetAttributes(&loaded, kernel), "cudaFuncGetAttributes(sm80_backward)");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(plan.shared_bytes) + ")");
}

template <DType kType, int kRank, int kAdapter>
void launch(const BackwardParams& problem, const Plan& plan, void* stream) {
    BackwardParams argument = problem;
    void* arguments[] = {&argument};
    const void* kernel = reinterpret_cast<const void*>(&backward_kernel<kType, kRank, kAdapter>);
    const cudaError_t code =
        cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(kThreads), arguments,
                         static_cast<std::size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess)
        check_cuda(code, "cudaLaunchKernel(sm80_backward, grid = " + std::to_string(plan.grid) + ")");
}

}  // namespace loge::sm80
