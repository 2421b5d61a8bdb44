// T of a slab as wgmma A fragments: rounded in place, or, in a cluster, summed over the blocks through distributed
// shared memory, each block summing its granules in the order of the ranks: the same bits from run to run.
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

template <class Accumulators>
__device__ __forceinline__ void write_partial(char* ring, const Accumulators& t, int first_granule, int thread) {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(t))::value; i += 4) {
        const int offset = exchange_offset(first_granule + i / kGranuleValues, i / 4 % 2, thread);
        *reinterpret_cast<float4*>(ring + offset) = {t(i), t(i + 1), t(i + 2), t(i + 3)};
    }
}

// The granules that this block owns: loads all blocks' shares at once, adds them in the order of the ranks and gives
// the rounded sum back to all, those from `scaled` on times `scaling`. Between the two cluster barriers nobody but this
// very thread touches its slots of these granules, in any block.
template <class Element, int kCluster>
__device__ __forceinline__ void sum_granules(char* ring, int scaled, int granules, int rank, float scaling,
                                             int thread) {
    std::uint32_t base[kCluster];
    CUTE_UNROLL
    for (int r = 0; r < kCluster; ++r)
        base[r] = remote_address(ring, r);
    static_assert(granule_owner(kCluster + 1, kCluster) == 1,
                  "a block's granules are kCluster apart, from its rank on");
    CUTE_NO_UNROLL
    for (int g = rank; g < granules; g += kCluster) {
        float4 part[kCluster][2];
        CUTE_UNROLL
        for (int r = 0; r < kCluster; ++r) {
            part[r][0] = remote_load(base[r] + exchange_offset(g, 0, thread));
            part[r][1] = remote_load(base[r] + exchange_offset(g, 1, thread));
        }
        float v[kGranuleValues] = {};
        CUTE_UNROLL
        for (int r = 0; r < kCluster; ++r) {
            CUTE_UNROLL
            for (int half = 0; half < 2; ++half) {
                v[4 * half + 0] += part[r][half].x;
                v[4 * half + 1] += part[r][half].y;
                v[4 * half + 2] += part[r][half].z;
                v[4 * half + 3] += part[r][half].w;
            }
        }
        if (g >= scaled) {
            CUTE_UNROLL
            for (int i = 0; i < kGranuleValues; ++i)
                v[i] *= scaling;
        }
        const uint4 rounded = round_granule<Element>(v);
        CUTE_UNROLL
        for (int r = 0; r < kCluster; ++r)
            remote_store(base[r] + exchange_offset(g, 0, thread), rounded);
    }
}

template <class Element>
__device__ __forceinline__ void sum_granules(int cluster, char* ring, int scaled, int granules, int rank, float scaling,
                                             int thread) {
    if (cluster == 2) {
        sum_granules<Element, 2>(ring, scaled, granules, rank, scaling, thread);
    } else if (cluster == 4) {
        sum_granules<Element, 4>(ring, scaled, granules, rank, scaling, thread);
    } else {
        sum_granules<Element, 8>(ring, scaled, granules, rank, scaling, thread);
    }
}

template <class Fragment>
__device__ __forceinline__ void read_sums(char* ring, int first_granule, int thread, Fragment& fragment) {
    CUTE_UNROLL
    for (int g = 0; g < decltype(cute::size(fragment))::value / kGranuleValues; ++g)
        write_granule(fragment, g,
                      *reinterpret_cast<const uint4*>(ring + exchange_offset(first_granule + g, 0, thread)));
}

// All consumer threads, after all of the block's wgmma have read the ring. `thread` is among the consumers.
template <class Layouts, class Element, class RankSums, class AdapterSums, class RankFragment, class AdapterFragment>
__device__ __forceinline__ void exchange_t(const Arguments& args, const Block<Layouts>& block, int thread,
                                           const RankSums& t_r, const AdapterSums& t_p, RankFragment& rank_fragment,
                                           AdapterFragment& adapter_fragment) {
    constexpr int kRankGranules = Layouts::kRankColumns / kGranuleColumns;
    constexpr int kGranules = kRankGranules + Layouts::kAdapterColumns / kGranuleColumns;
    char* ring = block.shared;
    if constexpr (Layouts::kHasRank) write_partial(ring, t_r, 0, thread);
    if constexpr (Layouts::kHasAdapter) write_partial(ring, t_p, kRankGranules, thread);
    cluster_barrier();
    sum_granules<Element>(args.cluster, ring, kRankGranules, kGranules, block.rank, args.scaling, thread);
    // The next to write here is TMA, in this block and in the others.
    cluster_async_proxy_fence();
    cluster_barrier();
    if constexpr (Layouts::kHasRank) read_sums(ring, 0, thread, rank_fragment);
    if constexpr (Layouts::kHasAdapter) read_sums(ring, kRankGranules, thread, adapter_fragment);
    async_proxy_fence();
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(block.barrier(block.kBarriers.ring_free));
}

}  // namespace loge::sm90
