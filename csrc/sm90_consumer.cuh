// The warpgroups that multiply: T and dB while walking N, dX and dA while walking K.
#pragma once

#include "sm90_exchange.cuh"
#include "sm90_finish.cuh"
#include "sm90_fragments.h"

namespace loge::sm90 {

template <class Element, class Layout>
__device__ __forceinline__ auto shared_tensor(char* shared, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(shared)), layout);
}

enum class Start { kZero, kAdd };

// acc += a b, or acc = a b; a and b as fragments over the contracted dimension.
template <Start kStart, class Mma, class A, class B, class Accumulators>
__device__ __forceinline__ void multiply(Mma mma, const A& a, const B& b, Accumulators& acc) {
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(b); ++k)
        wgmma(mma, kStart == Start::kAdd || k > 0, a(cute::_, cute::_, k), b(cute::_, cute::_, k), acc);
}

// The same with both operands in shared memory.
template <Start kStart, class Mma, class A, class B, class Accumulators>
__device__ __forceinline__ void multiply_shared(const A& a, const B& b, Accumulators& acc) {
    Mma mma;
    auto slice = mma.get_slice(0);
    multiply<kStart>(mma, slice.partition_fragment_A(a), slice.partition_fragment_B(b), acc);
}

template <class Mma, int kColumns>
__device__ __forceinline__ auto accumulators() {
    return cute::partition_fragment_C(Mma{},
                                      cute::Shape<cute::_64, cute::Int<kColumns>>{});  // ((2, 2, columns / 8), 1, 1)
}

// [64, columns] of T as the A operand of wgmma.
template <class Element, int kColumns>
__device__ __forceinline__ auto fragment() {
    using Columns = cute::Int<kColumns / kGranuleColumns>;
    return cute::make_tensor<Element>(
        cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, Columns>>{});
}

__device__ __forceinline__ void swap(float (&v)[4], BitSwap swap, int lane) {
    const bool lane_bit = lane >> swap.lane_bit & 1;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
        // The two pairs of registers that differ in the bit.
        float& v0 = v[swap.register_bit == 0 ? 2 * i : i];
        float& v1 = v[swap.register_bit == 0 ? 2 * i + 1 : i + 2];
        const float received = __shfl_xor_sync(0xffffffffu, exchange_send(v0, v1, lane_bit), 1 << swap.lane_bit);
        exchange_receive(v0, v1, lane_bit, received);
    }
}

__device__ __forceinline__ void reduce(float* pointer, const float (&v)[4], bool deterministic) {
    if (deterministic) {
        *reinterpret_cast<float4*>(pointer) = {v[0], v[1], v[2], v[3]};
    } else {
        global_add(pointer, v);
    }
}

