// The warpgroup that loads: one thread keeps the ring of stages full by TMA, over N and then over K.
#pragma once

#include "sm90_block.cuh"

namespace loge::sm90 {

template <class Layouts>
__device__ __forceinline__ void load_walk_n(const Arguments& args, const Block<Layouts>& block, RingPosition& at) {
    constexpr SharedMap map = Layouts::kMap;
    constexpr int kRankBoxes = Layouts::Rank::value / kStep;
    constexpr int kLeftBox = kStep * kStep * kElementBytes;
    const bool lora_B = block.has_adapter() && block.need_t;
    const int bytes = !block.need_t ? map.factor : lora_B ? map.stage_bytes : map.adapter;
    const int row = block.slab * kBlockM, first_column = block.tile * Layouts::Rank::value;
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
        char* stage = block.refill(at, bytes);
        std::uint64_t* barrier = block.full(at.stage);
        tma_load(args.dy, barrier, Reuse::kOnce, stage, step * kStep, row);
        if constexpr (Layouts::kHasRank) {
            // Boxes wholly beyond R are loaded too: they are the zeros that the padded product needs.
            CUTE_UNROLL
            for (int box = 0; box < kRankBoxes; ++box)
                block.load_factor(args.left, barrier, stage + map.factor + box * kLeftBox, kStep, kLeftBox,
                                  first_column + box * kStep, step * kStep);
        }
        if (lora_B)
            block.load_factor(args.lora_B, barrier, stage + map.adapter, kStep, map.stage_bytes - map.adapter, 0,
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
        char* stage = block.refill(at, bytes);
        std::uint64_t* barrier = block.full(at.stage);
        if (block.need_dA) tma_load(args.x, barrier, Reuse::kOnce, stage, step * kStep, block.slab * kBlockM);
        if constexpr (Layouts::kHasRank) {
            block.load_factor(args.right, barrier, stage + map.factor, Layouts::kRankColumns, map.adapter - map.factor,
                              step * kStep, 0);
            if constexpr (Layouts::kHasAdapter)
                block.load_factor(args.lora_A, barrier, stage + map.adapter, Layouts::kAdapterColumns,
                                  map.stage_bytes - map.adapter, step * kStep, 0);
        }
        at.advance(map.stages);
    }
}

// The first TMA of a map would wait for its 128 bytes: they are fetched while the barriers are made.
template <class Layouts>
__device__ __forceinline__ void prefetch_maps(const Arguments& args, const Block<Layouts>& block) {
    map_prefetch(args.dy);
    if constexpr (Layouts::kHasRank) {
        map_prefetch(args.left);
        map_prefetch(args.dx);
        if constexpr (!Layouts::kProject) map_prefetch(args.right);
    }
    if constexpr (Layouts::kHasAdapter) {
        if (block.need_t) map_prefetch(args.lora_B);
        if constexpr (Layouts::kHasRank) map_prefetch(Layouts::kProject ? args.t_p : args.lora_A);
        if (args.need_dB) map_prefetch(args.xa);
        if (args.need_dA) map_prefetch(args.x);
    }
}

template <class Layouts>
__device__ __forceinline__ void produce(const Arguments& args, const Block<Layouts>& block) {
    if (!elect_loader()) return;
    RingPosition at;
    load_walk_n(args, block, at);
    if constexpr (!Layouts::kProject) {
        if (block.exchange) barrier_wait(block.barrier(block.kBarriers.ring_free), 0);
        enter(Phase::kWalkK);
        load_walk_k(args, block, at);
    }
    block.wait_for_readers(at);
}

}  // namespace loge::sm90
