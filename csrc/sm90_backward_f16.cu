// The Hopper kernels compiled for float16: tiles of R (0: without dX) by tiles of P (0: without an adapter).
#include "sm90_launch.cuh"

namespace loge::sm90 {

constexpr DType kType = DType::kFloat16;
template Compiled compiled<kType, 0, 16>();
template Compiled compiled<kType, 0, 64>();
template Compiled compiled<kType, 64, 0>();
template Compiled compiled<kType, 64, 16>();
template Compiled compiled<kType, 64, 64>();
template Compiled compiled<kType, 128, 0>();
template Compiled compiled<kType, 128, 16>();
template Compiled compiled<kType, 128, 64>();
template Compiled compiled<kType, 256, 0>();
template Compiled compiled<kType, 256, 16>();
template Compiled compiled<kType, 256, 64>();

}  // namespace loge::sm90
