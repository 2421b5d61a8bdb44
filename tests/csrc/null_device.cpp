// A GPU that does nothing and counts: with csrc's host code it makes an extension module that runs without CUDA, in
// which everything is real but the kernels, the driver and the memory.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "sm80_kernels.h"
#include "sm90_arguments.h"

namespace {

struct Counts {
    long long kernels, memsets, memset_bytes, prepared, encoded, cluster;
} counts;
int shared_limit = 232448, device = 0;
loge::sm90::Residency resident = {132, 66, 32, 16};

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* base, const cuuint64_t*, const cuuint64_t*,
                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
    ++counts.encoded;
    std::memcpy(map, &base, sizeof(base));
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// What has been counted since the last call.
__attribute__((visibility("default"))) void null_device_counts(Counts* into) {
    *into = counts;
    counts = {};
}
__attribute__((visibility("default"))) void null_device_is(int shared_bytes, const int* clusters) {
    shared_limit = shared_bytes;
    for (std::size_t i = 0; i < resident.size(); ++i)
        resident[i] = clusters[i];
}

cudaError_t cudaGetDevice(int* current) {
    *current = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) {
    device = wanted;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
        *value = shared_limit;
    else if (attribute == cudaDevAttrMultiProcessorCount)
        *value = resident[0];
    else
        std::abort();
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    ++counts.memsets;
    counts.memset_bytes += static_cast<long long>(bytes);
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    *function = reinterpret_cast<void*>(&encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char*, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
    return cudaGetDriverEntryPointByVersion(nullptr, function, 0, 0, found);
}
const char* cudaGetErrorName(cudaError_t) {
    return "";
}
const char* cudaGetErrorString(cudaError_t) {
    return "";
}

}  // extern "C"

namespace loge {

namespace sm80 {

template <DType kType, int kRows, int kColumns, int kAdapter>
void prepare_project(const Plan&) {
    ++counts.prepared;
}
template <DType kType, int kRows, int kColumns, int kAdapter>
void launch_project(const Arguments&, const Plan&, void*) {
    ++counts.kernels;
    counts.cluster = 1;
}
template <DType kType, int kWidth, int kAdapter>
void prepare_expand(const Plan&) {
    ++counts.prepared;
}
template <DType kType, int kWidth, int kAdapter>
void launch_expand(const Arguments&, const Plan&, void*) {
    ++counts.kernels;
}

}  // namespace sm80

namespace sm90 {

template <DType kType, int kRank, int kAdapter>
Compiled compiled() {
    return {[] {
                ++counts.prepared;
                return resident;
            },
            [](const Arguments& arguments, const Plan&, void*) {
                ++counts.kernels;
                counts.cluster = arguments.rows << arguments.log_splits;
            }};
}

template <DType kType, int kAdapter>
Compiled compiled_project() {
    return compiled<kType, 0, kAdapter>();
}
template <DType kType, int kAdapter>
CompiledExpand compiled_expand() {
    return {compiled<kType, 0, kAdapter>().prepare,
            [](const ExpandArguments&, const Plan&, void*) { ++counts.kernels; }};
}

LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kFloat16)
LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kBFloat16)
LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kFloat16)
LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kBFloat16)

}  // namespace sm90

#define LOGE_PROJECT_TYPE(kType, kRows, kColumns, kAdapter)                             \
    template void sm80::prepare_project<kType, kRows, kColumns, kAdapter>(const Plan&); \
    template void sm80::launch_project<kType, kRows, kColumns, kAdapter>(const sm80::Arguments&, const Plan&, void*);
#define LOGE_EXPAND_TYPE(kType, kWidth, kAdapter)                             \
    template void sm80::prepare_expand<kType, kWidth, kAdapter>(const Plan&); \
    template void sm80::launch_expand<kType, kWidth, kAdapter>(const sm80::Arguments&, const Plan&, void*);
#define LOGE_PROJECT(kRows, kColumns, kAdapter)                   \
    LOGE_PROJECT_TYPE(DType::kFloat16, kRows, kColumns, kAdapter) \
    LOGE_PROJECT_TYPE(DType::kBFloat16, kRows, kColumns, kAdapter)
#define LOGE_EXPAND(kWidth, kAdapter)                   \
    LOGE_EXPAND_TYPE(DType::kFloat16, kWidth, kAdapter) \
    LOGE_EXPAND_TYPE(DType::kBFloat16, kWidth, kAdapter)
LOGE_SM80_PROJECT(LOGE_PROJECT)
LOGE_SM80_EXPAND(LOGE_EXPAND)

}  // namespace loge
