// What leaves a block: the sums dB and dA by additions to global memory, 16-bit tiles by TMA.
#pragma once

#include "sm90_arguments.h"
#include "sm90_exchange.cuh"
#include "sm90_fragments.h"

namespace loge::sm90 {

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
__device__ __forceinline__ void store_dB(const Sums& args, float* dB, int first_row, int thread,
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
__device__ __forceinline__ void store_dA(const Sums& args, float* dA, int first_column, int thread,
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
    CUTE_UNROLL
    for (int g = 0; g < kAdapter / kGranuleColumns; ++g) {
        const int chunk = (g * kGranuleColumns + at.column) / 8;
        stmatrix(resident + (kAdapter == 64 ? swizzle128(row, chunk) : swizzle32(row, chunk)), granule_of(t_p, g));
    }
}

// A tile [64, 64] to shared memory and on by TMA, which clips it to the matrix. `granule(g)` is its columns 16 g and
// on, as an A fragment holds them. `stores`: one thread, always the same.
template <class Layouts, class Granule>
__device__ __forceinline__ void store_tile(const CUtensorMap& map, const Ring<Layouts>& ring, int warpgroup, int thread,
                                           bool stores, int column, int row, int buffer, Granule granule) {
    char* staging = ring.staging(warpgroup, buffer);
    // The store that last read this buffer is done with it.
    if (stores) tma_store_wait<Layouts::kMap.staging_buffers - 1>();
    named_barrier(kOneWarpgroup + warpgroup, kWarpgroupThreads);
    const Position at = stmatrix_position(thread % 32);
    CUTE_UNROLL
    for (int g = 0; g < kStep / kGranuleColumns; ++g)
        stmatrix(staging + swizzle128(thread / 32 * 16 + at.row, (g * kGranuleColumns + at.column) / 8), granule(g));
    async_proxy_fence();
    named_barrier(kOneWarpgroup + warpgroup, kWarpgroupThreads);
    if (stores) tma_store(map, staging, column, row);
}

}  // namespace loge::sm90
