// T of a slab as wgmma A fragments: rounded in place, or summed over the splits of N, which push their shares into each
// other's shared memory. A granule's owner adds them in the order of the splits: the same bits from run to run.
//
// No barrier of the whole cluster: its release would wait for the additions to dB that are on their way to L2. What is
// pushed (st.async) says itself at the receiver's barrier how many bytes of it have come.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "sm90_block.cuh"

namespace loge::sm90 {

template <class Element>
__device__ __forceinline__ std::uint32_t round_pair(float low, float high) {
    if constexpr (std::is_same_v<Element, cute::half_t>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const std::uint32_t&>(pair);
    } else {
        static_assert(std::is_same_v<Element, cute::bfloat16_t>);
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const std::uint32_t&>(pair);
    }
}

template <class Element>
__device__ __forceinline__ uint4 round_granule(const float (&v)[kGranuleValues]) {
    return {round_pair<Element>(v[0], v[1]), round_pair<Element>(v[2], v[3]), round_pair<Element>(v[4], v[5]),
            round_pair<Element>(v[6], v[7])};
}

// Granule g of the accumulators, times `factor`.
template <class Accumulators>
__device__ __forceinline__ void read_granule(const Accumulators& t, int g, float factor, float (&v)[kGranuleValues]) {
    CUTE_UNROLL
    for (int i = 0; i < kGranuleValues; ++i)
        v[i] = t(g * kGranuleValues + i) * factor;
}

template <class Fragment>
__device__ __forceinline__ void write_granule(Fragment& fragment, int g, uint4 v) {
    auto words = cute::recast<std::uint32_t>(fragment);
    words(4 * g + 0) = v.x;
    words(4 * g + 1) = v.y;
    words(4 * g + 2) = v.z;
    words(4 * g + 3) = v.w;
}

template <class Fragment>
__device__ __forceinline__ uint4 granule_of(const Fragment& fragment, int g) {
    const auto words = cute::recast<const std::uint32_t>(fragment);
    return {words(4 * g), words(4 * g + 1), words(4 * g + 2), words(4 * g + 3)};
}

// One block: no exchange. t [64, columns] fp32 -> fragment, 16 bits.
template <class Element, class Accumulators, class Fragment>
__device__ __forceinline__ void round_t(const Accumulators& t, float factor, Fragment& fragment) {
    CUTE_UNROLL
    for (int g = 0; g < decltype(cute::size(t))::value / kGranuleValues; ++g) {
        float v[kGranuleValues];
        read_granule(t, g, factor, v);
        write_granule(fragment, g, round_granule<Element>(v));
    }
}

// One block's side of the exchange, for one of its consumer threads.
template <class Layouts>
struct Exchange {
    static constexpr int kGranules = granules_of(Layouts::kRankColumns, Layouts::kAdapterColumns);
    static constexpr BarrierMap kBarriers = Block<Layouts>::kBarriers;

    const Block<Layouts>& block;
    int thread;  // among the consumers
    int split = block.split, splits = block.splits, log_splits = block.log_splits;
    int slots = slot_count(kGranules, log_splits);
    char* ring = block.shared;
    // They count the bytes that come.
    std::uint64_t *partials = block.barrier(kBarriers.partials), *sums = block.barrier(kBarriers.sums);

    __device__ __forceinline__ Exchange(const Block<Layouts>& block, int thread) : block(block), thread(thread) {}

    __device__ __forceinline__ std::uint32_t at_split(const void* pointer, int other) const {
        return remote_address(pointer, block.rank_of(block.row, other));
    }

    __device__ __forceinline__ void push_share(int granule, const float (&v)[kGranuleValues]) const {
        const int owner = granule_owner(granule, log_splits);
        const std::uint32_t barrier = at_split(partials, owner);
        const std::uint32_t to =
            at_split(ring, owner) + share_offset(slot_of(granule, split, owner, log_splits), 0, thread);
        push(to, barrier, float4{v[0], v[1], v[2], v[3]});
        push(to + share_offset(0, 1, 0), barrier, float4{v[4], v[5], v[6], v[7]});
    }

    // Own shares `v`, which become the sum.
    __device__ __forceinline__ void add_shares(int granule, float (&v)[kGranuleValues]) const {
        float sum[kGranuleValues] = {};
        CUTE_NO_UNROLL
        for (int from = 0; from < splits; ++from) {
            float4 low = {v[0], v[1], v[2], v[3]}, high = {v[4], v[5], v[6], v[7]};
            if (from != split) {
                const char* share = ring + share_offset(slot_of(granule, from, split, log_splits), 0, thread);
                low = *reinterpret_cast<const float4*>(share);
                high = *reinterpret_cast<const float4*>(share + share_offset(0, 1, 0));
            }
            sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
            sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
        }
        CUTE_UNROLL
        for (int i = 0; i < kGranuleValues; ++i)
            v[i] = sum[i];
    }

