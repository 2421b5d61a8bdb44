// The fp32 sums of dA and dB to the adapter's 16 bits, in the kernel that adds them up.
//
// Every block counts itself as finished after its last addition; the one that comes last of those that share a part
// rounds that part. Why this is right in PTX's memory model: a block's additions (red.gpu, or atomicAdd) are before its
// barrier, and the barrier before thread 0's atom.acq_rel.gpu on the counter. That atom releases what is before it, as
// the barrier makes it cumulative over the block. The last block's own atom reads from the others' and acquires; its
// next barrier is before its threads' reads. So all additions happen before the reads, and the reads see them. Nobody
// waits for anybody: blocks may run in any order, and one after the other.
//
// The last block has a part alone: 512 KB of sums (P = 16, N + K = 8192) are some 5 us for one multiprocessor, less by
// the size of the cluster. That is what two casts of PyTorch's would take of the device, and saves the host their
// launches. Adapters in fp32, PEFT's default, round nothing: the sums are the result.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOGE_ROUNDING_DEVICE __device__ __forceinline__
#define LOGE_ROUNDING_UNROLL _Pragma("unroll")
#else
#define LOGE_ROUNDING_DEVICE inline
#define LOGE_ROUNDING_UNROLL
#endif

namespace loge {

// Calls `load(offset, v)` and `store(offset, v)` for each four values of [rows, columns] that are this thread's, of
// rows `stride` apart. `columns` and `stride` are multiples of 4, `rows` of kInFlight: so many loads are on their way
// at a time. What is contiguous can be taken as several rows.
template <int kThreads, int kInFlight, class Load, class Store>
LOGE_ROUNDING_DEVICE void for_each_quad(int thread, int rows, std::int64_t columns, std::int64_t stride, Load load,
                                        Store store) {
    for (std::int64_t column = 4 * thread; column < columns; column += 4 * kThreads)
        for (int row = 0; row < rows; row += kInFlight) {
            float v[kInFlight][4];
            LOGE_ROUNDING_UNROLL
            for (int i = 0; i < kInFlight; ++i)
                load((row + i) * stride + column, v[i]);
            LOGE_ROUNDING_UNROLL
            for (int i = 0; i < kInFlight; ++i)
                store((row + i) * stride + column, v[i]);
        }
}

}  // namespace loge
