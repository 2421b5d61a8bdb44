// The shared-memory tiles and the products of the Hopper kernel as CuTe types: what TMA fills, wgmma reads.
//
// A tile is one or more TMA boxes. Each box has rows of one swizzle width (64 values in 128 bytes, or 16 in 32 bytes
// for the narrow adapter) and its rows follow one another, so that the same bytes can be read with either dimension
// first.
#pragma once

#include <cute/tensor.hpp>
// After tensor.hpp, whose types these use.
#include <cute/atom/mma_atom.hpp>

#include "sm90_tiles.h"

namespace loge::sm90 {

// kProject: the kernel ends with T, of which a block computes kRank columns.
template <class Element_, int kRank, int kAdapter, bool kProject_ = false>
struct Layouts {
    using Element = Element_;
    static constexpr bool kProject = kProject_;
    static_assert(sizeof(Element) == kElementBytes);
    static_assert(kRank == rank_tile(kRank) && kAdapter == adapter_tile(kAdapter) && kRank + kAdapter > 0);
    static constexpr bool kHasRank = kRank > 0;        // dX is computed
    static constexpr bool kHasAdapter = kAdapter > 0;  // there is an adapter

    static constexpr int kRankColumns = kRank;  // of T
    static constexpr int kAdapterColumns = kAdapter;

    using Step = cute::Int<kStep>;
    using Rows = cute::Int<kBlockM>;
    // What is absent has the types of the smallest tile and is never touched.
    using Rank = cute::Int<kHasRank ? kRank : 64>;
    using Adapter = cute::Int<kHasAdapter ? kAdapter : 16>;
    using Wide = cute::SM90::GMMA::Layout_MN_SW128_Atom<Element>;
    using Narrow = cute::SM90::GMMA::Layout_MN_SW32_Atom<Element>;
    using AdapterAtom = std::conditional_t<kAdapter == 64, Wide, Narrow>;  // rows of P fill the swizzle
    using RowAtom = cute::SM90::GMMA::Layout_K_SW128_Atom<Element>;

    template <class Atom, class... Sizes>
    using Tile = decltype(cute::tile_to_shape(Atom{}, cute::Shape<Sizes...>{}));

    // Operands of wgmma, (rows or columns of the product, contracted). The first two are the same bytes.
    using Activation = Tile<RowAtom, cute::_64, Step>;  // dY [64 of 128, 64]: (BM / 2, BN)
    using ActivationP =
        std::conditional_t<kAdapter == 64, Activation,
                           Tile<cute::SM90::GMMA::Layout_K_SW32_Atom<Element>, cute::_64, cute::_16>>;  // T_P
    using ActivationT = Tile<Wide, Step, Rows>;  // dY [128, 64], x [128, 64]: (BN, BM), (BK, BM)
    // Boxes [64, 64] of left, one after the other: the contracted dimension goes first.
    using Left = decltype(cute::tile_to_shape(Wide{}, cute::Shape<Rank, Step>{}, cute::Step<cute::_2, cute::_1>{}));
    using LoraB = Tile<AdapterAtom, Adapter, Step>;     // lora_B [64, P]: (P, BN)
    using Resident = Tile<AdapterAtom, Adapter, Rows>;  // xa [128, P], T_P [128, P]: (P, BM)
    using Right = Tile<Wide, Step, Rank>;               // right [R, 64]: (BK, R)
    using LoraA = Tile<Wide, Step, Adapter>;            // lora_A [P, 64]: (BK, P)

    template <cute::SM90::GMMA::Major kMajorA, int kColumns>
    using Shared = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<kColumns>, Step>,
                                         kMajorA, cute::SM90::GMMA::Major::MN>()));

    // T_R [64, R] and T_P [64, P] of a warpgroup's rows.
    using ProjectRank = Shared<cute::SM90::GMMA::Major::K, Rank::value>;
    using ProjectAdapter = Shared<cute::SM90::GMMA::Major::K, Adapter::value>;
    // dB [64, P] = dY^T xa and dA^T [64, P] = x^T T_P over the slab's 128 rows.
    using Skinny = Shared<cute::SM90::GMMA::Major::MN, Adapter::value>;
    // dX [64, 64] of a warpgroup's rows, T from registers.
    using Expand = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::rs_op_selector<Element, Element, float, cute::Shape<cute::_64, Step, cute::_16>,
                                         cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>()));

    static constexpr SharedMap kMap = shared_map(kRank, kAdapter);
    static_assert(kMap.stages >= 3, "a shallower pipeline does not hide a load's latency");
    static_assert(kMap.bytes <= kMaxSharedBytes);
    static_assert(max_log_splits(kRank, kAdapter) >= 2, "M = 4096 would not fill the card");
    static_assert(kMap.factor % kSharedAlignment == 0 && kMap.adapter % kSharedAlignment == 0 &&
                  kMap.stage_bytes % kSharedAlignment == 0 && kMap.resident % kSharedAlignment == 0 &&
                  kMap.staging % kSharedAlignment == 0);
    static_assert(kElementBytes * cute::cosize_v<ActivationT> == kMap.factor);
    template <class Tile>
    static constexpr bool fills(bool present, int bytes) {
        return bytes == (present ? kElementBytes * cute::cosize_v<Tile> : 0);
    }
    static_assert(fills<Left>(kHasRank, kMap.adapter - kMap.factor));
    static_assert(fills<Right>(kHasRank, kMap.adapter - kMap.factor));
    static_assert(fills<LoraB>(kHasAdapter, kMap.stage_bytes - kMap.adapter));
    static_assert(fills<LoraA>(kHasAdapter, kMap.stage_bytes - kMap.adapter));
    static_assert(fills<Resident>(kHasAdapter, kMap.barriers - kMap.resident));
};

}  // namespace loge::sm90
