// What one block of the Ampere backward kernel does with its slab of rows, for any machine.
//
// A Machine is one thread's view of a multiprocessor: sm80_ptx.cuh has the real one, and the tests one that runs on the
// host. Shared memory is addressed in bytes from the block's base.
//
// The block walks N once, reading dY for T and for dB, keeps T in shared memory, and walks K once, writing dX and
// reading x for dA. Both walks are multistage: cp.async fills the tiles of later steps during the products of this one.
#pragma once

#include <cstdint>

#include "params.h"
#include "rounding.h"
#include "sm80_tiles.h"

#ifdef __CUDACC__
#define LOGE_SM80_DEVICE __device__ __forceinline__
#define LOGE_SM80_UNROLL _Pragma("unroll")
#else
#define LOGE_SM80_DEVICE inline
#define LOGE_SM80_UNROLL
#endif

namespace loge::sm80 {

// Columns [column, column + kColumns) of rows [row, row + kRows) of a matrix [rows, columns], into a tile of shared
// memory; zeros beyond the matrix.
template <int kRows, int kColumns, class Machine>
LOGE_SM80_DEVICE void load_tile(Machine& machine, int tile, const void* matrix, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, std::int64_t row, std::int64_t column) {
    constexpr int kChunks = kColumns / kChunk;
    constexpr int kTotal = kRows * kChunks;
    LOGE_SM80_UNROLL
    for (int first = 0; first < kTotal; first += kThreads) {
        const int index = first + machine.thread();
        if (kTotal % kThreads == 0 || index < kTotal) {
            const int i = index / kChunks, j = index % kChunks;
            const bool inside = row + i < rows && column + j * kChunk < columns;
            const std::int64_t element = inside ? (row + i) * stride + column + j * kChunk : 0;
            machine.copy_async(tile + tile_offset<kColumns>(i, j),
                               static_cast<const char*>(matrix) + element * kElementBytes, inside);
        }
    }
}

template <DType kType, int kRank, int kAdapter, class Machine>
class Block {
    using Map = Shared<kRank, kAdapter>;
    static constexpr int kStepK = Map::kStepK;
    static constexpr int kRankTiles = kRank / 32;        // n8 tiles of a warp's part of T [32, kRank / 4]
    static constexpr int kAdapterTiles = kAdapter / 16;  // n8 tiles of a strip's half [16, kAdapter / 2]
    static constexpr int kOutTiles = kStepK / 32;        // n8 tiles of a warp's part of dX [32, kStepK / 4]
    static constexpr int kXTiles = kStepK / 64;          // n8 tiles of a warp's part of dA [kAdapter, kStepK / 8]

 public:
    LOGE_SM80_DEVICE Block(const BackwardParams& problem, std::int64_t slab, Machine& machine)
        : p(problem),
          m(machine),
          slab_(slab),
          row_(slab * kBlockM),
          lane_(machine.thread() % 32),
          warp_(machine.thread() / 32),
          place_(warp_place(warp_)),
          need_dA_(kAdapter > 0 && problem.dA != nullptr),
          need_dB_(kAdapter > 0 && problem.dB != nullptr),
          need_TB_(kAdapter > 0 && (kRank > 0 || problem.dA != nullptr)) {}

    LOGE_SM80_DEVICE void run() {
        walk_N();
        if (kRank > 0 || need_dA_) walk_K();
        if constexpr (kAdapter > 0)
            if (p.finished != nullptr) finish();
    }

 private:
    // A walk of `steps` starts at a step of the slab's own and goes round: otherwise all slabs would add to the same
    // rows of dB, and read the same tile of a factor, at the same time.
    LOGE_SM80_DEVICE void start_walk(std::int64_t size, int step) {
        steps_ = static_cast<int>((size + step - 1) / step);
        shift_ = static_cast<int>(slab_ * steps_ / ((p.M + kBlockM - 1) / kBlockM));
    }
    LOGE_SM80_DEVICE int place(int i) const { return i + shift_ < steps_ ? i + shift_ : i + shift_ - steps_; }

