// What one block of the first Ampere launch does: T = dY [left | s lora_B], and dB of the rows that it walks.
//
// The tiles of T stand in line with their steps over N, and every block takes an equal share of the steps, whatever M
// is. Of a tile that several blocks share each sums a part, which the last of them adds up. dB of a step stays with the
// block, in memory of its own that it adds to as it comes by again; the second launch adds up what the blocks have. The
// loop is multistage: cp.async fills the tiles of later steps during the products of this one.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm80_arguments.h"
#include "sm80_tiles.h"
#include "sm80_warps.h"

namespace loge::sm80 {

template <DType kType, int kRows, int kColumns, int kAdapter, class Machine>
class Project {
    using Tiles = ProjectTiles<kRows, kColumns, kAdapter>;
    using Grid = typename Tiles::Grid;
    static constexpr int kStepN = Tiles::kStepN;
    static constexpr int kRowTiles = Grid::kRowTiles, kColumnTiles = Grid::kColumnTiles;

 public:
    LOGE_SM80_DEVICE Project(const Arguments& arguments, int block, Machine& machine)
        : a(arguments),
          p(arguments.problem),
          m(machine),
          block_(block),
          lane_(machine.thread() & 31),
          warp_(static_cast<unsigned>(machine.thread()) / 32) {}

    LOGE_SM80_DEVICE void run() {
        const std::int64_t begin = a.project.begin(block_);
        int tile = static_cast<int>(begin / a.steps), step = static_cast<int>(begin % a.steps);
        for (;;) {
            const std::int64_t rest = a.project.begin(block_ + 1) - (std::int64_t{tile} * a.steps + step);
            if (rest <= 0) return;
            const int left = a.steps - step;
            walk(tile, step, rest < left ? static_cast<int>(rest) : left);
            ++tile, step = 0;
        }
    }

 private:
    // `count` steps of a tile from `step` on.
    LOGE_SM80_DEVICE void walk(int tile, int step, int count) {
        slab_ = tile % a.project_slabs;
        column_ = tile / a.project_slabs * kColumns;
        float t[Tiles::kFragments][4] = {};  // this warp's part of the frozen path, then its strip of the adapter's
        m.sync();                            // every warp has read the last stages of the walk before
        if constexpr (kAdapter > 0)
            if (need_dB()) load_tile<kRows, kAdapter>(m, Tiles::kXa, p.xa, p.P, p.M, p.P, row(), 0);
        const int ahead = a.project_stages - 1;
        for (int i = 0; i < ahead; ++i) {
            load(i, step + i, i < count);
            m.commit();
        }
        int stage = 0;
        for (int i = 0; i < count; ++i) {
            m.wait(ahead - 1);
            m.sync();
            load(stage == 0 ? ahead : stage - 1, step + i + ahead, i + ahead < count);
            m.commit();
            const int base = Tiles::kFirstStage + stage * Tiles::kStageBytes;
            if (need_tP())
                project<true>(base, t);
            else if constexpr (kColumns > 0)
                project<false>(base, t);
            if constexpr (kAdapter > 0)
                if (need_dB()) gradient(base + Tiles::kDy);
            stage = stage == ahead ? 0 : stage + 1;
        }
        if (a.rank + a.adapter > 0) finish(tile, count, t);
    }

    // Of the tile: the first of its slab has what is the adapter's.
    LOGE_SM80_DEVICE bool need_dB() const { return kAdapter > 0 && column_ == 0 && p.dB != nullptr; }
    LOGE_SM80_DEVICE bool need_tP() const { return kAdapter > 0 && column_ == 0 && a.adapter > 0; }

    LOGE_SM80_DEVICE std::int64_t row() const { return std::int64_t{slab_} * kRows; }

