// What one block of the second Ampere launch does: dX = T [right ; lora_A], dA = T_P^T x, and the end of dB.
//
// A block owns columns of dX and walks slabs of rows: the factors' columns stay in shared memory, and dA of them in
// registers. The slabs of all columns stand in line, and every block takes an equal share; where several share the
// slabs of some columns, the last of them adds up their parts of dA.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm80_arguments.h"
#include "sm80_tiles.h"
#include "sm80_warps.h"

namespace loge::sm80 {

template <DType kType, int kWidth, int kAdapter, class Machine>
class Expand {
    using Tiles = ExpandTiles<kWidth, kAdapter>;
    using Grid = typename Tiles::Grid;
    static constexpr int kDepth = Tiles::kDepth;
    static constexpr int kRowTiles = Grid::kRowTiles;
    static constexpr int kColumnTiles = Grid::kColumnTiles;
    using Out = float[kRowTiles][kColumnTiles][4];
    using Gradient = float[kAdapter > 0 ? Tiles::kFragments : 1][4];

 public:
    LOGE_SM80_DEVICE Expand(const Arguments& arguments, int block, Machine& machine)
        : a(arguments),
          p(arguments.problem),
          m(machine),
          block_(block),
          lane_(machine.thread() & 31),
          warp_(static_cast<unsigned>(machine.thread()) / 32),
          stages_(arguments.expand_stages),
          depth_(arguments.rank > 0 ? arguments.rank + arguments.adapter : 0),
          // x of the next slab is asked for at the second part of a slab and must be there at its first: `stages`
          // parts later, as every load.
          parts_(depth_ > stages_ * kDepth ? (depth_ + kDepth - 1) / kDepth : stages_),
          factors_(Tiles::kFirstStage + stages_ * Tiles::kStageBytes) {}

    LOGE_SM80_DEVICE void run() {
        if constexpr (kAdapter > 0)
            if (p.dB != nullptr) add_up_dB();
        const std::int64_t begin = a.expand.begin(block_);
        int column = static_cast<int>(begin / a.expand_slabs), slab = static_cast<int>(begin % a.expand_slabs);
        for (;;) {
            const std::int64_t rest = a.expand.begin(block_ + 1) - (std::int64_t{column} * a.expand_slabs + slab);
            if (rest <= 0) return;
            const int left = a.expand_slabs - slab;
            walk(column, slab, rest < left ? static_cast<int>(rest) : left);
            ++column, slab = 0;
        }
    }

 private:
    // `count` slabs of columns [kWidth * column, .. + kWidth) from `slab` on.
    LOGE_SM80_DEVICE void walk(int column, int slab, int count) {
        column_ = std::int64_t{column} * kWidth;
        slab_ = slab, end_ = slab + count;
        Gradient dA = {};
        m.sync();  // every warp has read the last stages of the walk before
        load_factors();
        load_x(slab);
        int next_slab = slab, next_part = 0;  // of the loads that are ahead of the products
        for (int i = 0; i < stages_ - 1; ++i) {
            load_t(i, next_slab, next_part);
            m.commit();
            advance(next_slab, next_part);
        }
        int stage = 0;
        for (; slab_ < end_; ++slab_) {
            Out out = {};
            for (int part = 0; part < parts_; ++part) {
                m.wait(stages_ - 2);
                m.sync();
                load_t(stage == 0 ? stages_ - 1 : stage - 1, next_slab, next_part);
                advance(next_slab, next_part);
                if (part == 1) load_x(slab_ + 1);
                m.commit();
                if constexpr (kAdapter > 0)
                    if (part == 0 && p.dA != nullptr) gradient(dA);
                expand(Tiles::kFirstStage + stage * Tiles::kStageBytes, part * kDepth, out);
                stage = stage + 1 == stages_ ? 0 : stage + 1;
            }
            if (p.dx != nullptr) write_dx(out);
        }
        if constexpr (kAdapter > 0)
            if (p.dA != nullptr) finish(column, count, dA);
    }

    LOGE_SM80_DEVICE void advance(int& slab, int& part) const {
        part = part + 1 == parts_ ? 0 : part + 1;
        slab += part == 0;
    }

