// The Hopper kernels of one launch, compiled for bfloat16.
#include "sm90_launch.cuh"

namespace loge::sm90 {

LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kBFloat16)

}  // namespace loge::sm90
