// The second of two launches, where R is beyond one tile: dX = T [right ; lora_A], and dA = T_P^T x beside it.
//
// A block takes tiles [128, 256] of dX in turn: over R and P the walk of the first launch over N, with T for dY and
// right for left. While it stores one tile, the next one is being loaded. Two slabs share the loads of right. For M =
// 8192, K = 4096, R = 512, P = 16, in 10^6 bytes: 139 of T and 139 of right from L2 (277 without sharing), x and dX
// once. That is the traffic of tiles of 256 by 256, whose accumulators no block has registers for.
#pragma once

#include "sm90_finish.cuh"
#include "sm90_products.cuh"
#include "sm90_stores.cuh"

namespace loge::sm90 {

template <class Element, int kAdapter>
struct Expand {
    // Stages of T or x [128, 64], and right [64, 256] or lora_A [P, 256] or T_P [128, P].
    using Stages = Layouts<Element, kTileColumns, 0>;
    using Tiles = Layouts<Element, kTileColumns, kAdapter>;
    static constexpr SharedMap kMap = Stages::kMap;
    static constexpr bool kHasAdapter = kAdapter > 0;
    static constexpr int kBoxes = kTileColumns / kStep;
    static constexpr int kBox = kStep * kStep * kElementBytes;
    static constexpr int kAdapterBox = kAdapter * kStep * kElementBytes;
    static constexpr int kResident = kBlockM * kAdapter * kElementBytes;

    const ExpandArguments& args;
    Ring<Stages> ring;
    int columns;  // tiles in a row of dX
    int tiles;

    __device__ __forceinline__ Expand(const ExpandArguments& args, char* dynamic_shared)
        : args(args), ring(args.rows, 0, dynamic_shared) {
        columns = tiles_of(args.K);
        tiles = (args.slabs + args.rows - 1) / args.rows * columns;
    }

    __device__ __forceinline__ int slab(int tile) const { return tile / columns * args.rows + ring.row; }
    __device__ __forceinline__ int first_step(int tile) const { return tile % columns * kBoxes; }
    // A slab beyond the last one, in a pair: its T and x are zeros, and it walks the ring as its neighbour does.
    __device__ __forceinline__ bool phantom(int tile) const { return slab(tile) >= args.slabs; }
    // Steps over K in which a tile has dA: none beyond K.
    __device__ __forceinline__ int steps_dA(int tile) const {
        if (!kHasAdapter || !args.need_dA) return 0;
        const int left = count_steps(args.K) - first_step(tile);
        return left < kBoxes ? left : kBoxes;
    }

    __device__ __forceinline__ void produce() const {
        if (!elect_loader()) return;
        wait_for_prerequisites();
        RingPosition at;
        CUTE_NO_UNROLL
        for (int tile = ring.cluster; tile < tiles; tile += args.clusters)
            load_tile(tile, at);
        ring.wait_for_readers(at);
    }

    __device__ __forceinline__ void load_tile(int tile, RingPosition& at) const {
        const int row = slab(tile) * kBlockM, column = first_step(tile) * kStep;
        CUTE_NO_UNROLL
        for (int step = 0; step < args.steps; ++step) {
            char* stage = ring.refill(at, kMap.stage_bytes);
            std::uint64_t* barrier = ring.full(at.stage);
            tma_load(args.t, barrier, Reuse::kAgain, stage, step * kStep, row);
            CUTE_UNROLL
            for (int box = 0; box < kBoxes; ++box)
                ring.load_factor(args.right, barrier, stage + kMap.factor + box * kBox, kStep, kBox,
                                 column + box * kStep, step * kStep);
            at.advance(kMap.stages);
        }
        if constexpr (kHasAdapter) {
            char* stage = ring.refill(at, kMap.factor + kBoxes * kAdapterBox);
            std::uint64_t* barrier = ring.full(at.stage);
            tma_load(args.t_p, barrier, Reuse::kAgain, stage, 0, row);
            CUTE_UNROLL
            for (int box = 0; box < kBoxes; ++box)
                ring.load_factor(args.lora_A, barrier, stage + kMap.factor + box * kBox, kAdapter, kAdapterBox,
                                 column + box * kStep, 0);
            at.advance(kMap.stages);
            CUTE_NO_UNROLL
            for (int i = 0; i < steps_dA(tile); ++i) {
                stage = ring.refill(at, kMap.factor + kResident);
                barrier = ring.full(at.stage);
                tma_load(args.x, barrier, Reuse::kOnce, stage, column + i * kStep, row);
                tma_load(args.t_p_dA, barrier, Reuse::kAgain, stage + kMap.factor, 0, row);
                at.advance(kMap.stages);
            }
        }
    }

    // dx_tile [64, 256] += T [64, 64] right [64, 256], or the first `kDepth` of the contracted 64.
    template <int kDepth, class Accumulators>
    __device__ __forceinline__ void multiply_step(int stage_index, int warpgroup, Accumulators& dx_tile) const {
        char* stage = ring.stage(stage_index);
        const auto t = shared_tensor<Element>(stage + warpgroup * kWarpgroupRows * kStep * kElementBytes,
                                              typename Tiles::Activation{});                     // (BM / 2, 64)
        const auto right = shared_tensor<Element>(stage + kMap.factor, typename Tiles::Left{});  // (BK, 64)
        wgmma_own(dx_tile);
        wgmma_fence();
        multiply_shared<Start::kAdd, typename Tiles::ProjectRank, kDepth>(t, right, dx_tile);
        wgmma_commit();
    }

