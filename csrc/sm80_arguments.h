// What the two Ampere kernels are told beside the problem: how it is cut, and what the first leaves for the second.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"
#include "sm80_tiles.h"

namespace loge::sm80 {

struct Arguments {
    BackwardParams problem;
    std::int32_t rank, adapter;  // columns of T: R and P, 0 of what is not needed
    std::int32_t project_stages, expand_stages;
    std::int32_t step_n;                              // columns of dY per step
    std::int32_t project_slabs, expand_slabs, steps;  // of M, in either launch, and of N
    Cut project;             // the steps of tiles of T: those side by side after all slabs of the first
    Cut expand;              // the slabs of columns of dX
    std::int32_t dB_blocks;  // of the first launch: those that have a part of dB
    std::int32_t dB_steps;   // steps of N that such a block has room for
    void* t;                 // [M, rank + adapter], T in 16 bits; the adapter's part with its scale
    float *t_parts, *dB_parts, *dA_parts;
    unsigned *t_counters, *dA_counters;  // zeros, one for each block
};

inline std::int64_t tiles_of(std::int64_t size, std::int64_t tile) {
    return (size + tile - 1) / tile;
}

// The scratch of a call, in elements of 4 bytes: T, and what blocks have summed of tiles that are not all theirs.
struct Scratch {
    std::int64_t t_parts, dB_parts, dA_parts, size;
};
inline Scratch scratch_of(const Arguments& a, int t_fragments, int dA_fragments) {
    const auto parts = [](std::int64_t tiles, const Cut& cut, std::int64_t fragments) {
        return tiles % cut.blocks == 0 ? 0 : 2 * std::int64_t{cut.blocks} * fragments * kFragmentFloats;
    };
    const BackwardParams& p = a.problem;
    Scratch s{};
    s.t_parts = tiles_of(p.M * (a.rank + a.adapter), 8) * 4;
    s.dB_parts = s.t_parts + (a.rank + a.adapter > 0 ? parts(a.project.total / a.steps, a.project, t_fragments) : 0);
    s.dA_parts = s.dB_parts + (p.dB != nullptr ? std::int64_t{a.dB_blocks} * a.dB_steps * a.step_n * p.P : 0);
    s.size = s.dA_parts + (p.dA != nullptr ? parts(a.expand.total / a.expand_slabs, a.expand, dA_fragments) : 0);
    return s;
}

}  // namespace loge::sm80
