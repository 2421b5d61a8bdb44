"""Fused forward: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with xa = x Aᵀ as by-product.

The adapter rides on the tiles of x that the frozen product loads anyway: x is read no more than by `x Wᵀ` alone, and
y is written once.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl

from .device_code import dropout_keep, dropout_key, grouped_tile, load_tile

FORWARD_RUNTIME = ("M", "N", "K", "stride_x_m", "stride_x_k", "scaling", "threshold", "inv_keep")


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def fused_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    lora_A_ptr,
    lora_B_ptr,
    y_ptr,
    xa_ptr,
    seed_ptr,
    M: tl.int32,
    N: tl.int32,
    K: tl.int32,
    stride_x_m: tl.int64,
    stride_x_k: tl.int64,
    scaling: tl.float32,
    threshold: tl.int32,
    inv_keep: tl.float32,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (cdiv(M, BM) · cdiv(N, BN),), a `grouped_tile` each. weight [N, K], lora_A [P, K], lora_B [N, P], y [M, N]
    and xa [M, P] contiguous."""
    dtype = x_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_p = tl.arange(0, BP)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_p = offs_p < P
    if ALIGNED_K:
        K = K // 8 * 8
        stride_x_m = stride_x_m // 8 * 8
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    p_x_row = x_ptr + row_m * stride_x_m  # [BM, 1]
    p_weight_row = weight_ptr + offs_n.to(tl.int64)[:, None] * K  # [BN, 1]
    p_lora_A_row = lora_A_ptr + offs_p.to(tl.int64)[:, None] * K  # [BP, 1]
    if DROPOUT:
        key = dropout_key(seed_ptr)
    b_y = tl.zeros((BM, BN), dtype=tl.float32)
    b_xa = tl.zeros((BM, BP), dtype=tl.float32)
    for k0 in range(0, K, BK):
        offs_k = k0 + tl.arange(0, BK)
        mask_k = offs_k < K
        b_x = load_tile(p_x_row, offs_k, stride_x_k, mask_m[:, None] & mask_k[None, :], ALIGNED_K)  # [BM, BK]
        p_weight = p_weight_row + offs_k[None, :]
        b_weight = tl.load(p_weight, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BN, BK]
        b_y = tl.dot(b_x, tl.trans(b_weight), b_y, input_precision=PRECISION)
        p_lora_A = p_lora_A_row + offs_k[None, :]
        b_lora_A = tl.load(p_lora_A, mask=mask_p[:, None] & mask_k[None, :], other=0.0).to(dtype)  # [BP, BK]
        if DROPOUT:
            b_x = tl.where(dropout_keep(key, offs_m, offs_k, threshold), b_x, 0.0)
        b_xa = tl.dot(b_x, tl.trans(b_lora_A), b_xa, input_precision=PRECISION)
    if DROPOUT:
        b_xa *= inv_keep
    b_xa_out = b_xa.to(dtype)
    if pid_n == 0:
        tl.store(xa_ptr + row_m * P + offs_p[None, :], b_xa_out, mask=mask_m[:, None] & mask_p[None, :])
    p_lora_B = lora_B_ptr + offs_n.to(tl.int64)[:, None] * P + offs_p[None, :]
    b_lora_B = tl.load(p_lora_B, mask=mask_n[:, None] & mask_p[None, :], other=0.0).to(dtype)  # [BN, BP]
    b_y += tl.dot(b_xa_out, tl.trans(b_lora_B), input_precision=PRECISION) * scaling
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row_m * N + offs_n[None, :], b_y.to(dtype), mask=mask_m[:, None] & mask_n[None, :])
