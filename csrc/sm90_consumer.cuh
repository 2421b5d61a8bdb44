// The warpgroups that multiply: T and dB while walking N, dX and dA while walking K.
#pragma once

#include "sm90_finish.cuh"
#include "sm90_products.cuh"
#include "sm90_stores.cuh"

namespace loge::sm90 {

// One step of the walk over N: T += dY [left | lora_B] and, where it is this warpgroup's turn, dB = s dY^T xa. Returns
// with T's products still running: what is complete is this step's dB and the T of the step before, whose stage is
// free.
template <class Element, bool kTurn, class Layouts, class RankSums, class AdapterSums>
__device__ __forceinline__ void step_n(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                       float* dB, int step, int stage_index, int previous, RankSums& t_r,
                                       AdapterSums& t_p) {
    constexpr SharedMap map = Layouts::kMap;
    char* stage = block.stage(stage_index);
    const auto dy = shared_tensor<Element>(stage + warpgroup * kWarpgroupRows * kStep * kElementBytes,
                                           typename Layouts::Activation{});                      // (BM / 2, BN)
    const auto dy_t = shared_tensor<Element>(stage, typename Layouts::ActivationT{});            // (BN, BM)
    const auto left = shared_tensor<Element>(stage + map.factor, typename Layouts::Left{});      // (R, BN)
    const auto lora_B = shared_tensor<Element>(stage + map.adapter, typename Layouts::LoraB{});  // (P, BN)
    const auto xa = shared_tensor<Element>(block.resident(), typename Layouts::Resident{});      // (P, BM)
    auto dB_tile = accumulators<typename Layouts::Skinny, Layouts::Adapter::value>();            // (BN, P)

    wgmma_own(t_r);
    wgmma_own(t_p);
    // Groups complete in order: dB first, so that it is stored while T's products run.
    if constexpr (kTurn) {
        wgmma_own(dB_tile);
        wgmma_fence();
        multiply_shared<Start::kZero, typename Layouts::Skinny>(dy_t, xa, dB_tile);
        wgmma_commit();
    }
    if constexpr (Layouts::kHasRank) {
        wgmma_fence();
        multiply_shared<Start::kAdd, typename Layouts::ProjectRank>(dy, left, t_r);
        if constexpr (Layouts::kHasAdapter)
            if (block.has_adapter()) multiply_shared<Start::kAdd, typename Layouts::ProjectAdapter>(dy, lora_B, t_p);
        wgmma_commit();
        wgmma_wait<1>();
    } else {
        if (block.need_t) {
            wgmma_fence();
            multiply_shared<Start::kAdd, typename Layouts::ProjectAdapter>(dy, lora_B, t_p);
            wgmma_commit();
        }
        wgmma_wait<0>();
    }
    if (previous >= 0) block.release(previous, thread);
    if constexpr (kTurn) {
        wgmma_own(dB_tile);
        store_dB(args, dB, step * kStep, thread, dB_tile);
    }
}

template <class Element, class Layouts, class RankSums, class AdapterSums>
__device__ __forceinline__ void walk_n(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                       RingPosition& at, RankSums& t_r, AdapterSums& t_p) {
    float* dB = args.dB + block.slab * args.slab_stride;
    if (block.need_dB) barrier_wait(block.barrier(block.kBarriers.resident), 0);
    int previous = -1;
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_n.size(); ++i) {
        const int step = block.step_n(i);
        barrier_wait(block.full(at.stage), at.parity);
        if (block.need_dB && takes_turn(warpgroup, i)) {
            step_n<Element, true>(args, block, warpgroup, thread, dB, step, at.stage, previous, t_r, t_p);
        } else {
            step_n<Element, false>(args, block, warpgroup, thread, dB, step, at.stage, previous, t_r, t_p);
        }
        previous = at.stage;
        at.advance(Layouts::kMap.stages);
    }
    wgmma_wait<0>();
    wgmma_own(t_r);
    wgmma_own(t_p);
    if (previous >= 0) block.release(previous, thread);
}

