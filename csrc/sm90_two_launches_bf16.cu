// The Hopper kernels of two launches compiled for bfloat16: tiles of P (0: without an adapter).
#include "sm90_launch.cuh"

namespace loge::sm90 {

constexpr DType kType = DType::kBFloat16;
template Compiled compiled_project<kType, 0>();
template Compiled compiled_project<kType, 16>();
template Compiled compiled_project<kType, 64>();
template CompiledExpand compiled_expand<kType, 0>();
template CompiledExpand compiled_expand<kType, 16>();
template CompiledExpand compiled_expand<kType, 64>();

}  // namespace loge::sm90
