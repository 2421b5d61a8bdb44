// One block of the Ampere kernel on the host: a fiber per thread, shared memory that is NaN until written, and the
// instructions of sm80_ptx.cuh by their definition in the PTX manual (fragment layouts of mma.m16n8k16 and ldmatrix).
//
// cp.async may land anywhere between its issue and the wait for its group: `Schedule::kEager` copies at issue and runs
// the fibers last come first served, `kLate` copies at the wait and runs them in order. What is right on a GPU is right
// under both.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "fibers.h"
#include "formats.h"
#include "params.h"

namespace emulator {

enum class Schedule { kEager, kLate };

struct Counters {
    long long ldmatrix = 0, conflicts = 0, mma = 0, parts = 0;
};

class Block;

// One thread; the interface of loge::sm80::PtxMachine.
class Machine {
 public:
    Machine(Block& block, int thread) : block_(block), thread_(thread) {}
    int thread() const { return thread_; }
    int thread_anew() const { return thread_; }
    void sync();
    template <bool kOnce>
    void copy_async(int offset, const void* source, bool valid);
    void commit();
    void wait(int pending) {
        if (pending < 0 || pending > 2) fail("waits that the GPU does not have", pending);
        land(pending);
    }
    template <bool kTranspose>
    void ldmatrix(std::uint32_t (&r)[4], int offset);
    template <loge::DType kType>
    void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b);
    template <loge::DType kType>
    std::uint32_t pack(float low, float high) const {
        return narrow<kType>(low) | std::uint32_t{narrow<kType>(high)} << 16;
    }
    std::uint32_t swap(std::uint32_t value);
    void write_pair(float* target, float first, float second) {
        if (reinterpret_cast<std::uintptr_t>(target) % 8 != 0) fail("a pair off its 8-byte boundary");
        target[0] = first;
        target[1] = second;
    }
    void write_sums(float* target, const float (&v)[4]);
    void read_sums(float (&v)[4], const float* source) const {
        if (reinterpret_cast<std::uintptr_t>(source) % 16 != 0) fail("four sums off their 16-byte boundary");
        std::memcpy(v, source, 16);
    }
    void write_word(void* target, std::uint32_t word) const {
        if (reinterpret_cast<std::uintptr_t>(target) % 4 != 0) fail("a word off its 4-byte boundary");
        std::memcpy(target, &word, 4);
    }
    void write_words(void* target, std::uint32_t first, std::uint32_t second) const {
        if (reinterpret_cast<std::uintptr_t>(target) % 8 != 0) fail("two words off their 8-byte boundary");
        const std::uint32_t words[] = {first, second};
        std::memcpy(target, words, 8);
    }
    unsigned count(unsigned* counter);
    bool any(bool here);

 private:
    struct Copy {
        int offset;
        const void* source;
        bool valid;
    };
    void land(int pending);
    void perform(const Copy& copy);

    Block& block_;
    int thread_;
    std::deque<std::vector<Copy>> groups_;
    std::vector<Copy> open_;
};

class Block {
 public:
    Block(int threads, int shared_bytes, Schedule schedule)
        : schedule_(schedule),
          shared_(shared_bytes, 0xff),
          fibers_(threads, schedule == Schedule::kEager ? Fibers::Order::kLastCome : Fibers::Order::kFirstCome),
          warps_(threads / 32) {}

    // Runs `body` as every thread of the block.
    void run(const std::function<void(Machine&)>& body) {
        fibers_.run(
            [&](int thread) {
                Machine machine(*this, thread);
                body(machine);
            },
            [] { return false; });
    }

    Counters counters;

 private:
    friend class Machine;
    struct Lane {
        float* c;
        const std::uint32_t *a, *b;
        std::uint32_t* r;
        int offset;
    };
    struct Warp {
        int arrived = 0, kind = 0;
        std::array<Lane, 32> lanes;
    };

    // The last of a warp to come performs the instruction for all 32.
    template <class Perform>
    void together(int thread, int kind, const Lane& lane, Perform perform) {
        Warp& warp = warps_[thread / 32];
        if (warp.arrived > 0 && warp.kind != kind) fail("the lanes of a warp diverge", warp.kind, kind);
        warp.kind = kind;
        warp.lanes[thread % 32] = lane;
        if (++warp.arrived < 32) return fibers_.suspend();
        warp.arrived = 0;
        perform(warp.lanes);
        for (int i = 0; i < 32; ++i)
            if (thread / 32 * 32 + i != thread) fibers_.resume(thread / 32 * 32 + i);
    }

    unsigned char* at(int offset, int bytes) {
        if (offset < 0 || offset % bytes != 0 || offset + bytes > static_cast<int>(shared_.size()))
            fail("shared memory out of bounds or misaligned", offset, bytes);
        return shared_.data() + offset;
    }

    Schedule schedule_;
    std::vector<unsigned char> shared_;
    Fibers fibers_;
    std::vector<Warp> warps_;
    std::vector<int> waiting_;
    bool written_ = false;             // parts of sums since the last barrier
    bool said_ = false, any_ = false;  // of Machine::any: so far, and by all
};

