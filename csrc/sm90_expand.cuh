// The second of two launches, where R is beyond one tile: dX = T [right ; lora_A], and dA = T_P^T x beside it.
//
// A block takes tiles [128, 256] of dX in turn, most of them of one slab, whose T stays in shared memory while right
// passes by in steps of 32 rows. While a tile is stored, right is being loaded for the next one. Two slabs share the
// loads of right. For M = 8192, K = 4096, R = 512, P = 16, in 10^6 bytes from L2: 139 of right (277 without sharing)
// and 17 to 26 of T, which tiles that load both would read sixteen times: 138.
#pragma once

#include "sm90_finish.cuh"
#include "sm90_products.cuh"
#include "sm90_stores.cuh"

namespace loge::sm90 {

template <class Element, int kAdapter>
struct Expand {
    using Tiles = Layouts<Element, kTileColumns, kAdapter>;
    // Boxes [32, 64], one after the other.
    using Right =
        decltype(cute::tile_to_shape(typename Tiles::Wide{}, cute::Shape<cute::Int<kTileColumns>, cute::Int<kDepth>>{},
                                     cute::Step<cute::_2, cute::_1>{}));
    struct Shared {
        static constexpr SharedMap kMap = expand_map(kAdapter);
        static_assert(kMap.bytes <= kMaxSharedBytes);
    };
    static constexpr SharedMap kMap = Shared::kMap;
    static constexpr bool kHasAdapter = kAdapter > 0;
    static constexpr int kBoxes = kTileColumns / kStep;
    static constexpr int kBox = kDepth * kStep * kElementBytes;
    static constexpr int kHalves = kStep / kDepth;                               // steps for a box of T
    static constexpr int kAdapterDepth = kAdapter < kDepth ? kAdapter : kDepth;  // rows of lora_A in a step
    static constexpr int kAdapterSteps = kHasAdapter ? kAdapter / kAdapterDepth : 0;

    const ExpandArguments& args;
    Ring<Shared> ring;
    int columns;  // tiles in a row of dX
    Range tiles;  // of this block and its neighbour: along a slab, and then along the next