    LOGE_SM80_DEVICE void load_first(int step) {
        if (step >= steps_) return;
        const std::int64_t n = std::int64_t{place(step)} * kStepN;
        const int stage = Map::kFirstStages + step % Map::kFirstCount * Map::kFirstBytes;
        load_tile<kBlockM, kStepN>(m, stage + Map::kDy, p.dy, p.dy_stride, p.M, p.N, row_, n);
        if constexpr (kRank > 0) load_tile<kStepN, kRank>(m, stage + Map::kLeft, p.left, p.R, p.N, p.R, n, 0);
        if constexpr (kAdapter > 0)
            if (need_TB_) load_tile<kStepN, kAdapter>(m, stage + Map::kB, p.lora_B, p.P, p.N, p.P, n, 0);
    }

    // T and dB. T's accumulators are this warp's part of the frozen path and its strip of the adapter's.
    LOGE_SM80_DEVICE void walk_N() {
        float t[2][kRankTiles > 0 ? kRankTiles : 1][4] = {};
        float t_b[kAdapterTiles > 0 ? kAdapterTiles : 1][4] = {};
        if constexpr (kAdapter > 0)
            if (need_dB_) load_tile<kBlockM, kAdapter>(m, Map::kXa, p.xa, p.P, p.M, p.P, row_, 0);
        start_walk(p.N, kStepN);
        LOGE_SM80_UNROLL
        for (int step = 0; step < Map::kFirstCount - 1; ++step) {
            load_first(step);
            m.commit();
        }
        for (int step = 0; step < steps_; ++step) {
            m.template wait<Map::kFirstCount - 2>();
            m.sync();
            load_first(step + Map::kFirstCount - 1);
            m.commit();
            const int stage = Map::kFirstStages + step % Map::kFirstCount * Map::kFirstBytes;
            project(stage, t, t_b);
            if constexpr (kAdapter > 0)
                if (need_dB_) gradient_B(stage + Map::kDy, std::int64_t{place(step)} * kStepN);
        }
        m.template wait<0>();
        m.sync();
        keep(t, t_b);
    }

