// The warpgroup that loads: one thread keeps the ring of stages full by TMA, over N and then over K.
#pragma once

#include "sm90_block.cuh"

namespace loge::sm90 {

template <class Layouts>
__device__ __forceinline__ void load_walk_n(const Arguments& args, const Block<Layouts>& block) {
    constexpr SharedMap map = Layouts::kMap;
    constexpr int kRankBoxes = Layouts::Rank::value / kStep;
    constexpr int kLeftBox = kStep * kStep * kElementBytes;
    const int bytes = block.need_t ? map.stage_bytes : map.factor;
    const int row = block.slab * kBlockM;
    if (Layouts::kHasAdapter && args.need_dB) {
        std::uint64_t* barrier = block.barrier(block.kBarriers.resident);
        barrier_expect(barrier, map.staging - map.resident);
        tma_load(args.xa, barrier, Reuse::kOnce, block.resident(), 0, row);
    }
    RingPosition at;
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_n.size(); ++i) {
        const int step = block.step_n(i);
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        std::uint64_t* barrier = block.full(at.stage);
        char* stage = block.stage(at.stage);
        barrier_expect(barrier, bytes);
        tma_load(args.dy, barrier, Reuse::kOnce, stage, step * kStep, row);
        if constexpr (Layouts::kHasRank) {
            // Boxes wholly beyond R are loaded too: they are the zeros that the padded product needs.
            CUTE_UNROLL
            for (int box = 0; box < kRankBoxes; ++box)
                tma_load(args.left, barrier, Reuse::kAgain, stage + map.factor + box * kLeftBox, box * kStep,
                         step * kStep);
        }
        if (Layouts::kHasAdapter && block.need_t)
            tma_load(args.lora_B, barrier, Reuse::kAgain, stage + map.adapter, 0, step * kStep);
        at.advance(map.stages);
    }
}

template <class Layouts>
__device__ __forceinline__ void load_walk_k(const Arguments& args, const Block<Layouts>& block) {
    constexpr SharedMap map = Layouts::kMap;
    const int bytes = (args.need_dA ? map.factor : 0) + (Layouts::kHasRank ? map.stage_bytes - map.factor : 0);
    RingPosition at = ring_position(block.steps_n.size(), map.stages);
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_k.size(); ++i) {
        const int step = block.step_k(i);
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        std::uint64_t* barrier = block.full(at.stage);
        char* stage = block.stage(at.stage);
        barrier_expect(barrier, bytes);
        if (args.need_dA) tma_load(args.x, barrier, Reuse::kOnce, stage, step * kStep, block.slab * kBlockM);
        if constexpr (Layouts::kHasRank) {
            tma_load(args.right, barrier, Reuse::kAgain, stage + map.factor, step * kStep, 0);
            if constexpr (Layouts::kHasAdapter)
                tma_load(args.lora_A, barrier, Reuse::kAgain, stage + map.adapter, step * kStep, 0);
        }
        at.advance(map.stages);
    }
}

// While the ring holds the exchange of T, the first tiles of x come from HBM to L2.
template <class Layouts>
__device__ __forceinline__ void prefetch_walk_k(const Arguments& args, const Block<Layouts>& block) {
    CUTE_NO_UNROLL
    for (int i = 0; args.need_dA && i < block.steps_k.size() && i < Layouts::kMap.stages; ++i)
        tma_prefetch(args.x, block.step_k(i) * kStep, block.slab * kBlockM);
}

// The first TMA of a map would wait for its 128 bytes: they are fetched while the barriers are made.
template <class Layouts>
__device__ __forceinline__ void prefetch_maps(const Arguments& args, const Block<Layouts>& block) {
    map_prefetch(args.dy);
    if constexpr (Layouts::kHasRank) {
        map_prefetch(args.left);
        map_prefetch(args.right);
        map_prefetch(args.dx);
    }
    if constexpr (Layouts::kHasAdapter) {
        if (block.need_t) map_prefetch(args.lora_B);
        if constexpr (Layouts::kHasRank) map_prefetch(args.lora_A);
        if (args.need_dB) map_prefetch(args.xa);
        if (args.need_dA) map_prefetch(args.x);
    }
}

template <class Layouts>
__device__ __forceinline__ void produce(const Arguments& args, const Block<Layouts>& block) {
    // One thread of the first warp, elected where it is needed: then the compiler knows it to be one.
    const bool first_warp = __shfl_sync(0xffffffffu, threadIdx.x % kWarpgroupThreads / 32, 0) == 0;
    if (first_warp && elect_one()) {
        load_walk_n(args, block);
        if (block.exchange) prefetch_walk_k(args, block);
    }
    if (block.exchange) {
        // These warps have written nothing that another block reads: they release nothing.
        __syncwarp();
        cluster_barrier_silent();  // the blocks' partial sums of T are written
        cluster_barrier_silent();  // the rounded sums are back
    }
    if (first_warp && elect_one()) {
        if (block.exchange) barrier_wait(block.barrier(block.kBarriers.ring_free), 0);
        load_walk_k(args, block);
    }
}

}  // namespace loge::sm90
