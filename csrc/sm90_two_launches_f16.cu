// The Hopper kernels of two launches, compiled for float16.
#include "sm90_launch.cuh"

namespace loge::sm90 {

LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kFloat16)

}  // namespace loge::sm90
