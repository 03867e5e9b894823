"""Forward mode: tangents of o and lse for those of the operands, in one pass over the keys, O(n) memory.

    p     = exp(s - lse)                               recomputed, never stored
    ts    = ds/d(qk) (tq k^T + q tk^T) + ds/dz (tbias - tslope |i + q_offset - j|)
    tlse  = sum_j p ts + exp(sink - lse) tsink
    to    = sum_j r p (ts v + tv) - tlse o             r = dropout's factor, or 1

The score's tangent goes by the lines of `kernels/score.py`. What is not finite reaches no row that cannot see it: where
queries of a tile see different keys, a row that sees such a v has it in o already, one that sees such a tv gets NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import band, score, softmax, tile
from .launch import coded, cut, launch, prepare, shape_of, sizes_of, spread, view
from .spec import Config, Gradients, Mods, Positions, Site, Spec, Tangents, dense_like


@triton.jit
def jvp_kernel(
    q, k, v, o, lse, tangents, mods, sizes, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head and walks the keys they see, as the forward does."""
    sizes = tile.decoded(sizes)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    lse, tlse = tile.rows_of(lse, mods, sizes), tile.rows_of(tangents.lse, mods, sizes)
    row, h, b, i, offset, q0, k0, sizes = tile.queries(mods, sizes, spec, shape, BLOCK_M)
    h_k, row_end = h // shape.group, q0 + sizes.seqlen_q
    natural, unit = score.units(scale, spec, ACC)

    q_tile = tile.load(q, b, h, q0 + row, row_end, shape.head_dim, BLOCK_M, D, True)
    tq, tk, tv, to = tangents.q, tangents.k, tangents.v, tangents.o  # Triton 3.6 loses a stride of them behind a loop
    if tq is not None:
        tq_tile = tile.load(tq, b, h, q0 + row, row_end, shape.head_dim, BLOCK_M, D, True)
    lse_row = softmax.closed(tile.load_rows(lse, b, h, q0 + row, row_end, float("inf"), BLOCK_M, True))
    run = band.of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    end = k0 + run[3]

    mean = tl.zeros([BLOCK_M], ACC)  # of ts, under p: tlse
    acc = tl.zeros([BLOCK_M, DV], ACC)
    for PARTIAL in tl.static_range(1 if spec.hides else 0, 2):  # full tiles, where there are any
        for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, PARTIAL)):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
            at = Site(b, h, i, (col + tl.arange(0, BLOCK_N))[None, :], offset, q0, k0)
            k_tile = tile.load(k, b, h_k, k0 + col, end, shape.head_dim, BLOCK_N, D, PARTIAL)
            qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
            tqk = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            if tq is not None:
                tqk = tl.dot(tq_tile, k_tile.T, tqk, input_precision=spec.precision, out_dtype=ACC)
            if tk is not None:
                tk_tile = tile.load(tk, b, h_k, k0 + col, end, shape.head_dim, BLOCK_N, D, PARTIAL)
                tqk = tl.dot(q_tile, tk_tile.T, tqk, input_precision=spec.precision, out_dtype=ACC)
            s = score.score(qk, at, mods, sizes, scale, spec)
            p = softmax.probability(s, lse_row[:, None], natural, unit, PRECISE)
            ts = score.tangent(tqk, qk, at, mods, sizes, scale, spec)
            if PARTIAL:
                keep = score.visible(at, mods, sizes, spec)
                p, ts = tl.where(keep, p, 0.0), tl.where(keep, ts, 0.0)
            mean += tl.sum(p * ts, 1)
            weights = softmax.thinned(p, at, mods, spec)
            v_tile = tile.load(v, b, h_k, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, PARTIAL)
            values = tile.finite(v_tile) if PARTIAL else v_tile
            turned = weights * ts
            if tv is not None:
                tv_tile = tile.load(tv, b, h_k, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, PARTIAL)
                if PARTIAL:
                    odd = tl.sum((tv_tile - tv_tile).to(ACC), 1)  # NaN where tv_j is not finite, else 0
                    turned = tl.where(keep, turned + odd[None, :], 0.0)
                    tv_tile = tile.finite(tv_tile)
                moved = weights.to(tv_tile.dtype)
                acc = tl.dot(moved, tv_tile, acc, input_precision=spec.precision, out_dtype=ACC)
            acc = tl.dot(turned.to(values.dtype), values, acc, input_precision=spec.precision, out_dtype=ACC)

    if mods.sinks_tangent is not None:
        sink = tl.load(tile.origin(mods.sinks, b, h)).to(ACC)
        weight = softmax.probability(tl.zeros([BLOCK_M], ACC) + sink, lse_row, 1.0, score.LOG2E, True)
        mean += weight * tl.load(tile.origin(mods.sinks_tangent, b, h)).to(ACC)
    o_tile = tile.load(o, b, h, q0 + row, row_end, shape.head_dim_v, BLOCK_M, DV, True).to(ACC)
    tile.store(to, tile.spoiled(acc - o_tile * mean[:, None], mods, b), b, h, q0 + row, row_end, shape.head_dim_v)
    tile.store_rows(tlse, tile.spoiled(mean, mods, b), b, h, q0 + row, row_end)


def jvp(
    tangents: Gradients,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel.

    Args:
        tangents: of the operands, each of its operand's shape and dtype, any strides; None stands for zero.
        q, k, v, mods, spec, scale, positions: as the forward took them.
        o, lse: as the forward returned them.
        config: tile sizes and launch options.

    Returns:
        The tangents of o and of lse, each as the forward returns what it is of.
    """
    packed = mods.bad is not None
    to, tlse = dense_like(q, v.shape[3]), torch.empty_like(lse)
    if packed:  # rows of no sequence are nobody's
        to.zero_()
        tlse.zero_()
    operands, spec = prepare(mods, spec)
    operands = with_tangents(operands, tangents)
    programs, operands = cut(q, mods, operands, False, config.block_m)
    views = [view(x, packed) for x in (q, k, v, o)]
    tq, tk, tv = (None if x is None else view(x, packed) for x in tangents[:3])
    turned = Tangents(tq, tk, tv, view(to, packed), tlse)
    rest = (operands, coded(sizes_of(q, k, mods, positions)), scale, spec, shape_of(q, k, v))
    launch(jvp_kernel, programs, q.device, config, *views, lse, turned, *rest)
    return to, tlse


def with_tangents(operands: Any, tangents: Gradients) -> Any:
    """Operands, and the tangents of those that have one."""
    slopes = None if tangents.alibi_slopes is None else tangents.alibi_slopes[:, :, None, None]
    sinks = None if tangents.sinks is None else tangents.sinks[None, :, None, None]
    found = {"bias_tangent": tangents.bias, "slopes_tangent": slopes, "sinks_tangent": sinks}
    return operands._replace(**{name: None if x is None else spread(x) for name, x in found.items()})
