// Products of tiles in shared memory and in registers, as CuTe writes them.
#pragma once

#include "sm90_layouts.h"
#include "sm90_ptx.cuh"

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

}  // namespace loge::sm90
