"""Where things lie: which tile a program owns, pointers into a View, loads and stores that mind the edges.

Offsets are 64-bit. A tile's rows start at a scalar and its lanes add a loop-invariant offset, so that a loop over tiles
moves one address and not a tile of them.

Sequences may be packed one after another into a batch of one. A program then looks up the sequence that owns its tile;
rows are counted from the sequence's start, `q0` or `k0`, which is 0 where nothing is packed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .spec import Sizes


class Rows(NamedTuple):
    """A dense [batch, heads, seqlen] tensor."""

    ptr: Any
    heads: Any  # 0 where one batch element has all sequences
    seqlen: Any


# beyond any length: causal reads the same for all offsets past it, and a tile's end + q_offset stays within 32 bits
FARTHEST: tl.constexpr = tl.constexpr(2**30 - 2**9)


@triton.jit
def number(x):
    """The number that `launch.coded` made x of: a word of the arguments, in no register before it is asked for."""
    return (x.to(tl.uint64) >> 32).to(tl.int32)


@triton.jit
def decoded(x):
    """The Sizes that `launch.coded` made x of."""
    lengths = number(x.heads), number(x.seqlen_q), number(x.seqlen_k), number(x.batch)
    return Sizes(*lengths, number(x.q_offset), number(x.left), number(x.right))


@triton.jit
def locate(blocks, heads):
    """The tile, head and batch element of this program; neighbours share a head, then a batch element."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % heads, pid // blocks // heads


@triton.jit
def locate_group(blocks, heads, GROUP: tl.constexpr):
    """The same where GROUP heads of one tile are neighbours, then tiles, then groups."""
    pid = tl.program_id(0)
    rest = pid // GROUP
    group, b = rest // blocks % (heads // GROUP), rest // blocks // (heads // GROUP)
    return rest % blocks, group * GROUP + pid % GROUP, b


@triton.jit
def place(
    mods, sizes, heads, BY_KEY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr = 1,
    DOWNWARDS: tl.constexpr = False,
):  # fmt: skip
    """The tile of BLOCK queries or keys that this program owns: (first row, head, sequence, q0, k0, its Sizes).

    Programs start in the order of their ids. Those of one tile in the GROUP of heads that share keys come one after
    another, then the tiles of the sequence, DOWNWARDS from the last where that one has most to do, then the next group:
    long programs start before short ones, and what run at a time read the same keys.
    """
    if mods.tiles is None:
        blocks = tl.cdiv(sizes.seqlen_k if BY_KEY else sizes.seqlen_q, BLOCK)
        block, h, b = locate_group(blocks, heads, GROUP)
        if DOWNWARDS:
            block = blocks - 1 - block
        return block * BLOCK, h, b, 0, 0, sizes
    else:
        blocks = tl.num_programs(0) // heads
        tile, h, _ = locate_group(blocks, heads, GROUP)
        if DOWNWARDS:
            tile = blocks - 1 - tile
        low, high = tile * 0, sizes.batch
        while high - low > 1:  # tiles[low] <= tile, and tile < tiles[high] where such a sequence exists
            middle = (low + high) // 2
            after = tl.load(mods.tiles + middle) <= tile
            low, high = tl.where(after, middle, low), tl.where(after, high, middle)
        q0, k0, own = sequence(mods, sizes, low)
        row = (tile - tl.load(mods.tiles + low)) * BLOCK
        spare = row >= (own.seqlen_k if BY_KEY else own.seqlen_q)  # more programs than tiles: this one owns no row
        blind = spare | bad(mods, low)  # hostile lengths may be longer than what is read by them
        seqlen_q = tl.where(blind if BY_KEY else spare, 0, own.seqlen_q)
        seqlen_k = tl.where(spare if BY_KEY else blind, 0, own.seqlen_k)
        own = Sizes(own.heads, seqlen_q, seqlen_k, own.batch, own.q_offset, own.left, own.right)
        return row, h, low, q0, k0, own


