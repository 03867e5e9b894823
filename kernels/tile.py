"""Where things lie: which tile a program owns, pointers into a View, loads and stores that mind the edges.

Offsets are 64-bit. A tile's rows start at a scalar and its lanes add a loop-invariant offset, so that a loop over tiles
moves one address and not a tile of them.
"""

import triton
import triton.language as tl

# beyond any length: causal reads the same for all offsets past it, and a tile's end + q_offset stays within 32 bits
FARTHEST: tl.constexpr = tl.constexpr(2**30 - 2**9)


@triton.jit
def locate(blocks, heads):
    """The tile, head and batch element of this program; neighbours share a head, then a batch element."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % heads, pid // blocks // heads


@triton.jit
def first_position(mods, sizes, b):
    """Position of query 0 of batch element b among the keys."""
    if mods.q_offset is not None:
        offset = tl.load(mods.q_offset + b).to(tl.int64)
        return tl.minimum(tl.maximum(offset, -FARTHEST), FARTHEST).to(tl.int32)
    else:
        return sizes.q_offset


@triton.jit
def pointers(x, b, h, start, rows, dims):
    """Addresses of x[b, h, start + rows, dims]: rows [R], dims [D] -> [R, D]."""
    base = x.ptr + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h + start.to(tl.int64) * x.stride_s
    return base + (rows.to(tl.int64) * x.stride_s)[:, None] + (dims.to(tl.int64) * x.stride_d)[None, :]


@triton.jit
def inside(start, end, rows, dims, DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Lanes of a tile within its rows, where those are RAGGED, and within its DIM columns, where those are padded."""
    if RAGGED and dims.shape[0] != DIM:
        return ((start + rows) < end)[:, None] & (dims < DIM)[None, :]
    elif RAGGED:
        return ((start + rows) < end)[:, None]
    else:
        return (dims < DIM)[None, :]


@triton.jit
def load(x, b, h, start, end, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """x[b, h, start : start + ROWS] -> [ROWS, BLOCK_D], zero past DIM and, where RAGGED, past row `end`."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    if RAGGED or BLOCK_D != DIM:
        mask = inside(start, end, rows, dims, DIM, RAGGED)
        return tl.load(pointers(x, b, h, start, rows, dims), mask=mask, other=0.0)
    else:
        return tl.load(pointers(x, b, h, start, rows, dims))


@triton.jit
def finite(x):
    """x with 0 for what is NaN or infinite, which a weight of 0 does not keep out of a sum."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def store(x, value, b, h, start, end, DIM: tl.constexpr):
    """Write value [ROWS, BLOCK_D] to x[b, h, start : start + ROWS], without what lies past `end` and DIM."""
    rows, dims = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    mask = inside(start, end, rows, dims, DIM, True)
    tl.store(pointers(x, b, h, start, rows, dims), value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_pointers(x, sizes, b, h, start, ROWS: tl.constexpr):
    """Addresses in a dense [batch, heads, seqlen_q] tensor (lse, delta): [ROWS]."""
    return x + (b.to(tl.int64) * sizes.heads + h) * sizes.seqlen_q + start + tl.arange(0, ROWS)


@triton.jit
def load_rows(x, sizes, b, h, start, other, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """x[b, h, start : start + ROWS] of a tensor laid out as lse, `other` past its end where RAGGED: [ROWS]."""
    if RAGGED:
        mask = start + tl.arange(0, ROWS) < sizes.seqlen_q
        return tl.load(row_pointers(x, sizes, b, h, start, ROWS), mask=mask, other=other)
    else:
        return tl.load(row_pointers(x, sizes, b, h, start, ROWS))
