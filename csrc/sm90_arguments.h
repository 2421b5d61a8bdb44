// What the Hopper kernel is launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params.h"
#include "sm90_plan.h"

namespace loge::sm90 {

// Passed by value as a grid constant: TMA reads the maps where they lie. Maps of operands that are not needed are zero.
// The boxes of factors are as high as said here, or half as high where two slabs share their loads.
struct Arguments {
    CUtensorMap dy;      // boxes [128, 64]
    CUtensorMap left;    // boxes [64, 64]
    CUtensorMap lora_B;  // boxes [64, P tile]
    CUtensorMap xa;      // boxes [128, P tile]
    CUtensorMap x;       // boxes [128, 64]
    CUtensorMap right;   // boxes [R tile, 64]
    CUtensorMap lora_A;  // boxes [P tile, 64]
    CUtensorMap dx;      // boxes [64, 64]
    float* dA;           // and what follows: as in BackwardParams
    float* dB;
    void* dA_rounded;
    void* dB_rounded;
    unsigned* finished;
    std::int64_t slab_stride;
    std::int32_t N, K, P;
    std::int32_t slabs, clusters;
    std::int32_t rows, log_splits;  // of a cluster
    float scaling;
    bool need_dA, need_dB, deterministic;
};

// One compiled kernel.
struct Compiled {
    // Loads it on the current device, gives it its shared memory, and asks how many clusters of each size can run at
    // once. Throws CudaError.
    Residency (*prepare)();
    // On the current device, on which it has been prepared. `stream` is a cudaStream_t. Throws CudaError.
    void (*launch)(const Arguments& arguments, const Plan& plan, void* stream);
};

// The kernel for `kType` and the tiles of R (0: without dX) and P (0: without an adapter).
template <DType kType, int kRank, int kAdapter>
Compiled compiled();

}  // namespace loge::sm90
