// A cluster of blocks of the Hopper kernel on the host: a fiber per thread, shared memory that is NaN until written,
// and what the PTX manual says of TMA, mbarrier, wgmma, stmatrix and barriers.
//
// What is asynchronous may happen anywhere between its issue and the wait for it: a Schedule says which kinds happen at
// issue and which when nothing else is left to do. What is right on a GPU is right under all of them.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "fibers.h"
#include "params.h"
#include "sm90_counts.h"
#include "sm90_tiles.h"
#include "sm90_wgmma.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace emulator {

using loge::sm90::kThreads;

inline constexpr int kWindow = 1 << 18;  // bytes of a block's shared memory: the addresses of shared_address.h
inline constexpr int kBase = 16;         // where dynamic shared memory starts: not on a swizzle's boundary

// What encode_tensor_map keeps in the opaque CUtensorMap.
struct TensorMap {
    const char* base;
    std::int64_t rows, columns, row_stride;
    int box_rows, box_columns;
};

struct Schedule {
    bool last_first;     // of the threads that can run
    bool late_loads;     // TMA fills shared memory when nobody can run
    bool late_products;  // wgmma reads its operands when it is waited for and nobody can run
    bool late_stores;    // TMA reads shared memory when it is waited for
    bool late_pushes;    // what is pushed to another block comes when nobody can run
    bool counts_alone;   // nothing is moved or multiplied
};

class Cluster {
 public:
    Cluster(int blocks, int shared_bytes, Schedule schedule)
        : schedule_(schedule),
          fibers_(blocks * kThreads, schedule.last_first ? Fibers::Order::kLastCome : Fibers::Order::kFirstCome),
          threads_(blocks * kThreads),
          warps_(blocks * kThreads / 32),
          warpgroups_(blocks * kThreads / kWarpgroupThreads),
          blocks_(blocks) {
        for (Block& block : blocks_) {
            block.window.reset(static_cast<char*>(std::aligned_alloc(kWindow, kWindow)));
            std::memset(block.window.get(), 0xff, kWindow);
            ASAN_POISON_MEMORY_REGION(block.window.get(), kBase);
            ASAN_POISON_MEMORY_REGION(block.window.get() + kBase + shared_bytes, kWindow - kBase - shared_bytes);
        }
    }
    ~Cluster() {
        for (Block& block : blocks_)
            ASAN_UNPOISON_MEMORY_REGION(block.window.get(), kWindow);
    }

    // Runs `body(block, dynamic shared memory)` as every thread of every block.
    void run(const std::function<void(int, char*)>& body) {
        fibers_.run(
            [&](int fiber) {
                body(fiber / kThreads, blocks_[fiber / kThreads].window.get() + kBase);
                ++blocks_[fiber / kThreads].ended;
                if (!threads_[fiber].stores.empty()) fail("a thread ends before its stores have read", fiber);
                if (threads_[fiber].unfenced) fail("a thread ends with writes unknown to the async proxy", fiber);
            },
            [&] { return finish_products() || land_a_push() || land_a_load(); });
        for (const auto& [address, barrier] : barriers_)
            if (barrier.bytes != 0) fail("a barrier still expects bytes", barrier.bytes);
        for (const Warpgroup& warpgroup : warpgroups_)
            if (!warpgroup.products.empty()) fail("a product nobody waited for");
    }

    int thread() const { return fibers_.running() % kThreads; }
    int block() const { return fibers_.running() / kThreads; }

    void enter(int phase) { self().phase = phase; }
    // Of a phase, over the blocks.
    Traffic traffic(int phase) const {
        Traffic total;
        for (const Block& block : blocks_)
            total.add_blocks(block.traffic[phase]);
        return total;
    }

    // mbarriers

    void barrier_init(std::uint64_t* at, int arrivals) {
        if (!barriers_.emplace(at, Barrier{arrivals, arrivals, 0, 0, {}}).second) fail("a barrier initialised twice");
    }
    void barrier_arrive(std::uint64_t* at, int bytes = 0) {
        Barrier& barrier = find(at);
        if (at != local(at)) fail("a barrier of another block, by its local address");
        arrive(barrier, bytes);
    }
    void remote_arrive(std::uint32_t address) { arrive(find(remote_barrier(address)), 0); }
    void barrier_wait(std::uint64_t* at, std::uint32_t parity) {
        Barrier& barrier = find(at);
        if (thread() == 0) ++here().waits;
        while ((barrier.phase & 1) == parity) {
            barrier.waiting.push_back(fibers_.running());
            fibers_.suspend();
        }
    }