    // Columns of [right ; lora_A], and zeros below them: the products take 16 rows at a time.
    LOGE_SM80_DEVICE void load_factors() {
        constexpr int kChunks = kWidth / kChunk;
        const int total = (depth_ + 15) / 16 * 16 * kChunks;
        for (int index = m.thread(); index < total; index += kThreads) {
            const int i = index / kChunks, j = index % kChunks;
            const std::int64_t k = column_ + j * kChunk;
            const bool inside = i < depth_ && k < p.K;
            const bool frozen = i < a.rank || !inside;
            const std::int64_t element = inside ? (frozen ? i : i - a.rank) * p.K + k : 0;
            m.template copy_async<false>(
                factors_ + tile_offset<kWidth>(i, j),
                static_cast<const char*>(frozen ? p.right : p.lora_A) + element * kElementBytes, inside);
        }
    }

    LOGE_SM80_DEVICE void load_t(int stage, int slab, int part) {
        if (slab < end_ && part * kDepth < depth_)
            load_tile<kBlockM, kDepth>(m, Tiles::kFirstStage + stage * Tiles::kStageBytes, a.t, a.rank + a.adapter, p.M,
                                       depth_, std::int64_t{slab} * kBlockM, part * kDepth);
    }

    LOGE_SM80_DEVICE void load_x(int slab) {
        if constexpr (kAdapter > 0) {
            if (p.dA == nullptr || slab >= end_) return;
            const std::int64_t row = std::int64_t{slab} * kBlockM, stride = a.rank + a.adapter;
            load_tile<kBlockM, kWidth, true>(m, Tiles::kX, p.x, p.x_stride, p.M, p.K, row, column_);
            load_tile<kBlockM, kAdapter>(m, Tiles::kTP, a.t, stride, p.M, stride, row, a.rank);
        }
    }

    // dX += T [right ; lora_A] of kDepth columns of T, or of as many of 16 as there are.
    LOGE_SM80_DEVICE void expand(int t, int from, Out& out) {
        if (from + kDepth <= depth_) {
            LOGE_SM80_UNROLL
            for (int k = 0; k < kDepth; k += 16)
                multiply(t, k, from + k, out);
        } else {
            for (int k = 0; from + k < depth_; k += 16)
                multiply(t, k, from + k, out);
        }
    }

    LOGE_SM80_DEVICE void multiply(int t, int k, int row, Out& out) {
        const int rows = fragment<kDepth>(t, a_corner(lane_), warp_ / Grid::kAcross * Grid::kRows, 0);
        const int columns = fragment<kWidth>(factors_, b_wide_corner(lane_), 0, warp_ % Grid::kAcross * kColumnTiles);
        std::uint32_t of_t[kRowTiles][4];  // (16, 16) each
        LOGE_SM80_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
            m.template ldmatrix<false>(of_t[i], below<kDepth>(beside(rows, k / kChunk), 16 * i));
        LOGE_SM80_UNROLL
        for (int j = 0; j < kColumnTiles; j += 2) {
            std::uint32_t b[4];  // right or lora_A (16, 16)
            m.template ldmatrix<true>(b, below<kWidth>(beside(columns, j), row));
            LOGE_SM80_UNROLL
            for (int i = 0; i < kRowTiles; ++i) {
                m.template mma<kType>(out[i][j], of_t[i], b);
                m.template mma<kType>(out[i][j + 1], of_t[i], b + 2);
            }
        }
    }

    // dA += T_P^T x of one slab.
    LOGE_SM80_DEVICE void gradient(Gradient& dA) {
        const int rows = fragment<kAdapter>(Tiles::kTP, a_transposed_corner(lane_), 0, 0);
        const int columns = fragment<kWidth>(Tiles::kX, b_tall_corner(lane_), 0, warp_ * Tiles::kXTiles);
        LOGE_SM80_UNROLL
        for (int k32 = 0; k32 < kBlockM; k32 += 32) {
            std::uint32_t b[Tiles::kXTiles][4];  // x (32, 8) per tile
            LOGE_SM80_UNROLL
            for (int j = 0; j < Tiles::kXTiles; ++j)
                m.template ldmatrix<true>(b[j], below<kWidth>(beside(columns, j), k32));
            LOGE_SM80_UNROLL
            for (int k16 = 0; k16 < 2; ++k16) {
                LOGE_SM80_UNROLL
                for (int i = 0; i < kAdapter / 16; ++i) {
                    std::uint32_t transposed[4];  // T_P^T (16, 16)
                    m.template ldmatrix<true>(transposed, below<kAdapter>(beside(rows, 2 * i), k32 + 16 * k16));
                    LOGE_SM80_UNROLL
                    for (int j = 0; j < Tiles::kXTiles; ++j)
                        m.template mma<kType>(dA[i * Tiles::kXTiles + j], transposed, b[j] + 2 * k16);
                }
            }
        }
    }