    __device__ __forceinline__ Expand(const ExpandArguments& args, char* dynamic_shared)
        : args(args), ring(args.rows, 0, dynamic_shared) {
        columns = tiles_of(args.K);
        const std::int64_t groups = (args.slabs + args.rows - 1) / args.rows;
        tiles = share_of(groups * columns, ring.cluster, args.clusters);
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
    __device__ __forceinline__ char* t_box(int i) const { return ring.resident() + i * kTBoxBytes; }
    __device__ __forceinline__ char* t_p() const { return t_box(static_cast<int>(kMaxRank) / kStep); }

    __device__ __forceinline__ void produce() const {
        if (!elect_loader()) return;
        wait_for_prerequisites();
        RingPosition at;
        CUTE_NO_UNROLL
        for (int tile = tiles.begin; tile < tiles.end; ++tile)
            load_tile(tile, at);
        ring.wait_for_readers(at);
    }

    // A box of T comes with the first step that reads it of the first tile of its slab. The slab before has been read
    // there: the stage of that step was last read later than the box was, five boxes being more than there are stages.
    __device__ __forceinline__ void load_tile(int tile, RingPosition& at) const {
        const int row = slab(tile) * kBlockM, column = first_step(tile) * kStep;
        const bool first = tile == tiles.begin || tile % columns == 0;
        CUTE_NO_UNROLL
        for (int step = 0; step < kHalves * args.boxes; ++step) {
            const bool with_t = first && step % kHalves == 0;
            char* stage = ring.refill(at, kMap.stage_bytes + (with_t ? kTBoxBytes : 0));
            std::uint64_t* barrier = ring.full(at.stage);
            if (with_t) tma_load(args.t, barrier, Reuse::kAgain, t_box(step / kHalves), step * kDepth, row);
            load_rows(args.right, barrier, stage, column, step * kDepth);
            at.advance(kMap.stages);
        }
        CUTE_NO_UNROLL
        for (int step = 0; step < kAdapterSteps; ++step) {
            const bool with_t = first && step == 0;
            char* stage = ring.refill(
                at, kAdapterDepth * kTileColumns * kElementBytes + (with_t ? kBlockM * kAdapter * kElementBytes : 0));
            std::uint64_t* barrier = ring.full(at.stage);
            if (with_t) tma_load(args.t_p, barrier, Reuse::kAgain, t_p(), 0, row);
            load_rows(args.lora_A, barrier, stage, column, step * kDepth);
            at.advance(kMap.stages);
        }
        CUTE_NO_UNROLL
        for (int i = 0; i < steps_dA(tile); ++i) {
            char* stage = ring.refill(at, kMap.stage_bytes);
            tma_load(args.x, ring.full(at.stage), Reuse::kOnce, stage, column + i * kStep, row);
            at.advance(kMap.stages);
        }
    }

    __device__ __forceinline__ void load_rows(const CUtensorMap& map, std::uint64_t* barrier, char* stage, int column,
                                              int row) const {
        CUTE_UNROLL
        for (int box = 0; box < kBoxes; ++box)
            ring.load_in_turn(box, map, barrier, stage + box * kBox, column + box * kStep, row);
    }

    // dx_tile [64, 256] += t right, where this warpgroup's rows of `t` begin at `t_rows` and count from column `first`
    // on, `kCount` of them.
    template <class Layout, int kCount, class Accumulators>
    __device__ __forceinline__ void multiply_step(char* t_rows, int first, int stage, Accumulators& dx_tile) const {
        typename Tiles::ProjectRank mma;
        const auto slice = mma.get_slice(0);
        const auto t = slice.partition_fragment_A(shared_tensor<Element>(t_rows, Layout{}));  // (BM / 2, 64 or 16)
        const auto right = slice.partition_fragment_B(shared_tensor<Element>(ring.stage(stage), Right{}));  // (BK, 32)
        wgmma_own(dx_tile);
        wgmma_fence();
        CUTE_UNROLL
        for (int k = 0; k < kCount / 16; ++k)
            wgmma(mma, true, t(cute::_, cute::_, first / 16 + k), right(cute::_, cute::_, k), dx_tile);
        wgmma_commit();
    }

    template <class Accumulators>
    __device__ __forceinline__ void multiply_tile(int warpgroup, int thread, RingPosition& at,
                                                  Accumulators& dx_tile) const {
        constexpr int kHalfBox = kTBoxBytes / kConsumers, kHalfAdapter = kWarpgroupRows * kAdapter * kElementBytes;
        int previous = -1;
        // What is complete when the products of a step have been issued is the step before.
        const auto next = [&] {
            wgmma_wait<1>();
            if (previous >= 0) ring.release(previous, thread);
            previous = at.stage;
            at.advance(kMap.stages);
        };
        CUTE_NO_UNROLL
        for (int box = 0; box < args.boxes; ++box) {
            CUTE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                barrier_wait(ring.full(at.stage), at.parity);
                multiply_step<typename Tiles::Activation, kDepth>(t_box(box) + warpgroup * kHalfBox, half * kDepth,
                                                                  at.stage, dx_tile);
                next();
            }
        }
        CUTE_UNROLL
        for (int step = 0; step < kAdapterSteps; ++step) {
            barrier_wait(ring.full(at.stage), at.parity);
            multiply_step<typename Tiles::ActivationP, kAdapterDepth>(t_p() + warpgroup * kHalfAdapter, step * kDepth,
                                                                      at.stage, dx_tile);
            next();
        }
        wgmma_wait<0>();
        wgmma_own(dx_tile);
        ring.release(previous, thread);
    }

    // dA^T [64, P] = x^T T_P of step `i` of a tile.
    __device__ __forceinline__ void multiply_dA(int tile, int i, int stage, int thread) const {
        const auto x_t = shared_tensor<Element>(ring.stage(stage), typename Tiles::ActivationT{});  // (BK, BM)
        const auto t = shared_tensor<Element>(t_p(), typename Tiles::Resident{});                   // (P, BM)
        auto dA_tile = accumulators<typename Tiles::Skinny, Tiles::Adapter::value>();               // (BK, P)
        wgmma_own(dA_tile);
        wgmma_fence();
        multiply_shared<Start::kZero, typename Tiles::Skinny>(x_t, t, dA_tile);
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
        for (int tile = tiles.begin; tile < tiles.end; ++tile) {
            auto dx_tile = accumulators<typename Tiles::ProjectRank, kTileColumns>();  // (BM / 2, BK)
            cute::clear(dx_tile);
            multiply_tile(warpgroup, thread, at, dx_tile);
            CUTE_UNROLL
            for (int box = 0; box < kBoxes; ++box)
                store_tile(args.dx, ring, warpgroup, thread, stores, (first_step(tile) + box) * kStep,
                           slab(tile) * kBlockM + warpgroup * kWarpgroupRows, 0, [&dx_tile, box](int g) {
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
            if (args.need_dA) map_prefetch(args.x);
        }
    }

    __device__ __forceinline__ void run() const {
        enter(Phase::kExpand);
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
