#pragma once

#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"

namespace loge::sm90 {

template <class Element, int kRank, int kAdapter>
__global__ void __launch_bounds__(kThreads, 1) sm90_backward_kernel(const __grid_constant__ Arguments args) {
    using Tiles = Layouts<Element, kRank, kAdapter>;
    extern __shared__ char dynamic_shared[];
    const Block<Tiles> block(args, dynamic_shared);
    if (threadIdx.x == 0) block.init_barriers();
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

}  // namespace loge::sm90
