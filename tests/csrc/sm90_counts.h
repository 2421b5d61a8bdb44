// What an emulated cluster counts.
#pragma once

#include <algorithm>

namespace emulator {

struct Counters {
    long long loads = 0, stores = 0, products = 0, reductions = 0, conflicts = 0, pushes = 0;

    void operator+=(const Counters& other) {
        loads += other.loads, stores += other.stores, products += other.products;
        reductions += other.reductions, conflicts += other.conflicts, pushes += other.pushes;
    }
};

// What the time of a phase follows from, of all blocks: bytes that TMA reads from and writes to L2, within the
// matrices, and once where several blocks get them; bytes added there; bytes pushed to other blocks. Of the busiest
// block: bytes through its shared memory, products by their width (16, 64, 128, 256), and how often a consumer looks at
// a barrier.
inline constexpr int kPhases = 4;
struct Traffic {
    long long loaded = 0, stored = 0, added = 0, pushed = 0;
    long long shared = 0, products[4] = {}, waits = 0;

    void add_blocks(const Traffic& other) {
        loaded += other.loaded, stored += other.stored, added += other.added, pushed += other.pushed;
        if (other.shared < shared) return;
        shared = other.shared, waits = other.waits;
        std::copy(other.products, other.products + 4, products);
    }
};

}  // namespace emulator