inline void Machine::sync() {
    if (static_cast<int>(block_.waiting_.size()) + 1 < block_.fibers_.size()) {
        block_.waiting_.push_back(thread_);
        return block_.fibers_.suspend();
    }
    block_.written_ = false;
    block_.fibers_.resume(block_.waiting_);
}

inline unsigned Machine::count(unsigned* counter) {
    if (block_.written_) fail("a part of a sum that no barrier keeps before the block's count");
    ++block_.counters.parts;
    return (*counter)++;
}

inline bool Machine::any(bool here) {
    if (block_.written_) fail("a part of a sum after the block's count");
    block_.said_ |= here;
    if (static_cast<int>(block_.waiting_.size()) + 1 == block_.fibers_.size())
        block_.any_ = std::exchange(block_.said_, false);
    sync();
    return block_.any_;
}

inline void Machine::perform(const Copy& copy) {
    unsigned char* target = block_.at(copy.offset, 16);
    if (copy.valid)
        std::memcpy(target, copy.source, 16);
    else
        std::memset(target, 0, 16);
}

template <bool kOnce>
void Machine::copy_async(int offset, const void* source, bool valid) {
    if (reinterpret_cast<std::uintptr_t>(source) % 16 != 0) fail("cp.async from a misaligned address");
    const Copy copy{offset, source, valid};
    if (block_.schedule_ == Schedule::kEager)
        perform(copy);
    else
        open_.push_back(copy);
}

inline void Machine::commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
}

inline void Machine::land(int pending) {
    while (static_cast<int>(groups_.size()) > pending) {
        for (const Copy& copy : groups_.front())
            perform(copy);
        groups_.pop_front();
    }
}

template <bool kTranspose>
void Machine::ldmatrix(std::uint32_t (&r)[4], int offset) {
    block_.together(thread_, kTranspose ? 1 : 2, {nullptr, nullptr, nullptr, r, offset}, [this](auto& lanes) {
        ++block_.counters.ldmatrix;
        for (int matrix = 0; matrix < 4; ++matrix) {
            std::uint16_t rows[8][8];
            unsigned banks = 0;
            for (int i = 0; i < 8; ++i) {
                const int from = lanes[8 * matrix + i].offset;
                std::memcpy(rows[i], block_.at(from, 16), 16);
                block_.counters.conflicts += banks >> (from / 16 % 8) & 1;
                banks |= 1u << (from / 16 % 8);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int i = lane / 4, j = lane % 4 * 2;
                const std::uint16_t low = kTranspose ? rows[j][i] : rows[i][j];
                const std::uint16_t high = kTranspose ? rows[j + 1][i] : rows[i][j + 1];
                lanes[lane].r[matrix] = low | std::uint32_t{high} << 16;
            }
        }
    });
}

// C += A B of the fragments of 32 lanes. Most of an emulation's time.
template <loge::DType kType>
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void multiply(
    float* const (&c)[32], const std::uint32_t* const (&a)[32], const std::uint32_t* const (&b)[32]) {
    const auto value = [](std::uint32_t pair, int half) __attribute__((always_inline)) {
        const auto bits = static_cast<std::uint16_t>(pair >> 16 * half);
        if constexpr (kType == loge::DType::kBFloat16) {
            const std::uint32_t word = std::uint32_t{bits} << 16;
            float wide;
            std::memcpy(&wide, &word, 4);
            return wide;
        } else {
            _Float16 narrow;
            std::memcpy(&narrow, &bits, 2);
            return static_cast<float>(narrow);
        }
    };
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r)
                A[group + r % 2 * 8][pair + half + r / 2 * 8] = value(a[lane][r], half);
            for (int r = 0; r < 2; ++r)
                B[pair + half + r * 8][group] = value(b[lane][r], half);
        }
    }
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j)
            C[i][j] = 0.0f;
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j)
                C[i][j] += A[i][k] * B[k][j];
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r)
            c[lane][r] += C[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

template <loge::DType kType>
void Machine::mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
    block_.together(thread_, 3, {c, a, b, nullptr, 0}, [this](auto& lanes) {
        ++block_.counters.mma;
        float* all_c[32];
        const std::uint32_t *all_a[32], *all_b[32];
        for (int lane = 0; lane < 32; ++lane)
            all_c[lane] = lanes[lane].c, all_a[lane] = lanes[lane].a, all_b[lane] = lanes[lane].b;
        multiply<kType>(all_c, all_a, all_b);
    });
}

inline std::uint32_t Machine::swap(std::uint32_t value) {
    std::uint32_t other = value;
    block_.together(thread_, 4, {nullptr, nullptr, nullptr, &other, 0}, [](auto& lanes) {
        for (int lane = 0; lane < 32; lane += 2)
            std::swap(*lanes[lane].r, *lanes[lane + 1].r);
    });
    return other;
}

inline void Machine::write_sums(float* target, const float (&v)[4]) {
    if (reinterpret_cast<std::uintptr_t>(target) % 16 != 0) fail("four sums off their 16-byte boundary");
    block_.written_ = true;
    std::memcpy(target, v, 16);
}

}  // namespace emulator
