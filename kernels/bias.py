"""The gradient of bias, in bias' own shape: ds/dz summed over the axes that bias lacks, each element by one owner.

    dbias_bhij = sum over the missing axes of (ds/dz)_bhij

A program owns a tile of bias and walks all tiles of scores that share it. Where bias lacks so many axes that few
programs would be left, `parts` programs share a tile of bias, each with its own partial sum, and the sums are added in
order afterwards. How many is a matter of shapes alone, and so is every order of summation: no bit depends on chance.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import band, score, softmax, tile
from .launch import coded, launch, view
from .spec import Config, Mods, Operands, Site, Sizes

PROGRAMS = 512  # wanted; as many tiles of partial sums are held at most
STRIPS = 16  # at most, that the queries of one head are dealt out to
WIDEST = 64  # of a tile: sums of scores take registers beside everything else


class Sums(NamedTuple):
    """Where sums go, and how they are shared out."""

    out: Any  # View [parts * batch, heads, rows, cols]
    batch: Any  # of bias, 1 or all; these and what follows by `launch.coded`
    heads: Any
    rows: Any  # seqlen_q or 1
    cols: Any  # seqlen_k or 1
    pairs: Any  # (sequence, head) of a part
    strips: Any  # that their tiles of queries are dealt out to


@triton.jit
def dbias_kernel(
    q, k, v, do, lse, delta, sums, mods, sizes, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of sums.out.

    A part is some (sequence, head) pairs that share an element, and of their tiles of queries every strips-th.
    """
    sizes = tile.decoded(sizes)
    bias_batch, bias_heads = tile.number(sums.batch), tile.number(sums.heads)
    bias_q, bias_k = tile.number(sums.rows), tile.number(sums.cols)
    pairs, strips = tile.number(sums.pairs), tile.number(sums.strips)
    ACC: tl.constexpr = lse.dtype.element_ty
    PRECISE: tl.constexpr = q.ptr.dtype.element_ty.primitive_bitwidth >= 32
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    lse, delta = tile.rows_of(lse, mods, sizes), tile.rows_of(delta, mods, sizes)
    natural, unit = score.units(scale, spec, ACC)

    pid = tl.program_id(0)
    rows, cols = tl.cdiv(bias_q, BLOCK_M), tl.cdiv(bias_k, BLOCK_N)  # tiles of bias
    own_col, own_row = pid % cols * BLOCK_N, pid // cols % rows * BLOCK_M
    h_bias, b_bias = pid // cols // rows % bias_heads, pid // cols // rows // bias_heads % bias_batch
    part = pid // cols // rows // bias_heads // bias_batch
    shared_heads, shared = sizes.heads // bias_heads, sizes.heads // bias_heads * (sizes.batch // bias_batch)
    strip, first = part % strips, part // strips * pairs

    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for pair in range(first, tl.minimum(first + pairs, shared)):
        # bias_heads and bias_batch are 1 or all
        h, b = h_bias + pair % shared_heads, b_bias + pair // shared_heads
        h_k = h // shape.group
        q0, k0, own = tile.sequence(mods, sizes, b)
        offset = tile.first_position(mods, own, b)
        row_end = q0 + own.seqlen_q
        top, bottom = strip * BLOCK_M, own.seqlen_q
        if spec.bias_rows:
            top, bottom = own_row, tl.minimum(own_row + BLOCK_M, own.seqlen_q)
        if mods.bad is not None:  # it adds nothing: NaN would reach what other sequences share
            bottom = tl.where(tile.bad(mods, b), 0, bottom)
        for r in range(tl.cdiv(tl.maximum(bottom - top, 0), strips * BLOCK_M)):
            row = top + r * strips * BLOCK_M
            i = (row + tl.arange(0, BLOCK_M))[:, None]
            q_tile = tile.load(q, b, h, q0 + row, row_end, shape.head_dim, BLOCK_M, D, True)
            do_tile = tile.load(do, b, h, q0 + row, row_end, shape.head_dim_v, BLOCK_M, DV, True)
            lse_row = tile.load_rows(lse, b, h, q0 + row, row_end, float("inf"), BLOCK_M, True)
            lse_row = softmax.closed(lse_row)[:, None]
            delta_row = tile.load_rows(delta, b, h, q0 + row, row_end, 0.0, BLOCK_M, True)[:, None]
            begin, end = band.bounds_of_keys(row, b, h, offset, mods, own, spec, BLOCK_M, BLOCK_N)
            if spec.bias_cols:
                seen = (own_col + BLOCK_N > begin) & (own_col < end)
                begin, end = own_col, tl.where(seen, tl.minimum(own_col + BLOCK_N, end), own_col)
            for t in range(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)):
                col = begin + t * BLOCK_N
                at = Site(b, h, i, (col + tl.arange(0, BLOCK_N))[None, :], offset, q0, k0)
                k_tile = tile.load(k, b, h_k, k0 + col, k0 + end, shape.head_dim, BLOCK_N, D, True)
                v_tile = tile.load(v, b, h_k, k0 + col, k0 + end, shape.head_dim_v, BLOCK_N, DV, True)
                qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
                dp = tl.dot(do_tile, v_tile.T, input_precision=spec.precision, out_dtype=ACC)
                s = score.score(qk, at, mods, own, scale, spec)
                p = softmax.probability(s, lse_row, natural, unit, PRECISE)
                ds = p * (softmax.thinned(dp, at, mods, spec) - delta_row)
                dz, _ = score.gradient(ds, qk, at, mods, own, scale, spec)
                acc += tl.where(score.visible(at, mods, own, spec), dz, 0.0)

    base = tile.origin(sums.out, part * bias_batch + b_bias, h_bias)
    i, j = own_row + tl.arange(0, BLOCK_M), own_col + tl.arange(0, BLOCK_N)
    if spec.bias_rows and spec.bias_cols:
        ptrs = base + (i.to(tl.int64) * sums.out.stride_s)[:, None] + j[None, :]
        tl.store(ptrs, acc, mask=(i < bias_q)[:, None] & (j < bias_k)[None, :])
    elif spec.bias_rows:
        tl.store(base + i, tl.sum(acc, 1), mask=i < bias_q)
    elif spec.bias_cols:
        tl.store(base + j, tl.sum(acc, 0), mask=j < bias_k)
    else:
        tl.store(base, tl.sum(acc))


