"""What s_ij is, what its derivative is, and whether query i sees key j: said once, for every kernel.

    x_ij = scale * q_i . k_j
    y_ij = softcap * tanh(x_ij / softcap)
    z_ij = y_ij + bias_ij - slope * |i + q_offset - j|
    s_ij = score_mod(z_ij)       where key j is visible to query i
    s_ij = -inf                  elsewhere

Each line stands only where its operand is given. Gradients go up the same lines, tangents down.

Scores are kept in one of two units. Raw ones are q.k itself: the scale joins log2(e) in the exponent and costs nothing.
That needs a positive scale and a score that nothing else changes; otherwise scores are in natural units.
"""

import triton
import triton.language as tl

from . import tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
EVERY: tl.constexpr = tl.constexpr(-2)  # Blocks.state of a block whose pairs are all visible


@triton.jit
def units(scale, spec: tl.constexpr, ACC: tl.constexpr):
    """What one unit of score is worth: (in natural logarithm, in base 2); multiplied in 64 bits."""
    worth = tl.cast(scale if spec.raw else 1.0, tl.float64)
    return worth.to(ACC), (worth * LOG2E).to(ACC)


@triton.jit
def score(qk, at, mods, sizes, scale, spec: tl.constexpr):
    """Scores of a tile of products q.k, in the units of `units`."""
    if spec.raw:
        return qk
    else:
        s = added(capped(qk * tl.cast(scale, qk.dtype), spec), at, mods, sizes, spec)
        if mods.score_fn is not None:
            b, h, i, j = indices(at, mods, sizes)
            s = mods.score_fn(s, b, h, i, j, mods.score_args).to(qk.dtype)
        return s


@triton.jit
def gradient(ds, qk, at, mods, sizes, scale, spec: tl.constexpr):
    """From the gradient of s those of z and of x; where pairs are hidden, they are not yet 0."""
    if spec.raw:
        return ds, ds
    else:
        ds_dz, dz_dx = factors(qk, at, mods, sizes, scale, spec)
        dz = ds * ds_dz
        return dz, dz * dz_dx


@triton.jit
def tangent(tqk, qk, at, mods, sizes, scale, spec: tl.constexpr):
    """The tangent of s, natural, from those of q.k, bias and slopes; where pairs are hidden, not yet 0."""
    t = tqk * tl.cast(scale, tqk.dtype)
    if not spec.raw:
        ds_dz, dz_dx = factors(qk, at, mods, sizes, scale, spec)
        t *= dz_dx
        if mods.bias_tangent is not None:
            t += element(mods.bias_tangent, at, sizes, spec.bias_rows, spec.bias_cols).to(t.dtype)
        if mods.slopes_tangent is not None:
            slope = tl.load(tile.origin(mods.slopes_tangent, at.b, at.h)).to(t.dtype)
            t -= slope * distance(at).to(t.dtype)
        t *= ds_dz
    return t


@triton.jit
def factors(qk, at, mods, sizes, scale, spec: tl.constexpr):
    """ds/dz and dz/dx, the chain rule's factors of the lines that are not linear; 1.0 where there is none."""
    ds_dz, dz_dx = 1.0, 1.0
    x = qk * tl.cast(scale, qk.dtype)
    if mods.score_fn is not None:
        b, h, i, j = indices(at, mods, sizes)
        z = added(capped(x, spec), at, mods, sizes, spec)
        ds_dz = mods.score_derivative(z, b, h, i, j, mods.score_args).to(qk.dtype)
    if spec.softcap is not None:
        ratio = tanh(x * (1 / spec.softcap))
        dz_dx = 1.0 - ratio * ratio
    return ds_dz, dz_dx


@triton.jit
def derivative(total, scale):
    """Gradient with respect to q.k, summed over a row or a column, from the same sum with respect to x."""
    return total * tl.cast(scale, total.dtype)


@triton.jit
def capped(x, spec: tl.constexpr):
    """y of x."""
    if spec.softcap is not None:
        return spec.softcap * tanh(x * (1 / spec.softcap))
    else:
        return x


@triton.jit
def added(y, at, mods, sizes, spec: tl.constexpr):
    """z of y."""
    if mods.bias is not None:
        y += element(mods.bias, at, sizes, spec.bias_rows, spec.bias_cols).to(y.dtype)
    if mods.slopes is not None:
        slope = tl.load(tile.origin(mods.slopes, at.b, at.h)).to(y.dtype)
        y -= slope * distance(at).to(y.dtype)
    return y


@triton.jit
def distance(at):
    """How far a key is from the query's own position, on either side."""
    return tl.abs(at.i + at.offset - at.j)


