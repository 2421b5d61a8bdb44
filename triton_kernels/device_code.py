"""The pieces every kernel here is made of: the dropout hash, the walk over N and the walk over K.

Shapes in comments: BM tokens, BN / BK a tile of the out / in features, BR / BP the ranks R / P padded to a power of
two. Padding is done with masks: nothing is ever copied or concatenated in memory.

WGMMA says how the two skinny products, dB and dA, lie in the accumulator: with their long side (N, K) as its rows, of
which wgmma wants 64, or, for mma.sync, with the adapter's P as its rows, which lets the tiles of dY and x stay in the
one shared-memory layout that asynchronous copies fill.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl


@triton.jit
def mix(h):
    """A 32-bit finaliser (wrapping arithmetic); bit-identical to the one of the plain PyTorch reference."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def dropout_key(seed_ptr):
    """The 32-bit key of (seed, offset); read on the device, so that no host synchronisation is needed."""
    seed = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    h = mix((offset >> 32).to(tl.uint32) ^ tl.full((), 0x9E3779B9, tl.uint32))
    h = mix(offset.to(tl.uint32) ^ h)
    h = mix((seed >> 32).to(tl.uint32) ^ h)
    return mix(seed.to(tl.uint32) ^ h)


@triton.jit
def dropout_keep(key, offs_m, offs_k, threshold):
    """keep[m, k] of the adapter's input; `threshold` holds the bits of floor(p * 2^32) in an int32."""
    row_key = mix(offs_m.to(tl.uint32) ^ key)  # [BM]
    col_key = mix(offs_k.to(tl.uint32) ^ tl.full((), 0x85EBCA6B, tl.uint32))  # [BK]
    return mix(row_key[:, None] ^ col_key[None, :]) >= threshold.to(tl.uint32, bitcast=True)  # [BM, BK]


@triton.jit
def reduce_store(ptrs, value, mask, ATOMIC: tl.constexpr):
    """One block's share of a gradient: added to the common fp32 buffer, or stored in the block's own."""
    if ATOMIC:
        tl.atomic_add(ptrs, value, mask=mask, sem="relaxed")
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def load_tile(p_row, offs, stride, mask, ALIGNED: tl.constexpr):
    """The columns `offs` of the rows that p_row [., 1] points at, `stride` apart, and zeros where the mask says so;
    ALIGNED: next to each other, which 16-byte loads need to see."""
    if ALIGNED:
        p_tile = p_row + offs[None, :]
    else:
        p_tile = p_row + offs.to(tl.int64)[None, :] * stride
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def grouped_tile(blocks_m, blocks_n, GROUP: tl.constexpr):
    """The row and the column of this program's tile, of blocks_m · blocks_n: the columns are walked for GROUP rows at a
    time, whose operands then meet in L2."""
    pid = tl.program_id(0)
    first_m = pid // (GROUP * blocks_n) * GROUP
    rows_in_group = tl.minimum(blocks_m - first_m, GROUP)
    pid_in_group = pid % (GROUP * blocks_n)
    return first_m + pid_in_group % rows_in_group, pid_in_group // rows_in_group


