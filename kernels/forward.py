"""Forward pass of FlashAttention-2 (Dao 2023, Algorithm 1).

    s   = score(q k^T)               [seqlen_q, seqlen_k]      -inf where a key is not visible
    lse = log sum_j exp(s_j)         [seqlen_q]                natural logarithm
    o   = sum_j exp(s_j - lse) v_j   [seqlen_q, head_dim_v]

One program owns BLOCK_M queries of one head and walks the keys they can see BLOCK_N at a time: first the tiles that
all of them see, then those at the edges. There a weight of 0 would not keep a NaN of v from queries that must not see
it, as 0 * NaN = NaN: such values are left out of the product, and outputs that do see them are overwritten with NaN.

Over full tiles the loop has two orders, of the same sums in the same order:

    classic    s = q k^T, softmax, p v
    AHEAD      s of the next tile = q k^T, then softmax and p v of this one: a matrix product that the exponentials do
               not wait for, and that can run under them where it is asynchronous (sm_90)
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import band, score, softmax, tile
from .launch import coded, cut, launch, launch_again, prepare, shape_of, sizes_of, view
from .spec import Config, Mods, Positions, Site, Spec, accumulator_dtype, dense_like, output_dtype


@triton.jit
def beside(rows, col, N: tl.constexpr):
    """The Site of the queries `rows` with the N keys from col on."""
    return Site(rows.b, rows.h, rows.i, (col + tl.arange(0, N))[None, :], rows.offset, rows.q0, rows.k0)


@triton.jit
def product(
    q_tile, k, rows, col, end, spec: tl.constexpr, shape: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """q k^T of the N keys from col on: [M, N]."""
    h_k = rows.h // shape.group
    k_tile = tile.load(k, rows.b, h_k, rows.k0 + col, end, shape.head_dim, N, shape.block_d, PARTIAL)
    return tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)


@triton.jit
def take_in(
    qk, v, rows, col, end, m, l, acc, mods, sizes, scale, spec: tl.constexpr, shape: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """The keys from col on join the softmax: (m [M], l [M], acc [M, D], whether their v held NaN or infinity)."""
    N: tl.constexpr = qk.shape[1]
    PRECISE: tl.constexpr = v.ptr.dtype.element_ty.primitive_bitwidth >= 32
    _, unit = score.units(scale, spec, acc.dtype)
    at = beside(rows, col, N)
    s = score.score(qk, at, mods, sizes, scale, spec)
    if PARTIAL:
        s = tl.where(score.visible(at, mods, sizes, spec), s, float("-inf"))
    p, alpha, m, l = softmax.step(s, m, l, unit, PRECISE)
    p = softmax.thinned(p, at, mods, spec)
    h_k = rows.h // shape.group
    v_tile = tile.load(v, rows.b, h_k, rows.k0 + col, end, shape.head_dim_v, N, shape.block_dv, PARTIAL)
    strange = 0
    if PARTIAL:
        strange = tl.max((tile.finite(v_tile) != v_tile).to(tl.int32))
        v_tile = tile.finite(v_tile)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=spec.precision, out_dtype=acc.dtype)
    return m, l, acc, strange


@triton.jit
def forward_kernel(
    q, k, v, o, lse, mods, sizes, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sizes = tile.decoded(sizes)
    ACC: tl.constexpr = lse.dtype.element_ty
    D: tl.constexpr = shape.block_d
    DV: tl.constexpr = shape.block_dv
    lse = tile.rows_of(lse, mods, sizes)
    row, h, b, i, offset, q0, k0, sizes = tile.queries(mods, sizes, spec, shape, BLOCK_M)
    natural, _ = score.units(scale, spec, ACC)
    rows = Site(b, h, i, None, offset, q0, k0)

    q_tile = tile.load(q, b, h, q0 + row, q0 + sizes.seqlen_q, shape.head_dim, BLOCK_M, D, True)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, DV], ACC)

    run = band.of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    end = k0 + run[3]  # keys past it are seen by no query of this tile: they are not read, whatever they hold
    strange = 0  # whether a partial tile of v held NaN or infinity
    for PARTIAL in tl.static_range(1 if spec.hides else 0, 2):  # full tiles, where there are any
        count = band.tiles(run, mods, spec, 1, BLOCK_N, PARTIAL)
        if AHEAD and not PARTIAL:
            if count > 0:
                col = band.start(run, 0, mods, spec, 1, BLOCK_N, PARTIAL)
                qk = product(q_tile, k, rows, col, end, spec, shape, ACC, BLOCK_N, PARTIAL)
                for t in range(1, count):
                    ahead = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
                    qk_ahead = product(q_tile, k, rows, ahead, end, spec, shape, ACC, BLOCK_N, PARTIAL)
                    m, l, acc, odd = take_in(qk, v, rows, col, end, m, l, acc, mods, sizes, scale, spec, shape, PARTIAL)
                    col, qk = ahead, qk_ahead
                m, l, acc, odd = take_in(qk, v, rows, col, end, m, l, acc, mods, sizes, scale, spec, shape, PARTIAL)
        else:
            for t in range(count):
                col = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
                qk = product(q_tile, k, rows, col, end, spec, shape, ACC, BLOCK_N, PARTIAL)
                m, l, acc, odd = take_in(qk, v, rows, col, end, m, l, acc, mods, sizes, scale, spec, shape, PARTIAL)
                strange = tl.maximum(strange, odd)

    o_tile, lse_row = softmax.finish(acc, m, l, natural, mods, b, h)
    tile.store_rows(lse, tile.spoiled(lse_row, mods, b), b, h, q0 + row, q0 + sizes.seqlen_q)
    tile.store(o, tile.spoiled(o_tile, mods, b), b, h, q0 + row, q0 + sizes.seqlen_q, shape.head_dim_v)

    if strange != 0:  # rare: back to the outputs that do see what is not finite, acc no longer in registers
        tl.debug_barrier()  # not before o is written, by whatever thread
        nan = tl.full([BLOCK_M, DV], float("nan"), ACC)
        for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, True)):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, True)
            at = beside(rows, col, BLOCK_N)
            v_tile = tile.load(v, b, h // shape.group, k0 + col, end, shape.head_dim_v, BLOCK_N, DV, True)
            keep = score.visible(at, mods, sizes, spec).to(v_tile.dtype)
            found = (tile.finite(v_tile) != v_tile).to(v_tile.dtype)
            seen = tl.dot(keep, found, input_precision=spec.precision, out_dtype=ACC)
            tile.store(o, nan, b, h, q0 + row, q0 + sizes.seqlen_q, shape.head_dim_v, seen > 0.0)


class Plan(NamedTuple):
    """A dense forward that was launched, less its tensors: others of the same kind can be launched as it was.

    Args:
        compiled: what Triton compiled.
        programs: how many.
        device: of the tensors.
        strides: of q, k, v and o.
        rows: shape and strides of lse.
        head_dim_v: of o.
        rest: the kernel's arguments after lse.
    """

    compiled: Any
    programs: int
    device: torch.device
    strides: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], tuple[int, ...]]
    head_dim_v: int
    rest: tuple[Any, ...]

    def like(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> "Plan":
        """The Plan of a call that is compiled alike, with other lengths, batch, heads or strides."""
        o = dense_like(q, self.head_dim_v, "meta")
        operands, _, *rest = self.rest
        sizes = sizes_of(q, k, Mods(), Positions(k.shape[2] - q.shape[2]))
        programs, _ = cut(q, Mods(), operands, False, rest[-2])
        strides = tuple(x.stride() for x in (q, k, v, o))
        rows = tuple(q.shape[:3]), (q.shape[1] * q.shape[2], q.shape[2], 1)
        return self._replace(programs=programs, strides=strides, rows=rows, rest=(operands, coded(sizes), *rest))

    def launch(self, *tensors: torch.Tensor) -> bool:
        """Launch the kernel on q, k, v, o and lse, all 16-byte aligned; False, and nothing, where it cannot be."""
        q, k, v, o, lse = tensors
        of_q, of_k, of_v, of_o = self.strides
        args = ((q, *of_q), (k, *of_k), (v, *of_v), (o, *of_o), lse, *self.rest)
        return launch_again(self.compiled, forward_kernel, self.programs, self.device, args)


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
    """o and lse of `planned_forward`."""
    o, lse, _ = planned_forward(q, k, v, mods, spec, scale, positions, config)
    return o, lse


def planned_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, Plan | None]:
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
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype (a part's is lse's) and axis order, and lse [batch, heads,
        seqlen_q] in natural logarithm, float32 (float64 for float64); and the Plan of a call without mods, where there
        is a kernel to plan.
    """
    packed = mods.bad is not None
    o = dense_like(q, v.shape[3], dtype=output_dtype(q, spec))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q))
    if packed:  # rows of no sequence are nobody's
        o.zero_()
        lse.fill_(float("-inf"))
    operands, spec = prepare(mods, spec)
    programs, operands = cut(q, mods, operands, False, config.block_m)
    views = [view(x, packed) for x in (q, k, v, o)]
    sizes = sizes_of(q, k, mods, positions)
    rest = (operands, coded(sizes), scale, spec, shape_of(q, k, v), config.ahead)
    compiled = launch(forward_kernel, programs, q.device, config, *views, lse, *rest)
    if compiled is None or any(x is not None for x in mods):
        return o, lse, None
    strides = tuple(tuple(x[1:]) for x in views)
    rows = tuple(lse.shape), lse.stride()
    tiles = config.block_m, config.block_n
    return o, lse, Plan(compiled, programs, q.device, strides, rows, v.shape[3], (*rest, *tiles))
