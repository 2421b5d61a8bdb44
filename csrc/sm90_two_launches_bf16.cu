// The Hopper kernels of two launches, compiled for bfloat16.
#include "sm90_launch.cuh"

namespace loge::sm90 {

LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kBFloat16)

}  // namespace loge::sm90
