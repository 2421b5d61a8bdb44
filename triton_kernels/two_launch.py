"""Two launches, for a factor rank that no tile holds or too few rows to fill the card with slabs.

`project`: T = dY [left | s B], with dB and db, over (rows × tiles of R) and splits of N.
`expand_slab` or `expand_tiles`: dX = T [right ; A] and dA, over (rows × chunks or tiles of K).
T lies between the launches in the dtype of dY as [rows · BM, WIDTH], WIDTH = the padded R and then the padded P: whole
tiles, so that neither kernel masks them. Where N is split, `project` gives fp32 parts instead: added up by atomics in
one layer or, without ATOMIC, for the same bits from run to run, in a layer for each split. `expand_slab` rounds their
sum to T before its walk; for `expand_tiles`, whose blocks share slabs of T, the host does.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl

from .device_code import (
    dropout_keep,
    dropout_key,
    grouped_tile,
    load_tile,
    reduce_store,
    store_thin,
    thin_product,
    walk_k,
    walk_n,
)

PROJECT_RUNTIME = ("M", "N", "n_chunk", "stride_dy_m", "stride_dy_n", "scaling")
EXPAND_RUNTIME = ("M", "K", "stride_x_m", "stride_x_k", "threshold", "inv_keep")
GROUP = tl.constexpr(8)  # rows of tiles that are walked together: their operands are a few MB, which L2 holds


@triton.jit
def store_t(t_ptr, parts_ptr, begin, offs, value, ATOMIC: tl.constexpr):
    """A block's tile of T at begin + offs: T itself, or a part of it where N is split."""
    if tl.num_programs(1) == 1:
        tl.store(t_ptr + begin + offs, value.to(t_ptr.dtype.element_ty))
    else:
        reduce_store(parts_ptr + begin + offs, value, None, ATOMIC=ATOMIC)


