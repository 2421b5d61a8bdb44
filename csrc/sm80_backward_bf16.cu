// The Ampere kernels compiled for bfloat16.
#include "sm80_launch.cuh"

namespace loge::sm80 {

#define LOGE_SM80_P(kRows, kColumns, kAdapter) LOGE_SM80_PROJECT_INSTANCE(DType::kBFloat16, kRows, kColumns, kAdapter)
#define LOGE_SM80_E(kWidth, kAdapter) LOGE_SM80_EXPAND_INSTANCE(DType::kBFloat16, kWidth, kAdapter)
LOGE_SM80_PROJECT(LOGE_SM80_P)
LOGE_SM80_EXPAND(LOGE_SM80_E)

}  // namespace loge::sm80
