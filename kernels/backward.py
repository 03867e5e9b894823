"""Backward pass of FlashAttention-2 (Dao 2023, Algorithm 2) without atomics: every sum has one owner and one order.

    delta = sum_d o_d do_d - dlse                      [seqlen_q]
    p     = exp(s - lse)                               recomputed, never stored
    ds    = p (r do v^T - delta)                       [seqlen_q, seqlen_k], r = dropout's factor, or 1
    dv    = (r p)^T do      dk = ds/d(qk)^T q      dq = ds/d(qk) k
    dslope = -sum ds/dz |i + q_offset - j|      dsink = -sum exp(sink - lse) delta

The gradient of lse needs no kernel of its own: d lse_i / d s_ij = p_ij, so it joins delta. That of bias has its own
file.

Where queries of a tile see different keys, what is not finite in q, k or do is left out of the products: pairs that
see it have a NaN in ds already, or get one in p, and the others must not get one from 0 * NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import band, bias, score, softmax, tile
from .launch import coded, cut, launch, prepare, shape_of, sizes_of, view
from .spec import Configs, Gradients, Mods, Positions, Site, Spec, output_dtype


@triton.jit
def delta_kernel(
    o, do, dlse, delta, sizes, shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program owns BLOCK_M queries of one head; where sequences are packed, no matter whose."""
    ACC: tl.constexpr = delta.dtype.element_ty
    heads, seqlen_q = tile.number(sizes.heads), tile.number(sizes.seqlen_q)
    delta = tile.Rows(delta, heads, seqlen_q)
    block, h, b = tile.locate(tl.cdiv(seqlen_q, BLOCK_M), heads)
    row = block * BLOCK_M
    o_tile = tile.load(o, b, h, row, seqlen_q, shape.head_dim_v, BLOCK_M, shape.block_dv, True).to(ACC)
    do_tile = tile.load(do, b, h, row, seqlen_q, shape.head_dim_v, BLOCK_M, shape.block_dv, True).to(ACC)
    total = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        inside = row + tl.arange(0, BLOCK_M) < seqlen_q
        total -= tl.load(tile.strided_rows(dlse, b, h, row, BLOCK_M), mask=inside, other=0.0).to(ACC)
    tile.store_rows(delta, total, b, h, row, seqlen_q)


