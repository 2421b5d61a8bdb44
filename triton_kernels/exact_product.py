"""The exact product and what rides on it: dX = dY W + drop(T A), written once, and dA = Tᵀ drop(x) from one read of x.

dY and W come in 16 or 32 bits, or both in 8 bits with a scale for each row of dY, and one for each column of W or none.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl

from .device_code import dropout_keep, dropout_key, grouped_tile, load_tile, store_thin, thin_product
from .exact_prepare import rotated

PRODUCT_RUNTIME = ("M", "N", "K", "stride_dy_m", "stride_dy_n", "stride_x_m", "stride_x_k", "threshold", "inv_keep")


@triton.jit
def exact_sum(
    dy_ptr,
    weight_ptr,
    dy_scale_ptr,
    weight_scale_ptr,
    offs_m,  # [BM], int32
    offs_k,  # [BK], int32
    M,
    N,
    K,
    stride_dy_m,
    stride_dy_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALES: tl.constexpr,
    WEIGHT_SCALES: tl.constexpr,
    IMPRECISE: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dY W of one tile [BM, BK] in fp32, its scales multiplied in."""
    mask_m = offs_m < M
    mask_k = offs_k < K
    p_dy_row = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dy_m  # [BM, 1]
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    accumulator = tl.zeros((BM, BK), dtype=SUM)
    for n0 in range(0, N, BN):
        offs_n = n0 + tl.arange(0, BN)
        mask_n = offs_n < N
        b_dy = load_tile(p_dy_row, offs_n, stride_dy_n, mask_m[:, None] & mask_n[None, :], ALIGNED_N)  # [BM, BN]
        if not SCALES:
            p_weight = weight_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        else:
            p_weight = weight_ptr + offs_k.to(tl.int64)[None, :] * N + offs_n[:, None]
        b_weight = tl.load(p_weight, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BN, BK]
        accumulator = tl.dot(
            b_dy,
            b_weight,
            accumulator,
            input_precision=PRECISION,
            max_num_imprecise_acc=IMPRECISE,
            out_dtype=SUM,
        )

    b_dx = accumulator.to(tl.float32)
    if SCALES:
        b_dy_scale = tl.load(dy_scale_ptr + offs_m, mask=mask_m, other=0.0)  # [BM]
        b_dx *= b_dy_scale[:, None]
    if WEIGHT_SCALES:
        b_weight_scale = tl.load(weight_scale_ptr + offs_k, mask=mask_k, other=0.0)  # [BK]
        b_dx *= b_weight_scale[None, :]
    return b_dx


@triton.jit(do_not_specialize=PRODUCT_RUNTIME)
def exact_product(
    dy_ptr,
    weight_ptr,
    dy_scale_ptr,
    weight_scale_ptr,
    t_ptr,
    x_ptr,
    lora_A_ptr,
    dx_ptr,
    dA_ptr,
    seed_ptr,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    stride_dy_m: tl.int64,
    stride_dy_n: tl.int64,
    stride_x_m: tl.int64,
    stride_x_k: tl.int64,
    threshold: tl.int32,
    inv_keep: tl.float32,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WEIGHT_SCALES: tl.constexpr,
    ROTATE: tl.constexpr,
    IMPRECISE: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (cdiv(M, BM) · cdiv(K, BK),), a `grouped_tile` each.

    weight [N, K], contiguous, or with SCALES stored column by column; dx [M, K] contiguous; t [M, P] in fp32, scaled;
    dA [P, K] in fp32, with a leading dimension of row blocks unless ATOMIC. SCALES: dy_scale [M], and with
    WEIGHT_SCALES weight_scale [K]. ROTATE: W was rotated in blocks of so many columns, which divide BK, and dX is
    rotated back; 1: it was not. IMPRECISE: terms of float8 that the tensor cores may sum in their own, shorter
    accumulator before fp32 takes them; None: all.
    """
    dtype = dx_ptr.dtype.element_ty
    pid_m, pid_k = grouped_tile(tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_k = pid_k * BK + tl.arange(0, BK)
    offs_p = tl.arange(0, BP)
    if ALIGNED_N:
        N = N // 16 * 16
        stride_dy_m = stride_dy_m // 16 * 16
    if ALIGNED_K:
        K = K // 8 * 8
        stride_x_m = stride_x_m // 8 * 8
    mask_m = offs_m < M
    mask_k = offs_k < K
    mask_p = offs_p < P
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    if P > 16 or not DROPOUT:  # a narrow adapter with dropout is not serialised, and would spill
        tl.assume(N > 0)  # to the end of `walked`, which takes a register more
    b_dx = exact_sum(
        dy_ptr,
        weight_ptr,
        dy_scale_ptr,
        weight_scale_ptr,
        offs_m,
        offs_k,
        M,
        N,
        K,
        stride_dy_m,
        stride_dy_n,
        BM=BM,
        BN=BN,
        BK=BK,
        SCALES=SCALES,
        WEIGHT_SCALES=WEIGHT_SCALES,
        IMPRECISE=IMPRECISE,
        ALIGNED_N=ALIGNED_N,
        PRECISION=PRECISION,
    )
    mask_mk = mask_m[:, None] & mask_k[None, :]
    if DROPOUT:
        key = dropout_key(seed_ptr)
    if P > 0:
        # Before the rotation, whose matrix is then still in the way: of a tile of t that takes its place in shared
        # memory ptxas 12.8 loses the address (`compile_check.broken_descriptors`), and dA is garbage.
        p_t = t_ptr + row_m * P + offs_p[None, :]
        b_t = tl.load(p_t, mask=mask_m[:, None] & mask_p[None, :], other=0.0).to(dtype)  # [BM, BP]
    if ROTATE > 1:
        # In dX's dtype: float32 products would spill, and 8 bits lose more than this rounding.
        b_dx = rotated(b_dx.to(dtype), BM, BK, ROTATE, PRECISION)
    if P > 0:
        p_lora_A = lora_A_ptr + offs_p.to(tl.int64)[:, None] * K + offs_k[None, :]
        b_lora_A = tl.load(p_lora_A, mask=mask_p[:, None] & mask_k[None, :], other=0.0).to(dtype)  # [BP, BK]
        if DROPOUT:
            b_adapter = tl.dot(b_t, b_lora_A, input_precision=PRECISION) * inv_keep
            b_dx += tl.where(dropout_keep(key, offs_m, offs_k, threshold), b_adapter, 0.0)
        else:
            b_dx = tl.dot(b_t, b_lora_A, b_dx, input_precision=PRECISION)
    tl.store(dx_ptr + row_m * K + offs_k[None, :], b_dx.to(dtype), mask=mask_mk)
    if NEED_DA:
        b_x = load_tile(x_ptr + row_m * stride_x_m, offs_k, stride_x_k, mask_mk, ALIGNED_K)  # [BM, BK]
        if DROPOUT:
            # The mask again: to keep it would cost more registers than there are.
            b_x = tl.where(dropout_keep(key, offs_m, offs_k, threshold), b_x, 0.0)
        if ATOMIC:
            p_dA = dA_ptr
        else:
            p_dA = dA_ptr + pid_m.to(tl.int64) * K * P
        b_dA = thin_product(b_x, b_t, inv_keep, WGMMA, PRECISION)
        store_thin(p_dA, b_dA, offs_k, mask_k, 1, K, P, BP, WGMMA, ATOMIC)
