"""What s_ij is, what its derivative is, and which keys a tile can see: said once, for every kernel.

    s_ij = scale * q_i . k_j      where key j is visible to query i
    s_ij = -inf                   elsewhere

    d s_ij / d (q_i . k_j) = scale

Scores are kept in one of two units. Raw ones are q.k itself: the scale joins log2(e) in the exponent and costs nothing.
That needs a positive scale and a score that nothing else changes; otherwise scores are in natural units, scale * q.k.

Visible pairs lie within a band of tiles: those that every query sees whole (`full`) run without a mask, those at its
edges (`partial`) with one, and tiles outside are never loaded.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def units(scale, spec: tl.constexpr, ACC: tl.constexpr):
    """What one unit of score is worth: (in natural logarithm, in base 2); multiplied in 64 bits."""
    worth = tl.full([], scale if spec.raw else 1.0, tl.float64)
    return worth.to(ACC), (worth * LOG2E).to(ACC)


@triton.jit
def score(qk, scale, spec: tl.constexpr):
    """Scores of a tile of products q.k, in the units of `units`."""
    if spec.raw:
        return qk
    else:
        return qk * tl.full([], scale, qk.dtype)


@triton.jit
def derivative(total, scale):
    """Gradient with respect to q.k, summed over a row or a column, from the same sum with respect to s."""
    return total * tl.full([], scale, total.dtype)


@triton.jit
def visible(i, j, offset, sizes, spec: tl.constexpr):
    """Whether query i sees key j; i and j broadcast against each other in either order."""
    keep = (i < sizes.seqlen_q) & (j < sizes.seqlen_k)
    if spec.causal:
        keep &= j <= i + offset
    return keep


@triton.jit
def key_band(row, offset, sizes, spec: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries row ... row + BLOCK_M - 1 see: (begin, full_begin, full_end, end) of `band`."""
    full_end, end = sizes.seqlen_k // BLOCK_N * BLOCK_N, sizes.seqlen_k
    if spec.causal:
        last = tl.minimum(row + BLOCK_M, sizes.seqlen_q) - 1
        full_end = tl.minimum(full_end, tl.maximum(row + offset + 1, 0) // BLOCK_N * BLOCK_N)
        end = tl.minimum(end, last + offset + 1)
    return band(0, 0, full_end, end)


@triton.jit
def query_band(col, offset, sizes, spec: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries that see keys col ... col + BLOCK_N - 1: (begin, full_begin, full_end, end) of `band`."""
    begin, full_begin = 0, 0
    if spec.causal:
        last = tl.minimum(col + BLOCK_N, sizes.seqlen_k) - 1
        begin = tl.maximum(col - offset, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(last - offset, 0), BLOCK_M) * BLOCK_M
    return band(begin, full_begin, sizes.seqlen_q // BLOCK_M * BLOCK_M, sizes.seqlen_q)


@triton.jit
def band(begin, full_begin, full_end, end):
    """Tiles [begin, end) whose middle [full_begin, full_end) is full; without a middle, all are partial."""
    empty = full_begin >= full_end
    return begin, tl.where(empty, begin, full_begin), tl.where(empty, begin, full_end), end


@triton.jit
def tiles(run, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """How many full or partial tiles a band has."""
    begin, full_begin, full_end, end = run
    if PARTIAL:
        return (full_begin - begin) // BLOCK + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
    else:
        return (full_end - full_begin) // BLOCK


@triton.jit
def tile_start(run, t, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """Where the t-th full or partial tile of a band starts; partial ones before the full ones come first."""
    begin, full_begin, full_end, end = run
    if PARTIAL:
        before = (full_begin - begin) // BLOCK
        return tl.where(t < before, begin + t * BLOCK, full_end + (t - before) * BLOCK)
    else:
        return full_begin + t * BLOCK