@triton.jit
def queries(mods, sizes, spec: tl.constexpr, shape: tl.constexpr, BLOCK_M: tl.constexpr):
    """`place` for BLOCK_M queries: (first row, head, sequence, i [M, 1], position of query 0, q0, k0, its Sizes)."""
    LAST_LONGEST: tl.constexpr = spec.causal or spec.right  # later queries see more keys
    row, h, b, q0, k0, own = place(mods, sizes, sizes.heads, False, BLOCK_M, shape.group, LAST_LONGEST)
    i = (row + tl.arange(0, BLOCK_M))[:, None]
    return row, h, b, i, first_position(mods, own, b), q0, k0, own


@triton.jit
def sequence(mods, sizes, b):
    """Where sequence b starts, and its lengths: (q0, k0, Sizes)."""
    if mods.starts_q is None:
        return 0, 0, sizes
    else:
        q0, k0 = tl.load(mods.starts_q + b), tl.load(mods.starts_k + b)
        seqlen_q, seqlen_k = tl.load(mods.starts_q + b + 1) - q0, tl.load(mods.starts_k + b + 1) - k0
        return q0, k0, Sizes(sizes.heads, seqlen_q, seqlen_k, sizes.batch, sizes.q_offset, sizes.left, sizes.right)


@triton.jit
def rows_of(x, mods, sizes):
    """A dense [batch, heads, seqlen_q] tensor as Rows: its strides are lengths, and so never specialised."""
    return Rows(x, sizes.heads if mods.starts_q is None else 0, sizes.seqlen_q)


@triton.jit
def first_position(mods, sizes, b):
    """Position of query 0 of batch element b among the keys."""
    if mods.q_offset is not None:
        offset = tl.load(mods.q_offset + b).to(tl.int64)
        return tl.minimum(tl.maximum(offset, -FARTHEST), FARTHEST).to(tl.int32)
    else:
        return sizes.q_offset


@triton.jit
def origin(x, b, h):
    """Address of x[b, h, 0, 0]."""
    return x.ptr + b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h


@triton.jit
def pointers(x, b, h, start, rows, dims):
    """Addresses of x[b, h, start + rows, dims]: rows [R], dims [D] -> [R, D]."""
    base = origin(x, b, h) + start.to(tl.int64) * x.stride_s
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
def bad(mods, b):
    """Whether the lengths of packed sequence b were hostile: it reads nothing, and its rows are NaN."""
    return tl.load(mods.bad + b) != 0


@triton.jit
def spoiled(x, mods, b):
    """x, or NaN for a bad sequence."""
    if mods.bad is None:
        return x
    else:
        return tl.where(bad(mods, b), float("nan"), x)


@triton.jit
def store(x, value, b, h, start, end, DIM: tl.constexpr, where=None):
    """Write value [ROWS, BLOCK_D] to x[b, h, start : start + ROWS], `where` given and not past `end` and DIM."""
    rows, dims = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    mask = inside(start, end, rows, dims, DIM, True)
    if where is not None:
        mask &= where
    tl.store(pointers(x, b, h, start, rows, dims), value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def strided_rows(x, b, h, start, ROWS: tl.constexpr):
    """Addresses of x[b, h, start : start + ROWS, 0], of a View with one number a row: [ROWS]."""
    return origin(x, b, h) + (start.to(tl.int64) + tl.arange(0, ROWS)) * x.stride_s


@triton.jit
def row_pointers(x, b, h, start, ROWS: tl.constexpr):
    """Addresses of x[b, h, start : start + ROWS] of Rows, side by side: 64-bit lanes would cost registers."""
    return x.ptr + (b * x.heads + h).to(tl.int64) * x.seqlen + start + tl.arange(0, ROWS)


@triton.jit
def load_rows(x, b, h, start, end, other, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """x[b, h, start : start + ROWS] of Rows, `other` past row `end` where RAGGED: [ROWS]."""
    if RAGGED:
        return tl.load(row_pointers(x, b, h, start, ROWS), mask=start + tl.arange(0, ROWS) < end, other=other)
    else:
        return tl.load(row_pointers(x, b, h, start, ROWS))


@triton.jit
def store_rows(x, value, b, h, start, end):
    """Write value [ROWS] to x[b, h, start : start + ROWS] of Rows, without what lies past `end`."""
    mask = start + tl.arange(0, value.shape[0]) < end
    tl.store(row_pointers(x, b, h, start, value.shape[0]), value, mask=mask)
