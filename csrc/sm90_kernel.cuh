// One launch of the Hopper backward kernel: two warpgroups multiply what a third one loads.
//
// Why the blocks of a cluster split N and K and add up T through distributed shared memory, and do not share the
// factors' loads by multicast. Counted, not measured, for M = 8192, N = K = 4096, R = 256, P = 16, 16 bits, in 10^6
// bytes:
//
//                                      slabs  blocks  dY, x, dX  factors into shared  from L2  between blocks
//     a block a slab of 128               64      64        201                  285      285               0
//     two blocks a slab of 128, T added   64     128        201                  285      285              13
//     64-row slabs, two share multicasts 128     128        201                  570      285             285
//     two by two blocks, both of these    64     128        201                  285      143             156
//
// Factors: (R + P)(N + K) 2 bytes a slab. Exchange: each granule's owner reads 4 bytes from and writes 2 to each other
// block, (cluster - 1) 128 (R + P) 6 a slab. Both splits fill 128 of 132 multiprocessors and ask the same of L2; with
// 64-row slabs shared memory takes in twice the factors, and wgmma reads them for 64 rows instead of 128. The last
// form, a pair of 128-row slabs that multicast the factors to each other and split N and K with another pair, is better
// on paper and not built.
#pragma once

#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"

namespace loge::sm90 {

template <class Element, class Layouts>
__device__ __forceinline__ void run_block(const Arguments& args, char* dynamic_shared) {
    const Block<Layouts> block(args, dynamic_shared);
    if (threadIdx.x == 0) block.init_barriers();
    if (threadIdx.x == kConsumerThreads) prefetch_maps(args, block);
    __syncthreads();
    // The same in all lanes of a warp, and known to be.
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
    if (warpgroup == kConsumers) {
        give_registers_back<kProducerRegisters>();
        produce(args, block);
    } else {
        take_registers<kConsumerRegisters>();
        consume<Element>(args, block, warpgroup);
    }
}

template <class Element, int kRank, int kAdapter>
__global__ void __launch_bounds__(kThreads, 1) sm90_backward_kernel(const __grid_constant__ Arguments args) {
    extern __shared__ char dynamic_shared[];
    run_block<Element, Layouts<Element, kRank, kAdapter>>(args, dynamic_shared);
}

}  // namespace loge::sm90
