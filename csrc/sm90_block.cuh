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

    char* shared;  // aligned to kSharedAlignment, the same address in every block of a cluster
    int slab;
    int rank;  // in the cluster
    Range steps_n, steps_k;
    int shift_n, shift_k;
    bool need_t;    // for dX or dA
    bool exchange;  // T is the sum over the blocks of a cluster

    __device__ __forceinline__ Block(const Arguments& args, char* dynamic_shared) {
        const std::uint32_t address = cute::cast_smem_ptr_to_uint(dynamic_shared);
        shared = dynamic_shared + ((kSharedAlignment - address % kSharedAlignment) % kSharedAlignment);
        slab = blockIdx.x / args.cluster;
        rank = blockIdx.x % args.cluster;
        need_t = Layouts::kHasRank || args.need_dA;
        exchange = need_t && args.cluster > 1;
        steps_n = steps_of(args.N, rank, args.cluster);
        steps_k = need_t ? steps_of(args.K, rank, args.cluster) : Range{0, 0};
        shift_n = shift_of(steps_n, slab, args.slabs);
        shift_k = shift_of(steps_k, slab, args.slabs);
    }

    // Where in N, and in K, step `i` of this block's walk is.
    __device__ __forceinline__ int step_n(int i) const { return rotated(steps_n, shift_n, i); }
    __device__ __forceinline__ int step_k(int i) const { return rotated(steps_k, shift_k, i); }

    __device__ __forceinline__ char* stage(int i) const { return shared + i * kMap.stage_bytes; }
    __device__ __forceinline__ char* resident() const { return shared + kMap.resident; }
    __device__ __forceinline__ char* staging(int warpgroup, int buffer) const {
        return shared + kMap.staging + (warpgroup * kStagingBuffers + buffer) * kStagingBytes;
    }
    __device__ __forceinline__ std::uint64_t* barrier(int i) const {
        return reinterpret_cast<std::uint64_t*>(shared + kMap.barriers) + i;
    }
    __device__ __forceinline__ std::uint64_t* full(int i) const { return barrier(kBarriers.full + i); }
    __device__ __forceinline__ std::uint64_t* empty(int i) const { return barrier(kBarriers.empty + i); }

    // One thread. Full barriers count the loads' bytes, empty ones the warps that have read a stage.
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kMap.stages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), kConsumerWarps);
        }
        barrier_init(barrier(kBarriers.resident), 1);
        barrier_init(barrier(kBarriers.ring_free), kConsumerWarps);
        barrier_init_fence();
    }
};

}  // namespace loge::sm90