@triton.jit
def walk_n(
    dy_ptr,
    xa_ptr,
    left_ptr,
    lora_B_ptr,
    dB_ptr,
    db_ptr,
    offs_m,  # [BM], int32
    n_begin,
    n_end,
    r_begin,
    M,
    N,
    scaling,
    stride_dy_m,
    stride_dy_n,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    NEED_T_R: tl.constexpr,
    NEED_T_P: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T[:, r_begin : r_begin + BR] and T[:, R:] of one slab of rows, with dB and db on the way: dY is read once.

    dB_ptr and db_ptr point at what this slab may write: the common buffer (ATOMIC) or the slab's own.
    """
    dtype = dy_ptr.dtype.element_ty
    offs_r = r_begin + tl.arange(0, BR)
    offs_p = tl.arange(0, BP)
    mask_m = offs_m < M
    if ALIGNED_N:  # what divides by 8 lets the compiler use 16-byte loads (masks and rows alike)
        N = N // 8 * 8
        stride_dy_m = stride_dy_m // 8 * 8
    p_dy_row = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dy_m  # [BM, 1]
    t_r = tl.zeros((BM, BR), dtype=tl.float32)
    t_p = tl.zeros((BM, BP), dtype=tl.float32)
    if NEED_DB:
        p_xa = xa_ptr + offs_m.to(tl.int64)[:, None] * P + offs_p[None, :]
        b_xa = tl.load(p_xa, mask=mask_m[:, None] & (offs_p < P)[None, :], other=0.0)  # [BM, BP]

    for n0 in range(n_begin, n_end, BN):
        offs_n = n0 + tl.arange(0, BN)
        mask_n = offs_n < N
        b_dy = load_tile(p_dy_row, offs_n, stride_dy_n, mask_m[:, None] & mask_n[None, :], ALIGNED_N)  # [BM, BN]
        row_n = offs_n.to(tl.int64)[:, None]  # [BN, 1]
        if NEED_T_R:
            p_left = left_ptr + row_n * R + offs_r[None, :]
            b_left = tl.load(p_left, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)  # [BN, BR]
            t_r = tl.dot(b_dy, b_left, t_r, input_precision=PRECISION)
        if NEED_T_P:
            p_lora_B = lora_B_ptr + row_n * P + offs_p[None, :]
            b_lora_B = tl.load(p_lora_B, mask=mask_n[:, None] & (offs_p < P)[None, :], other=0.0)  # [BN, BP]
            t_p = tl.dot(b_dy, b_lora_B.to(dtype), t_p, input_precision=PRECISION)
        if NEED_DB:
            if WGMMA:
                b_dB = tl.dot(tl.trans(b_dy), b_xa, input_precision=PRECISION) * scaling  # [BN, BP]
                p_dB = dB_ptr + row_n * P + offs_p[None, :]
                reduce_store(p_dB, b_dB, mask_n[:, None] & (offs_p < P)[None, :], ATOMIC=ATOMIC)
            else:
                b_dB = tl.dot(tl.trans(b_xa), b_dy, input_precision=PRECISION) * scaling  # [BP, BN]
                p_dB = dB_ptr + offs_n.to(tl.int64)[None, :] * P + offs_p[:, None]
                reduce_store(p_dB, b_dB, (offs_p < P)[:, None] & mask_n[None, :], ATOMIC=ATOMIC)
        if NEED_DBIAS:
            reduce_store(db_ptr + offs_n, tl.sum(b_dy.to(tl.float32), axis=0), mask_n, ATOMIC=ATOMIC)  # [BN]
    return t_r, t_p * scaling


@triton.jit
def store_dA(
    dA_ptr,
    t_p,  # [BM, BP]
    b_x,  # [BM, BK]
    offs_k,
    mask_k,
    K,
    inv_keep,
    P: tl.constexpr,
    BP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One slab's share of dA[:, offs_k] = T_Bᵀ x, from the masked tile of x."""
    offs_p = tl.arange(0, BP)
    if WGMMA:
        b_dA = tl.dot(tl.trans(b_x), t_p, input_precision=PRECISION)  # [BK, BP]
        p_dA = dA_ptr + offs_p.to(tl.int64)[None, :] * K + offs_k[:, None]
        mask = mask_k[:, None] & (offs_p < P)[None, :]
    else:
        b_dA = tl.dot(tl.trans(t_p), b_x, input_precision=PRECISION)  # [BP, BK]
        p_dA = dA_ptr + offs_p.to(tl.int64)[:, None] * K + offs_k[None, :]
        mask = (offs_p < P)[:, None] & mask_k[None, :]
    if DROPOUT:
        b_dA *= inv_keep
    reduce_store(p_dA, b_dA, mask, ATOMIC=ATOMIC)


@triton.jit
def walk_k(
    t_r,  # [BM, BR], in the inputs' dtype
    t_p,  # [BM, BP], likewise, scaled
    x_ptr,
    right_ptr,
    lora_A_ptr,
    dx_ptr,
    dA_ptr,
    key,
    offs_m,  # [BM], int32
    k_begin,
    k_end,
    M,
    K,
    threshold,
    inv_keep,
    stride_x_m,
    stride_x_k,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX and this slab's share of dA from T: dX is written once, x read once."""
    dtype = t_p.dtype
    offs_r = tl.arange(0, BR)
    offs_p = tl.arange(0, BP)
    mask_m = offs_m < M
    if ALIGNED_K:
        K = K // 8 * 8
        stride_x_m = stride_x_m // 8 * 8
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    p_right_row = right_ptr + offs_r.to(tl.int64)[:, None] * K  # [BR, 1]
    p_lora_A_row = lora_A_ptr + offs_p.to(tl.int64)[:, None] * K  # [BP, 1]

    for k0 in range(k_begin, k_end, BK):
        offs_k = k0 + tl.arange(0, BK)
        mask_k = offs_k < K
        mask_mk = mask_m[:, None] & mask_k[None, :]
        if DROPOUT:
            keep = dropout_keep(key, offs_m, offs_k, threshold)  # [BM, BK]
        if NEED_DX:
            b_dx = tl.zeros((BM, BK), dtype=tl.float32)
            if HAS_FACTORS:
                p_right = p_right_row + offs_k[None, :]
                b_right = tl.load(p_right, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)  # [BR, BK]
                b_dx = tl.dot(t_r, b_right, b_dx, input_precision=PRECISION)
            if HAS_LORA:
                p_lora_A = p_lora_A_row + offs_k[None, :]
                b_lora_A = tl.load(p_lora_A, mask=(offs_p < P)[:, None] & mask_k[None, :], other=0.0)  # [BP, BK]
                b_lora_A = b_lora_A.to(dtype)
                if DROPOUT:
                    b_adapter = tl.dot(t_p, b_lora_A, input_precision=PRECISION) * inv_keep
                    b_dx += tl.where(keep, b_adapter, 0.0)
                else:
                    b_dx = tl.dot(t_p, b_lora_A, b_dx, input_precision=PRECISION)
            tl.store(dx_ptr + row_m * K + offs_k[None, :], b_dx.to(dtype), mask=mask_mk)
        if NEED_DA:
            b_x = load_tile(x_ptr + row_m * stride_x_m, offs_k, stride_x_k, mask_mk, ALIGNED_K)  # [BM, BK]
            if DROPOUT:
                b_x = tl.where(keep, b_x, 0.0)
            store_dA(dA_ptr, t_p, b_x, offs_k, mask_k, K, inv_keep, P, BP, DROPOUT, WGMMA, ATOMIC, PRECISION)
