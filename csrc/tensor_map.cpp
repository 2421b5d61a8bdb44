#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "cuda_check.h"

namespace loge {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    constexpr const char* kName = "cuTensorMapEncodeTiled";
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    constexpr unsigned int kSince = 12000;
    const cudaError_t code = cudaGetDriverEntryPointByVersion(kName, &function, kSince, cudaEnableDefault, &found);
#else
    const cudaError_t code = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
    check_cuda(code, "looking for the driver's cuTensorMapEncodeTiled: is there an NVIDIA driver?");
    if (function == nullptr || found != cudaDriverEntryPointSuccess)
        throw CudaError("the NVIDIA driver has no cuTensorMapEncodeTiled: it must be one of CUDA 12.0 or later");
    return reinterpret_cast<Encode>(function);
}

}  // namespace

CUtensorMap encode_tensor_map(const Matrix& m) {
    // Looked up at the first launch; where that throws, the next launch looks again.
    static const Encode encode = find_encode();
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
    const cuuint64_t stride_bytes[] = {static_cast<cuuint64_t>(m.row_stride) * 2};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(m.box_columns), static_cast<cuuint32_t>(m.box_rows)};
    const cuuint32_t element_strides[] = {1, 1};
    CUtensorMap map{};
    const CUresult result = encode(
        &map, m.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        /*tensorRank=*/2, const_cast<void*>(m.base), sizes, stride_bytes, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, m.box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        std::ostringstream message;
        message << "cuTensorMapEncodeTiled: CUresult " << result << " for a matrix [" << m.rows << ", " << m.columns
                << "] at " << m.base << ", rows " << m.row_stride << " elements apart, boxes [" << m.box_rows << ", "
                << m.box_columns << "]";
        throw CudaError(message.str());
    }
    return map;
}

}  // namespace loge