    LOGE_SM80_DEVICE void load(int stage, int step, bool wanted) {
        if (!wanted) return;
        const std::int64_t n = std::int64_t{step} * kStepN;
        const int base = Tiles::kFirstStage + stage * Tiles::kStageBytes;
        load_tile<kRows, kStepN, true>(m, base + Tiles::kDy, p.dy, p.dy_stride, p.M, p.N, row(), n);
        if constexpr (kColumns > 0)
            load_tile<kStepN, kColumns>(m, base + Tiles::kLeft, p.left, p.R, p.N, p.R, n, column_);
        if constexpr (kAdapter > 0)
            if (need_tP()) load_tile<kStepN, kAdapter>(m, base + Tiles::kB, p.lora_B, p.P, p.N, p.P, n, 0);
    }

    // Row of the slab at which a warp's fragment `i` begins. Each warp begins with others: the strips of 16 rows of
    // which it computes the adapter's part of T.
    static LOGE_SM80_DEVICE int strip(unsigned warp, int i) {
        return warp / Grid::kAcross * Grid::kRows + 16 * ((i + warp % Grid::kAcross * Tiles::kOwn) % kRowTiles);
    }

    // Where the adapter's part of a warp's own strip lies among its fragments.
    static constexpr LOGE_SM80_DEVICE int own(int i, int j) { return Tiles::kFrozen + i * (kAdapter / 8) + j; }

    // T += dY [left | lora_B] of one step.
    template <bool kWithAdapter>
    LOGE_SM80_DEVICE void project(int stage, float (&t)[Tiles::kFragments][4]) {
        int rows[kRowTiles];
        LOGE_SM80_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
            rows[i] = fragment<kStepN>(stage + Tiles::kDy, a_corner(lane_), strip(warp_, i), 0);
        LOGE_SM80_UNROLL
        for (int k = 0; k < kStepN; k += 16) {
            std::uint32_t dy[kRowTiles][4];  // (16, 16) each
            LOGE_SM80_UNROLL
            for (int i = 0; i < kRowTiles; ++i)
                m.template ldmatrix<false>(dy[i], beside(rows[i], k / kChunk));
            if constexpr (kColumns > 0) {
                const int columns = fragment<kColumns>(stage + Tiles::kLeft, b_wide_corner(lane_), 0,
                                                       warp_ % Grid::kAcross * kColumnTiles);
                LOGE_SM80_UNROLL
                for (int j = 0; j < kColumnTiles; j += 2) {
                    std::uint32_t left[4];  // (16, 16)
                    m.template ldmatrix<true>(left, below<kColumns>(beside(columns, j), k));
                    LOGE_SM80_UNROLL
                    for (int i = 0; i < kRowTiles; ++i) {
                        m.template mma<kType>(t[i * kColumnTiles + j], dy[i], left);
                        m.template mma<kType>(t[i * kColumnTiles + j + 1], dy[i], left + 2);
                    }
                }
            }
            if constexpr (kAdapter > 0 && kWithAdapter) {
                const int columns = fragment<kAdapter>(stage + Tiles::kB, b_wide_corner(lane_), 0, 0);
                LOGE_SM80_UNROLL
                for (int j = 0; j < kAdapter / 8; j += 2) {
                    std::uint32_t b[4];  // lora_B (16, 16)
                    m.template ldmatrix<true>(b, below<kAdapter>(beside(columns, j), k));
                    LOGE_SM80_UNROLL
                    for (int i = 0; i < Tiles::kOwn; ++i) {
                        m.template mma<kType>(t[own(i, j)], dy[i], b);
                        m.template mma<kType>(t[own(i, j + 1)], dy[i], b + 2);
                    }
                }
            }
        }
    }