    template <class Accumulators>
    __device__ __forceinline__ void multiply_tile(int warpgroup, int thread, RingPosition& at,
                                                  Accumulators& dx_tile) const {
        int previous = -1;
        CUTE_NO_UNROLL
        for (int step = 0; step < args.steps; ++step) {
            barrier_wait(ring.full(at.stage), at.parity);
            multiply_step<kStep>(at.stage, warpgroup, dx_tile);
            wgmma_wait<1>();
            if (previous >= 0) ring.release(previous, thread);
            previous = at.stage;
            at.advance(kMap.stages);
        }
        if constexpr (kHasAdapter) {
            barrier_wait(ring.full(at.stage), at.parity);
            multiply_step<kAdapter>(at.stage, warpgroup, dx_tile);
            wgmma_wait<1>();
            ring.release(previous, thread);
            previous = at.stage;
            at.advance(kMap.stages);
        }
        wgmma_wait<0>();
        wgmma_own(dx_tile);
        ring.release(previous, thread);
    }

    // dA^T [64, P] = x^T T_P of step `i` of a tile.
    __device__ __forceinline__ void multiply_dA(int tile, int i, int stage_index, int thread) const {
        char* stage = ring.stage(stage_index);
        const auto x_t = shared_tensor<Element>(stage, typename Tiles::ActivationT{});             // (BK, BM)
        const auto t_p = shared_tensor<Element>(stage + kMap.factor, typename Tiles::Resident{});  // (P, BM)
        auto dA_tile = accumulators<typename Tiles::Skinny, Tiles::Adapter::value>();              // (BK, P)
        wgmma_own(dA_tile);
        wgmma_fence();
        multiply_shared<Start::kZero, typename Tiles::Skinny>(x_t, t_p, dA_tile);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_own(dA_tile);
        store_dA(args, args.dA + slab(tile) * args.slab_stride, (first_step(tile) + i) * kStep, thread, dA_tile);
    }

    __device__ __forceinline__ void consume(int warpgroup) const {
        const int thread = threadIdx.x % kWarpgroupThreads;
        const bool stores = elect_one() && thread < 32;
        RingPosition at;
        CUTE_NO_UNROLL
        for (int tile = ring.cluster; tile < tiles; tile += args.clusters) {
            auto dx_tile = accumulators<typename Tiles::ProjectRank, kTileColumns>();  // (BM / 2, BK)
            cute::clear(dx_tile);
            multiply_tile(warpgroup, thread, at, dx_tile);
            CUTE_UNROLL
            for (int box = 0; box < kBoxes; ++box)
                store_tile(args.dx, ring, warpgroup, thread, stores, (first_step(tile) + box) * kStep,
                           slab(tile) * kBlockM + warpgroup * kWarpgroupRows, box % kMap.staging_buffers,
                           [&dx_tile, box](int g) {
                               float v[kGranuleValues];
                               read_granule(dx_tile, box * (kStep / kGranuleColumns) + g, 1.0f, v);
                               return round_granule<Element>(v);
                           });
            CUTE_NO_UNROLL
            for (int i = 0; i < steps_dA(tile); ++i) {
                barrier_wait(ring.full(at.stage), at.parity);
                if (takes_turn(warpgroup, i) && !phantom(tile)) multiply_dA(tile, i, at.stage, thread);
                ring.release(at.stage, thread);
                at.advance(kMap.stages);
            }
        }
        if (stores) tma_store_wait<0>();
        if (kHasAdapter && args.finished != nullptr && args.need_dA)
            finish_sums<Element>(args, args.finished + kMaxCluster - 1, args.clusters * args.rows, Range{0, 0},
                                 Range{0, args.K}, warpgroup * kWarpgroupThreads + thread);
    }

    __device__ __forceinline__ void prefetch_maps() const {
        map_prefetch(args.t);
        map_prefetch(args.right);
        map_prefetch(args.dx);
        if constexpr (kHasAdapter) {
            map_prefetch(args.t_p);
            map_prefetch(args.lora_A);
            if (args.need_dA) {
                map_prefetch(args.x);
                map_prefetch(args.t_p_dA);
            }
        }
    }

    __device__ __forceinline__ void run() const {
        if (threadIdx.x == 0) ring.init_barriers();
        if (threadIdx.x == kConsumerThreads) prefetch_maps();
        ring.start();
        const int warpgroup = take_role();
        if (warpgroup == kConsumers) {
            produce();
        } else {
            consume(warpgroup);
        }
    }
};

template <class Element, int kAdapter>
__global__ void __launch_bounds__(kThreads, 1) sm90_expand_kernel(const __grid_constant__ ExpandArguments args) {
    extern __shared__ char dynamic_shared[];
    Expand<Element, kAdapter>(args, dynamic_shared).run();
}

}  // namespace loge::sm90
