"""One launch: T = dY [left | s B] kept on chip, dX = T [right ; A], dA = T_Bᵀ x, dB = s dYᵀ xa, db = Σ dY.

A block owns BM rows. It walks N once, reading dY for T, dB and db alike, and then K once, writing dX and reading x for
dA. dA, dB and db are summed over blocks by fp32 atomics, or, for a deterministic result, stored once per block
(`[blocks, ...]`) and summed in a fixed order afterwards.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl

from .device_code import dropout_key, walk_k, walk_n

# Sizes, strides and scalars never specialise: one compiled kernel serves every M, N and K. Their types are spelled out
# because Triton would otherwise pick i32 or i64 by value.
SIZES_AND_SCALARS = (
    "M",
    "N",
    "K",
    "stride_dy_m",
    "stride_dy_n",
    "stride_x_m",
    "stride_x_k",
    "scaling",
    "threshold",
    "inv_keep",
)


@triton.jit(do_not_specialize=SIZES_AND_SCALARS)
def one_launch_backward(
    dy_ptr,
    x_ptr,
    xa_ptr,
    left_ptr,
    right_ptr,
    lora_A_ptr,
    lora_B_ptr,
    dx_ptr,
    dA_ptr,
    dB_ptr,
    db_ptr,
    seed_ptr,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    stride_dy_m: tl.int64,
    stride_dy_n: tl.int64,
    stride_x_m: tl.int64,
    stride_x_k: tl.int64,
    scaling: tl.float32,
    threshold: tl.int32,
    inv_keep: tl.float32,
    R: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (cdiv(M, BM),). dx [M, K] contiguous; dA [P, K], dB [N, P], db [N] in fp32, with a leading block dimension
    unless ATOMIC. ALIGNED_N / ALIGNED_K: last strides 1 and 16-byte aligned rows along N / K."""
    pid = tl.program_id(0)
    offs_m = pid * BM + tl.arange(0, BM)
    if ATOMIC:
        block = 0
    else:
        block = pid.to(tl.int64)
    dtype = dy_ptr.dtype.element_ty
    NEED_T_R: tl.constexpr = NEED_DX and R > 0
    NEED_T_P: tl.constexpr = (NEED_DX or NEED_DA) and P > 0
    t_r, t_p = walk_n(
        dy_ptr,
        xa_ptr,
        left_ptr,
        lora_B_ptr,
        dB_ptr + block * N * P,
        db_ptr + block * N,
        offs_m,
        0,
        N,
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
    if NEED_DX or NEED_DA:
        if DROPOUT:
            key = dropout_key(seed_ptr)
        else:
            key = 0
        walk_k(
            t_r.to(dtype),
            t_p.to(dtype),
            x_ptr,
            right_ptr,
            lora_A_ptr,
            dx_ptr,
            dA_ptr + block * K * P,
            key,
            offs_m,
            0,
            K,
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
