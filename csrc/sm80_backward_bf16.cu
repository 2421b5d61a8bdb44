// The Ampere kernels compiled for bfloat16.
#include "sm80_launch.cuh"

namespace loge::sm80 {

#define LOGE_SM80_INSTANCE(kRank, kAdapter)                                \
    template void prepare<DType::kBFloat16, kRank, kAdapter>(const Plan&); \
    template void launch<DType::kBFloat16, kRank, kAdapter>(const BackwardParams&, const Plan&, void*);
LOGE_SM80_KERNELS(LOGE_SM80_INSTANCE)

}  // namespace loge::sm80
