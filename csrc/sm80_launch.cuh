// The Ampere kernels and their launches.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda_check.h"
#include "sm80_expand.h"
#include "sm80_kernels.h"
#include "sm80_project.h"
#include "sm80_ptx.cuh"

namespace loge::sm80 {

template <DType kType, int kRows, int kColumns, int kAdapter>
__global__ void __launch_bounds__(kThreads, 1) project_kernel(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(128) unsigned char shared[];
    PtxMachine machine(shared);
    Project<kType, kRows, kColumns, kAdapter, PtxMachine>(arguments, blockIdx.x, machine).run();
}

template <DType kType, int kWidth, int kAdapter>
__global__ void __launch_bounds__(kThreads, 1) expand_kernel(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(128) unsigned char shared[];
    PtxMachine machine(shared);
    Expand<kType, kWidth, kAdapter, PtxMachine>(arguments, blockIdx.x, machine).run();
}

// Loads the kernel, which CUDA would otherwise do at the first launch: that may be inside a graph's capture.
template <class Kernel>
void prepare(Kernel kernel, int shared_bytes) {
    cudaFuncAttributes loaded{};
    check_cuda(cudaFuncGetAttributes(&loaded, kernel), "cudaFuncGetAttributes(sm80)");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(shared_bytes) + ")");
}

template <class Kernel>
void launch(Kernel kernel, const char* name, const Arguments& arguments, std::int64_t grid, int shared_bytes,
            void* stream) {
    Arguments copy = arguments;
    void* list[] = {&copy};
    const cudaError_t code =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid)), dim3(kThreads), list,
                         static_cast<std::size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess)
        check_cuda(code, std::string("cudaLaunchKernel(") + name + ", grid = " + std::to_string(grid) + ")");
}

template <DType kType, int kRows, int kColumns, int kAdapter>
void prepare_project(const Plan& plan) {
    prepare(project_kernel<kType, kRows, kColumns, kAdapter>, plan.shared_bytes);
}
template <DType kType, int kRows, int kColumns, int kAdapter>
void launch_project(const Arguments& arguments, const Plan& plan, void* stream) {
    launch(project_kernel<kType, kRows, kColumns, kAdapter>, "sm80 project", arguments, plan.grid, plan.shared_bytes,
           stream);
}
template <DType kType, int kWidth, int kAdapter>
void prepare_expand(const Plan& plan) {
    prepare(expand_kernel<kType, kWidth, kAdapter>, plan.second.shared_bytes);
}
template <DType kType, int kWidth, int kAdapter>
void launch_expand(const Arguments& arguments, const Plan& plan, void* stream) {
    launch(expand_kernel<kType, kWidth, kAdapter>, "sm80 expand", arguments, plan.second.grid, plan.second.shared_bytes,
           stream);
}

#define LOGE_SM80_PROJECT_INSTANCE(kType, kRows, kColumns, kAdapter)              \
    template void prepare_project<kType, kRows, kColumns, kAdapter>(const Plan&); \
    template void launch_project<kType, kRows, kColumns, kAdapter>(const Arguments&, const Plan&, void*);
#define LOGE_SM80_EXPAND_INSTANCE(kType, kWidth, kAdapter)              \
    template void prepare_expand<kType, kWidth, kAdapter>(const Plan&); \
    template void launch_expand<kType, kWidth, kAdapter>(const Arguments&, const Plan&, void*);

}  // namespace loge::sm80
