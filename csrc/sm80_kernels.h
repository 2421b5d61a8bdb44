// Which of the compiled Ampere kernels serves a problem.
#pragma once

#include <type_traits>

#include "params.h"
#include "sm80_tiles.h"

namespace loge::sm80 {

// Tiles of R (0: without dX) by tiles of P (0: without an adapter). Both on the current device: `prepare` loads the
// kernel and gives it its shared memory, once before the first `launch`. They throw CudaError.
template <DType kType, int kRank, int kAdapter>
void prepare(const Plan& plan);
template <DType kType, int kRank, int kAdapter>
void launch(const BackwardParams& problem, const Plan& plan, void* stream);

#define LOGE_SM80_KERNELS(X) \
    X(0, 16) X(0, 64) X(64, 0) X(64, 16) X(64, 64) X(128, 0) X(128, 16) X(128, 64) X(256, 0) X(256, 16) X(256, 64)

// Calls `use(rank, adapter)` with the tiles of `p` as integral constants.
template <class Use>
auto with_tiles(const BackwardParams& p, Use use) {
    const int rank = rank_tile(p.dx != nullptr ? p.R : 0), adapter = adapter_tile(p.P);
#define LOGE_SM80_TRY(kRank, kAdapter)        \
    if (rank == kRank && adapter == kAdapter) \
        return use(std::integral_constant<int, kRank>{}, std::integral_constant<int, kAdapter>{});
    LOGE_SM80_KERNELS(LOGE_SM80_TRY)
#undef LOGE_SM80_TRY
    return use(std::integral_constant<int, 0>{}, std::integral_constant<int, 16>{});
}

}  // namespace loge::sm80
