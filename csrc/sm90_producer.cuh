// The warpgroup that loads: one thread keeps the ring of stages full by TMA, over N and then over K.
#pragma once

#include "sm90_block.cuh"

namespace loge::sm90 {

// A factor's tile, of which each row of the cluster loads its part into both.
template <class Layouts>
__device__ __forceinline__ void load_factor(const CUtensorMap& map, const Block<Layouts>& block, std::uint64_t* barrier,
                                            char* tile, int tile_rows, int tile_bytes, int column, int row) {
    if (block.rows == 1) {
        tma_load(map, barrier, Reuse::kAgain, tile, column, row);
    } else {
        const unsigned both = 3u << block.rank_of(0, block.split);
        tma_load_shared(map, barrier, both, Reuse::kAgain, tile + block.row * (tile_bytes / 2), column,
                        row + block.row * (tile_rows / 2));
    }
}

template <class Layouts>
__device__ __forceinline__ void load_walk_n(const Arguments& args, const Block<Layouts>& block, RingPosition& at) {
    constexpr SharedMap map = Layouts::kMap;
    constexpr int kRankBoxes = Layouts::Rank::value / kStep;
    constexpr int kLeftBox = kStep * kStep * kElementBytes;
    const int bytes = block.need_t ? map.stage_bytes : map.factor;
    const int row = block.slab * kBlockM;
    if (block.need_dB) {
        std::uint64_t* barrier = block.barrier(block.kBarriers.resident);
        barrier_expect(barrier, map.barriers - map.resident);
        tma_load(args.xa, barrier, Reuse::kOnce, block.resident(), 0, row);
    }
    const int first_ahead = block.steps_n.size() - tiles_ahead(block.steps_n, block.steps_k);
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_n.size(); ++i) {
        const int step = block.step_n(i);
        if (block.need_dA && i >= first_ahead) tma_prefetch(args.x, block.step_k(i - first_ahead) * kStep, row);
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        std::uint64_t* barrier = block.full(at.stage);
        char* stage = block.stage(at.stage);
        barrier_expect(barrier, bytes);
        tma_load(args.dy, barrier, Reuse::kOnce, stage, step * kStep, row);
        if constexpr (Layouts::kHasRank) {
            // Boxes wholly beyond R are loaded too: they are the zeros that the padded product needs.
            CUTE_UNROLL
            for (int box = 0; box < kRankBoxes; ++box)
                load_factor(args.left, block, barrier, stage + map.factor + box * kLeftBox, kStep, kLeftBox,
                            box * kStep, step * kStep);
        }
        if (Layouts::kHasAdapter && block.need_t)
            load_factor(args.lora_B, block, barrier, stage + map.adapter, kStep, map.stage_bytes - map.adapter, 0,
                        step * kStep);
        at.advance(map.stages);
    }
}

template <class Layouts>
__device__ __forceinline__ void load_walk_k(const Arguments& args, const Block<Layouts>& block, RingPosition& at) {
    constexpr SharedMap map = Layouts::kMap;
    const int bytes = (block.need_dA ? map.factor : 0) + (Layouts::kHasRank ? map.stage_bytes - map.factor : 0);
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_k.size(); ++i) {
        const int step = block.step_k(i);
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        std::uint64_t* barrier = block.full(at.stage);
        char* stage = block.stage(at.stage);
        barrier_expect(barrier, bytes);
        if (block.need_dA) tma_load(args.x, barrier, Reuse::kOnce, stage, step * kStep, block.slab * kBlockM);
        if constexpr (Layouts::kHasRank) {
            load_factor(args.right, block, barrier, stage + map.factor, Layouts::kRankColumns, map.adapter - map.factor,
                        step * kStep, 0);
            if constexpr (Layouts::kHasAdapter)
                load_factor(args.lora_A, block, barrier, stage + map.adapter, Layouts::kAdapterColumns,
                            map.stage_bytes - map.adapter, step * kStep, 0);
        }
        at.advance(map.stages);
    }
}

// A block outlives what its neighbour's warps have still to say to it: that they have read the last stages.
template <class Layouts>
__device__ __forceinline__ void wait_for_readers(const Block<Layouts>& block, RingPosition at) {
    CUTE_NO_UNROLL
    for (int i = 0; block.rows == 2 && i < Layouts::kMap.stages; ++i) {
        barrier_wait(block.empty(at.stage), at.parity ^ 1);
        at.advance(Layouts::kMap.stages);
    }
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
    if (!first_warp || !elect_one()) return;
    RingPosition at;
    load_walk_n(args, block, at);
    if (block.exchange) barrier_wait(block.barrier(block.kBarriers.ring_free), 0);
    load_walk_k(args, block, at);
    wait_for_readers(block, at);
}

}  // namespace loge::sm90
