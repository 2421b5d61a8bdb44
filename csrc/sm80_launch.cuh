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
void launch(const BackwardParams& problem, const Plan& plan, void* stream) {
    BackwardParams argument = problem;
    void* arguments[] = {&argument};
    const void* kernel = reinterpret_cast<const void*>(&backward_kernel<kType, kRank, kAdapter>);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
               "cudaFuncSetAttribute(shared memory = " + std::to_string(plan.shared_bytes) + ")");
    check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(plan.grid)), dim3(kThreads), arguments,
                                static_cast<std::size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream)),
               "cudaLaunchKernel(sm80_backward, grid = " + std::to_string(plan.grid) + ")");
}

}  // namespace loge::sm80
