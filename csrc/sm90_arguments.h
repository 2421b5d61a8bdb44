// What the Hopper kernel is launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params.h"
#include "sm90_plan.h"

namespace loge::sm90 {

// The sums that the slabs share, as in BackwardParams.
struct Sums {
    float* dA;
    float* dB;
    void* dA_rounded;
    void* dB_rounded;
    unsigned* finished;
    std::int64_t slab_stride;
    std::int32_t N, K, P;
    std::int32_t slabs;
    float scaling;
    bool need_dA, need_dB, deterministic;
};

// Passed by value as a grid constant: TMA reads the maps where they lie. Maps of operands that are not needed are zero.
// The boxes of factors are as high as said here, or half as high where two slabs share their loads.
struct Arguments : Sums {
    CUtensorMap dy;      // boxes [128, 64]
    CUtensorMap left;    // boxes [64, 64]
    CUtensorMap lora_B;  // boxes [64, P tile]
    CUtensorMap xa;      // boxes [128, P tile]
    CUtensorMap x;       // boxes [128, 64]
    CUtensorMap right;   // boxes [R tile, 64]
    CUtensorMap lora_A;  // boxes [P tile, 64]
    CUtensorMap dx;      // boxes [64, 64]; of the first of two launches: T
    CUtensorMap t_p;     // boxes [128, P tile]: the adapter's columns of T, of the first of two launches
    std::int32_t clusters;
    std::int32_t tiles;             // of the rank: 1, but for the first of two launches
    std::int32_t rows, log_splits;  // of a cluster
};

// The second of two launches: dX = T [right ; lora_A], dA = T_P^T x.
struct ExpandArguments : Sums {
    CUtensorMap t;       // boxes [128, 64]
    CUtensorMap t_p;     // boxes [128, P tile]: the adapter's columns of T
    CUtensorMap right;   // boxes [32, 64]
    CUtensorMap lora_A;  // boxes [32, 64], or [16, 64] where the P tile has no more
    CUtensorMap x;       // boxes [128, 64]
    CUtensorMap dx;      // boxes [64, 64]
    std::int32_t boxes;  // of T: 64 columns of R each
    std::int32_t clusters, rows;
};

// One compiled kernel.
struct Compiled {
    // Loads it on the current device, gives it its shared memory, and asks how many clusters of each size can run at
    // once. Throws CudaError.
    Residency (*prepare)();
    // On the current device, on which it has been prepared. `stream` is a cudaStream_t. Throws CudaError.
    void (*launch)(const Arguments& arguments, const Plan& plan, void* stream);
};

// The same for the second launch.
struct CompiledExpand {
    Residency (*prepare)();
    void (*launch)(const ExpandArguments& arguments, const Plan& plan, void* stream);
};

// The kernel for `kType` and the tiles of R (0: without dX) and P (0: without an adapter).
template <DType kType, int kRank, int kAdapter>
Compiled compiled();
// Those of two launches, for R beyond one tile.
template <DType kType, int kAdapter>
Compiled compiled_project();
template <DType kType, int kAdapter>
CompiledExpand compiled_expand();

// All that are compiled, as X(dtype, R tile, P tile), and as X(dtype, P tile) for two launches; and what makes one.
#define LOGE_SM90_RANK_0(X, kType) X(kType, 0, 16) X(kType, 0, 64)
#define LOGE_SM90_RANK(X, kType, kRank) X(kType, kRank, 0) X(kType, kRank, 16) X(kType, kRank, 64)
#define LOGE_SM90_KERNELS(X, kType) \
    LOGE_SM90_RANK_0(X, kType)      \
    LOGE_SM90_RANK(X, kType, 64) LOGE_SM90_RANK(X, kType, 128) LOGE_SM90_RANK(X, kType, 256)
#define LOGE_SM90_TWO_LAUNCHES(X, kType) X(kType, 0) X(kType, 16) X(kType, 64)
#define LOGE_SM90_KERNEL(kType, kRank, kAdapter) template Compiled compiled<kType, kRank, kAdapter>();
#define LOGE_SM90_TWO_KERNELS(kType, kAdapter)             \
    template Compiled compiled_project<kType, kAdapter>(); \
    template CompiledExpand compiled_expand<kType, kAdapter>();

}  // namespace loge::sm90