// dB[first_row + 0..63, :] from its tile [64, P tile]. dB is this slab's own, or the common one.
template <class Accumulators>
__device__ __forceinline__ void store_dB(const Arguments& args, float* dB, int first_row, int thread,
                                         const Accumulators& tile) {
    CUTE_UNROLL
    for (int block = 0; block < decltype(cute::size(tile))::value / 4; ++block) {
        float v[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            v[i] = tile(4 * block + i) * args.scaling;
        swap(v, row_swap(), thread % 32);
        const Position at = row_quad(thread, block);
        if (first_row + at.row < args.N && at.column < args.P)
            reduce(dB + static_cast<std::int64_t>(first_row + at.row) * args.P + at.column, v, args.deterministic);
    }
}

// dA[:, first_column + 0..63] from the tile [64, P tile] of dA^T.
template <class Accumulators>
__device__ __forceinline__ void store_dA(const Arguments& args, float* dA, int first_column, int thread,
                                         const Accumulators& tile) {
    CUTE_UNROLL
    for (int block = 0; block < decltype(cute::size(tile))::value / 4; ++block) {
        float v[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i)
            v[i] = tile(4 * block + i);
        swap(v, column_swap(0), thread % 32);
        swap(v, column_swap(1), thread % 32);
        const Position at = column_quad(thread, block);
        if (first_column + at.row < args.K && at.column < args.P)
            reduce(dA + static_cast<std::int64_t>(at.column) * args.K + first_column + at.row, v, args.deterministic);
    }
}

// T_P [64, P] of this warpgroup's rows into the resident tile, rows of P values.
template <int kAdapter, class Fragment>
__device__ __forceinline__ void store_t_p(char* resident, int first_row, int thread, const Fragment& t_p) {
    const Position at = stmatrix_position(thread % 32);
    const int row = first_row + thread / 32 * 16 + at.row;
    const auto words = cute::recast<const std::uint32_t>(t_p);
    CUTE_UNROLL
    for (int g = 0; g < kAdapter / kGranuleColumns; ++g) {
        const int chunk = (g * kGranuleColumns + at.column) / 8;
        stmatrix(resident + (kAdapter == 64 ? swizzle128(row, chunk) : swizzle32(row, chunk)),
                 {words(4 * g), words(4 * g + 1), words(4 * g + 2), words(4 * g + 3)});
    }
}

// A tile [64, 64] of dX to shared memory and on by TMA, which clips it to [M, K]. `stores`: one thread, always the
// same.
template <class Element, class Layouts, class Accumulators>
__device__ __forceinline__ void store_dx(const Arguments& args, const Block<Layouts>& block, int warpgroup, int thread,
                                         bool stores, int step, int buffer, const Accumulators& tile) {
    char* staging = block.staging(warpgroup, buffer);
    // The store that last read this buffer is done with it.
    if (stores) tma_store_wait<Layouts::kMap.staging_buffers - 1>();
    named_barrier(kOneWarpgroup + warpgroup, kWarpgroupThreads);
    const Position at = stmatrix_position(thread % 32);
    const int row = thread / 32 * 16 + at.row;
    CUTE_UNROLL
    for (int g = 0; g < kStep / kGranuleColumns; ++g) {
        float v[kGranuleValues];
        read_granule(tile, g, 1.0f, v);
        stmatrix(staging + swizzle128(row, (g * kGranuleColumns + at.column) / 8), round_granule<Element>(v));
    }
    async_proxy_fence();
    named_barrier(kOneWarpgroup + warpgroup, kWarpgroupThreads);
    if (stores) {
        tma_store(args.dx, staging, step * kStep, block.slab * kBlockM + warpgroup * kWarpgroupRows);
    }
}

// Each warp says for itself that it has read a stage: its wgmma are complete, those of its neighbours need not be.
template <class Layouts>
__device__ __forceinline__ void release(const Block<Layouts>& block, int stage, int thread) {
    __syncwarp();
    block.arrive_in_rows(block.empty(stage), thread % 32);
}

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
            multiply_shared<Start::kAdd, typename Layouts::ProjectAdapter>(dy, lora_B, t_p);
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
    if (previous >= 0) release(block, previous, thread);
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
    if (previous >= 0) release(block, previous, thread);
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
    release(block, stage_index, thread);
    if constexpr (Layouts::kHasRank) {
        wgmma_own(dx_tile);
        store_dx<Element>(args, block, warpgroup, thread, stores, step, buffer, dx_tile);
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
        exchange_t<Layouts, Element>(args, block, warpgroup * kWarpgroupThreads + thread, t_r, t_p, rank_fragment,
                                     adapter_fragment);
    } else {
        if constexpr (Layouts::kHasRank) round_t<Element>(t_r, 1.0f, rank_fragment);
        if constexpr (Layouts::kHasAdapter) round_t<Element>(t_p, args.scaling, adapter_fragment);
    }
    if (block.need_dA) {
        store_t_p<kAdapter>(block.resident(), warpgroup * kWarpgroupRows, thread, adapter_fragment);
        async_proxy_fence();
        named_barrier(kAllConsumers, kConsumerThreads);
    }
    walk_k<Element>(args, block, warpgroup, thread, at, rank_fragment, adapter_fragment);
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
    if (Layouts::kHasAdapter && args.finished != nullptr && !block.phantom)
        finish<Element>(args, block, warpgroup * kWarpgroupThreads + thread);
}

}  // namespace loge::sm90
