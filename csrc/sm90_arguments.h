// What the Hopper kernel is launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params.h"

namespace loge::sm90 {

// Passed by value as a grid constant: TMA reads the maps where they lie. Maps of operands that are not needed are zero.
struct Arguments {
    CUtensorMap dy;      // boxes [128, 64]
    CUtensorMap left;    // boxes [64, 64]
    CUtensorMap lora_B;  // boxes [64, P tile]
    CUtensorMap xa;      // boxes [128, P tile]
    CUtensorMap x;       // boxes [128, 64]
    CUtensorMap right;   // boxes [R tile, 64]
    CUtensorMap lora_A;  // boxes [P tile, 64]
    CUtensorMap dx;      // boxes [64, 64]
    float* dA;
    float* dB;
    std::int32_t N, K, P;
    std::int32_t cluster;
    float scaling;
    bool need_dA, need_dB, deterministic;
};

// Launches the kernel compiled for `kType` and the tiles of R (0: without dX) and P (0: without an adapter). `stream`
// is a cudaStream_t. Throws CudaError.
template <DType kType, int kRank, int kAdapter>
void launch(const Arguments& arguments, const Plan& plan, int device, void* stream);

}  // namespace loge::sm90