    LOGE_SM80_DEVICE void write_dx(const Out& out) {
        LOGE_SM80_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < kColumnTiles; j += 2)
                write_rows<kType>(m, p.dx, p.K, p.M, p.K,
                                  std::int64_t{slab_} * kBlockM + warp_ / Grid::kAcross * Grid::kRows + 16 * i,
                                  column_ + warp_ % Grid::kAcross * Grid::kColumns + 8 * j, lane_, out[i][j],
                                  out[i][j + 1], 1.0f);
        }
    }

    LOGE_SM80_DEVICE void finish(std::int64_t column, int count, Gradient& dA) {
        if (count < a.expand_slabs) {
            const Sharing sharing{a.expand.owner(column * a.expand_slabs),
                                  a.expand.owner((column + 1) * a.expand_slabs - 1), block_};
            if (!add_up(m, dA, a.dA_parts, sharing, a.dA_counters)) return;
        }
        LOGE_SM80_UNROLL
        for (int i = 0; i < kAdapter / 16; ++i) {
            LOGE_SM80_UNROLL
            for (int j = 0; j < Tiles::kXTiles; ++j)
                write_gradient<kType>(m, p.dA, p.dA_rounded, p.P, p.K, 16 * i,
                                      column_ + 8 * (warp_ * Tiles::kXTiles + j), lane_, dA[i * Tiles::kXTiles + j],
                                      1.0f);
        }
    }

    // dB = s times the sum of what the blocks of the first launch have kept, in their order. Four values at a time, as
    // they lay in C [16, 8]: all blocks of this launch take their share.
    LOGE_SM80_DEVICE void add_up_dB() {
        const int tiles = p.P / 8, fragments = a.step_n / 16 * tiles;  // of a row of them, and of a step
        const std::int64_t total = std::int64_t{a.steps} * fragments * 32;
        for (std::int64_t index = std::int64_t{block_} * kThreads + m.thread(); index < total;
             index += a.expand.blocks * kThreads) {
            const int step = static_cast<int>(index / (fragments * 32));
            const int rest = static_cast<int>(index % (fragments * 32)), fragment = rest / 32;
            float sum[4];
            add_up_step(step, a.dB_parts + rest * 4, std::int64_t{fragments} * 128, sum);
            write_gradient<kType>(m, p.dB, p.dB_rounded, p.N, p.P,
                                  std::int64_t{step} * a.step_n + fragment / tiles * 16, fragment % tiles * 8,
                                  rest % 32, sum, p.scaling);
        }
    }

    // The sum over the blocks that have come by `step` of N: each keeps its steps, `size` elements each, in the order
    // of its share.
    LOGE_SM80_DEVICE void add_up_step(int step, const float* parts, std::int64_t size, float (&sum)[4]) {
        constexpr int kInFlight = 8;
        const std::int64_t each = a.project.each, limit = std::int64_t{a.project_slabs} * a.steps;
        const int more = a.project.more;
        const int round = static_cast<int>(each % a.steps), round_more = static_cast<int>((each + 1) % a.steps);
        std::int64_t begin = 0;  // of the block's share
        int begin_step = 0;      // of N
        LOGE_SM80_UNROLL
        for (int r = 0; r < 4; ++r)
            sum[r] = 0.0f;
        for (int first = 0; first < a.dB_blocks; first += kInFlight) {
            float v[kInFlight][4] = {};
            LOGE_SM80_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
                const int block = first + i;
                const std::int64_t share = each + (block < more);
                const int after = step - begin_step + (step < begin_step ? a.steps : 0);
                if (block < a.dB_blocks && after < share && begin + after < limit)
                    m.read_sums(v[i], parts + (std::int64_t{block} * a.dB_steps + after) * size);
                begin += share;
                begin_step += block < more ? round_more : round;
                begin_step -= begin_step < a.steps ? 0 : a.steps;
            }
            LOGE_SM80_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
                LOGE_SM80_UNROLL
                for (int r = 0; r < 4; ++r)
                    sum[r] += v[i][r];
            }
        }
    }

    const Arguments& a;
    const BackwardParams& p;
    Machine& m;
    const int block_, lane_;
    const unsigned warp_;
    const int stages_;
    const int depth_, parts_;  // columns of T that dX takes, and the steps of a slab
    const int factors_;        // where they lie
    std::int64_t column_ = 0;
    int slab_ = 0, end_ = 0;
};

}  // namespace loge::sm80