@triton.jit
def dkdv_kernel(
    q, k, v, do, lse, delta, grads, mods, sizes, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys of one key head and walks the queries that see them, of every head of the group.

    Tiles are kept transposed, [BLOCK_N, BLOCK_M]: p^T and ds^T then enter their products from registers.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    sizes = tile.decoded(sizes)
    lse, delta = tile.rows_of(lse, mods, sizes), tile.rows_of(delta, mods, sizes)
    LAST_LONGEST: tl.constexpr = spec.left and not (spec.causal or spec.right)  # later keys are seen by more queries
    col, h_k, b, q0, k0, sizes = tile.place(mods, sizes, sizes.heads // shape.group, True, BLOCK_N, 1, LAST_LONGEST)
    offset = tile.first_position(mods, sizes, b)
    natural, unit = score.units(scale, spec, ACC)
    j = (col + tl.arange(0, BLOCK_N))[:, None]
    row_end, col_end = q0 + sizes.seqlen_q, k0 + sizes.seqlen_k

    k_tile = tile.load(k, b, h_k, k0 + col, col_end, shape.head_dim, BLOCK_N, D, True)
    v_tile = tile.load(v, b, h_k, k0 + col, col_end, shape.head_dim_v, BLOCK_N, DV, True)
    dk_acc = tl.zeros([BLOCK_N, D], ACC)
    dv_acc = tl.zeros([BLOCK_N, DV], ACC)

    for g in range(shape.group):
        h = h_k * shape.group + g
        run = band.of_queries(col, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
        for PARTIAL in tl.static_range(1 if spec.hides else 0, 2):
            for t in range(band.tiles(run, mods, spec, 0, BLOCK_M, PARTIAL)):
                row = band.start(run, t, mods, spec, 0, BLOCK_M, PARTIAL)
                at = Site(b, h, (row + tl.arange(0, BLOCK_M))[None, :], j, offset, q0, k0)
                q_tile = tile.load(q, b, h, q0 + row, row_end, shape.head_dim, BLOCK_M, D, PARTIAL)
                lse_row = tile.load_rows(lse, b, h, q0 + row, row_end, float("inf"), BLOCK_M, PARTIAL)
                delta_row = tile.load_rows(delta, b, h, q0 + row, row_end, 0.0, BLOCK_M, PARTIAL)[None, :]
                qk = tl.dot(k_tile, q_tile.T, input_precision=spec.precision, out_dtype=ACC)
                s = score.score(qk, at, mods, sizes, scale, spec)
                p = softmax.probability(s, softmax.closed(lse_row)[None, :], natural, unit, PRECISE)
                if PARTIAL:
                    keep = score.visible(at, mods, sizes, spec)
                    p = tl.where(keep, p + (delta_row - delta_row), 0.0)  # NaN where do_i is not finite: delta_i is not
                do_tile = tile.load(do, b, h, q0 + row, row_end, shape.head_dim_v, BLOCK_M, DV, PARTIAL)
                if grads.v is not None:
                    values = tile.finite(do_tile) if PARTIAL else do_tile
                    weights = softmax.thinned(p, at, mods, spec).to(values.dtype)
                    dv_acc = tl.dot(weights, values, dv_acc, input_precision=spec.precision, out_dtype=ACC)
                if grads.k is not None:
                    dp = tl.dot(v_tile, do_tile.T, input_precision=spec.precision, out_dtype=ACC)
                    ds = p * (softmax.thinned(dp, at, mods, spec) - delta_row)
                    _, dx = score.gradient(ds, qk, at, mods, sizes, scale, spec)
                    if PARTIAL:
                        dx = tl.where(keep, dx, 0.0)  # p = 0 alone would let a NaN of dp through
                        q_tile = tile.finite(q_tile)
                    dk_acc = tl.dot(dx.to(q_tile.dtype), q_tile, dk_acc, input_precision=spec.precision, out_dtype=ACC)

    if grads.k is not None:
        dk_tile = tile.spoiled(score.derivative(dk_acc, scale), mods, b)
        tile.store(grads.k, dk_tile, b, h_k, k0 + col, col_end, shape.head_dim)
    if grads.v is not None:
        tile.store(grads.v, tile.spoiled(dv_acc, mods, b), b, h_k, k0 + col, col_end, shape.head_dim_v)


@triton.jit
def dq_kernel(
    q, k, v, do, lse, delta, grads, mods, sizes, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head and walks the keys they see, as the forward does.

    grads.alibi_slopes is each query's share in the gradient of its head's slope.
    """
    sizes = tile.decoded(sizes)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    lse, delta = tile.rows_of(lse, mods, sizes), tile.rows_of(delta, mods, sizes)
    if grads.alibi_slopes is not None:
        shares = tile.rows_of(grads.alibi_slopes, mods, sizes)
    row, h, b, i, offset, q0, k0, sizes = tile.queries(mods, sizes, spec, shape, BLOCK_M)
    h_k, row_end = h // shape.group, q0 + sizes.seqlen_q
    natural, unit = score.units(scale, spec, ACC)

    q_tile = tile.load(q, b, h, q0 + row, row_end, shape.head_dim, BLOCK_M, D, True)
    do_tile = tile.load(do, b, h, q0 + row, row_end, shape.head_dim_v, BLOCK_M, DV, True)
    lse_row = softmax.closed(tile.load_rows(lse, b, h, q0 + row, row_end, float("inf"), BLOCK_M, True))[:, None]
    delta_row = tile.load_rows(delta, b, h, q0 + row, row_end, 0.0, BLOCK_M, True)[:, None]
    acc = tl.zeros([BLOCK_M, D], ACC)
    slopes_acc = tl.zeros([BLOCK_M], ACC)

    run = band.of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    end = k0 + run[3]
    for PARTIAL in tl.static_range(1 if spec.hides else 0, 2):
        for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, PARTIAL)):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
            at = Site(b, h, i, (col + tl.arange(0, BLOCK_N))[None, :], offset, q0, k0)
            k_tile = tile.load(k, b, h_k, k0 + col, end, shape.head_dim, BLOCK_N, D, PARTIAL)
            v_tile = tile.load(v, b, h_k, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, PARTIAL)
            qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
            dp = tl.dot(do_tile, v_tile.T, input_precision=spec.precision, out_dtype=ACC)
            s = score.score(qk, at, mods, sizes, scale, spec)
            p = softmax.probability(s, lse_row, natural, unit, PRECISE)
            ds = p * (softmax.thinned(dp, at, mods, spec) - delta_row)
            dz, dx = score.gradient(ds, qk, at, mods, sizes, scale, spec)
            if PARTIAL:
                keep = score.visible(at, mods, sizes, spec)
                dx = tl.where(keep, dx, 0.0)
                k_tile = tile.finite(k_tile)
            if grads.alibi_slopes is not None:
                dz = tl.where(keep, dz, 0.0) if PARTIAL else dz
                slopes_acc -= tl.sum(dz * score.distance(at).to(ACC), 1)
            if grads.q is not None:
                acc = tl.dot(dx.to(k_tile.dtype), k_tile, acc, input_precision=spec.precision, out_dtype=ACC)

    if grads.q is not None:
        dq_tile = tile.spoiled(score.derivative(acc, scale), mods, b)
        tile.store(grads.q, dq_tile, b, h, q0 + row, row_end, shape.head_dim)
    if grads.alibi_slopes is not None:
        tile.store_rows(shares, slopes_acc, b, h, q0 + row, row_end)


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
    positions: Positions,
    configs: Configs,
    needs: Gradients,
) -> Gradients:
    """Launch the backward kernels that the wanted gradients need.

    Args:
        do: gradient of o, [batch, heads, seqlen_q, head_dim_v], any strides.
        dlse: gradient of lse, [batch, heads, seqlen_q], any strides, or None.
        q, k, v, mods, spec, scale, positions: as the forward took them.
        o, lse: as the forward returned them, lse dense; of a part, those of the whole call, of its rows.
        configs: tile sizes and launch options of the dkdv and dq kernels.
        needs: which gradients are wanted.

    Returns:
        The gradients, each with its operand's shape, dtype (of q, k and v in a part: lse's) and (of q, k and v) axis
        order; None where not wanted.
    """
    packed = mods.bad is not None
    blank = torch.zeros_like if packed or q.shape[1] == 0 else torch.empty_like  # rows of no sequence have no owner
    dq, dk, dv = (
        blank(x, dtype=output_dtype(x, spec)) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    dslopes = blank(lse) if needs.alibi_slopes else None
    delta = torch.empty_like(lse)
    operands, spec = prepare(mods, spec)
    sizes, shape = sizes_of(q, k, mods, positions), shape_of(q, k, v)
    rest = (coded(sizes), scale, spec, shape)

    def views(*tensors: torch.Tensor | None) -> list[Any]:
        return [None if x is None else view(x, packed) for x in tensors]

    # tiles of delta are cut as those of dq: both walk the same rows
    programs = triton.cdiv(q.shape[2], configs.dq.block_m) * q.shape[1] * q.shape[0]
    dlse = None if dlse is None else dlse.unsqueeze(3)
    launch(delta_kernel, programs, q.device, configs.dq, *views(o, do, dlse), delta, coded(sizes), shape)
    inputs = (*views(q, k, v, do), lse, delta)
    if (dk is not None or dv is not None) and q.shape[1] > 0:
        programs, own = cut(k, mods, operands, True, configs.dkdv.block_n)
        to_k, to_v = views(dk, dv)
        grads = Gradients(None, to_k, to_v)
        launch(dkdv_kernel, programs, q.device, configs.dkdv, *inputs, grads, own, *rest)
    if dq is not None or dslopes is not None:
        programs, own = cut(q, mods, operands, False, configs.dq.block_m)
        (to_q,) = views(dq)
        grads = Gradients(to_q, None, None, alibi_slopes=dslopes)
        launch(dq_kernel, programs, q.device, configs.dq, *inputs, grads, own, *rest)
    dbias = None
    if needs.bias:
        dbias = bias.gradient(inputs, q.device, mods, operands, sizes, rest, configs.dq)
    dalibi_slopes = None if dslopes is None else of_slopes(dslopes, mods)
    dsinks = of_sinks(lse, delta, mods) if needs.sinks else None
    return Gradients(dq, dk, dv, dbias, dalibi_slopes, dsinks)


def of_slopes(dslopes: torch.Tensor, mods: Mods) -> torch.Tensor:
    """The gradient of the slopes from each query's share, [batch, heads, seqlen_q] or packed [1, heads, total_q]."""
    slopes = mods.alibi_slopes
    if mods.bad is not None and slopes.shape[0] > 1:
        starts = torch.nn.functional.pad(mods.starts_q, (1, 0))  # and rows of no sequence in front of the first
        ends = starts.new_full((1,), dslopes.shape[2])
        rows = dslopes[0].T.contiguous()
        total = torch.segment_reduce(rows, "sum", offsets=torch.cat([starts, ends]).long(), unsafe=True)[1:-1]
    else:
        total = dslopes.sum(2)
        total = total if slopes.shape[0] > 1 else total.sum(0, keepdim=True)
    return torch.empty_like(slopes).copy_(total)


def of_sinks(lse: torch.Tensor, delta: torch.Tensor, mods: Mods) -> torch.Tensor:
    """The gradient of the sinks: each is the weight exp(sink - lse) of a key whose value is 0.

    Rows without keys and sink, rows of nobody and rows of a bad sequence add nothing.
    """
    weights = (mods.sinks.to(lse.dtype)[:, None] - lse).exp()
    nobody = lse == float("-inf")
    if mods.bad is not None:
        rows = torch.arange(lse.shape[2], dtype=mods.starts_q.dtype, device=lse.device)
        owner = torch.searchsorted(mods.starts_q, rows, right=True).sub_(1).clamp_(0, len(mods.bad) - 1)
        nobody = nobody | mods.bad[owner]  # of rows without an owner lse is -inf
    total = (weights * delta).masked_fill(nobody, 0.0).sum((0, 2))
    return torch.empty_like(mods.sinks).copy_(-total)