    // TMA

    void map_prefetch(const CUtensorMap& map) {
        if (reinterpret_cast<const TensorMap&>(map).base == nullptr) fail("a map that nobody has encoded");
    }
    // To the blocks whose bits are set.
    void load(const CUtensorMap& map, std::uint64_t* barrier, unsigned blocks, char* shared, int column, int row) {
        ++counters.loads;
        const TensorMap& box = reinterpret_cast<const TensorMap&>(map);
        here().loaded += 2 * overlap(row, box.box_rows, box.rows) * overlap(column, box.box_columns, box.columns);
        if (blocks >> blocks_.size() != 0) fail("a load to blocks that are not in the cluster", blocks);
        for (int i = 0; i < static_cast<int>(blocks_.size()); ++i) {
            if ((blocks >> i & 1) == 0) continue;
            std::uint64_t* const there = counterpart(barrier, i);
            find(there);
            loads_.push_back({&map, i, there, counterpart(shared, i), column, row});
            blocks_[i].traffic[self().phase].shared += 2 * box.box_rows * box.box_columns;
            if (!schedule_.late_loads) land_a_load();
        }
    }
    // A bulk group of its own.
    void store(const CUtensorMap& map, const char* shared, int column, int row) {
        ++counters.stores;
        const TensorMap& box = reinterpret_cast<const TensorMap&>(map);
        here().stored += 2 * overlap(row, box.box_rows, box.rows) * overlap(column, box.box_columns, box.columns);
        here().shared += 2 * box.box_rows * box.box_columns;
        const Store made{&map, shared, column, row};
        if (schedule_.late_stores)
            self().stores.push_back(made);
        else
            perform(made);
    }
    void store_wait(int pending) {
        for (auto& stores = self().stores; static_cast<int>(stores.size()) > pending; stores.pop_front())
            perform(stores.front());
    }

    // wgmma. `acc` are this thread's accumulators, `a_registers` its part of A.

    void product(const Product& made, float* acc, const void* a_registers) {
        Thread& thread = self();
        if (!thread.fenced) fail("wgmma without wgmma.fence");
        Warpgroup& warpgroup = my_warpgroup();
        const std::size_t index = thread.issued++ - warpgroup.done;
        if (index == warpgroup.products.size()) warpgroup.products.push_back({made, 0, {}, {}});
        Issued& issued = warpgroup.products.at(index);
        if (std::memcmp(&issued.product.a, &made.a, 16) != 0 || issued.product.columns != made.columns ||
            issued.product.accumulate != made.accumulate)
            fail("the threads of a warpgroup multiply different things");
        issued.acc[fibers_.running() % kWarpgroupThreads] = acc;
        issued.a[fibers_.running() % kWarpgroupThreads] = static_cast<const std::uint16_t*>(a_registers);
        if (++issued.arrived == kWarpgroupThreads) {
            here().shared += 32 * (made.columns + (made.a_in_registers ? 0 : 64));
            ++here().products[made.columns == 16 ? 0 : made.columns == 64 ? 1 : made.columns == 128 ? 2 : 3];
            if (!schedule_.late_products) complete(warpgroup, 1);
        }
    }
    void product_fence() { self().fenced = true; }
    void product_commit() { self().groups.push_back(self().issued); }
    // A rendezvous of the warpgroup as well.
    void product_wait(int pending) {
        Thread& thread = self();
        Warpgroup& warpgroup = my_warpgroup();
        const std::size_t count = thread.groups.size();
        const long long until = count > static_cast<std::size_t>(pending) ? thread.groups[count - 1 - pending] : 0;
        if (pending == 0 && thread.issued != until && thread.issued != 0) fail("wgmma without commit");
        thread.fenced = false;
        warpgroup.until = until;
        warpgroup.waiting.push_back(fibers_.running());
        if (static_cast<int>(warpgroup.waiting.size()) == kWarpgroupThreads) {
            finishing_.push_back(&warpgroup);
            if (!schedule_.late_products) finish_products();
        }
        fibers_.suspend();
    }

