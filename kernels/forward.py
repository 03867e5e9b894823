"""Forward pass of FlashAttention-2 (Dao 2023, Algorithm 1).

    s   = score(q k^T)               [seqlen_q, seqlen_k]      -inf where a key is not visible
    lse = log sum_j exp(s_j)         [seqlen_q]                natural logarithm
    o   = sum_j exp(s_j - lse) v_j   [seqlen_q, head_dim_v]

One program owns BLOCK_M queries of one head and walks the keys they can see BLOCK_N at a time: first the tiles that
all of them see, then those at the edges. There a weight of 0 would not keep a NaN of v from queries that must not see
it, as 0 * NaN = NaN: such values are left out of the product, and make NaN of the outputs that do see them
afterwards.
"""

import torch
import triton
import triton.language as tl

from . import band, score, softmax, tile
from .launch import LENGTHS, cut, launch, prepare, shape_of, sizes_of, view
from .spec import Config, Mods, Positions, Site, Sizes, Spec, dense_like


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, o, lse, mods, heads, seqlen_q, seqlen_k, batch, q_offset, left, right, scale: tl.float64,
    spec: tl.constexpr, shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(heads, seqlen_q, seqlen_k, batch, q_offset, left, right)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    FIRST: tl.constexpr = 1 if spec.hides else 0  # the first kind of tile there is: full, partial
    lse = tile.rows_of(lse, mods, sizes)
    row, h, b, q0, k0, sizes = tile.place(mods, sizes, heads, False, BLOCK_M)
    h_k = h // shape.group
    offset = tile.first_position(mods, sizes, b)
    natural, unit = score.units(scale, spec, ACC)
    i = (row + tl.arange(0, BLOCK_M))[:, None]

    q_tile = tile.load(q, b, h, q0 + row, q0 + sizes.seqlen_q, shape.head_dim, BLOCK_M, D, True)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, DV], ACC)

    run = band.of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    end = k0 + run[3]  # keys past it are seen by no query of this tile: they are not read, whatever they hold
    strange = 0  # whether a partial tile of v held NaN or infinity
    for PARTIAL in tl.static_range(FIRST, 2):
        for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, PARTIAL)):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
            at = Site(b, h, i, (col + tl.arange(0, BLOCK_N))[None, :], offset, q0, k0)
            k_tile = tile.load(k, b, h_k, k0 + col, end, shape.head_dim, BLOCK_N, D, PARTIAL)
            qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
            s = score.score(qk, at, mods, sizes, scale, spec)
            if PARTIAL:
                s = tl.where(score.visible(at, mods, sizes, spec), s, float("-inf"))
            p, alpha, m, l = softmax.step(s, m, l, unit, PRECISE)
            p = softmax.thinned(p, at, mods, spec)
            v_tile = tile.load(v, b, h_k, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, PARTIAL)
            if PARTIAL:
                strange = tl.maximum(strange, tl.max((tile.finite(v_tile) != v_tile).to(tl.int32)))
                v_tile = tile.finite(v_tile)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=spec.precision, out_dtype=ACC)

    if strange != 0:  # rare: back to the queries that do see what is not finite
        for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, True)):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, True)
            at = Site(b, h, i, (col + tl.arange(0, BLOCK_N))[None, :], offset, q0, k0)
            v_tile = tile.load(v, b, h_k, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, True)
            keep = score.visible(at, mods, sizes, spec).to(v_tile.dtype)
            found = (tile.finite(v_tile) != v_tile).to(v_tile.dtype)
            seen = tl.dot(keep, found, input_precision=spec.precision, out_dtype=ACC)
            acc = tl.where(seen > 0.0, float("nan"), acc)

    o_tile, lse_row = softmax.finish(acc, m, l, natural, mods, b, h)
    tile.store(o, tile.spoiled(o_tile, mods, b), b, h, q0 + row, q0 + sizes.seqlen_q, shape.head_dim_v)
    tile.store_rows(lse, tile.spoiled(lse_row, mods, b), b, h, q0 + row, q0 + sizes.seqlen_q)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel.

    Args:
        q: [batch, heads, seqlen_q, head_dim], any strides.
        k: [batch, heads_k, seqlen_k, head_dim], any strides.
        v: [batch, heads_k, seqlen_k, head_dim_v], any strides.
        mods: optional operands.
        spec: compile-time choices.
        scale: factor of q.k.
        positions: position of query 0 among the keys, and the window's reach.
        config: tile sizes and launch options.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and axis order, and lse [batch, heads, seqlen_q] in natural
        logarithm, float32 (float64 for float64).
    """
    packed = mods.bad is not None
    o = dense_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if packed:  # rows of no sequence are nobody's
        o.zero_()
        lse.fill_(float("-inf"))
    operands, spec = prepare(mods, spec)
    programs, operands = cut(q, mods, operands, False, config.block_m)
    views = (view(x, packed) for x in (q, k, v, o))
    sizes = sizes_of(q, k, mods, positions)
    launch(forward_kernel, programs, q.device, config, *views, lse, operands, *sizes, scale, spec, shape_of(q, k, v))
    return o, lse
