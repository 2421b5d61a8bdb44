// Every instruction that is Hopper's own, as a function: the one file to replace in order to run the kernel elsewhere.
// Those that CuTe wraps without telling the compiler that memory changes are written out here: each is a compiler
// barrier too, so that no plain access to shared memory moves across it.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>
#include <cute/tensor.hpp>
// After tensor.hpp, whose types these use.
#include <cute/atom/mma_atom.hpp>

#include <cstdint>

namespace loge::sm90 {

// What a thread is about to do. Nothing on a GPU; the emulation counts by it.
enum class Phase { kWalkN, kExchange, kWalkK, kExpand };
__device__ __forceinline__ void enter(Phase) {}

// One lane of a converged warp, always the same one.
__device__ __forceinline__ bool elect_one() {
    return cute::elect_one_sync() != 0;
}

// dY, x and xa are read once, by one block; the factors by every slab. Those of a whole model are larger than L2:
// EVICT_LAST would leave it full of lines that the following kernels cannot use, and must be measured to be asked for.
enum class Reuse : std::uint64_t {
    kOnce = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
    kAgain = static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
};

__device__ __forceinline__ void tma_load(const CUtensorMap& map, std::uint64_t* barrier, Reuse reuse, char* shared,
                                         int column, int row) {
    cute::SM90_TMA_LOAD_2D::copy(&map, barrier, static_cast<std::uint64_t>(reuse), shared, column, row);
}

// The same into every block of the cluster whose bit is set in `blocks`, at the same address there, of which the
// barrier counts the bytes.
__device__ __forceinline__ void tma_load_shared(const CUtensorMap& map, std::uint64_t* barrier, unsigned blocks,
                                                Reuse reuse, char* shared, int column, int row) {
    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier, static_cast<std::uint16_t>(blocks),
                                           static_cast<std::uint64_t>(reuse), shared, column, row);
}

__device__ __forceinline__ void map_prefetch(const CUtensorMap& map) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map, int column, int row) {
    cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&map, column, row);
}

// A bulk group of its own.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const char* shared, int column, int row) {
    cute::SM90_TMA_STORE_2D::copy(&map, shared, column, row);
    cute::tma_store_arrive();
}

// Until all but the last kPending stores of this thread have read their shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
    cute::tma_store_wait<kPending>();
}

// Until all of this thread's stores are written, which the end of a kernel does not wait for before its successor,
// where that has been let go early.
__device__ __forceinline__ void tma_store_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The next launch may start its blocks where there is room for them; it waits for the end of this one by itself.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_prerequisites() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// acc += a b, or acc = a b, for one slice of 16 contracted values. All threads of a warpgroup.
template <class Mma, class A, class B, class Accumulators>
__device__ __forceinline__ void wgmma(Mma& mma, bool accumulate, const A& a, const B& b, Accumulators& acc) {
    mma.accumulate_ = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
    cute::gemm(mma, a, b, acc);
}

// Registers written before are seen by the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
    cute::warpgroup_arrive();
}

__device__ __forceinline__ void wgmma_commit() {
    cute::warpgroup_commit_batch();
}

// Until all but the last kPending groups of wgmma are complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    cute::warpgroup_wait<kPending>();
}

// Keeps the compiler from moving what it does with accumulators across the wgmma that own them.
template <class Accumulators>
__device__ __forceinline__ void wgmma_own(Accumulators& acc) {
    cute::warpgroup_fence_operand(acc);
}

// Four 8 x 8 matrices of a warp's registers to the rows of 8 values that its lanes address.
__device__ __forceinline__ void stmatrix(char* row, uint4 v) {
    cute::SM90_U32x4_STSM_N::copy(v.x, v.y, v.z, v.w, *reinterpret_cast<cute::uint128_t*>(row));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers known to the asynchronous proxy and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cute::cast_smem_ptr_to_uint(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t"
        "}" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
        "r"(parity)
        : "memory");
}

// The same, seeing what other blocks have pushed.
__device__ __forceinline__ void barrier_wait_cluster(std::uint64_t* barrier, std::uint32_t parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t"
        "}" ::"r"(cute::cast_smem_ptr_to_uint(barrier)),
        "r"(parity)
        : "memory");
}

// Plain accesses of this thread to the block's shared memory come before what TMA and wgmma do after the next barrier.
// (Without the state space it would wait for global memory as well.)
__device__ __forceinline__ void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether one of these threads says so.
__device__ __forceinline__ bool named_any(int id, int threads, bool here) {
    int any;
    asm volatile(
        "{\n\t"
        ".reg .pred here, any;\n\t"
        "setp.ne.s32 here, %1, 0;\n\t"
        "bar.red.or.pred any, %2, %3, here;\n\t"
        "selp.s32 %0, 1, 0, any;\n\t"
        "}"
        : "=r"(any)
        : "r"(static_cast<int>(here)), "r"(id), "r"(threads)
        : "memory");
    return any != 0;
}

// All threads of all blocks of the cluster. It releases nothing: what comes before must be published otherwise.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of `pointer`'s counterpart in block `rank` of the cluster.
__device__ __forceinline__ std::uint32_t remote_address(const void* pointer, int rank) {
    std::uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(cute::cast_smem_ptr_to_uint(pointer)), "r"(rank));
    return address;
}

// At a barrier of another block, by its remote address. It says that reads are over, and publishes no writes: a release
// for the cluster would wait for this thread's additions to global memory.
__device__ __forceinline__ void remote_arrive(std::uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// 16 bytes to another block's shared memory, counted there by `barrier`; both are remote addresses of that block.
__device__ __forceinline__ void push(std::uint32_t address, std::uint32_t barrier, uint4 v) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
            address),
        "r"(barrier), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}
__device__ __forceinline__ void push(std::uint32_t address, std::uint32_t barrier, float4 v) {
    push(address, barrier,
         uint4{__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)});
}

__device__ __forceinline__ void global_add(float* pointer, const float (&v)[4]) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
}

// Four sums that other blocks have added to: from L2, where they lie.
__device__ __forceinline__ void global_read(const float* pointer, float (&v)[4]) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(pointer));
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// One more at `counter`, which was the value returned; releases and acquires, see rounding.h.
__device__ __forceinline__ unsigned count(unsigned* counter) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
}

}  // namespace loge::sm90