// One step of the walk over K: dX = T [right ; lora_A] and, where it is this warpgroup's turn, dA^T = x^T T_P.
template <class Element, bool kTurn, class Layouts, class RankFragment, class AdapterFragment>
__device__ __forceinline__ void step_k(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                       bool stores, float* dA, int step, int stage_index, int buffer,
                                       const RankFragment& t_r, const AdapterFragment& t_p) {
    constexpr SharedMap map = Layouts::kMap;
    char* stage = block.stage(stage_index);
    const auto x_t = shared_tensor<Element>(stage, typename Layouts::ActivationT{});               // (BK, BM)
    const auto right = shared_tensor<Element>(stage + map.factor, typename Layouts::Right{});      // (BK, R)
    const auto lora_A = shared_tensor<Element>(stage + map.adapter, typename Layouts::LoraA{});    // (BK, P)
    const auto resident = shared_tensor<Element>(block.resident(), typename Layouts::Resident{});  // (P, BM)
    auto dA_tile = accumulators<typename Layouts::Skinny, Layouts::Adapter::value>();              // (BK, P)
    auto dx_tile = accumulators<typename Layouts::Expand, kStep>();                                // (BM / 2, BK)

    if constexpr (kTurn) {
        wgmma_own(dA_tile);
        wgmma_fence();
        multiply_shared<Start::kZero, typename Layouts::Skinny>(x_t, resident, dA_tile);
        wgmma_commit();
    }
    if constexpr (Layouts::kHasRank) {
        typename Layouts::Expand expand;
        const auto slice = expand.get_slice(0);
        wgmma_own(dx_tile);
        wgmma_fence();
        // The fragments of T are read while this runs. They never change, and each step waits for its products: a
        // pipeline that left some running over a step's end would have to keep the compiler off the fragments too.
        multiply<Start::kZero>(expand, t_r, slice.partition_fragment_B(right), dx_tile);
        if constexpr (Layouts::kHasAdapter)
            multiply<Start::kAdd>(expand, t_p, slice.partition_fragment_B(lora_A), dx_tile);
        wgmma_commit();
    }
    if constexpr (kTurn) {
        wgmma_wait<Layouts::kHasRank ? 1 : 0>();
        wgmma_own(dA_tile);
        store_dA(args, dA, step * kStep, thread, dA_tile);
    }
    wgmma_wait<0>();
    block.release(stage_index, thread);
    if constexpr (Layouts::kHasRank) {
        wgmma_own(dx_tile);
        store_tile(args.dx, block, warpgroup, thread, stores, step * kStep,
                   block.slab * kBlockM + warpgroup * kWarpgroupRows, buffer, [&dx_tile](int g) {
                       float v[kGranuleValues];
                       read_granule(dx_tile, g, 1.0f, v);
                       return round_granule<Element>(v);
                   });
    }
}

template <class Element, class Layouts, class RankFragment, class AdapterFragment>
__device__ __forceinline__ void walk_k(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                       RingPosition& at, const RankFragment& t_r, const AdapterFragment& t_p) {
    float* dA = args.dA + block.slab * args.slab_stride;
    const bool stores = elect_one() && thread < 32;
    CUTE_NO_UNROLL
    for (int i = 0; i < block.steps_k.size(); ++i) {
        const int step = block.step_k(i);
        const int buffer = i % Layouts::kMap.staging_buffers;
        barrier_wait(block.full(at.stage), at.parity);
        if (block.need_dA && takes_turn(warpgroup, i)) {
            step_k<Element, true>(args, block, warpgroup, thread, stores, dA, step, at.stage, buffer, t_r, t_p);
        } else {
            step_k<Element, false>(args, block, warpgroup, thread, stores, dA, step, at.stage, buffer, t_r, t_p);
        }
        at.advance(Layouts::kMap.stages);
    }
    // Shared memory must outlive its stores, which is all that the kernel's end needs. A launch that let its successor
    // start early would have to wait until they are written.
    if (Layouts::kHasRank && stores) tma_store_wait<0>();
}

