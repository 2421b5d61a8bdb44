// One launch of the Hopper backward kernel: two warpgroups multiply what a third one loads.
//
// A cluster is one or two slabs of 128 rows by up to eight splits of N and K. The slabs share the factors' tiles, of
// which each block loads a part into both by multicast. The splits add up T. Counted, not measured, for M = 8192, N = K
// = 4096, R = 256, P = 16, 16 bits, in 10^6 bytes:
//
//                                      slabs  blocks  dY, x, dX  factors into shared  from L2  between blocks
//     a block a slab of 128               64      64        201                  285      285               0
//     two splits a slab                   64     128        201                  285      285              13
//     64-row slabs, two share multicasts 128     128        201                  570      285             285
//     two slabs by two splits             64     128        201                  285      143             156
//
// Factors: (R + P)(N + K) 2 bytes a slab. Exchange: 4 bytes of each value to its owner and 2 back, from each other
// split: (splits - 1) 128 (R + P) 6 a slab. With 64-row slabs shared memory takes in twice the factors, and wgmma reads
// them for 64 rows instead of 128.
//
// The launch does not overlap with the one before it (programmatic dependent launch): that is a memset of the sums.
#pragma once

#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"

namespace loge::sm90 {

template <class Layouts>
__device__ __forceinline__ void run_block(const Arguments& args, char* dynamic_shared) {
    const Block<Layouts> block(args, dynamic_shared);
    if (threadIdx.x == 0) block.init_barriers();
    if (threadIdx.x == kConsumerThreads) prefetch_maps(args, block);
    if constexpr (Layouts::kProject) launch_dependents();
    block.start();
    const int warpgroup = take_role();
    if (warpgroup == kConsumers) {
        produce(args, block);
    } else {
        consume<typename Layouts::Element>(args, block, warpgroup);
    }
}

template <class Layouts>
__global__ void __launch_bounds__(kThreads, 1) sm90_backward_kernel(const __grid_constant__ Arguments args) {
    extern __shared__ char dynamic_shared[];
    run_block<Layouts>(args, dynamic_shared);
}

}  // namespace loge::sm90
