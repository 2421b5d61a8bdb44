// The Hopper kernels of one launch, compiled for float16.
#include "sm90_launch.cuh"

namespace loge::sm90 {

LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kFloat16)

}  // namespace loge::sm90