    // T += dY [left | lora_B] of one step.
    template <class Frozen, class Adapter>
    LOGE_SM80_DEVICE void project(int stage, Frozen& t, Adapter& t_b) {
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kStepN / 32; ++k32) {
            std::uint32_t b_b[kAdapterTiles > 0 ? kAdapterTiles : 1][4];  // lora_B (32, 8) per tile
            if constexpr (kAdapter > 0) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kAdapterTiles; ++j)
                    if (need_TB_)
                        fetch<true, kAdapter>(b_b[j], stage + Map::kB, b_tall_corner(lane_), 32 * k32,
                                              place_.half * kAdapterTiles + j);
            }
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                const int k = 32 * k32 + 16 * k16;
                std::uint32_t a[2][4];  // dY (16, 16) twice
                LOGE_SM80_UNROLL
                for (int i = 0; i < 2; ++i)
                    fetch<false, kStepN>(a[i], stage + Map::kDy, a_corner(lane_), 32 * place_.m + 16 * i, k / kChunk);
                if constexpr (kRank > 0) {
                    LOGE_SM80_UNROLL
                    for (int j = 0; j < kRankTiles; j += 2) {
                        std::uint32_t b[4];  // left (16, 16)
                        fetch<true, kRank>(b, stage + Map::kLeft, b_wide_corner(lane_), k, place_.n * kRankTiles + j);
                        multiply(t, a, b, j);
                    }
                }
                if constexpr (kAdapter > 0) {
                    std::uint32_t strip[4];  // the half of the warp's rows that its strip is
                    LOGE_SM80_UNROLL
                    for (int r = 0; r < 4; ++r)
                        strip[r] = (place_.strip & 1) != 0 ? a[1][r] : a[0][r];
                    LOGE_SM80_UNROLL
                    for (int j = 0; j < kAdapterTiles; ++j)
                        if (need_TB_) m.template mma<kType>(t_b[j], strip, b_b[j] + 2 * k16);
                }
            }
        }
    }

    // dB[n : n + kStepN] of this slab: dY^T xa.
    LOGE_SM80_DEVICE void gradient_B(int dy, std::int64_t n) {
        float sum[kAdapterTiles > 0 ? kAdapterTiles : 1][4] = {};
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kBlockM / 32; ++k32) {
            std::uint32_t b[kAdapterTiles > 0 ? kAdapterTiles : 1][4];  // xa (32, 8) per tile
            LOGE_SM80_UNROLL
            for (int j = 0; j < kAdapterTiles; ++j)
                fetch<true, kAdapter>(b[j], Map::kXa, b_tall_corner(lane_), 32 * k32, place_.half * kAdapterTiles + j);
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                std::uint32_t a[4];  // dY^T (16, 16)
                fetch<true, kStepN>(a, dy, a_transposed_corner(lane_), 32 * k32 + 16 * k16, 2 * place_.n_strip);
                LOGE_SM80_UNROLL
                for (int j = 0; j < kAdapterTiles; ++j)
                    m.template mma<kType>(sum[j], a, b[j] + 2 * k16);
            }
        }
        LOGE_SM80_UNROLL
        for (int j = 0; j < kAdapterTiles; ++j)
            add(p.dB, p.N, p.P, n + 16 * place_.n_strip, place_.half * kAdapter / 2 + 8 * j, sum[j], p.scaling);
    }

    // T to shared memory, rounded to 16 bits; the adapter's part with its scale.
    template <class Frozen, class Adapter>
    LOGE_SM80_DEVICE void keep(const Frozen& t, const Adapter& t_b) {
        if constexpr (kRank > 0) {
            LOGE_SM80_UNROLL
            for (int i = 0; i < 2; ++i) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kRankTiles; ++j)
                    store<kRank>(Map::kT, 32 * place_.m + 16 * i, place_.n * kRankTiles + j, t[i][j], 1.0f);
            }
        }
        if constexpr (kAdapter > 0) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < kAdapterTiles; ++j)
                store<kAdapter>(Map::kTB, 16 * place_.strip, place_.half * kAdapterTiles + j, t_b[j], p.scaling);
        }
    }

    LOGE_SM80_DEVICE void load_second(std::int64_t step) {
        if constexpr (kRank > 0) {
            const int tile = static_cast<int>(step / Map::kSteps), part = static_cast<int>(step % Map::kSteps);
            if (tile >= steps_) return;
            const std::int64_t k = std::int64_t{place(tile)} * kStepK;
            const int stage = Map::kSecondStages + static_cast<int>(step % Map::kSecondCount) * Map::kSecondBytes;
            if (part < Map::kFrozenSteps)
                load_tile<kDepth, kStepK>(m, stage, p.right, p.K, p.R, p.K, part * kDepth, k);
            else if constexpr (kAdapter > 0)
                load_tile<kAdapter, kStepK>(m, stage, p.lora_A, p.K, p.P, p.K, 0, k);
        }
    }

    LOGE_SM80_DEVICE void load_x(int tile) {
        if (need_dA_ && tile < steps_)
            load_tile<kBlockM, kStepK>(m, x_tile(tile), p.x, p.x_stride, p.M, p.K, row_,
                                       std::int64_t{place(tile)} * kStepK);
    }

    LOGE_SM80_DEVICE int x_tile(int tile) const { return Map::kX + (tile & 1) * Map::kXBytes; }

    // dX and dA.
    LOGE_SM80_DEVICE void walk_K() {
        start_walk(p.K, kStepK);
        load_x(0);
        LOGE_SM80_UNROLL
        for (int step = 0; step < Map::kSecondCount - 1; ++step) {
            load_second(step);
            m.commit();
        }
        std::int64_t step = 0;
        for (int tile = 0; tile < steps_; ++tile) {
            const std::int64_t k = std::int64_t{place(tile)} * kStepK;
            float out[2][kOutTiles][4] = {};
            for (int part = 0; part < Map::kSteps; ++part, ++step) {
                m.template wait<Map::kSecondCount - 2>();
                m.sync();
                load_second(step + Map::kSecondCount - 1);
                if (part == 0) load_x(tile + 1);
                m.commit();
                const int stage = Map::kSecondStages + static_cast<int>(step % Map::kSecondCount) * Map::kSecondBytes;
                if constexpr (kRank > 0) {
                    if (part < Map::kFrozenSteps)
                        expand<kRank, kDepth>(Map::kT, part * kDepth / kChunk, stage, out);
                    else if constexpr (kAdapter > 0)
                        expand<kAdapter, kAdapter>(Map::kTB, 0, stage, out);
                }
            }
            if constexpr (kAdapter > 0)
                if (need_dA_) gradient_A(x_tile(tile), k);
            if constexpr (kRank > 0) write_dx(x_tile(tile), k, out);
        }
    }

    // dX += T[:, part] [right ; lora_A][part] for kCount rows of the latter.
    template <int kColumns, int kCount, class Out>
    LOGE_SM80_DEVICE void expand(int t, int chunk, int stage, Out& out) {
        LOGE_SM80_UNROLL
        for (int k = 0; k < kCount; k += 16) {
            std::uint32_t a[2][4];  // T (16, 16) twice
            LOGE_SM80_UNROLL
            for (int i = 0; i < 2; ++i)
                fetch<false, kColumns>(a[i], t, a_corner(lane_), 32 * place_.m + 16 * i, chunk + k / kChunk);
            LOGE_SM80_UNROLL
            for (int j = 0; j < kOutTiles; j += 2) {
                std::uint32_t b[4];  // right or lora_A (16, 16)
                fetch<true, kStepK>(b, stage, b_wide_corner(lane_), k, place_.n * kOutTiles + j);
                multiply(out, a, b, j);
            }
        }
    }

    // dA[:, k : k + kStepK] of this slab: T_B^T x.
    LOGE_SM80_DEVICE void gradient_A(int x, std::int64_t k) {
        float sum[kAdapter > 0 ? kAdapter / 16 : 1][kXTiles][4] = {};
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kBlockM / 32; ++k32) {
            std::uint32_t b[kXTiles][4];  // x (32, 8) per tile
            LOGE_SM80_UNROLL
            for (int j = 0; j < kXTiles; ++j)
                fetch<true, kStepK>(b[j], x, b_tall_corner(lane_), 32 * k32, warp_ * kXTiles + j);
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                LOGE_SM80_UNROLL
                for (int i = 0; i < kAdapter / 16; ++i) {
                    std::uint32_t a[4];  // T_B^T (16, 16)
                    fetch<true, kAdapter>(a, Map::kTB, a_transposed_corner(lane_), 32 * k32 + 16 * k16, 2 * i);
                    LOGE_SM80_UNROLL
                    for (int j = 0; j < kXTiles; ++j)
                        m.template mma<kType>(sum[i][j], a, b[j] + 2 * k16);
                }
            }
        }
        LOGE_SM80_UNROLL
        for (int i = 0; i < kAdapter / 16; ++i) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < kXTiles; ++j)
                add(p.dA, p.P, p.K, 16 * i, k + 8 * (warp_ * kXTiles + j), sum[i][j], 1.0f);
        }
    }

    // dX's tile through the tile of x it is done with, so that it leaves in rows of 16 bytes.
    template <class Out>
    LOGE_SM80_DEVICE void write_dx(int tile, std::int64_t k, const Out& out) {
        if (need_dA_) m.sync();  // every warp has read x
        LOGE_SM80_UNROLL
        for (int i = 0; i < 2; ++i) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < kOutTiles; ++j)
                store<kStepK>(tile, 32 * place_.m + 16 * i, place_.n * kOutTiles + j, out[i][j], 1.0f);
        }
        m.sync();
        constexpr int kChunks = kStepK / kChunk;
        LOGE_SM80_UNROLL
        for (int first = 0; first < kBlockM * kChunks; first += kThreads) {
            const int index = first + m.thread();
            const int i = index / kChunks, j = index % kChunks;
            if (row_ + i < p.M && k + j * kChunk < p.K)
                m.copy_out(static_cast<char*>(p.dx) + ((row_ + i) * p.K + k + j * kChunk) * kElementBytes,
                           tile + tile_offset<kStepK>(i, j));
        }
    }

    // Columns [8 j, 8 j + 16) of C [32, .] += A [32, 16] B [16, 16].
    template <class C>
    LOGE_SM80_DEVICE void multiply(C& c, const std::uint32_t (&a)[2][4], const std::uint32_t (&b)[4], int j) {
        LOGE_SM80_UNROLL
        for (int i = 0; i < 2; ++i) {
            m.template mma<kType>(c[i][j], a[i], b);
            m.template mma<kType>(c[i][j + 1], a[i], b + 2);
        }
    }

    // Four 8x8 matrices of a tile, `row` rows and `chunk` chunks from its corner.
    template <bool kTranspose, int kColumns>
    LOGE_SM80_DEVICE void fetch(std::uint32_t (&registers)[4], int tile, Corner corner, int row, int chunk) {
        m.template ldmatrix<kTranspose>(registers,
                                        tile + tile_offset<kColumns>(row + corner.row, chunk + corner.chunk));
    }

    // Accumulators C [16, 8], scaled and rounded, to `row` and `chunk` of a tile.
    template <int kColumns>
    LOGE_SM80_DEVICE void store(int tile, int row, int chunk, const float (&c)[4], float scale) {
        LOGE_SM80_UNROLL
        for (int half = 0; half < 2; ++half)
            m.store(
                tile + tile_offset<kColumns>(row + 8 * half + c_row(lane_), chunk) + c_column(lane_) * kElementBytes,
                m.template pack<kType>(scale * c[2 * half], scale * c[2 * half + 1]));
    }

    // The block that comes here last rounds the sums; see rounding.h.
    LOGE_SM80_DEVICE void finish() {
        m.sync();
        const int thread = m.thread_anew();
        const auto slabs = static_cast<unsigned>((p.M + kBlockM - 1) / kBlockM);
        const bool last = thread == 0 && m.count(p.finished) == slabs - 1;
        if (!m.any(last)) return;
        round(p.dA, p.dA_rounded, p.P * p.K, thread);
        round(p.dB, p.dB_rounded, p.N * p.P, thread);
    }

    LOGE_SM80_DEVICE void round(const float* sums, void* rounded, std::int64_t count, int thread) {
        if (rounded == nullptr) return;
        // N, K and P are multiples of 8: eight rows of an eighth each.
        for_each_quad<kThreads, 4>(
            thread, 8, count / 8, count / 8, [&](std::int64_t at, float (&v)[4]) { m.read_sums(v, sums + at); },
            [&](std::int64_t at, const float (&v)[4]) {
                m.write_words(static_cast<char*>(rounded) + at * kElementBytes, m.template pack<kType>(v[0], v[1]),
                              m.template pack<kType>(v[2], v[3]));
            });
    }

    // Accumulators C [16, 8], scaled, to `row` and `column` of a gradient [rows, columns]: onto what is there, or as
    // this slab's own part.
    LOGE_SM80_DEVICE void add(float* gradient, std::int64_t rows, std::int64_t columns, std::int64_t row,
                              std::int64_t column, const float (&c)[4], float scale) {
        LOGE_SM80_UNROLL
        for (int half = 0; half < 2; ++half) {
            const std::int64_t i = row + 8 * half + c_row(lane_), j = column + c_column(lane_);
            if (i >= rows || j >= columns) continue;
            if (p.deterministic)
                m.write_pair(gradient + slab_ * p.slab_stride + i * columns + j, scale * c[2 * half],
                             scale * c[2 * half + 1]);
            else
                m.add_pair(gradient + i * columns + j, scale * c[2 * half], scale * c[2 * half + 1]);
        }
    }

    const BackwardParams& p;
    Machine& m;
    const std::int64_t slab_, row_;
    int steps_ = 0, shift_ = 0;  // of the walk
    const int lane_, warp_;
    const WarpPlace place_;
    const bool need_dA_, need_dB_, need_TB_;
};

}  // namespace loge::sm80
