"""Which tiles a program visits: those in which some query sees some key, and among them those that all see whole.

Visible pairs lie within a band of tiles: those that every query sees whole (`full`) run without a mask, those at its
edges (`partial`) with one, and tiles outside are never loaded. A block mask lists its tiles instead, save for packed
sequences and parts of a call, which begin anywhere in a block.

    band     (begin, full_begin, full_end, end)      tiles [begin, end), whose middle is full
    listed   (whole, part, list, end)                the blocks of `list`, whole ones first

Where Spec.hides, any pair may be hidden and all tiles count as partial. Rows past `end` are seen by nobody.
"""

import triton
import triton.language as tl

from . import tile


@triton.jit
def of_keys(row, b, h, offset, mods, sizes, spec: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys that queries row ... row + BLOCK_M - 1 see."""
    begin, end = bounds_of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    if spec.blocks is not None and mods.tiles is None and mods.origin is None:
        lists, counts = mods.keys, mods.key_counts
        return listed(lists, counts, b, h, row // spec.blocks[0], end)
    else:
        full_begin, full_end = 0, sizes.seqlen_k // BLOCK_N * BLOCK_N
        if spec.causal:
            full_end = tl.minimum(full_end, tl.maximum(row + offset + 1, 0) // BLOCK_N * BLOCK_N)
        if spec.right:
            full_end = tl.minimum(full_end, within(row, offset, sizes.right, 1, sizes.seqlen_k) // BLOCK_N * BLOCK_N)
        if spec.left:
            last = tl.minimum(row + BLOCK_M, sizes.seqlen_q) - 1
            full_begin = tl.cdiv(within(last, offset, -sizes.left, 0, sizes.seqlen_k), BLOCK_N) * BLOCK_N
        return band(begin, full_begin, full_end, end, spec)


@triton.jit
def bounds_of_keys(row, b, h, offset, mods, sizes, spec: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tile of keys that any of the queries may see, and the end of the keys that any may see."""
    first, end = 0, sizes.seqlen_k
    last = tl.minimum(row + BLOCK_M, sizes.seqlen_q) - 1
    if spec.causal:
        end = tl.minimum(end, last + offset + 1)
    if spec.right:
        end = tl.minimum(end, within(last, offset, sizes.right, 1, sizes.seqlen_k))
    if spec.left:
        first = within(row, offset, -sizes.left, 0, sizes.seqlen_k)
    if mods.key_begin is not None:
        lowest, highest = span(mods.key_begin, mods.key_end, b, h, row, sizes.seqlen_q, end, BLOCK_M)
        first, end = tl.maximum(first, lowest), tl.minimum(end, highest)
    return whole_tiles(first, end, BLOCK_N)


@triton.jit
def of_queries(col, b, h, offset, mods, sizes, spec: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries that see keys col ... col + BLOCK_N - 1."""
    first, full_begin = 0, 0
    full_end, end = sizes.seqlen_q // BLOCK_M * BLOCK_M, sizes.seqlen_q
    last = tl.minimum(col + BLOCK_N, sizes.seqlen_k) - 1
    if spec.causal:
        first = tl.maximum(col - offset, 0)
        full_begin = tl.cdiv(tl.maximum(last - offset, 0), BLOCK_M) * BLOCK_M
    if spec.right:
        first = within(col, -offset, -sizes.right, 0, sizes.seqlen_q)
        full_begin = tl.cdiv(within(last, -offset, -sizes.right, 0, sizes.seqlen_q), BLOCK_M) * BLOCK_M
    if spec.left:
        full_end = tl.minimum(full_end, within(col, -offset, sizes.left, 1, sizes.seqlen_q) // BLOCK_M * BLOCK_M)
        end = tl.minimum(end, within(last, -offset, sizes.left, 1, sizes.seqlen_q))
    if mods.key_begin is not None:
        lowest, highest = span(mods.query_begin, mods.query_end, b, h, col, sizes.seqlen_k, end, BLOCK_N)
        first, end = tl.maximum(first, lowest), tl.minimum(end, highest)
    begin, end = whole_tiles(first, end, BLOCK_M)
    if spec.blocks is not None and mods.tiles is None and mods.origin is None:
        lists, counts = mods.queries, mods.query_counts
        return listed(lists, counts, b, h, col // spec.blocks[1], end)
    else:
        return band(begin, full_begin, full_end, end, spec)


@triton.jit
def whole_tiles(first, end, BLOCK: tl.constexpr):
    """Where the tile of row `first` begins, and `end`; nothing where `end` comes before `first`."""
    return first // BLOCK * BLOCK, tl.where(first < end, end, 0)


@triton.jit
def within(x, offset, reach, more, length):
    """x + offset + reach + more, held to 0 ... length; each may be near 2^30, their sum is not 32-bit."""
    place = x.to(tl.int64) + offset + reach + more
    return tl.minimum(tl.maximum(place, 0), length).to(tl.int32)


@triton.jit
def span(begins, ends, b, h, start, length, end, ROWS: tl.constexpr):
    """The lowest of `begins` and the highest of `ends` over rows start ... start + ROWS - 1."""
    rows = tl.arange(0, ROWS)
    inside = start + rows < length
    lowest = tl.load(tile.strided_rows(begins, b, h, start, ROWS), mask=inside, other=2**30)
    highest = tl.load(tile.strided_rows(ends, b, h, start, ROWS), mask=inside, other=0)
    return tl.minimum(tl.min(lowest), end), tl.max(highest)


@triton.jit
def listed(lists, counts, b, h, block, end):
    """The blocks that a block sees: how many whole, how many in part, the address of the list."""
    count = tile.origin(counts, b, h) + block * counts.stride_s
    list = tile.origin(lists, b, h) + block * lists.stride_s
    return tl.load(count), tl.load(count + 1), list, end


@triton.jit
def band(begin, full_begin, full_end, end, spec: tl.constexpr):
    """Tiles [begin, end) whose middle [full_begin, full_end) is full; without a middle, all are partial."""
    if spec.hides:
        return begin, begin, begin, end
    else:
        empty = tl.maximum(begin, full_begin) >= full_end
        return begin, tl.where(empty, begin, tl.maximum(begin, full_begin)), tl.where(empty, begin, full_end), end


@triton.jit
def tiles(run, mods, spec: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """How many full or partial tiles of BLOCK rows a run has; SIZE is the axis of Spec.blocks."""
    if spec.blocks is not None and mods.tiles is None and mods.origin is None:
        whole, part, _, _ = run
        RATIO: tl.constexpr = spec.blocks[SIZE] // BLOCK
        if PARTIAL:
            return (whole + part) * RATIO if spec.hides else part * RATIO
        else:
            return whole * RATIO
    else:
        begin, full_begin, full_end, end = run
        if PARTIAL:
            return (full_begin - begin) // BLOCK + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
        else:
            return (full_end - full_begin) // BLOCK


@triton.jit
def start(run, t, mods, spec: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """Where the t-th full or partial tile starts; in a band, partial ones before the full ones come first."""
    if spec.blocks is not None and mods.tiles is None and mods.origin is None:
        whole, _, list, _ = run
        RATIO: tl.constexpr = spec.blocks[SIZE] // BLOCK
        skipped = whole if PARTIAL and not spec.hides else 0
        return tl.load(list + skipped + t // RATIO) * spec.blocks[SIZE] + t % RATIO * BLOCK
    else:
        begin, full_begin, full_end, _ = run
        if PARTIAL:
            before = (full_begin - begin) // BLOCK
            return tl.where(t < before, begin + t * BLOCK, full_end + (t - before) * BLOCK)
        else:
            return full_begin + t * BLOCK
