// The last of the blocks that add to a part of dA and dB rounds that part to the adapter's 16 bits; see rounding.h.
#pragma once

#include "rounding.h"
#include "sm90_block.cuh"
#include "sm90_stores.cuh"

namespace loge::sm90 {

// [rows, columns] of the sums, `stride` apart; `rows` is a multiple of 8.
template <class Element>
__device__ __forceinline__ void round_sums(const float* sums, void* rounded, int rows, std::int64_t columns,
                                           std::int64_t stride, int thread) {
    for_each_quad<kConsumerThreads, 8>(
        thread, rows, columns, stride, [&](std::int64_t at, float (&v)[4]) { global_read(sums + at, v); },
        [&](std::int64_t at, const float (&v)[4]) {
            *reinterpret_cast<uint2*>(static_cast<char*>(rounded) + at * kElementBytes) = {
                round_pair<Element>(v[0], v[1]), round_pair<Element>(v[2], v[3])};
        });
}

// All consumer threads, after the block's additions to the rows `n` of dB and the columns `k` of dA, which `blocks`
// blocks in all add to and count at `counter`.
template <class Element>
__device__ __forceinline__ void finish_sums(const Sums& args, unsigned* counter, int blocks, Range n, Range k,
                                            int thread) {
    named_barrier(kAllConsumers, kConsumerThreads);
    const bool last = thread == 0 && count(counter) == static_cast<unsigned>(blocks - 1);
    if (!named_any(kAllConsumers, kConsumerThreads, last)) return;
    if (args.dB_rounded != nullptr) {
        // Contiguous, and N and P are multiples of 8: eight rows of an eighth each.
        const std::int64_t first = static_cast<std::int64_t>(n.begin) * args.P,
                           eighth = static_cast<std::int64_t>(n.size()) / 8 * args.P;
        round_sums<Element>(args.dB + first, static_cast<char*>(args.dB_rounded) + first * kElementBytes, 8, eighth,
                            eighth, thread);
    }
    if (args.dA_rounded != nullptr)
        round_sums<Element>(args.dA + k.begin,
                            static_cast<char*>(args.dA_rounded) + std::int64_t{k.begin} * kElementBytes, args.P,
                            k.size(), args.K, thread);
}

// The blocks of one split share the rows of dB and the columns of dA that their steps have: one counter for each split.
template <class Element, class Layouts>
__device__ __forceinline__ void finish(const Arguments& args, const Block<Layouts>& block, int thread) {
    finish_sums<Element>(args, args.finished + block.split, args.slabs, columns_of(block.steps_n, args.N),
                         columns_of(block.steps_k, args.K), thread);
}

}  // namespace loge::sm90