def gradient(
    inputs: tuple[Any, ...], device: torch.device, mods: Mods, operands: Operands, sizes: Sizes, rest: tuple[Any, ...],
    config: Config,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel: dbias, of bias' shape, dtype and axis order.

    Args:
        inputs: Views of q, k, v and do, then lse and delta.
        device: where they are.
        mods, operands: the operands of the call, as tensors and as kernels take them.
        sizes: lengths of the call.
        rest: lengths as kernels take them, scale, spec and shape.
        config: the dq kernel's; tiles are at most WIDEST wide.
    """
    bias = mods.bias
    bias_batch, bias_heads, rows, cols = bias.shape
    config = config._replace(block_m=min(config.block_m, WIDEST), block_n=min(config.block_n, WIDEST), num_stages=1)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(cols, config.block_n) * bias_batch * bias_heads
    shared = sizes.heads // max(bias_heads, 1) * (sizes.batch // max(bias_batch, 1))
    pairs = triton.cdiv(shared, max(1, PROGRAMS // max(tiles, 1)))
    groups = triton.cdiv(shared, max(pairs, 1))
    strips = 1 if rows > 1 else min(STRIPS, max(1, PROGRAMS // max(tiles * groups, 1)))
    parts = groups * strips
    acc = torch.float64 if inputs[4].dtype == torch.float64 else torch.float32
    found = bias.new_empty((parts * bias_batch, bias_heads, rows, cols), dtype=acc)
    sums = coded(Sums(0, bias_batch, bias_heads, rows, cols, pairs, strips))._replace(out=view(found))
    launch(dbias_kernel, tiles * parts, device, config, *inputs, sums, operands, *rest)
    return torch.empty_like(bias).copy_(found.view(parts, *bias.shape).sum(0))