    __device__ __forceinline__ void push_sum(int granule, uint4 rounded) const {
        CUTE_NO_UNROLL
        for (int to = 0; to < splits; ++to)
            if (to != split)
                push(at_split(ring, to) + sum_offset(slots, slot_of(granule, split, to, log_splits), thread),
                     at_split(sums, to), rounded);
    }

    __device__ __forceinline__ uint4 read_sum(int granule) const {
        const int owner = granule_owner(granule, log_splits);
        return *reinterpret_cast<const uint4*>(ring +
                                               sum_offset(slots, slot_of(granule, owner, split, log_splits), thread));
    }

    __device__ __forceinline__ bool owns(int granule) const { return granule_owner(granule, log_splits) == split; }
};

template <class Layouts, class Accumulators>
__device__ __forceinline__ void push_shares(const Exchange<Layouts>& exchange, const Accumulators& t,
                                            int first_granule) {
    CUTE_UNROLL
    for (int g = 0; g < decltype(cute::size(t))::value / kGranuleValues; ++g) {
        if (exchange.owns(first_granule + g)) continue;
        float v[kGranuleValues];
        read_granule(t, g, 1.0f, v);
        exchange.push_share(first_granule + g, v);
    }
}

template <class Element, class Layouts, class Accumulators, class Fragment>
__device__ __forceinline__ void sum_owned(const Exchange<Layouts>& exchange, const Accumulators& t, int first_granule,
                                          float factor, Fragment& fragment) {
    CUTE_UNROLL
    for (int g = 0; g < decltype(cute::size(t))::value / kGranuleValues; ++g) {
        if (!exchange.owns(first_granule + g)) continue;
        float v[kGranuleValues];
        read_granule(t, g, 1.0f, v);
        exchange.add_shares(first_granule + g, v);
        CUTE_UNROLL
        for (int i = 0; i < kGranuleValues; ++i)
            v[i] *= factor;
        const uint4 rounded = round_granule<Element>(v);
        exchange.push_sum(first_granule + g, rounded);
        write_granule(fragment, g, rounded);
    }
}

template <class Layouts, class Fragment>
__device__ __forceinline__ void read_sums(const Exchange<Layouts>& exchange, int first_granule, Fragment& fragment) {
    CUTE_UNROLL
    for (int g = 0; g < decltype(cute::size(fragment))::value / kGranuleValues; ++g)
        if (!exchange.owns(first_granule + g)) write_granule(fragment, g, exchange.read_sum(first_granule + g));
}

// All consumer threads, after all of the block's wgmma have read the ring. `thread` is among the consumers.
template <class Layouts, class Element, class RankSums, class AdapterSums, class RankFragment, class AdapterFragment>
__device__ __forceinline__ void exchange_t(const Arguments& args, const Block<Layouts>& block, int thread,
                                           const RankSums& t_r, const AdapterSums& t_p, RankFragment& rank_fragment,
                                           AdapterFragment& adapter_fragment) {
    constexpr int kRankGranules = Layouts::kRankColumns / kGranuleColumns;
    constexpr BarrierMap kBarriers = Block<Layouts>::kBarriers;
    const Exchange<Layouts> exchange(block, thread);
    // This block's ring may be written to, by each of the others. What has been read from it needs no release.
    std::uint64_t* drained = block.barrier(kBarriers.drained);
    if (thread == 0) {
        const int owned = granules_owned(exchange.kGranules, block.split, block.log_splits);
        barrier_expect(exchange.partials, owned * (block.splits - 1) * kShareBytes);
        barrier_expect(exchange.sums, (exchange.kGranules - owned) * kSumBytes);
    }
    if (thread < block.splits && thread != block.split) remote_arrive(exchange.at_split(drained, thread));
    barrier_wait_cluster(drained, 0);
    if constexpr (Layouts::kHasRank) push_shares(exchange, t_r, 0);
    if constexpr (Layouts::kHasAdapter) push_shares(exchange, t_p, kRankGranules);
    barrier_wait_cluster(exchange.partials, 0);
    if constexpr (Layouts::kHasRank) sum_owned<Element>(exchange, t_r, 0, 1.0f, rank_fragment);
    if constexpr (Layouts::kHasAdapter)
        sum_owned<Element>(exchange, t_p, kRankGranules, args.scaling, adapter_fragment);
    barrier_wait_cluster(exchange.sums, 0);
    if constexpr (Layouts::kHasRank) read_sums(exchange, 0, rank_fragment);
    if constexpr (Layouts::kHasAdapter) read_sums(exchange, kRankGranules, adapter_fragment);
    if constexpr (Layouts::kProject) {
        // The next to write here are these threads themselves: T's tiles, on their way out.
        named_barrier(kAllConsumers, kConsumerThreads);
    } else {
        // The next to write here is TMA, this block's and its neighbour's.
        async_proxy_fence();
        __syncwarp();
        block.arrive_in_rows(block.barrier(kBarriers.ring_free), thread % 32);
    }
}

}  // namespace loge::sm90
