"""Around an exact dX: T = s · dY B, dB = s · dYᵀ xa and db from one read of dY, and dY in 8 bits.

`exact_prepare`: a block owns BN columns of dY and walks a chunk of its rows. What it owes to dB and db stays on chip
for the whole chunk; T is summed over the blocks of a row by fp32 atomics, or, for a deterministic result, stored once
per block of columns. A slab of 64 rows that walked N instead would add all of dB once a slab: 33 MB of atomics for
M = 8192, N = 4096, P = 16, where these are 2 MB for dB and 8 MB for T.

In 8 bits, by the rules of `loge_kernels.numerics.eight_bit`, scale[m] = max |dY[m, :]| / limit needs the whole row:
`exact_prepare` leaves the rows' maxima, `exact_quantize` reads dY once more. With a scale for each column, dY is
multiplied by it first: those of the rows of a weight in 8 bits, which the sum over N cannot leave to its end. An input
x of a forward in 8 bits, which nothing else is wanted of, is quantised by `exact_quantize_rows` alone.
"""

# mypy: disallow-incomplete-defs=False
# The launch gives a kernel's arguments their types; only what must not follow the value is annotated.
import triton
import triton.language as tl

from .availability import interpreted
from .device_code import load_tile, reduce_store, walked

QUANTIZE_ROWS_RUNTIME = ("M", "N", "stride_m", "stride_n")
PREPARE_RUNTIME = ("M", "N", "m_chunk", "stride_dy_m", "stride_dy_n", "scaling")
QUANTIZE_RUNTIME = ("M", "N", "stride_dy_m", "stride_dy_n")
_TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32: no zero row divides by zero
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2^23: float32 has no fraction bits there, so adding it rounds to even
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def absolute_bits(values):
    """|values| as integers that are ordered as they are, NaN above inf: a maximum of these loses no NaN."""
    if values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True) & 0x7FFF
    else:
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def from_absolute_bits(bits, dtype: tl.constexpr):
    """The float32 values behind `absolute_bits` of elements in `dtype`."""
    if dtype.primitive_bitwidth == 16:
        values = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        values = bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def scale_of(amax, LIMIT_RECIPROCAL: tl.constexpr):
    """What divides a row of this largest magnitude; NaN stays NaN."""
    scale = amax * LIMIT_RECIPROCAL
    return tl.where(scale < _TINY, _TINY, scale)


@triton.jit
def in_eight_bits(values, scale, q_ptr):
    """values / scale in the element type behind q_ptr, rounded once, ties to even."""
    dtype = q_ptr.dtype.element_ty
    quotient = tl.math.div_rn(values.to(tl.float32), scale)
    if dtype == tl.int8:
        quotient = (quotient + _ROUNDING) - _ROUNDING
    elif _INTERPRETED:  # whose conversion to float8 loses the carry out of the significand; the GPU's rounds by itself
        quotient = rounded_to_float8(quotient)
    return quotient.to(dtype)


@triton.jit
def rounded_to_float8(values):
    """Float32 values rounded to float8_e4m3fn's 4 significant bits, or to its last subnormal place, 2^-9."""
    exponent = (values.to(tl.int32, bitcast=True) >> 23) & 0xFF
    place = tl.maximum(exponent - 3, 127 - 9) << 23
    step = place.to(tl.float32, bitcast=True)
    return ((values / step + _ROUNDING) - _ROUNDING) * step