// T [64, 256] of this warpgroup's rows, and the adapter's part of the slab's, to global memory. All splits have it, and
// each stores a part.
template <class Layouts, class RankFragment, class AdapterFragment>
__device__ __forceinline__ void store_t(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                        const RankFragment& t_r, const AdapterFragment& t_p) {
    const bool stores = elect_one() && thread < 32;
    const int row = block.slab * kBlockM;
    CUTE_UNROLL
    for (int box = 0; box < Layouts::kRankColumns / kStep; ++box)
        if (granule_owner(box, block.log_splits) == block.split)
            store_tile(args.dx, block, warpgroup, thread, stores, block.tile * Layouts::kRankColumns + box * kStep,
                       row + warpgroup * kWarpgroupRows, box % Layouts::kMap.staging_buffers,
                       [&t_r, box](int g) { return granule_of(t_r, box * (kStep / kGranuleColumns) + g); });
    if (block.has_adapter() && block.split == 0) {
        store_t_p<Layouts::kAdapterColumns>(block.resident(), warpgroup * kWarpgroupRows, thread, t_p);
        async_proxy_fence();
        named_barrier(kAllConsumers, kConsumerThreads);
        if (stores && warpgroup == 0) tma_store(args.t_p, block.resident(), 0, row);
    }
    // The launch that reads T has started.
    if (stores) tma_store_wait_written();
}

// T to its 16-bit fragments, and the walk over K.
template <class Element, class Layouts, class RankSums, class AdapterSums>
__device__ __forceinline__ void expand(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                       RingPosition& at, const RankSums& t_r, const AdapterSums& t_p) {
    constexpr int kRank = Layouts::Rank::value, kAdapter = Layouts::Adapter::value;
    auto rank_fragment = fragment<Element, kRank>();
    auto adapter_fragment = fragment<Element, kAdapter>();
    // Both warpgroups have read the last stage and xa.
    named_barrier(kAllConsumers, kConsumerThreads);
    if (block.exchange) {
        enter(Phase::kExchange);
        exchange_t<Layouts, Element>(args, block, warpgroup * kWarpgroupThreads + thread, t_r, t_p, rank_fragment,
                                     adapter_fragment);
    } else {
        if constexpr (Layouts::kHasRank) round_t<Element>(t_r, 1.0f, rank_fragment);
        if constexpr (Layouts::kHasAdapter) round_t<Element>(t_p, args.scaling, adapter_fragment);
    }
    enter(Layouts::kProject ? Phase::kWalkN : Phase::kWalkK);
    if constexpr (Layouts::kProject) {
        store_t(args, block, warpgroup, thread, rank_fragment, adapter_fragment);
    } else {
        if (block.need_dA) {
            store_t_p<kAdapter>(block.resident(), warpgroup * kWarpgroupRows, thread, adapter_fragment);
            async_proxy_fence();
            named_barrier(kAllConsumers, kConsumerThreads);
        }
        walk_k<Element>(args, block, warpgroup, thread, at, rank_fragment, adapter_fragment);
    }
}

template <class Element, class Layouts>
__device__ __forceinline__ void consume(const Arguments& args, const Block<Layouts>& block, int warpgroup) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    RingPosition at;
    auto t_r = accumulators<typename Layouts::ProjectRank, Layouts::Rank::value>();        // (BM / 2, R)
    auto t_p = accumulators<typename Layouts::ProjectAdapter, Layouts::Adapter::value>();  // (BM / 2, P)
    cute::clear(t_r);
    cute::clear(t_p);
    walk_n<Element>(args, block, warpgroup, thread, at, t_r, t_p);
    if (block.need_t) expand<Element>(args, block, warpgroup, thread, at, t_r, t_p);
    if (block.has_adapter() && args.finished != nullptr && !block.phantom)
        finish<Element>(args, block, warpgroup * kWarpgroupThreads + thread);
}

}  // namespace loge::sm90
