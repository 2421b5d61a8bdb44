// Takes the place of csrc/sm90_ptx.cuh: the same functions, on the emulated cluster.
#pragma once

#include <cute/tensor.hpp>
// After tensor.hpp, whose types these use.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cute/atom/mma_atom.hpp>

#include <cstdint>

#include "sm90_machine.h"

namespace emulator {

inline Cluster* cluster = nullptr;  // the one that runs
struct Index {
    int x;
};
inline int first_block = 0;  // of the grid, in this cluster

template <class Op>
struct Operation;
template <template <cute::SM90::GMMA::Major, cute::SM90::GMMA::Major, cute::SM90::GMMA::ScaleIn,
                    cute::SM90::GMMA::ScaleIn> class Op,
          cute::SM90::GMMA::Major kA, cute::SM90::GMMA::Major kB, cute::SM90::GMMA::ScaleIn kScaleA,
          cute::SM90::GMMA::ScaleIn kScaleB>
struct Operation<Op<kA, kB, kScaleA, kScaleB>> {
    static_assert(kScaleA == cute::SM90::GMMA::ScaleIn::One && kScaleB == cute::SM90::GMMA::ScaleIn::One);
    static constexpr bool kMnMajorA = kA == cute::SM90::GMMA::Major::MN;
    static constexpr bool kMnMajorB = kB == cute::SM90::GMMA::Major::MN;
};

}  // namespace emulator

#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline  // the host's compiler would take minutes
#define threadIdx (emulator::Index{emulator::cluster->thread()})
#define blockIdx (emulator::Index{emulator::first_block + emulator::cluster->block()})

inline void __syncthreads() {
    emulator::cluster->named_barrier(0, emulator::kThreads);
}
inline void __syncwarp() {
    emulator::cluster->warp_barrier();
}
inline int __shfl_sync(unsigned, int value, int source) {
    return emulator::cluster->exchange(value, [source](int) { return source; });
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return emulator::cluster->exchange(value, [mask](int lane) { return lane ^ mask; });
}

namespace loge::sm90 {

enum class Phase { kWalkN, kExchange, kWalkK, kExpand };
inline void enter(Phase phase) {
    emulator::cluster->enter(static_cast<int>(phase));
}

inline bool elect_one() {
    return threadIdx.x % 32 == 0;
}

enum class Reuse { kOnce, kAgain };

inline void tma_load(const CUtensorMap& map, std::uint64_t* barrier, Reuse, char* shared, int column, int row) {
    emulator::cluster->load(map, barrier, 1u << emulator::cluster->block(), shared, column, row);
}
inline void tma_load_shared(const CUtensorMap& map, std::uint64_t* barrier, unsigned blocks, Reuse, char* shared,
                            int column, int row) {
    emulator::cluster->load(map, barrier, blocks, shared, column, row);
}
inline void map_prefetch(const CUtensorMap& map) {
    emulator::cluster->map_prefetch(map);
}
inline void tma_prefetch(const CUtensorMap&, int, int) {}
inline void tma_store(const CUtensorMap& map, const char* shared, int column, int row) {
    emulator::cluster->store(map, shared, column, row);
}
template <int kPending>
void tma_store_wait() {
    emulator::cluster->store_wait(kPending);
}

inline void tma_store_wait_written() {
    tma_store_wait<0>();
}
// The launches of the emulation come one after the other.
inline void launch_dependents() {}
inline void wait_for_prerequisites() {}

template <class Mma, class A, class B, class Accumulators>
void wgmma(Mma&, bool accumulate, const A& a, const B& b, Accumulators& acc) {
    using Operation = emulator::Operation<typename Mma::MMA_Op>;
    constexpr bool kRegisters = !std::is_convertible_v<decltype(a(0)), std::uint64_t> ||
                                std::is_same_v<std::decay_t<decltype(a(0))>, typename Mma::ValTypeA>;
    emulator::Product product{};
    product.dtype = std::is_same_v<typename Mma::ValTypeA, cute::half_t> ? DType::kFloat16 : DType::kBFloat16;
    product.columns = cute::size<1>(typename Mma::AtomShape_MNK{});
    product.accumulate = accumulate;
    product.a_in_registers = kRegisters;
    product.a_mn_major = Operation::kMnMajorA;
    product.b_mn_major = Operation::kMnMajorB;
    product.b = static_cast<std::uint64_t>(b(0));
    const void* registers = nullptr;
    if constexpr (kRegisters)
        registers = &a(0);
    else
        product.a = static_cast<std::uint64_t>(a(0));
    emulator::cluster->product(product, &acc(0), registers);
}
inline void wgmma_fence() {
    emulator::cluster->product_fence();
}
inline void wgmma_commit() {
    emulator::cluster->product_commit();
}
template <int kPending>
void wgmma_wait() {
    emulator::cluster->product_wait(kPending);
}
template <class Accumulators>
void wgmma_own(Accumulators&) {}

inline void stmatrix(char* row, uint4 v) {
    const std::uint32_t words[] = {v.x, v.y, v.z, v.w};
    emulator::cluster->stmatrix(row, words);
}

template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}

inline void barrier_init(std::uint64_t* barrier, int arrivals) {
    emulator::cluster->barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_expect(std::uint64_t* barrier, int bytes) {
    emulator::cluster->barrier_arrive(barrier, bytes);
}
inline void barrier_arrive(std::uint64_t* barrier) {
    emulator::cluster->barrier_arrive(barrier);
}
inline void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
    emulator::cluster->barrier_wait(barrier, parity);
}

inline void barrier_wait_cluster(std::uint64_t* barrier, std::uint32_t parity) {
    emulator::cluster->barrier_wait(barrier, parity);
}

inline void async_proxy_fence() {
    emulator::cluster->async_fence();
}
inline void named_barrier(int id, int threads) {
    emulator::cluster->named_barrier(id, threads);
}
inline bool named_any(int id, int threads, bool here) {
    return emulator::cluster->named_any(id, threads, here);
}
inline void cluster_barrier() {
    emulator::cluster->cluster_barrier();
}
inline std::uint32_t remote_address(const void* pointer, int rank) {
    return emulator::cluster->remote_address(pointer, rank);
}
inline void remote_arrive(std::uint32_t barrier) {
    emulator::cluster->remote_arrive(barrier);
}
inline void push(std::uint32_t address, std::uint32_t barrier, uint4 v) {
    emulator::cluster->push(address, barrier, &v);
}
inline void push(std::uint32_t address, std::uint32_t barrier, float4 v) {
    emulator::cluster->push(address, barrier, &v);
}
inline void global_add(float* pointer, const float (&v)[4]) {
    emulator::cluster->global_add(pointer, v);
}
inline void global_read(const float* pointer, float (&v)[4]) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) emulator::fail("four sums off their 16-byte boundary");
    std::memcpy(v, pointer, 16);
}
inline unsigned count(unsigned* counter) {
    return emulator::cluster->count(counter);
}

}  // namespace loge::sm90
