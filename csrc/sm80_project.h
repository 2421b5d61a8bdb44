// What one block of the first Ampere launch does: T = dY [left | s lora_B], and dB of the rows that it walks.
//
// The tiles of T, 128 rows each, stand in line with their steps over N, and every block takes an equal share of the
// steps, whatever M is. Of a tile that several blocks share each sums a part, which the last of them adds up. dB of a
// step stays with the block, in memory of its own that it adds to as it comes by again; the second launch adds up what
// the blocks have. The loop is multistage: cp.async fills the tiles of later steps during the products of this one.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm80_arguments.h"
#include "sm80_tiles.h"
#include "sm80_warps.h"

namespace loge::sm80 {

template <DType kType, int kColumns, int kAdapter, class Machine>
class Project {
    using Tiles = ProjectTiles<kColumns, kAdapter>;
    using Grid = typename Tiles::Grid;
    static constexpr int kStepN = Tiles::kStepN;
    static constexpr int kColumnTiles = Tiles::kColumnTiles;

 public:
    LOGE_SM80_DEVICE Project(const Arguments& arguments, std::int64_t block, Machine& machine)
        : a(arguments),
          p(arguments.problem),
          m(machine),
          block_(block),
          lane_(machine.thread() % 32),
          warp_(machine.thread() / 32) {}

    LOGE_SM80_DEVICE void run() {
        const std::int64_t begin = a.project.begin(block_), end = a.project.begin(block_ + 1);
        std::int64_t at = begin;
        while (at < end) {
            const std::int64_t tile = at / a.steps, step = at % a.steps;
            const std::int64_t rest = end - at, left = a.steps - step;
            const int count = static_cast<int>(rest < left ? rest : left);
            walk(tile, step, count, at - begin);
            at += count;
        }
    }

 private:
    // `count` steps of a tile from `step` on. The block has gone `gone` steps before.
    LOGE_SM80_DEVICE void walk(std::int64_t tile, std::int64_t step, int count, std::int64_t gone) {
        row_ = tile % a.slabs * kBlockM;
        column_ = tile / a.slabs * kColumns;
        with_adapter_ = kAdapter > 0 && column_ == 0;
        float t[Tiles::kFragments][4] = {};  // this warp's part of the frozen path, then its strip of the adapter's
        m.sync();                            // every warp has read the last stages of the walk before
        if constexpr (kAdapter > 0)
            if (need_dB()) load_tile<kBlockM, kAdapter>(m, Tiles::kXa, p.xa, p.P, p.M, p.P, row_, 0);
        const int ahead = a.project_stages - 1;
        for (int i = 0; i < ahead; ++i) {
            load(i, step + i, i < count);
            m.commit();
        }
        int stage = 0, next = ahead;
        for (int i = 0; i < count; ++i) {
            m.wait(ahead - 1);
            m.sync();
            load(next, step + i + ahead, i + ahead < count);
            m.commit();
            const int base = Tiles::kFirstStage + stage * Tiles::kStageBytes;
            float sum[kAdapter > 0 ? Tiles::kGradientTiles : 1][4] = {};
            float* const place = dB_place(gone + i);
            if constexpr (kAdapter > 0)
                if (need_dB() && gone + i >= a.steps) recall(place, sum);
            project(base, t);
            if constexpr (kAdapter > 0)
                if (need_dB()) gradient(base + Tiles::kDy, place, sum);
            stage = stage + 1 == a.project_stages ? 0 : stage + 1;
            next = next + 1 == a.project_stages ? 0 : next + 1;
        }
        if (a.rank + a.adapter > 0) finish(tile, count, t);
    }

    LOGE_SM80_DEVICE bool need_dB() const { return with_adapter_ && p.dB != nullptr; }
    LOGE_SM80_DEVICE bool need_tP() const { return with_adapter_ && a.adapter > 0; }

    LOGE_SM80_DEVICE void load(int stage, std::int64_t step, bool wanted) {
        if (!wanted) return;
        const std::int64_t n = step * kStepN;
        const int base = Tiles::kFirstStage + stage * Tiles::kStageBytes;
        load_tile<kBlockM, kStepN>(m, base + Tiles::kDy, p.dy, p.dy_stride, p.M, p.N, row_, n);
        if constexpr (kColumns > 0)
            load_tile<kStepN, kColumns>(m, base + Tiles::kLeft, p.left, p.R, p.N, p.R, n, column_);
        if constexpr (kAdapter > 0)
            if (need_tP()) load_tile<kStepN, kAdapter>(m, base + Tiles::kB, p.lora_B, p.P, p.N, p.P, n, 0);
    }

    // Row of the slab at which this warp's fragment `i` begins. Each warp begins with another one: the strip of 16 rows
    // of which it computes the adapter's part of T.
    LOGE_SM80_DEVICE int strip(int i) const {
        return warp_ / Grid::kAcross * Grid::kRows + 16 * ((i + warp_ % Grid::kAcross) % Grid::kRowTiles);
    }

