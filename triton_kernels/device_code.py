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
def walked(begin, end, WGMMA: tl.constexpr):
    """What a walk from begin to end is counted from, its first and its last count. With wgmma it has at least one step,
    whose masks may leave nothing.

    Around a loop that may take no step LLVM copies accumulators, and ptxas then waits for every single wgmma
    (`compile_check.serialised`): on an H200 a backward's product in float8 had some
    920 TFLOP/s, where a forward's, with the same loop and not serialised, had 1250 (what is around them taken off).
    """
    if WGMMA:
        base = begin
        first = 0
        last = tl.maximum(end - begin, 1)
    else:
        base = 0
        first = begin
        last = end
    return base, first, last


@triton.jit
def reduce_store(ptrs, value, mask, ATOMIC: tl.constexpr):
    """One block's share of a gradient: added to the common fp32 buffer, or stored in the block's own."""
    if ATOMIC:
        tl.atomic_add(ptrs, value, mask=mask, sem="relaxed")
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def thin_product(b_wide, b_thin, scale, WGMMA: tl.constexpr, PRECISION: tl.constexpr):
    """scale · wideᵀ thin in fp32, of a tile of dY or x [BM, BN] and one of the adapter's columns [BM, BP]: [BN, BP], or
    [BP, BN] without WGMMA."""
    if WGMMA:
        b_product = tl.dot(tl.trans(b_wide), b_thin, input_precision=PRECISION)
    else:
        b_product = tl.dot(tl.trans(b_thin), b_wide, input_precision=PRECISION)
    return b_product * scale


@triton.jit
def store_thin(
    ptr,
    b_product,
    offs,
    mask,
    stride,
    stride_p,
    P: tl.constexpr,
    BP: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """One block's share of dB or dA, a `thin_product` of the columns `offs` [BN] of dY or x that `mask` leaves."""
    offs_p = tl.arange(0, BP)
    mask_p = offs_p < P
    if WGMMA:
        p_out = ptr + offs.to(tl.int64)[:, None] * stride + offs_p.to(tl.int64)[None, :] * stride_p
        reduce_store(p_out, b_product, mask[:, None] & mask_p[None, :], ATOMIC=ATOMIC)
    else:
        p_out = ptr + offs.to(tl.int64)[None, :] * stride + offs_p.to(tl.int64)[:, None] * stride_p
        reduce_store(p_out, b_product, mask_p[:, None] & mask[None, :], ATOMIC=ATOMIC)


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

    dB_ptr and db_ptr point at what this slab may write: the common buffer (ATOMIC) or the slab's own. Of a product that
    it stores in the same step the compiler waits for the end. With wgmma dB's comes first therefore, and those of T are
    in flight while dB is stored and the next tiles are loaded: one `wait_group 0` a step, behind the thin product.
    Carried over to the next step, or issued last, it drains them all. mma.sync has nothing in flight, and unaligned
    tiles have none to load meanwhile: there the same order costs registers alone, up to spilling.
    """
    IN_FLIGHT: tl.constexpr = WGMMA and ALIGNED_N
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

    base, first, last = walked(n_begin, n_end, WGMMA)
    for n0 in range(first, last, BN):
        offs_n = base + n0 + tl.arange(0, BN)
        mask_n = offs_n < N
        b_dy = load_tile(p_dy_row, offs_n, stride_dy_n, mask_m[:, None] & mask_n[None, :], ALIGNED_N)  # [BM, BN]
        row_n = offs_n.to(tl.int64)[:, None]  # [BN, 1]
        if NEED_DB and IN_FLIGHT:
            b_dB = thin_product(b_dy, b_xa, scaling, WGMMA, PRECISION)
        if NEED_T_R:
            p_left = left_ptr + row_n * R + offs_r[None, :]
            b_left = tl.load(p_left, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)  # [BN, BR]
            t_r = tl.dot(b_dy, b_left, t_r, input_precision=PRECISION)
        if NEED_T_P:
            p_lora_B = lora_B_ptr + row_n * P + offs_p[None, :]
            b_lora_B = tl.load(p_lora_B, mask=mask_n[:, None] & (offs_p < P)[None, :], other=0.0)  # [BN, BP]
            t_p = tl.dot(b_dy, b_lora_B.to(dtype), t_p, input_precision=PRECISION)
        if NEED_DB:
            if not IN_FLIGHT:
                b_dB = thin_product(b_dy, b_xa, scaling, WGMMA, PRECISION)
            store_thin(dB_ptr, b_dB, offs_n, mask_n, P, 1, P, BP, WGMMA, ATOMIC)
        if NEED_DBIAS:
            reduce_store(db_ptr + offs_n, tl.sum(b_dy.to(tl.float32), axis=0), mask_n, ATOMIC=ATOMIC)  # [BN]
    return t_r, t_p * scaling


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
    """dX and this slab's share of dA from T: dX is written once, x read once.

    Each step waits for its wide product. Stored one step later it could be in flight meanwhile, but then Triton 3.6
    copies its accumulators, and ptxas waits for every single wgmma. The order is the one that does not spill.
    """
    THIN_FIRST: tl.constexpr = WGMMA and ALIGNED_K
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

    p_dx_row = dx_ptr + row_m * K  # [BM, 1]
    base, first, last = walked(k_begin, k_end, WGMMA)
    for k0 in range(first, last, BK):
        offs_k = base + k0 + tl.arange(0, BK)
        mask_k = offs_k < K
        mask_mk = mask_m[:, None] & mask_k[None, :]
        if DROPOUT:
            keep = dropout_keep(key, offs_m, offs_k, threshold)  # [BM, BK]
        if NEED_DA:
            b_x = load_tile(x_ptr + row_m * stride_x_m, offs_k, stride_x_k, mask_mk, ALIGNED_K)  # [BM, BK]
            if DROPOUT:
                b_x = tl.where(keep, b_x, 0.0)
            if THIN_FIRST:
                b_dA = thin_product(b_x, t_p, inv_keep, WGMMA, PRECISION)
                store_thin(dA_ptr, b_dA, offs_k, mask_k, 1, K, P, BP, WGMMA, ATOMIC)
        if NEED_DX:
            b_dx = tl.zeros((BM, BK), dtype=tl.float32)
            if HAS_LORA:
                p_lora_A = p_lora_A_row + offs_k[None, :]
                b_lora_A = tl.load(p_lora_A, mask=(offs_p < P)[:, None] & mask_k[None, :], other=0.0)  # [BP, BK]
                b_dx = tl.dot(t_p, b_lora_A.to(dtype), input_precision=PRECISION)
                if DROPOUT:
                    b_dx = tl.where(keep, b_dx * inv_keep, 0.0)
            if HAS_FACTORS:
                p_right = p_right_row + offs_k[None, :]
                b_right = tl.load(p_right, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0)  # [BR, BK]
                b_dx = tl.dot(t_r, b_right, b_dx, input_precision=PRECISION)
            tl.store(p_dx_row + offs_k[None, :], b_dx.to(dtype), mask=mask_mk)
        if NEED_DA and not THIN_FIRST:
            b_dA = thin_product(b_x, t_p, inv_keep, WGMMA, PRECISION)
            store_thin(dA_ptr, b_dA, offs_k, mask_k, 1, K, P, BP, WGMMA, ATOMIC)