    // Proxies: what this thread has written by plain stores, and whether TMA and wgmma would see it.

    void async_fence() { self().unfenced = false; }

    // Barriers and exchanges

    void named_barrier(int id, int threads) {
        if (self().unfenced) fail("a barrier passes on writes that the async proxy does not see", id);
        rendezvous(blocks_[block()].named[id], threads);
    }
    bool named_any(int id, int threads, bool here) {
        Block& mine = blocks_[block()];
        mine.said |= here;
        if (static_cast<int>(mine.named[id].size()) + 1 == threads) mine.any = std::exchange(mine.said, false);
        named_barrier(id, threads);
        return mine.any;
    }
    // Releases nothing.
    void cluster_barrier() {
        if (self().wrote) fail("a barrier that releases nothing, and a thread that has written", fibers_.running());
        rendezvous(waiting_, fibers_.size());
    }
    void warp_barrier() {
        together(0, {}, [](auto&) {});
    }
    template <class Value, class Source>
    Value exchange(Value value, Source source) {
        Value received;
        together(1, {&value, &received}, [&source](auto& lanes) {
            for (int lane = 0; lane < 32; ++lane)
                std::memcpy(lanes[lane].out, lanes[source(lane)].in, sizeof(Value));
        });
        return received;
    }
    // `registers`: four words; `row`: the 16 bytes that this lane addresses.
    void stmatrix(char* row, const std::uint32_t* registers) {
        if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) fail("stmatrix to a misaligned row");
        self().unfenced = self().wrote = true;
        here().shared += 16;
        together(2, {registers, row}, [this](auto& lanes) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                unsigned banks = 0;
                for (int i = 0; i < 8; ++i) {
                    char* target = static_cast<char*>(lanes[8 * matrix + i].out);
                    const unsigned bank = 1u << (reinterpret_cast<std::uintptr_t>(target) / 16 % 8);
                    counters.conflicts += (banks & bank) != 0;
                    banks |= bank;
                    for (int j = 0; j < 4; ++j)
                        std::memcpy(target + 4 * j, static_cast<const std::uint32_t*>(lanes[4 * i + j].in) + matrix, 4);
                }
            }
        });
    }

    // Distributed shared memory: the window's offset and the block's rank.

    std::uint32_t remote_address(const void* pointer, int rank) const {
        if (rank < 0 || rank >= static_cast<int>(blocks_.size())) fail("no such block in the cluster", rank);
        return static_cast<std::uint32_t>(rank * kWindow +
                                          (static_cast<const char*>(pointer) - blocks_[block()].window.get()));
    }
    // 16 bytes, counted by a barrier of the block that they go to.
    void push(std::uint32_t address, std::uint32_t barrier, const void* value) {
        if (address / kWindow != barrier / kWindow) fail("a push and its barrier are in different blocks");
        ++counters.pushes;
        here().pushed += 16;
        blocks_[address / kWindow].traffic[self().phase].shared += 32;  // it comes, and is read
        Push made{static_cast<int>(address / kWindow), remote(address), remote_barrier(barrier), {}};
        std::memcpy(made.value.data(), value, 16);
        pushes_.push_back(made);
        if (!schedule_.late_pushes) land_a_push();
    }

    void global_add(float* pointer, const float* v) {
        if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail("a reduction of four off its 16-byte boundary");
        if (blocks_[block()].counted) fail("an addition after the block has counted itself as finished");
        self().wrote = true;
        ++counters.reductions;
        here().added += 16;
        for (int i = 0; i < 4; ++i)
            pointer[i] += v[i];
    }
    unsigned count(unsigned* counter) {
        blocks_[block()].counted = true;
        return (*counter)++;
    }

    Counters counters;

 private:
    struct Barrier {
        int expected, pending;
        long long bytes;
        unsigned phase;
        std::vector<int> waiting;
    };
    struct Load {
        const CUtensorMap* map;
        int block;
        std::uint64_t* barrier;
        char* shared;
        int column, row;
    };
    struct Push {
        int block;
        char* shared;
        std::uint64_t* barrier;
        std::array<char, 16> value;
    };
    struct Store {
        const CUtensorMap* map;
        const char* shared;
        int column, row;
    };
    struct Thread {
        std::deque<Store> stores;
        std::vector<long long> groups;  // products issued when each group was committed
        long long issued = 0;
        int phase = 0;
        bool fenced = false, unfenced = false, wrote = false;
    };
    struct Lane {
        const void* in;
        void* out;
    };
    struct Warp {
        int arrived = 0, kind = 0;
        std::array<Lane, 32> lanes;
    };
    struct Warpgroup {
        std::deque<Issued> products;    // not complete; the first is number `done`
        long long done = 0, until = 0;  // complete, and to be completed before those that wait go on
        std::vector<int> waiting;
    };
    struct Free {
        void operator()(char* window) const { std::free(window); }
    };
    struct Block {
        std::unique_ptr<char, Free> window;
        std::array<std::vector<int>, 16> named;
        int ended = 0;  // threads
        Traffic traffic[kPhases];
        bool counted = false;            // as finished
        bool said = false, any = false;  // of named_any: so far, and by all
    };

    Thread& self() { return threads_[fibers_.running()]; }
    Traffic& here() { return blocks_[block()].traffic[self().phase]; }
    // How much of [begin, begin + count) lies before `size`.
    static std::int64_t overlap(std::int64_t begin, std::int64_t count, std::int64_t size) {
        return std::max<std::int64_t>(0, std::min(count, size - begin));
    }
    Warpgroup& my_warpgroup() { return warpgroups_[fibers_.running() / kWarpgroupThreads]; }

    Barrier& find(std::uint64_t* at) {
        const auto found = barriers_.find(at);
        if (found == barriers_.end()) fail("a barrier used before it is initialised");
        return found->second;
    }
    void arrive(Barrier& barrier, int bytes) {
        barrier.bytes += bytes;
        if (--barrier.pending < 0) fail("a barrier has more arrivals than it expects", barrier.expected);
        turn(barrier);
    }
    // Bytes may come before the arrival that expects them.
    void turn(Barrier& barrier) {
        if (barrier.pending != 0) return;
        if (barrier.bytes < 0) fail("a barrier has got more bytes than it expects", barrier.bytes);
        if (barrier.bytes != 0) return;
        barrier.pending = barrier.expected;
        ++barrier.phase;
        fibers_.resume(barrier.waiting);
    }

    bool finish_products() {
        if (finishing_.empty()) return false;
        Warpgroup& warpgroup = *finishing_.front();
        finishing_.pop_front();
        if (warpgroup.until > warpgroup.done) complete(warpgroup, warpgroup.until - warpgroup.done);
        fibers_.resume(warpgroup.waiting);
        return true;
    }

    // The latest one, since loads have no order.
    bool land_a_load() {
        if (loads_.empty()) return false;
        const Load load = loads_.back();
        loads_.pop_back();
        must_live(load.block);
        const TensorMap& map = reinterpret_cast<const TensorMap&>(*load.map);
        const std::int64_t width = map.box_columns;
        for (int i = 0; i < map.box_rows && !schedule_.counts_alone; ++i)
            for (int j = 0; j < width; j += 8) {
                char* target = swizzled(load.shared, map, i, j);
                const std::int64_t row = load.row + std::int64_t{i}, column = load.column + std::int64_t{j};
                if (row < map.rows && column < map.columns)  // both are multiples of 8
                    std::memcpy(target, map.base + (row * map.row_stride + column) * 2, 16);
                else
                    std::memset(target, 0, 16);
            }
        Barrier& barrier = find(load.barrier);
        barrier.bytes -= map.box_rows * width * 2;
        turn(barrier);
        return true;
    }

    bool land_a_push() {
        if (pushes_.empty()) return false;
        const Push push = pushes_.back();
        pushes_.pop_back();
        must_live(push.block);
        std::memcpy(push.shared, push.value.data(), 16);
        Barrier& barrier = find(push.barrier);
        barrier.bytes -= 16;
        turn(barrier);
        return true;
    }

    void perform(const Store& store) {
        if (schedule_.counts_alone) return;
        const TensorMap& map = reinterpret_cast<const TensorMap&>(*store.map);
        for (int i = 0; i < map.box_rows; ++i)
            for (int j = 0; j < map.box_columns; j += 8) {
                const std::int64_t row = store.row + std::int64_t{i}, column = store.column + std::int64_t{j};
                if (row < map.rows && column < map.columns)
                    std::memcpy(const_cast<char*>(map.base) + (row * map.row_stride + column) * 2,
                                swizzled(const_cast<char*>(store.shared), map, i, j), 16);
            }
    }

    // Address bits 4.. xor bits 7.., three of them for rows of 128 bytes and one for rows of 32.
    static char* swizzled(char* shared, const TensorMap& map, int row, int column) {
        if (reinterpret_cast<std::uintptr_t>(shared) % 128 != 0) fail("TMA wants a 128-byte boundary");
        const auto address = reinterpret_cast<std::uintptr_t>(shared) + (row * map.box_columns + column) * 2;
        const std::uintptr_t mask = map.box_columns == 64 ? 7 : 1;
        return reinterpret_cast<char*>(address ^ ((address >> 7 & mask) << 4));
    }

    void complete(Warpgroup& warpgroup, long long count) {
        const char* window = blocks_[(&warpgroup - warpgroups_.data()) / (kThreads / kWarpgroupThreads)].window.get();
        for (; count > 0; --count, ++warpgroup.done) {
            if (warpgroup.products.empty() || warpgroup.products.front().arrived != kWarpgroupThreads)
                fail("a product not all threads have issued");
            const Issued& issued = warpgroup.products.front();
            if (schedule_.counts_alone) {
            } else if (issued.product.dtype == loge::DType::kBFloat16)
                multiply<loge::DType::kBFloat16>(issued, window);
            else
                multiply<loge::DType::kFloat16>(issued, window);
            ++counters.products;
            warpgroup.products.pop_front();
        }
    }

    void rendezvous(std::vector<int>& waiting, int threads) {
        if (static_cast<int>(waiting.size()) + 1 < threads) {
            waiting.push_back(fibers_.running());
            return fibers_.suspend();
        }
        fibers_.resume(waiting);
    }

    // The last of a warp to come performs the instruction for all 32.
    template <class Perform>
    void together(int kind, const Lane& lane, Perform perform) {
        const int fiber = fibers_.running();
        Warp& warp = warps_[fiber / 32];
        if (warp.arrived > 0 && warp.kind != kind) fail("the lanes of a warp diverge", warp.kind, kind);
        warp.kind = kind;
        warp.lanes[fiber % 32] = lane;
        if (++warp.arrived < 32) return fibers_.suspend();
        warp.arrived = 0;
        perform(warp.lanes);
        for (int i = fiber / 32 * 32; i < fiber / 32 * 32 + 32; ++i)
            if (i != fiber) fibers_.resume(i);
    }

    // Shared memory goes with its block.
    void must_live(int block) const {
        if (blocks_[block].ended == kThreads) fail("something comes to a block that has ended", block);
    }
    template <class T>
    T* counterpart(T* pointer, int block) const {
        const auto offset = reinterpret_cast<std::uintptr_t>(pointer) % kWindow;
        return reinterpret_cast<T*>(blocks_[block].window.get() + offset);
    }
    std::uint64_t* local(std::uint64_t* pointer) const { return counterpart(pointer, block()); }
    char* remote(std::uint32_t address) {
        if (address % 16 != 0) fail("a remote address off its 16-byte boundary", address);
        return blocks_.at(address / kWindow).window.get() + address % kWindow;
    }
    std::uint64_t* remote_barrier(std::uint32_t address) {
        must_live(static_cast<int>(address / kWindow));
        return reinterpret_cast<std::uint64_t*>(blocks_.at(address / kWindow).window.get() + address % kWindow);
    }

    Schedule schedule_;
    Fibers fibers_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<Warpgroup> warpgroups_;
    std::vector<Block> blocks_;
    std::map<const std::uint64_t*, Barrier> barriers_;
    std::vector<Load> loads_;
    std::vector<Push> pushes_;
    std::deque<Warpgroup*> finishing_;  // all of whose threads wait for products
    std::vector<int> waiting_;          // at the cluster's barrier
};

}  // namespace emulator