    // dB += dY^T xa of one step, without its scale: onto what the block has of these rows of dB already. It keeps them
    // in the order of its share.
    LOGE_SM80_DEVICE void gradient(int dy) {
        const int first = warp_ / Tiles::kStrips * Tiles::kGradientTiles, tiles = p.P / 8;  // of the columns
        float* const place = a.dB_parts + (std::int64_t{block_} * a.dB_steps + kept_) * (kStepN * p.P) +
                             ((warp_ % Tiles::kStrips * tiles + first) * 32 + lane_) * 4;
        float before[Tiles::kGradientTiles][4] = {}, sum[Tiles::kGradientTiles][4] = {};
        if (again_) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < Tiles::kGradientTiles; ++j)
                if (first + j < tiles) m.read_sums(before[j], place + 128 * j);
        }
        const int rows = fragment<kStepN>(dy, a_transposed_corner(lane_), 0, 2 * (warp_ % Tiles::kStrips));
        const int columns =
            fragment<kAdapter>(Tiles::kXa, b_tall_corner(lane_), 0, warp_ / Tiles::kStrips * Tiles::kGradientTiles);
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kRows; k32 += 32) {
            std::uint32_t b[Tiles::kGradientTiles][4];  // xa (32, 8) per tile
            LOGE_SM80_UNROLL
            for (int j = 0; j < Tiles::kGradientTiles; ++j)
                m.template ldmatrix<true>(b[j], below<kAdapter>(beside(columns, j), k32));
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                std::uint32_t transposed[4];  // dY^T (16, 16)
                m.template ldmatrix<true>(transposed, below<kStepN>(rows, k32 + 16 * k16));
                LOGE_SM80_UNROLL
                for (int j = 0; j < Tiles::kGradientTiles; ++j)
                    m.template mma<kType>(sum[j], transposed, b[j] + 2 * k16);
            }
        }
        LOGE_SM80_UNROLL
        for (int j = 0; j < Tiles::kGradientTiles; ++j) {
            LOGE_SM80_UNROLL
            for (int r = 0; r < 4; ++r)
                sum[j][r] += before[j][r];
            if (first + j < tiles) m.write_sums(place + 128 * j, sum[j]);
        }
        again_ |= kept_ + 1 == a.steps;
        kept_ = kept_ + 1 == a.steps ? 0 : kept_ + 1;
    }

    // T in 16 bits, once all of its steps are summed.
    LOGE_SM80_DEVICE void finish(std::int64_t tile, int count, float (&t)[Tiles::kFragments][4]) {
        if (count < a.steps) {
            const Sharing sharing{a.project.owner(tile * a.steps), a.project.owner((tile + 1) * a.steps - 1), block_};
            if (!add_up(m, t, a.t_parts, sharing, a.t_counters)) return;
        }
        const int thread = m.thread_anew(), lane = thread & 31, stride = a.rank + a.adapter;
        const unsigned warp = static_cast<unsigned>(thread) / 32;
        if constexpr (kColumns > 0) {
            const int column = column_ + warp % Grid::kAcross * Grid::kColumns;
            LOGE_SM80_UNROLL
            for (int i = 0; i < kRowTiles; ++i) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kColumnTiles; j += 2)
                    write_rows<kType>(m, a.t, stride, p.M, a.rank, row() + strip(warp, i), column + 8 * j, lane,
                                      t[i * kColumnTiles + j], t[i * kColumnTiles + j + 1], 1.0f);
            }
        }
        if constexpr (kAdapter > 0) {
            if (!need_tP()) return;
            LOGE_SM80_UNROLL
            for (int i = 0; i < Tiles::kOwn; ++i) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kAdapter / 8; j += 2)
                    write_rows<kType>(m, a.t, stride, p.M, stride, row() + strip(warp, i), a.rank + 8 * j, lane,
                                      t[own(i, j)], t[own(i, j + 1)], p.scaling);
            }
        }
    }

    const Arguments& a;
    const BackwardParams& p;
    Machine& m;
    const int block_, lane_;
    const unsigned warp_;
    int slab_ = 0, column_ = 0;  // of the tile
    int kept_ = 0;               // steps of dB, since N was begun anew
    bool again_ = false;         // the block has come round to the step that it began with
};

}  // namespace loge::sm80
