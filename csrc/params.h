// What travels between the binding and a kernel: plain structs, no torch, no Python, no CUDA header.
//
// Names are those of loge_kernels/backend/reference.py: M tokens, N out features, K in features, R factor rank, P
// adapter rank.
//
//     T  = dY [left | s B]        [M, R + P]
//     dX = T [right ; A]          [M, K]
//     dA = (s dY B)^T x           [P, K]
//     dB = s dY^T xa              [N, P]
#pragma once

#include <cstdint>

namespace loge {

enum class DType : std::int32_t { kFloat16 = 0, kBFloat16 = 1 };

inline constexpr std::int64_t kMaxRank = 512;
inline constexpr std::int64_t kMaxAdapter = 64;
// What TMA, cp.async and vector stores move at a time; every row of every operand starts on such a boundary.
inline constexpr std::int64_t kAlignmentBytes = 16;

// One backward problem. 16-bit operands share `dtype`; unit stride along the last dimension. Pointers on one device;
// null where the gradients asked for (the output pointers that are not null) do not read them.
struct BackwardParams {
    const void* dy;      // [M, N], rows dy_stride elements apart
    const void* x;       // [M, K], rows x_stride elements apart; for dA
    const void* xa;      // [M, P], contiguous; for dB
    const void* left;    // [N, R], contiguous; for dX
    const void* right;   // [R, K], contiguous; for dX
    const void* lora_A;  // [P, K], contiguous; for dX, null without an adapter
    const void* lora_B;  // [N, P], contiguous; for dX and dA, null without an adapter
    void* dx;            // [M, K], contiguous, or null
    // fp32 sums, contiguous. The slabs add to zeros by atomics; with `deterministic` each slab stores a part of its
    // own, slab_stride elements behind the one before, for the caller to add up in a fixed order.
    float* dA;  // [P, K], or null
    float* dB;  // [N, P], or null
    // The sums rounded to `dtype`, by the last block that adds to them; null: the sums are the result.
    void* dA_rounded;          // [P, K]
    void* dB_rounded;          // [N, P]
    unsigned* finished;        // zeros, one for each part of N and K: slabs that have added; null: nothing is rounded
    void* scratch;             // of a plan that has some
    std::int64_t slab_stride;  // 0 unless deterministic
    std::int64_t M, N, K;
    std::int64_t dy_stride, x_stride;
    std::int32_t R, P;  // multiples of 8; P = 0 without an adapter
    float scaling;
    DType dtype;
    bool deterministic;
};

// Of a workspace when deterministic: it grows with the rows, and nobody expects gradients of a few MB to need GBs.
inline constexpr std::int64_t kMaxWorkspaceBytes = std::int64_t{256} << 20;
// Of what blocks keep of sums that they share: it grows with N and P, and with the rows only up to some.
inline constexpr std::int64_t kMaxPartsBytes = std::int64_t{512} << 20;
inline constexpr int kMaxCluster = 8;  // the largest size that every Hopper part supports

// How a problem is cut: decided on the host by arithmetic alone, so that it can be shown and tested without a GPU.
struct Plan {
    std::int32_t block_m;       // rows of a slab
    std::int32_t block_n;       // columns of dY per step of the first product
    std::int32_t block_k;       // columns of dX per step of the second
    std::int32_t cluster;       // blocks that work together
    std::int32_t rows;          // slabs that they share; of the cluster / rows blocks of a slab each takes a part of N
                                // and then of K
    std::int32_t stages;        // depth of the load pipeline
    std::int32_t shared_bytes;  // dynamic shared memory of a block
    std::int32_t threads;       // of a block
    std::int64_t slabs;         // ceil(M / block_m)
    std::int64_t grid;          // blocks
    // Of kernels that take two launches; zeros for the others.
    std::int32_t block_r;  // columns of T that a block of the first launch computes
    struct {
        std::int32_t stages, shared_bytes;
        std::int64_t grid;
    } second;
    std::int64_t scratch;  // elements of 4 bytes that the blocks hand each other
    std::int64_t parts;    // of these, sums of which each block has a part: no more with more rows, beyond some
    // The kernel adds up dA and dB itself, in an order that the plan fixes: deterministic or not, it does the same.
    bool ordered;
};

// The one workspace of a call, in elements of 4 bytes: a set of sums, dA [P, K] and dB [N, P], those that are wanted,
// and then the counters; or a set for each slab, when deterministic.
struct Workspace {
    std::int64_t dB;     // where dB starts in a set
    std::int64_t set;    // elements of a set
    std::int64_t sets;   // that the caller adds up; 0: the one set is the result
    std::int64_t zeros;  // from here on it is to be cleared
    std::int64_t size;   // 0 where neither is wanted
};
inline Workspace workspace_of(const BackwardParams& p, const Plan& plan) {
    const std::int64_t dB = p.dA != nullptr ? p.P * p.K : 0, set = dB + (p.dB != nullptr ? p.N * p.P : 0);
    if (plan.ordered) return {dB, set, 0, set, set + plan.grid + plan.second.grid};
    if (p.deterministic) return {dB, set, plan.slabs, plan.slabs * set, plan.slabs * set};
    return {dB, set, 0, 0, set == 0 ? 0 : set + kMaxCluster};
}

}  // namespace loge