@triton.jit(do_not_specialize=PROJECT_RUNTIME)
def project(
    dy_ptr,
    xa_ptr,
    left_ptr,
    lora_B_ptr,
    t_ptr,
    parts_ptr,
    dB_ptr,
    db_ptr,
    M: tl.int32,
    N: tl.int32,
    n_chunk: tl.int32,
    stride_dy_m: tl.int64,
    stride_dy_n: tl.int64,
    scaling: tl.float32,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    WIDTH: tl.constexpr,
    NEED_T_R: tl.constexpr,
    NEED_T_P: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (cdiv(M, BM) · tiles of R (at least 1), splits = cdiv(N, n_chunk)); n_chunk is a multiple of BN.

    t [rows, WIDTH] is written where there is one split, parts [rows, WIDTH] in fp32 where there are more. dB [N, P] and
    db [N] in fp32. Unless ATOMIC, parts has a leading dimension of splits, dB and db of row blocks.
    """
    tiles: tl.constexpr = max(1, (R + BR - 1) // BR)
    rows = tl.num_programs(0) // tiles
    pid_m, pid_r = grouped_tile(rows, tiles, GROUP)
    pid_s = tl.program_id(1)
    n_chunk = n_chunk // BN * BN  # as it is: said so that the compiler sees aligned tiles
    n_begin = pid_s * n_chunk
    n_end = tl.minimum(n_begin + n_chunk, N)
    offs_m = pid_m * BM + tl.arange(0, BM)
    # A 64-bit base and 32-bit offsets in the tile: 64-bit addresses of a whole tile of T would spill.
    begin = pid_m.to(tl.int64) * BM * WIDTH
    if ATOMIC:
        block = 0
    else:
        block = pid_m.to(tl.int64)
        begin += pid_s.to(tl.int64) * rows * BM * WIDTH
    row_t = tl.arange(0, BM)[:, None] * WIDTH  # [BM, 1]
    p_dB = dB_ptr + block * N * P
    p_db = db_ptr + block * N
    offs_r = pid_r * BR + tl.arange(0, BR)
    if pid_r == 0:  # the adapter's columns travel with the first tile of the factor's
        t_r, t_p = walk_n(
            dy_ptr,
            xa_ptr,
            left_ptr,
            lora_B_ptr,
            p_dB,
            p_db,
            offs_m,
            n_begin,
            n_end,
            0,
            M,
            N,
            scaling,
            stride_dy_m,
            stride_dy_n,
            R=R,
            P=P,
            BM=BM,
            BN=BN,
            BR=BR,
            BP=BP,
            NEED_T_R=NEED_T_R,
            NEED_T_P=NEED_T_P,
            NEED_DB=NEED_DB,
            NEED_DBIAS=NEED_DBIAS,
            ALIGNED_N=ALIGNED_N,
            WGMMA=WGMMA,
            ATOMIC=ATOMIC,
            PRECISION=PRECISION,
        )
        if NEED_T_P:
            offs_p = WIDTH - BP + tl.arange(0, BP)
            store_t(t_ptr, parts_ptr, begin, row_t + offs_p[None, :], t_p, ATOMIC)
        if NEED_T_R:
            store_t(t_ptr, parts_ptr, begin, row_t + offs_r[None, :], t_r, ATOMIC)
    elif NEED_T_R and R > BR:
        t_r, _ = walk_n(
            dy_ptr,
            xa_ptr,
            left_ptr,
            lora_B_ptr,
            p_dB,
            p_db,
            offs_m,
            n_begin,
            n_end,
            pid_r * BR,
            M,
            N,
            scaling,
            stride_dy_m,
            stride_dy_n,
            R=R,
            P=P,
            BM=BM,
            BN=BN,
            BR=BR,
            BP=BP,
            NEED_T_R=True,
            NEED_T_P=False,
            NEED_DB=False,
            NEED_DBIAS=False,
            ALIGNED_N=ALIGNED_N,
            WGMMA=WGMMA,
            ATOMIC=ATOMIC,
            PRECISION=PRECISION,
        )
        store_t(t_ptr, parts_ptr, begin, row_t + offs_r[None, :], t_r, ATOMIC)


@triton.jit
def sum_parts(p_t, p_parts, offs, layers, layer_stride):
    """A tile of T from its parts, layer by layer."""
    b_t = tl.load(p_parts + offs)
    for layer in range(1, layers):
        b_t += tl.load(p_parts + layer * layer_stride + offs)
    tl.store(p_t + offs, b_t.to(p_t.dtype.element_ty))


@triton.jit(do_not_specialize=(*EXPAND_RUNTIME, "k_chunk", "layers"))
def expand_slab(
    t_ptr,
    parts_ptr,
    x_ptr,
    right_ptr,
    lora_A_ptr,
    dx_ptr,
    dA_ptr,
    seed_ptr,
    M: tl.int32,
    K: tl.int32,
    k_chunk: tl.int32,
    layers: tl.int32,
    stride_x_m: tl.int64,
    stride_x_k: tl.int64,
    threshold: tl.int32,
    inv_keep: tl.float32,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    WIDTH: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`expand` for a rank that one tile holds: T of a slab stays on chip while the block walks its chunk of K.

    Grid (cdiv(M, BM), cdiv(K, k_chunk)), k_chunk a multiple of BK; outputs as in `expand_tiles`. K is cut only where
    there are few rows, and all blocks run at once: their order does not matter. layers: of parts; 0: t is whole.
    """
    dtype = t_ptr.dtype.element_ty
    pid_m = tl.program_id(0)
    k_chunk = k_chunk // BK * BK  # as it is: said so that the compiler sees aligned tiles
    k_begin = tl.program_id(1) * k_chunk
    k_end = tl.minimum(k_begin + k_chunk, K)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_r = tl.arange(0, BR)
    offs_p = tl.arange(0, BP)
    row_t = tl.arange(0, BM)[:, None] * WIDTH  # [BM, 1]
    begin = pid_m.to(tl.int64) * BM * WIDTH
    p_t = t_ptr + begin
    if layers > 0:
        # Through memory: a T that is computed here would be loaded from shared memory into registers in each step,
        # where one that is only loaded stays in shared memory as wgmma's operand. Blocks of a slab write the same bits.
        layer_stride = tl.num_programs(0).to(tl.int64) * BM * WIDTH
        if NEED_DX:
            sum_parts(p_t, parts_ptr + begin, row_t + offs_r[None, :], layers, layer_stride)
        if P > 0:
            sum_parts(p_t, parts_ptr + begin, row_t + WIDTH - BP + offs_p[None, :], layers, layer_stride)
        tl.debug_barrier()
    t_r = tl.zeros((BM, BR), dtype=dtype)
    t_p = tl.zeros((BM, BP), dtype=dtype)
    if NEED_DX:
        t_r = tl.load(p_t + (row_t + offs_r[None, :]))
    if P > 0:
        t_p = tl.load(p_t + (row_t + WIDTH - BP + offs_p[None, :]))
    if DROPOUT:
        key = dropout_key(seed_ptr)
    else:
        key = 0
    if ATOMIC:
        block = 0
    else:
        block = pid_m.to(tl.int64)
    walk_k(
        t_r,
        t_p,
        x_ptr,
        right_ptr,
        lora_A_ptr,
        dx_ptr,
        dA_ptr + block * K * P,
        key,
        offs_m,
        k_begin,
        k_end,
        M,
        K,
        threshold,
        inv_keep,
        stride_x_m,
        stride_x_k,
        R=R,
        P=P,
        BM=BM,
        BK=BK,
        BR=BR,
        BP=BP,
        HAS_LORA=P > 0,
        HAS_FACTORS=R > 0,
        NEED_DX=NEED_DX,
        NEED_DA=NEED_DA,
        DROPOUT=DROPOUT,
        ALIGNED_K=ALIGNED_K,
        WGMMA=WGMMA,
        ATOMIC=ATOMIC,
        PRECISION=PRECISION,
    )


@triton.jit(do_not_specialize=EXPAND_RUNTIME)
def expand_tiles(
    t_ptr,
    x_ptr,
    right_ptr,
    lora_A_ptr,
    dx_ptr,
    dA_ptr,
    seed_ptr,
    M: tl.int32,
    K: tl.int32,
    stride_x_m: tl.int64,
    stride_x_k: tl.int64,
    threshold: tl.int32,
    inv_keep: tl.float32,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    WIDTH: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`expand` for any rank: a tile of dX sums over R in steps of BR, reading T anew for every tile of K.

    Grid (cdiv(M, BM) · cdiv(K, BK),), a `grouped_tile` each: one dimension, because rows may be more than the 65,535
    blocks of a second one. dx [M, K] contiguous, dA [P, K] fp32 (a leading row-block dimension unless ATOMIC). The
    adapter's product comes first and the loop adds to it, so that nothing in the loop waits: one product of T_R | T_P
    would need R + P to be a power of two. dA's comes last.
    """
    dtype = t_ptr.dtype.element_ty
    pid_m, pid_k = grouped_tile(tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_k = pid_k * BK + tl.arange(0, BK)
    offs_p = tl.arange(0, BP)
    if ALIGNED_K:
        K = K // 8 * 8
        stride_x_m = stride_x_m // 8 * 8
    mask_k = offs_k < K
    mask_p = offs_p < P
    mask_mk = (offs_m < M)[:, None] & mask_k[None, :]
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    row_t = tl.arange(0, BM)[:, None] * WIDTH  # [BM, 1]
    p_t = t_ptr + pid_m.to(tl.int64) * BM * WIDTH
    if DROPOUT:
        keep = dropout_keep(dropout_key(seed_ptr), offs_m, offs_k, threshold)  # [BM, BK]
    if P > 0:
        t_p = tl.load(p_t + (row_t + WIDTH - BP + offs_p[None, :]))  # [BM, BP]
    if NEED_DX:
        b_dx = tl.zeros((BM, BK), dtype=tl.float32)
        if P > 0:
            p_lora_A = lora_A_ptr + offs_p.to(tl.int64)[:, None] * K + offs_k[None, :]
            b_lora_A = tl.load(p_lora_A, mask=mask_p[:, None] & mask_k[None, :], other=0.0).to(dtype)  # [BP, BK]
            b_dx = tl.dot(t_p, b_lora_A, input_precision=PRECISION)
            if DROPOUT:
                b_dx = tl.where(keep, b_dx * inv_keep, 0.0)
        for r0 in range(0, R, BR):
            offs_r = r0 + tl.arange(0, BR)
            b_t = tl.load(p_t + (row_t + offs_r[None, :]))  # [BM, BR]
            p_right = right_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
            b_right = tl.load(p_right, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)  # [BR, BK]
            b_dx = tl.dot(b_t, b_right, b_dx, input_precision=PRECISION)
        tl.store(dx_ptr + row_m * K + offs_k[None, :], b_dx.to(dtype), mask=mask_mk)
    if NEED_DA:
        b_x = load_tile(x_ptr + row_m * stride_x_m, offs_k, stride_x_k, mask_mk, ALIGNED_K)  # [BM, BK]
        if DROPOUT:
            b_x = tl.where(keep, b_x, 0.0)
        if ATOMIC:
            p_dA = dA_ptr
        else:
            p_dA = dA_ptr + pid_m.to(tl.int64) * K * P
        b_dA = thin_product(b_x, t_p, inv_keep, WGMMA, PRECISION)
        store_thin(p_dA, b_dA, offs_k, mask_k, 1, K, P, BP, WGMMA, ATOMIC)
