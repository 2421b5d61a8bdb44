// One thread's view of a multiprocessor: the instructions that the Ampere kernels are written in.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace loge::sm80 {

class PtxMachine {
 public:
    __device__ __forceinline__ explicit PtxMachine(void* shared)
        : base_(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))) {}

    __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
    // The same, read again: a value kept from the kernel's start to its end costs spills where registers are scarce.
    __device__ __forceinline__ int thread_anew() const {
        int thread;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        return thread;
    }
    __device__ __forceinline__ void sync() const { __syncthreads(); }

    // 16 bytes of global memory to shared memory, or zeros. `kOnce`: nobody reads them again, and what L2 holds beside
    // them is worth more.
    template <bool kOnce>
    __device__ __forceinline__ void copy_async(int offset, const void* source, bool valid) const {
        if constexpr (kOnce) {
            std::uint64_t policy;
            asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
            asm volatile(
                "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(base_ + offset),
                "l"(source), "r"(valid ? 16 : 0), "l"(policy)
                : "memory");
        } else {
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(base_ + offset), "l"(source),
                         "r"(valid ? 16 : 0)
                         : "memory");
        }
    }
    __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
    // Until no more than `pending` groups, 0 .. 2, are on their way.
    __device__ __forceinline__ void wait(int pending) const {
        if (pending >= 2)
            asm volatile("cp.async.wait_group 2;\n" ::: "memory");
        else if (pending == 1)
            asm volatile("cp.async.wait_group 1;\n" ::: "memory");
        else
            asm volatile("cp.async.wait_group 0;\n" ::: "memory");
    }

    template <bool kTranspose>
    __device__ __forceinline__ void ldmatrix(std::uint32_t (&r)[4], int offset) const {
        if constexpr (kTranspose)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(base_ + offset)
                         : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(base_ + offset)
                         : "memory");
    }

    // C [16, 8] += A [16, 16] B [16, 8]
    template <DType kType>
    __device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) const {
        if constexpr (kType == DType::kBFloat16)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        else
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};\n"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }

    template <DType kType>
    __device__ __forceinline__ std::uint32_t pack(float low, float high) const {
        std::uint32_t packed;
        if constexpr (kType == DType::kBFloat16)
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
        else
            asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }

    // The value of the lane beside this one, 0 and 1, 2 and 3, ...
    __device__ __forceinline__ std::uint32_t swap(std::uint32_t value) const {
        return __shfl_xor_sync(0xffffffffu, value, 1);
    }
    __device__ __forceinline__ void write_pair(float* target, float first, float second) const {
        *reinterpret_cast<float2*>(target) = make_float2(first, second);
    }
    // Four sums that another block, or this one, has written: from L2, where they lie.
    __device__ __forceinline__ void read_sums(float (&v)[4], const float* source) const {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(source));
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    }
    __device__ __forceinline__ void write_sums(float* target, const float (&v)[4]) const {
        *reinterpret_cast<float4*>(target) = make_float4(v[0], v[1], v[2], v[3]);
    }
    __device__ __forceinline__ void write_word(void* target, std::uint32_t word) const {
        *static_cast<std::uint32_t*>(target) = word;
    }
    __device__ __forceinline__ void write_words(void* target, std::uint32_t first, std::uint32_t second) const {
        *static_cast<uint2*>(target) = make_uint2(first, second);
    }
    // One more at `counter`, which was the value returned; releases and acquires, see rounding.h.
    __device__ __forceinline__ unsigned count(unsigned* counter) const {
        unsigned before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;\n"
                     : "=r"(before)
                     : "l"(__cvta_generic_to_global(counter))
                     : "memory");
        return before;
    }
    // Whether any thread of the block says so; a barrier.
    __device__ __forceinline__ bool any(bool here) const { return __syncthreads_or(here) != 0; }

 private:
    std::uint32_t base_;
};

}  // namespace loge::sm80
