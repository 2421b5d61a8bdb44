// The Hopper kernels compiled for float16: tiles of R (0: without dX) by tiles of P (0: without an adapter).
#include "sm90_launch.cuh"

namespace loge::sm90 {

constexpr DType kType = DType::kFloat16;
template void launch<kType, 0, 16>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 0, 64>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 64, 0>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 64, 16>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 64, 64>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 128, 0>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 128, 16>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 128, 64>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 256, 0>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 256, 16>(const Arguments&, const Plan&, int, void*);
template void launch<kType, 256, 64>(const Arguments&, const Plan&, int, void*);

}  // namespace loge::sm90
