"""Backward pass of FlashAttention-2 (Dao 2023, Algorithm 2) without atomics: every sum has one owner and one order.

    delta = sum_d o_d do_d - dlse                      [seqlen_q]
    p     = exp(s - lse)                               recomputed, never stored
    ds    = p (do v^T - delta)                         [seqlen_q, seqlen_k]
    dv    = p^T do      dk = ds/d(qk)^T q      dq = ds/d(qk) k

The gradient of lse needs no kernel of its own: d lse_i / d s_ij = p_ij, so it joins delta.

Where queries of a tile see different keys, what is not finite in q, k or do is left out of the products: pairs that
see it have a NaN in ds already, or get one in p, and the others must not get one from 0 * NaN.
"""

import torch
import triton
import triton.language as tl

from . import score, softmax, tile
from .launch import LENGTHS, launch, shape_of, sizes_of, view
from .spec import Configs, Mods, Sizes, Spec


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    o, do, dlse, delta, heads, seqlen_q, seqlen_k, q_offset,
    shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head."""
    sizes = Sizes(heads, seqlen_q, seqlen_k, q_offset)
    ACC: tl.constexpr = delta.dtype.element_ty
    block, h, b = tile.locate(tl.cdiv(sizes.seqlen_q, BLOCK_M), sizes.heads)
    row = block * BLOCK_M
    o_tile = tile.load(o, b, h, row, sizes.seqlen_q, shape.head_dim_v, BLOCK_M, shape.block_dv, True).to(ACC)
    do_tile = tile.load(do, b, h, row, sizes.seqlen_q, shape.head_dim_v, BLOCK_M, shape.block_dv, True).to(ACC)
    total = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        total -= tl.sum(tile.load(dlse, b, h, row, sizes.seqlen_q, 1, BLOCK_M, 1, True).to(ACC), 1)
    ptrs = tile.row_pointers(delta, sizes, b, h, row, BLOCK_M)
    tl.store(ptrs, total, mask=row + tl.arange(0, BLOCK_M) < sizes.seqlen_q)


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, mods, heads, seqlen_q, seqlen_k, q_offset, scale: tl.float64,
    spec: tl.constexpr, shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys of one key head and walks the queries that see them, of every head of the group.

    Tiles are kept transposed, [BLOCK_N, BLOCK_M]: p^T and ds^T then enter their products from registers.
    """
    sizes = Sizes(heads, seqlen_q, seqlen_k, q_offset)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    block, h_k, b = tile.locate(tl.cdiv(sizes.seqlen_k, BLOCK_N), sizes.heads // shape.group)
    col = block * BLOCK_N
    offset = tile.first_position(mods, sizes, b)
    natural, unit = score.units(scale, spec, ACC)
    j = (col + tl.arange(0, BLOCK_N))[:, None]

    k_tile = tile.load(k, b, h_k, col, sizes.seqlen_k, shape.head_dim, BLOCK_N, D, True)
    v_tile = tile.load(v, b, h_k, col, sizes.seqlen_k, shape.head_dim_v, BLOCK_N, DV, True)
    dk_acc = tl.zeros([BLOCK_N, D], ACC)
    dv_acc = tl.zeros([BLOCK_N, DV], ACC)

    run = score.query_band(col, offset, sizes, spec, BLOCK_M, BLOCK_N)
    for g in range(shape.group):
        h = h_k * shape.group + g
        for PARTIAL in tl.static_range(2):
            for t in range(score.tiles(run, BLOCK_M, PARTIAL)):
                row = score.tile_start(run, t, BLOCK_M, PARTIAL)
                q_tile = tile.load(q, b, h, row, sizes.seqlen_q, shape.head_dim, BLOCK_M, D, PARTIAL)
                lse_row = tile.load_rows(lse, sizes, b, h, row, float("inf"), BLOCK_M, PARTIAL)
                delta_row = tile.load_rows(delta, sizes, b, h, row, 0.0, BLOCK_M, PARTIAL)[None, :]
                qk = tl.dot(k_tile, q_tile.T, input_precision=spec.precision, out_dtype=ACC)
                s = score.score(qk, scale, spec)
                p = softmax.probability(s, softmax.closed(lse_row)[None, :], natural, unit, PRECISE)
                if PARTIAL:
                    i = (row + tl.arange(0, BLOCK_M))[None, :]
                    keep = score.visible(i, j, offset, sizes, spec)
                    p = tl.where(keep, p + (delta_row - delta_row), 0.0)  # NaN where do_i is not finite: delta_i is not
                do_tile = tile.load(do, b, h, row, sizes.seqlen_q, shape.head_dim_v, BLOCK_M, DV, PARTIAL)
                if dv is not None:
                    values = tile.finite(do_tile) if PARTIAL else do_tile
                    dv_acc = tl.dot(p.to(values.dtype), values, dv_acc, input_precision=spec.precision, out_dtype=ACC)
                if dk is not None:
                    dp = tl.dot(v_tile, do_tile.T, input_precision=spec.precision, out_dtype=ACC)
                    ds = p * (dp - delta_row)
                    if PARTIAL:
                        ds = tl.where(keep, ds, 0.0)  # p = 0 alone would let a NaN of dp through
                        q_tile = tile.finite(q_tile)
                    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=spec.precision, out_dtype=ACC)

    if dk is not None:
        tile.store(dk, score.derivative(dk_acc, scale), b, h_k, col, sizes.seqlen_k, shape.head_dim)
    if dv is not None:
        tile.store(dv, dv_acc, b, h_k, col, sizes.seqlen_k, shape.head_dim_v)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, do, lse, delta, dq, mods, heads, seqlen_q, seqlen_k, q_offset, scale: tl.float64,
    spec: tl.constexpr, shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head and walks the keys they see, as the forward does."""
    sizes = Sizes(heads, seqlen_q, seqlen_k, q_offset)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    block, h, b = tile.locate(tl.cdiv(sizes.seqlen_q, BLOCK_M), sizes.heads)
    h_k = h // shape.group
    row = block * BLOCK_M
    offset = tile.first_position(mods, sizes, b)
    natural, unit = score.units(scale, spec, ACC)
    i = (row + tl.arange(0, BLOCK_M))[:, None]

    q_tile = tile.load(q, b, h, row, sizes.seqlen_q, shape.head_dim, BLOCK_M, D, True)
    do_tile = tile.load(do, b, h, row, sizes.seqlen_q, shape.head_dim_v, BLOCK_M, DV, True)
    lse_row = softmax.closed(tile.load_rows(lse, sizes, b, h, row, float("inf"), BLOCK_M, True))[:, None]
    delta_row = tile.load_rows(delta, sizes, b, h, row, 0.0, BLOCK_M, True)[:, None]
    acc = tl.zeros([BLOCK_M, D], ACC)

    run = score.key_band(row, offset, sizes, spec, BLOCK_M, BLOCK_N)
    end = run[3]
    for PARTIAL in tl.static_range(2):
        for t in range(score.tiles(run, BLOCK_N, PARTIAL)):
            col = score.tile_start(run, t, BLOCK_N, PARTIAL)
            k_tile = tile.load(k, b, h_k, col, end, shape.head_dim, BLOCK_N, D, PARTIAL)
            v_tile = tile.load(v, b, h_k, col, end, shape.head_dim_v, BLOCK_N, DV, PARTIAL)
            qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
            dp = tl.dot(do_tile, v_tile.T, input_precision=spec.precision, out_dtype=ACC)
            p = softmax.probability(score.score(qk, scale, spec), lse_row, natural, unit, PRECISE)
            ds = p * (dp - delta_row)
            if PARTIAL:
                j = (col + tl.arange(0, BLOCK_N))[None, :]
                ds = tl.where(score.visible(i, j, offset, sizes, spec), ds, 0.0)
                k_tile = tile.finite(k_tile)
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=spec.precision, out_dtype=ACC)

    tile.store(dq, score.derivative(acc, scale), b, h, row, sizes.seqlen_q, shape.head_dim)


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    q_offset: int,
    configs: Configs,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward kernels that the wanted gradients need.

    Args:
        do: gradient of o, [batch, heads, seqlen_q, head_dim_v], any strides.
        dlse: gradient of lse, [batch, heads, seqlen_q], any strides, or None.
        q, k, v, mods, spec, scale, q_offset: as the forward took them.
        o, lse: as the forward returned them.
        configs: tile sizes and launch options of the dkdv and dq kernels.
        needs: which of dq, dk and dv are wanted.

    Returns:
        dq, dk, dv, each with its input's shape, dtype and axis order, or None where it is not wanted.
    """
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    sizes, shape = sizes_of(q, k, q_offset), shape_of(q, k, v)
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), needs, strict=True))
    delta = torch.empty_like(lse)
    dlse_view = None if dlse is None else view(dlse.unsqueeze(3))
    # tiles of delta are cut as those of dq: both walk the same rows
    programs = triton.cdiv(seqlen_q, configs.dq.block_m) * heads * batch
    launch(delta_kernel, programs, q.device, configs.dq, view(o), view(do), dlse_view, delta, *sizes, shape)
    inputs = (view(q), view(k), view(v), view(do), lse, delta)
    if dk is not None or dv is not None:
        outputs = (None if dk is None else view(dk), None if dv is None else view(dv))
        blocks = triton.cdiv(seqlen_k, configs.dkdv.block_n) * heads_k * batch
        launch(dkdv_kernel, blocks, q.device, configs.dkdv, *inputs, *outputs, mods, *sizes, scale, spec, shape)
    if dq is not None:
        launch(dq_kernel, programs, q.device, configs.dq, *inputs, view(dq), mods, *sizes, scale, spec, shape)
    return dq, dk, dv