@triton.jit
def tanh(x):
    """tanh, to the last bits of x's type: a continued fraction (Lambert 1768) near 0, where exponentials cancel."""
    TERMS: tl.constexpr = 9 if x.dtype == tl.float64 else 5
    square = tl.minimum(x * x, 0.5)  # the fraction is used up to there
    above, below = square * 0.0 + (2 * TERMS + 1), square * 0.0 + 1.0
    for k in tl.static_range(TERMS):
        above, below = (2 * TERMS - 1 - 2 * k) * above + square * below, above
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(x * x < 0.5, x * (below / above), tl.where(x < 0, -far, far))


@triton.jit
def indices(at, mods, sizes):
    """b, h, i and j as user functions get them, who index tensors with them: i and j within their sequence."""
    return numbered(at, tl.minimum(at.i, sizes.seqlen_q - 1), tl.minimum(at.j, sizes.seqlen_k - 1), mods)


@triton.jit
def numbered(at, i, j, mods):
    """(b, h, i, j) as the whole call numbers them, of which this one may be a part."""
    if mods.origin is None:
        return at.b, at.h, i, j
    else:
        x = mods.origin
        base = tile.origin(x, at.b, at.h)
        b, h = at.b + tl.load(base), at.h + tl.load(base + x.stride_d)
        return b, h, i + tl.load(base + 2 * x.stride_d), j + tl.load(base + 3 * x.stride_d)


@triton.jit
def element(x, at, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x[b, h, i, j] of a View that may lack an axis of queries or of keys; 0 past the lengths."""
    base = tile.origin(x, at.b, at.h)
    if ROWS and COLS:
        ptrs = base + at.i.to(tl.int64) * x.stride_s + at.j.to(tl.int64) * x.stride_d
        return tl.load(ptrs, mask=(at.i < sizes.seqlen_q) & (at.j < sizes.seqlen_k), other=0)
    elif ROWS:
        return tl.load(base + at.i.to(tl.int64) * x.stride_s, mask=at.i < sizes.seqlen_q, other=0)
    elif COLS:
        return tl.load(base + at.j.to(tl.int64) * x.stride_d, mask=at.j < sizes.seqlen_k, other=0)
    else:
        return tl.load(base)


@triton.jit
def visible(at, mods, sizes, spec: tl.constexpr):
    """Whether query i sees key j; i and j broadcast against each other in either order."""
    keep = (at.i < sizes.seqlen_q) & (at.j < sizes.seqlen_k)
    if spec.causal:
        keep &= at.j <= at.i + at.offset
    if spec.right:
        keep &= at.j - at.i - at.offset <= sizes.right
    if spec.left:
        keep &= at.j - at.i - at.offset >= -sizes.left
    if mods.mask is not None:
        keep &= element(mods.mask, at, sizes, spec.mask_rows, spec.mask_cols) != 0
    if mods.bias is not None:
        keep &= not_lowest(element(mods.bias, at, sizes, spec.bias_rows, spec.bias_cols))
    if mods.mask_fn is not None:
        b, h, i, j = indices(at, mods, sizes)
        keep &= mods.mask_fn(b, h, i, j, mods.mask_args) != 0
    if spec.blocks is not None:
        keep &= in_blocks(at, mods, keep, spec)
    return keep


@triton.jit
def not_lowest(bias):
    """Whether a bias leaves its key visible: -inf and the lowest number of its type, which stands for it, do not."""
    if bias.dtype == tl.float16:
        return (bias <= -65504.0) == 0
    elif bias.dtype == tl.bfloat16:
        return (bias.to(tl.float32) <= -3.3895313892515355e38) == 0
    elif bias.dtype == tl.float32:
        return (bias <= -3.4028234663852886e38) == 0
    else:
        return (bias <= -1.7976931348623157e308) == 0


@triton.jit
def in_blocks(at, mods, keep, spec: tl.constexpr):
    """Whether the block mask shows key j to query i; looked up where `keep`."""
    QUERIES: tl.constexpr = spec.blocks[0]
    KEYS: tl.constexpr = spec.blocks[1]
    WORDS: tl.constexpr = (KEYS + 31) // 32
    b, h, i, j = numbered(at, at.q0 + at.i, at.k0 + at.j, mods)
    base = tile.origin(mods.state, b, h)
    state = tl.load(base + (i // QUERIES) * mods.state.stride_s + j // KEYS, mask=keep, other=-1)
    word = (state.to(tl.int64) * QUERIES + i % QUERIES) * WORDS + j % KEYS // 32
    bits = tl.load(mods.bits + word, mask=keep & (state >= 0), other=0)
    return (state == EVERY) | ((bits >> (j % KEYS % 32)) & 1 != 0)
