// What every thread of a block of the Hopper kernel knows: its place in the problem and its shared memory.
#pragma once

#include <cstdint>

#include "sm90_arguments.h"
#include "sm90_layouts.h"
#include "sm90_ptx.cuh"

namespace loge::sm90 {

inline constexpr int kAllConsumers = 1;  // named barriers; 0 is __syncthreads
inline constexpr int kOneWarpgroup = 2;  // and 3

template <class Layouts>
struct Block {
    static constexpr SharedMap kMap = Layouts::kMap;
    static constexpr BarrierMap kBarriers = barrier_map(kMap.stages);

    char* shared;            // aligned to kSharedAlignment, the same address in every block of a cluster
    int rows;                // slabs that share a cluster, and with it the factors' loads: 1 or 2
    int row;                 // of this block among them
    int splits, log_splits;  // of N and K
    int split;               // this block's
    int slab;
    Range steps_n, steps_k;
    int shift_n, shift_k;
    bool need_t;    // for dX or dA
    bool exchange;  // T is the sum over the splits
    // A phantom slab, where a cluster of two has one slab left, loads what its neighbour needs and multiplies zeros.
    bool phantom;
    bool need_dA, need_dB;  // of this slab

    __device__ __forceinline__ Block(const Arguments& args, char* dynamic_shared) {
        const std::uint32_t address = cute::cast_smem_ptr_to_uint(dynamic_shared);
        shared = dynamic_shared + ((kSharedAlignment - address % kSharedAlignment) % kSharedAlignment);
        rows = args.rows;
        log_splits = args.log_splits;
        splits = 1 << log_splits;
        const int size = rows << log_splits, cluster = blockIdx.x / size, rank = blockIdx.x % size;
        row = rank % rows;
        split = rank / rows;
        slab = cluster * rows + row;
        phantom = slab >= args.slabs;
        need_t = Layouts::kHasRank || args.need_dA;
        exchange = need_t && splits > 1;
        need_dA = Layouts::kHasAdapter && args.need_dA && !phantom;
        need_dB = Layouts::kHasAdapter && args.need_dB && !phantom;
        steps_n = steps_of(args.N, split, splits);
        steps_k = need_t ? steps_of(args.K, split, splits) : Range{0, 0};
        shift_n = shift_of(steps_n, cluster, args.clusters);
        shift_k = shift_of(steps_k, cluster, args.clusters);
    }

    // In the cluster.
    __device__ __forceinline__ int rank_of(int of_row, int of_split) const { return of_split * rows + of_row; }
    __device__ __forceinline__ int neighbour() const { return rank_of(row ^ 1, split); }

    // Where in N, and in K, step `i` of this block's walk is.
    __device__ __forceinline__ int step_n(int i) const { return rotated(steps_n, shift_n, i); }
    __device__ __forceinline__ int step_k(int i) const { return rotated(steps_k, shift_k, i); }

    __device__ __forceinline__ char* stage(int i) const { return shared + i * kMap.stage_bytes; }
    __device__ __forceinline__ char* resident() const { return shared + kMap.resident; }
    __device__ __forceinline__ char* staging(int warpgroup, int buffer) const {
        return shared + kMap.staging + (warpgroup * kMap.staging_buffers + buffer) * kStagingBytes;
    }
    __device__ __forceinline__ std::uint64_t* barrier(int i) const {
        return reinterpret_cast<std::uint64_t*>(shared + kMap.barriers) + i;
    }
    __device__ __forceinline__ std::uint64_t* full(int i) const { return barrier(kBarriers.full + i); }
    __device__ __forceinline__ std::uint64_t* empty(int i) const { return barrier(kBarriers.empty + i); }

    // One thread. Full barriers count the loads' bytes, empty ones the warps that have read a stage, of both rows: what
    // one of them loads, both read.
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kMap.stages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), kConsumerWarps * rows);
        }
        barrier_init(barrier(kBarriers.resident), 1);
        barrier_init(barrier(kBarriers.drained), splits > 1 ? splits - 1 : 1);
        barrier_init(barrier(kBarriers.partials), 1);
        barrier_init(barrier(kBarriers.sums), 1);
        barrier_init(barrier(kBarriers.ring_free), kConsumerWarps * rows);
        barrier_init_fence();
    }

    // One arrival of a warp at a barrier of this block and of its neighbour.
    __device__ __forceinline__ void arrive_in_rows(std::uint64_t* at, int lane) const {
        if (lane == 0) barrier_arrive(at);
        if (lane == 1 && rows == 2) remote_arrive(remote_address(at, neighbour()));
    }
};

}  // namespace loge::sm90