    // T += dY [left | lora_B] of one step.
    LOGE_SM80_DEVICE void project(int stage, float (&t)[Tiles::kFragments][4]) {
        LOGE_SM80_UNROLL
        for (int k = 0; k < kStepN; k += 16) {
            std::uint32_t dy[Tiles::kRowTiles][4];  // (16, 16) each
            LOGE_SM80_UNROLL
            for (int i = 0; i < Tiles::kRowTiles; ++i)
                fetch<false, kStepN>(m, dy[i], stage + Tiles::kDy, a_corner(lane_), strip(i), k / kChunk);
            if constexpr (kColumns > 0) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kColumnTiles; j += 2) {
                    std::uint32_t left[4];  // (16, 16)
                    fetch<true, kColumns>(m, left, stage + Tiles::kLeft, b_wide_corner(lane_), k,
                                          warp_ % Grid::kAcross * kColumnTiles + j);
                    LOGE_SM80_UNROLL
                    for (int i = 0; i < Tiles::kRowTiles; ++i) {
                        m.template mma<kType>(t[i * kColumnTiles + j], dy[i], left);
                        m.template mma<kType>(t[i * kColumnTiles + j + 1], dy[i], left + 2);
                    }
                }
            }
            if constexpr (kAdapter > 0) {
                if (need_tP()) {
                    LOGE_SM80_UNROLL
                    for (int j = 0; j < kAdapter / 8; j += 2) {
                        std::uint32_t b[4];  // lora_B (16, 16)
                        fetch<true, kAdapter>(m, b, stage + Tiles::kB, b_wide_corner(lane_), k, j);
                        m.template mma<kType>(t[Tiles::kFrozen + j], dy[0], b);
                        m.template mma<kType>(t[Tiles::kFrozen + j + 1], dy[0], b + 2);
                    }
                }
            }
        }
    }

    // Where this lane keeps its part of dB of the block's step number `gone`.
    LOGE_SM80_DEVICE float* dB_place(std::int64_t gone) const {
        if constexpr (kAdapter == 0) return nullptr;
        const std::int64_t step = block_ * a.dB_steps + gone % a.steps;
        const int tile = warp_ % Tiles::kStrips * (kAdapter / 8) + warp_ / Tiles::kStrips * Tiles::kGradientTiles;
        return a.dB_parts + step * (kStepN * kAdapter) + (tile * 32 + lane_) * 4;
    }

    template <class Sum>
    LOGE_SM80_DEVICE void recall(const float* place, Sum& sum) {
        LOGE_SM80_UNROLL
        for (int j = 0; j < Tiles::kGradientTiles; ++j)
            m.read_sums(sum[j], place + 128 * j);
    }

    // dB += dY^T xa of one step, without its scale.
    template <class Sum>
    LOGE_SM80_DEVICE void gradient(int dy, float* place, Sum& sum) {
        const int column = warp_ / Tiles::kStrips * Tiles::kGradientTiles;
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kBlockM; k32 += 32) {
            std::uint32_t b[Tiles::kGradientTiles][4];  // xa (32, 8) per tile
            LOGE_SM80_UNROLL
            for (int j = 0; j < Tiles::kGradientTiles; ++j)
                fetch<true, kAdapter>(m, b[j], Tiles::kXa, b_tall_corner(lane_), k32, column + j);
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                std::uint32_t transposed[4];  // dY^T (16, 16)
                fetch<true, kStepN>(m, transposed, dy, a_transposed_corner(lane_), k32 + 16 * k16,
                                    2 * (warp_ % Tiles::kStrips));
                LOGE_SM80_UNROLL
                for (int j = 0; j < Tiles::kGradientTiles; ++j)
                    m.template mma<kType>(sum[j], transposed, b[j] + 2 * k16);
            }
        }
        LOGE_SM80_UNROLL
        for (int j = 0; j < Tiles::kGradientTiles; ++j)
            m.write_sums(place + 128 * j, sum[j]);
    }

    // T in 16 bits, once all of its steps are summed.
    LOGE_SM80_DEVICE void finish(std::int64_t tile, int count, float (&t)[Tiles::kFragments][4]) {
        if (count < a.steps) {
            const Sharing sharing{a.project.owner(tile * a.steps), a.project.owner((tile + 1) * a.steps - 1), block_};
            if (!add_up(m, t, a.t_parts, sharing, a.t_counters)) return;
        }
        const std::int64_t stride = a.rank + a.adapter;
        if constexpr (kColumns > 0) {
            const std::int64_t column = column_ + warp_ % Grid::kAcross * Grid::kColumns;
            LOGE_SM80_UNROLL
            for (int i = 0; i < Tiles::kRowTiles; ++i) {
                LOGE_SM80_UNROLL
                for (int j = 0; j < kColumnTiles; j += 2)
                    write_rows<kType>(m, a.t, stride, p.M, a.rank, row_ + strip(i), column + 8 * j,
                                      t[i * kColumnTiles + j], t[i * kColumnTiles + j + 1], 1.0f);
            }
        }
        if constexpr (kAdapter > 0) {
            if (!need_tP()) return;
            LOGE_SM80_UNROLL
            for (int j = 0; j < kAdapter / 8; j += 2)
                write_rows<kType>(m, a.t, stride, p.M, stride, row_ + strip(0), a.rank + 8 * j,
                                  t[Tiles::kFrozen + j], t[Tiles::kFrozen + j + 1], p.scaling);
        }
    }

    const Arguments& a;
    const BackwardParams& p;
    Machine& m;
    const std::int64_t block_;
    std::int64_t row_ = 0, column_ = 0;  // of the tile
    bool with_adapter_ = false;          // the tile is the one of its slab that has it
    const int lane_, warp_;
};

}  // namespace loge::sm80
