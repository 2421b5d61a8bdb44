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
    for (int step = block.steps_n.begin; step < block.steps_n.end; ++step) {
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        std::uint64_t* barrier = block.full(at.stage);
        char* stage = block.stage(at.stage);
        barrier_expect(barrier, bytes);
        tma_load(args.dy, barrier, Reuse::kOnce, stage, step * kStep, row);
        if constexpr (Layouts::kHasRank) {
            // Boxes wholly beyond R are loaded too: they are the zeros that the padded product needs.
            CUTE_UNROLL
            for (int i = 0; i < kRankBoxes; ++i)
                tma_load(args.left, barrier, Reuse::kAgain, stage + map.factor + i * kLeftBox, i * kStep, step * kStep);
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
    for (int step = block.steps_k.begin; step < block.steps_k.end; ++step) {
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
    const Range steps = block.steps_k;
    CUTE_NO_UNROLL
    for (int step = steps.begin; args.need_dA && step < steps.end && step < steps.begin + Layouts::kMap.stages; ++step)
        tma_prefetch(args.x, step * kStep, block.slab * kBlockM);
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
        __syncwarp();
        cluster_barrier();  // the blocks' partial sums of T are written
        cluster_barrier();  // the rounded sums are back
    }
    if (first_warp && elect_one()) {
        if (block.exchange) barrier_wait(block.barrier(block.kBarriers.ring_free), 0);
        load_walk_k(args, block);
    }
}

}  // namespace loge::sm90
