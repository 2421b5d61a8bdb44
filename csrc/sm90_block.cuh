// What every thread of a block of the Hopper kernel knows: its place in the problem and its shared memory.
#pragma once

#include "sm90_arguments.h"
#include "sm90_ring.cuh"

namespace loge::sm90 {

template <class Layouts>
struct Block : Ring<Layouts> {
    int tile;  // of the rank: columns 256 `tile` and on of left and T
    int slab;
    Range steps_n, steps_k;
    int shift_n, shift_k;
    bool need_t;    // for dX or dA
    bool exchange;  // T is the sum over the splits
    // A phantom slab, where a cluster of two has one slab left, loads what its neighbour needs and multiplies zeros.
    bool phantom;
    bool need_dA, need_dB;  // of this slab

    __device__ __forceinline__ Block(const Arguments& args, char* dynamic_shared)
        : Ring<Layouts>(args.rows, args.log_splits, dynamic_shared) {
        const int group = this->cluster / args.tiles, groups = args.clusters / args.tiles;
        tile = this->cluster % args.tiles;
        slab = group * this->rows + this->row;
        phantom = slab >= args.slabs;
        need_t = Layouts::kHasRank || args.need_dA;
        exchange = need_t && this->splits > 1;
        need_dA = Layouts::kHasAdapter && args.need_dA && !phantom;
        need_dB = Layouts::kHasAdapter && args.need_dB && !phantom && has_adapter();
        steps_n = steps_of(args.N, this->split, this->splits);
        steps_k = need_t && !Layouts::kProject ? steps_of(args.K, this->split, this->splits) : Range{0, 0};
        shift_n = shift_of(steps_n, group, groups);
        shift_k = shift_of(steps_k, group, groups);
    }

    // The adapter's part of T and of dB goes with the first tile of the rank.
    __device__ __forceinline__ bool has_adapter() const {
        return Layouts::kHasAdapter && (!Layouts::kProject || tile == 0);
    }

    // Where in N, and in K, step `i` of this block's walk is.
    __device__ __forceinline__ int step_n(int i) const { return rotated(steps_n, shift_n, i); }
    __device__ __forceinline__ int step_k(int i) const { return rotated(steps_k, shift_k, i); }
};

}  // namespace loge::sm90
