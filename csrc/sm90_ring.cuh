// The shared memory of a block and the ring of stages in it, through which the blocks of up to two slabs, the rows of a
// cluster, load factors for each other.
#pragma once

#include <cstdint>

#include "sm90_layouts.h"
#include "sm90_ptx.cuh"

namespace loge::sm90 {

inline constexpr int kAllConsumers = 1;  // named barriers; 0 is __syncthreads
inline constexpr int kOneWarpgroup = 2;  // and 3

template <class Layouts>
struct Ring {
    static constexpr SharedMap kMap = Layouts::kMap;
    static constexpr BarrierMap kBarriers = barrier_map(kMap.stages);

    char* shared;            // aligned to kSharedAlignment, the same address in every block of a cluster
    int rows;                // slabs that share a cluster, and with it the factors' loads: 1 or 2
    int splits, log_splits;  // of N and K
    int cluster;             // in the grid
    int row, split;          // of this block in its cluster

    __device__ __forceinline__ Ring(int rows, int log_splits, char* dynamic_shared)
        : rows(rows), splits(1 << log_splits), log_splits(log_splits) {
        const std::uint32_t address = cute::cast_smem_ptr_to_uint(dynamic_shared);
        shared = dynamic_shared + ((kSharedAlignment - address % kSharedAlignment) % kSharedAlignment);
        const int size = rows << log_splits, rank = blockIdx.x % size;
        cluster = blockIdx.x / size;
        row = rank % rows;
        split = rank / rows;
    }

    // In the cluster.
    __device__ __forceinline__ int rank_of(int of_row, int of_split) const { return of_split * rows + of_row; }
    __device__ __forceinline__ int neighbour() const { return rank_of(row ^ 1, split); }

    __device__ __forceinline__ char* stage(int i) const { return shared + i * kMap.stage_bytes; }
    __device__ __forceinline__ char* resident() const { return shared + kMap.resident; }
    __device__ __forceinline__ char* staging(int warpgroup, int buffer) const {
        return shared + kMap.staging + (warpgroup * kMap.staging_buffers + buffer) * kStagingBytes;
    }
    __device__ __forceinline__ std::uint64_t* barrier(int i) const {
        return reinterpret_cast<std::uint64_t*>(shared + kMap.barriers) + i;
    }
    __device__ __forceinline__ std::uint64_t* full(int i) const { return barrier(kBarriers.full + i); }
    __device__ __forceinline__ std::uint64_t* empty(int i) const { return barrier(kBarriers.empty + i); }

    // One thread. Full barriers count the loads' bytes, empty ones the warps that have read a stage, of both rows: what
    // one of them loads, both read.
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kMap.stages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), kConsumerWarps * rows);
        }
        barrier_init(barrier(kBarriers.resident), 1);
        barrier_init(barrier(kBarriers.drained), splits > 1 ? splits - 1 : 1);
        barrier_init(barrier(kBarriers.partials), 1);
        barrier_init(barrier(kBarriers.sums), 1);
        barrier_init(barrier(kBarriers.ring_free), kConsumerWarps * rows);
        barrier_init_fence();
    }

    // All threads: what the first has initialised is there, in every block of the cluster.
    __device__ __forceinline__ void start() const {
        if (rows * splits > 1) {
            cluster_barrier();
        } else {
            __syncthreads();
        }
    }

    // One arrival of a warp at a barrier of this block and of its neighbour.
    __device__ __forceinline__ void arrive_in_rows(std::uint64_t* at, int lane) const {
        if (lane == 0) barrier_arrive(at);
        if (lane == 1 && rows == 2) remote_arrive(remote_address(at, neighbour()));
    }

    // Each warp says for itself that it has read a stage: its wgmma are complete, those of its neighbours need not be.
    __device__ __forceinline__ void release(int at, int thread) const {
        __syncwarp();
        arrive_in_rows(empty(at), thread % 32);
    }

    // What follows: one thread of the warpgroup that loads.

    // The stage at `at`, once it has been read, expecting `bytes` at its barrier.
    __device__ __forceinline__ char* refill(RingPosition at, int bytes) const {
        barrier_wait(empty(at.stage), at.parity ^ 1);
        barrier_expect(full(at.stage), bytes);
        return stage(at.stage);
    }

    // A factor's tile, of which each row of the cluster loads its part into both.
    __device__ __forceinline__ void load_factor(const CUtensorMap& map, std::uint64_t* barrier, char* tile,
                                                int tile_rows, int tile_bytes, int column, int first_row) const {
        if (rows == 1) {
            tma_load(map, barrier, Reuse::kAgain, tile, column, first_row);
        } else {
            tma_load_shared(map, barrier, 3u << rank_of(0, split), Reuse::kAgain, tile + row * (tile_bytes / 2), column,
                            first_row + row * (tile_rows / 2));
        }
    }

    // A box that both rows read, loaded by one of them, in turns: for boxes whose halves would be small.
    __device__ __forceinline__ void load_in_turn(int turn, const CUtensorMap& map, std::uint64_t* barrier, char* box,
                                                 int column, int first_row) const {
        if (rows == 1) {
            tma_load(map, barrier, Reuse::kAgain, box, column, first_row);
        } else if (turn % 2 == row) {
            tma_load_shared(map, barrier, 3u << rank_of(0, split), Reuse::kAgain, box, column, first_row);
        }
    }

    // A block outlives what its neighbour's warps have still to say to it: that they have read the last stages.
    __device__ __forceinline__ void wait_for_readers(RingPosition at) const {
        CUTE_NO_UNROLL
        for (int i = 0; rows == 2 && i < kMap.stages; ++i) {
            barrier_wait(empty(at.stage), at.parity ^ 1);
            at.advance(kMap.stages);
        }
    }
};

// The warpgroup of this thread, with its registers: kConsumers is the one that loads. The same in all lanes of a warp,
// and known to be.
__device__ __forceinline__ int take_role() {
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
    if (warpgroup == kConsumers) {
        give_registers_back<kProducerRegisters>();
    } else {
        take_registers<kConsumerRegisters>();
    }
    return warpgroup;
}

// One thread of the first warp that loads, elected where it is needed: then the compiler knows it to be one.
__device__ __forceinline__ bool elect_loader() {
    return __shfl_sync(0xffffffffu, threadIdx.x % kWarpgroupThreads / 32, 0) == 0 && elect_one();
}

}  // namespace loge::sm90