@triton.jit(do_not_specialize=PREPARE_RUNTIME)
def exact_prepare(
    dy_ptr,
    xa_ptr,
    lora_B_ptr,
    t_ptr,
    dB_ptr,
    db_ptr,
    amax_ptr,
    column_scale_ptr,
    M: tl.int32,
    N: tl.int32,
    m_chunk: tl.int32,
    stride_dy_m: tl.int64,
    stride_dy_n: tl.int64,
    scaling: tl.float32,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    NEED_T: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    ROW_MAXIMA: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    WGMMA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (cdiv(N, BN), cdiv(M, m_chunk)); m_chunk is a multiple of BM.

    t [M, P] in fp32, with a leading dimension of column blocks unless ATOMIC; dB [N, P] and db [N] in fp32, with one of
    row chunks unless ATOMIC; amax int32 [M], zeroed: the bits of float32 maxima, whose order no result depends on;
    column_scale fp32 [N], with COLUMN_SCALES.
    """
    dtype = dy_ptr.dtype.element_ty
    pid_n = tl.program_id(0)
    chunk = tl.program_id(1)
    m_chunk = m_chunk // BM * BM  # as it is: said so that the compiler sees aligned tiles
    m_begin = chunk * m_chunk
    m_end = tl.minimum(m_begin + m_chunk, M)
    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_p = tl.arange(0, BP)
    if ALIGNED_N:  # what divides by 8 lets the compiler use 16-byte loads (masks and rows alike)
        N = N // 8 * 8
        stride_dy_m = stride_dy_m // 8 * 8
    mask_n = offs_n < N
    mask_p = offs_p < P
    row_n = offs_n.to(tl.int64)[:, None]  # [BN, 1]
    if ATOMIC:
        p_t = t_ptr
        p_dB = dB_ptr
        p_db = db_ptr
    else:
        p_t = t_ptr + pid_n.to(tl.int64) * M * P
        p_dB = dB_ptr + chunk.to(tl.int64) * N * P
        p_db = db_ptr + chunk.to(tl.int64) * N
    if NEED_T:
        p_lora_B = lora_B_ptr + row_n * P + offs_p[None, :]
        b_lora_B = tl.load(p_lora_B, mask=mask_n[:, None] & mask_p[None, :], other=0.0).to(dtype)  # [BN, BP]
    if NEED_DB:
        if WGMMA:
            b_dB = tl.zeros((BN, BP), dtype=tl.float32)
        else:
            b_dB = tl.zeros((BP, BN), dtype=tl.float32)
    if NEED_DBIAS:
        b_db = tl.zeros((BN,), dtype=tl.float32)
    if COLUMN_SCALES:
        b_column_scale = tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0)  # [BN]

    base, first, last = walked(m_begin, m_end, WGMMA)
    for m0 in range(first, last, BM):
        offs_m = base + m0 + tl.arange(0, BM)
        mask_m = offs_m < M
        row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
        mask_mn = mask_m[:, None] & mask_n[None, :]
        b_dy = load_tile(dy_ptr + row_m * stride_dy_m, offs_n, stride_dy_n, mask_mn, ALIGNED_N)  # [BM, BN]
        if NEED_T:
            b_t = tl.dot(b_dy, b_lora_B, input_precision=PRECISION) * scaling  # [BM, BP]
            reduce_store(p_t + row_m * P + offs_p[None, :], b_t, mask_m[:, None] & mask_p[None, :], ATOMIC=ATOMIC)
        if NEED_DB:
            p_xa = xa_ptr + row_m * P + offs_p[None, :]
            b_xa = tl.load(p_xa, mask=mask_m[:, None] & mask_p[None, :], other=0.0)  # [BM, BP]
            if WGMMA:
                b_dB = tl.dot(tl.trans(b_dy), b_xa, b_dB, input_precision=PRECISION)  # [BN, BP]
            else:
                b_dB = tl.dot(tl.trans(b_xa), b_dy, b_dB, input_precision=PRECISION)  # [BP, BN]
        if NEED_DBIAS:
            b_db += tl.sum(b_dy.to(tl.float32), axis=0)
        if ROW_MAXIMA:
            if COLUMN_SCALES:
                b_scaled = b_dy.to(tl.float32) * b_column_scale[None, :]
                b_amax = from_absolute_bits(tl.max(absolute_bits(b_scaled), axis=1), tl.float32)  # [BM]
            else:
                b_amax = from_absolute_bits(tl.max(absolute_bits(b_dy), axis=1), dtype)  # [BM]
            tl.atomic_max(amax_ptr + offs_m, b_amax.to(tl.int32, bitcast=True), mask=mask_m, sem="relaxed")

    if NEED_DB:
        if WGMMA:
            reduce_store(
                p_dB + row_n * P + offs_p[None, :],
                b_dB * scaling,
                mask_n[:, None] & mask_p[None, :],
                ATOMIC=ATOMIC,
            )
        else:
            reduce_store(
                p_dB + offs_n.to(tl.int64)[None, :] * P + offs_p[:, None],
                b_dB * scaling,
                mask_p[:, None] & mask_n[None, :],
                ATOMIC=ATOMIC,
            )
    if NEED_DBIAS:
        reduce_store(p_db + offs_n, b_db, mask_n, ATOMIC=ATOMIC)


@triton.jit(do_not_specialize=QUANTIZE_RUNTIME)
def exact_quantize(
    dy_ptr,
    amax_ptr,
    column_scale_ptr,
    q_ptr,
    scale_ptr,
    M: tl.int32,
    N: tl.int32,
    stride_dy_m: tl.int64,
    stride_dy_n: tl.int64,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    LIMIT_RECIPROCAL: tl.constexpr,
    ALIGNED_N: tl.constexpr,
):
    """q [M, N] of dY, times column_scale [N] with COLUMN_SCALES, and its row scales [M] in fp32, from the rows' maxima.
    Grid (cdiv(M, BM) · cdiv(N, BN),)."""
    blocks_n = tl.cdiv(N, BN)
    pid_n = tl.program_id(0) % blocks_n
    offs_m = tl.program_id(0) // blocks_n * BM + tl.arange(0, BM)
    offs_n = pid_n * BN + tl.arange(0, BN)
    if ALIGNED_N:
        N = N // 8 * 8
        stride_dy_m = stride_dy_m // 8 * 8
    mask_m = offs_m < M
    mask_mn = mask_m[:, None] & (offs_n < N)[None, :]
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    b_dy = load_tile(dy_ptr + row_m * stride_dy_m, offs_n, stride_dy_n, mask_mn, ALIGNED_N)  # [BM, BN]
    if COLUMN_SCALES:
        b_column_scale = tl.load(column_scale_ptr + offs_n, mask=offs_n < N, other=0.0)  # [BN]
        b_dy = b_dy.to(tl.float32) * b_column_scale[None, :]
    b_amax = tl.load(amax_ptr + offs_m, mask=mask_m, other=0).to(tl.float32, bitcast=True)  # [BM]
    b_scale = scale_of(b_amax, LIMIT_RECIPROCAL)
    tl.store(q_ptr + row_m * N + offs_n[None, :], in_eight_bits(b_dy, b_scale[:, None], q_ptr), mask=mask_mn)
    if pid_n == 0:
        tl.store(scale_ptr + offs_m, b_scale, mask=mask_m)


@triton.jit
def rotated(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """values [ROWS, COLUMNS] times a Hadamard matrix on each BLOCK of columns, in fp32
    (`loge_kernels.numerics.rotation`)."""
    offs = tl.arange(0, BLOCK)
    shared = offs[:, None] & offs[None, :]
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    signs = (1 - 2 * (shared & 1)).to(values.dtype)
    blocks = tl.reshape(values, (ROWS * COLUMNS // BLOCK, BLOCK))
    out = tl.dot(blocks, signs, input_precision=PRECISION) * (1.0 / tl.sqrt(BLOCK * 1.0))
    return tl.reshape(out, (ROWS, COLUMNS))


@triton.jit(do_not_specialize=QUANTIZE_ROWS_RUNTIME)
def exact_quantize_rows(
    x_ptr,
    q_ptr,
    scale_ptr,
    M: tl.int32,
    N: tl.int32,
    stride_m: tl.int64,
    stride_n: tl.int64,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROTATE: tl.constexpr,
    LIMIT_RECIPROCAL: tl.constexpr,
    ALIGNED_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q [M, N] of x, rotated in blocks of ROTATE columns (1: not), and its row scales [M] in fp32. Grid (cdiv(M, BM),):
    a block reads its rows twice, the second time from L2."""
    offs_m = tl.program_id(0) * BM + tl.arange(0, BM)
    if ALIGNED_N:
        N = N // 8 * 8
        stride_m = stride_m // 8 * 8
    mask_m = offs_m < M
    row_m = offs_m.to(tl.int64)[:, None]  # [BM, 1]
    b_bits = tl.zeros((BM,), dtype=tl.int32)
    for n0 in range(0, N, BN):
        offs_n = n0 + tl.arange(0, BN)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        b_x = load_tile(x_ptr + row_m * stride_m, offs_n, stride_n, mask, ALIGNED_N)  # [BM, BN]
        if ROTATE > 1:
            b_x = rotated(b_x, BM, BN, ROTATE, PRECISION)
        b_bits = tl.maximum(b_bits, tl.max(absolute_bits(b_x.to(tl.float32)), axis=1))
    b_scale = scale_of(b_bits.to(tl.float32, bitcast=True), LIMIT_RECIPROCAL)  # [BM]
    tl.store(scale_ptr + offs_m, b_scale, mask=mask_m)
    for n0 in range(0, N, BN):
        offs_n = n0 + tl.arange(0, BN)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        b_x = load_tile(x_ptr + row_m * stride_m, offs_n, stride_n, mask, ALIGNED_N)  # [BM, BN]
        if ROTATE > 1:
            b_x = rotated(b_x, BM, BN, ROTATE, PRECISION)
        tl.store(q_ptr + row_m * N + offs_n[None, :], in_eight_bits(b_x, b_scale[:, None], q_ptr), mask=mask)
