"""Attention of a sequence's last queries to the keys that a cache has of it: bound by reading them once.

    s   = score(q k^T)               queries at positions total - seqlen_q ... total - 1
    lse = log sum_j exp(s_j)         natural logarithm
    o   = sum_j exp(s_j - lse) v_j

One program owns a tile of rows of one key head and a part of the keys. Rows are the group's query heads for each query,
side by side, so that keys are read once for all of them. Parts are cut in whole tiles by the sequence's own length:
what is beside it in the batch changes no bit. A second kernel merges them, always in the same order.

A bad sequence is NaN (see `cache`): of lies in its table a program knows those that it met, so all that read the table
between them read the whole of what the sequence may see. Compiled and interpreted, not yet run on a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import band, score, softmax, tile
from . import cache as cached
from .launch import Launched, coded, prepare, shape_of, view
from .rotary import angles_of, turned
from .spec import Cache, Config, Mods, Positions, Rotary, Site, Sizes, Spec, View, dense_like

MERGED: tl.constexpr = tl.constexpr(16)  # parts that one step of the merge takes in


class Lengths(NamedTuple):
    """Numbers of a call, known when it runs; the kernel is given them by `launch.coded`."""

    heads: Any
    seqlen_q: Any
    left: Any  # the window's reach, as in Sizes
    right: Any
    new: Any  # keys that cache.seqlens does not count yet
    splits: Any  # parts of a sequence's keys
    keys: Any  # of each part; 0: all are equal


class Walk(NamedTuple):
    """How a call is walked, known when it is compiled."""

    turn: Any  # Turn of q
    page: int  # positions in a page; 0: none
    alike: bool  # all rows of a sequence see the same keys
    several: bool  # they make more than one tile, which leaves out keys


@triton.jit
def packed_rows(row, h_k, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head and query of a tile of rows, each [M, 1]: query i of head g of the group is row i * GROUP + g."""
    r = row + tl.arange(0, BLOCK_M)
    return (h_k * GROUP + r % GROUP)[:, None], (r // GROUP)[:, None]


@triton.jit
def beside(rows, col, N: tl.constexpr):
    """The Site of `rows` with the N keys from col on."""
    return Site(rows.b, rows.h, rows.i, (col + tl.arange(0, N))[None, :], rows.offset, 0, 0)


@triton.jit
def part_of(first, total, split, splits, keys, BLOCK_N: tl.constexpr):
    """One of the parts of keys first ... total - 1, cut between tiles: (begin, end).

    Parts are `splits` equal ones, or of so many keys each, where that is not 0.
    """
    tiles = tl.cdiv(total, BLOCK_N) - first // BLOCK_N
    each = tl.where(keys > 0, keys, tl.cdiv(tiles, splits) * BLOCK_N)
    begin = first // BLOCK_N * BLOCK_N + split * each
    return tl.maximum(begin, first), tl.minimum(begin + each, total)


@triton.jit
def seen(
    row, b, h_k, offset, part, mods, sizes, spec: tl.constexpr, shape: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Tiles of a part of the keys that the queries of rows row ... row + M - 1 see, as `band.of_keys` has them."""
    low = row // shape.group
    last = (tl.minimum(row + M, sizes.seqlen_q * shape.group) - 1) // shape.group
    own = Sizes(sizes.heads, last + 1, sizes.seqlen_k, 0, 0, sizes.left, sizes.right)
    begin, full_begin, full_end, end = band.of_keys(low, b, h_k, offset, mods, own, spec, M, N)
    first, end = tl.maximum(begin, part[0]), tl.minimum(end, part[1])
    begin, end = band.whole_tiles(first, end, N)
    full_begin = tl.maximum(full_begin, tl.cdiv(part[0], N) * N)
    return band.band(begin, full_begin, tl.minimum(full_end, part[1] // N * N), end, spec)


@triton.jit
def visible(at, part, mods, sizes, spec: tl.constexpr):
    """Whether query i sees key j of a part."""
    return score.visible(at, mods, sizes, spec) & (at.j >= part[0])


@triton.jit
def decode_kernel(
    q, o, lse, caches, angles, mods, lengths, extent, scale: tl.float64, spec: tl.constexpr, shape: tl.constexpr,
    walk: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PAGE: tl.constexpr = walk.page
    TURN: tl.constexpr = walk.turn  # Triton 3.6 passes no tuple out of a constant one
    ACC: tl.constexpr = lse.dtype.element_ty
    TYPE: tl.constexpr = q.ptr.dtype.element_ty
    PRECISE: tl.constexpr = TYPE.primitive_bitwidth >= 32
    DV: tl.constexpr = shape.block_dv
    heads, seqlen_q = tile.number(lengths.heads), tile.number(lengths.seqlen_q)
    left, right = tile.number(lengths.left), tile.number(lengths.right)
    new, splits, keys = tile.number(lengths.new), tile.number(lengths.splits), tile.number(lengths.keys)
    pid = tl.program_id(0)
    blocks, heads_k = tl.cdiv(seqlen_q * shape.group, BLOCK_M), heads // shape.group
    row, h_k = pid % blocks * BLOCK_M, pid // blocks % heads_k
    split, b = pid // blocks // heads_k % splits, pid // blocks // heads_k // splits

    extent = cached.extent_of(extent)
    own = cached.sequence(caches, extent, b, new)
    sizes = Sizes(heads, seqlen_q, own.total, 0, 0, left, right)
    offset = own.total - seqlen_q
    first = own.leftpad
    if spec.left:
        first = tl.maximum(first, band.within(offset, 0, -left, 0, own.total))
    part = part_of(first, own.total, split, splits, keys, BLOCK_N)
    lies = tl.zeros([BLOCK_N], tl.int32)
    if walk.several and PAGE > 0:
        lies |= cached.unlisted(caches, extent, own.slot, part[0], part[1], PAGE, BLOCK_N)

    h, i = packed_rows(row, h_k, shape.group, BLOCK_M)
    rows = Site(b, h, i, None, offset, 0, 0)  # made here: Triton 3.6 returns no None
    inside = rows.i < seqlen_q
    at_q = tile.origin(q, b, rows.h) + rows.i.to(tl.int64) * q.stride_s
    p_q = rows.i + offset - own.leftpad
    q_tile = turned(at_q, q.stride_d, p_q, inside, angles, TURN, shape.head_dim, shape.block_d)
    if caches.k_scale is not None:
        scale = scale * cached.factor(caches.k_scale, b, h_k, tl.float64)
    natural, unit = score.units(scale, spec, ACC)

    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, DV], ACC)
    run = seen(row, b, h_k, offset, part, mods, sizes, spec, shape, BLOCK_M, BLOCK_N)
    strange = 0  # whether a partial tile of v held NaN or infinity
    for PARTIAL in tl.static_range(2):
        for t in tl.range(band.tiles(run, mods, spec, 1, BLOCK_N, PARTIAL), num_stages=1 if PARTIAL else None):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, PARTIAL)
            place, lie = cached.locate(caches, extent, own.slot, col, part[0], run[3], PAGE, BLOCK_N, True, PARTIAL)
            lies |= lie
            there = cached.within(col, part[0], run[3], BLOCK_N)
            k_tile = cached.load(caches.k, h_k, place, there, TYPE, shape.head_dim, shape.block_d, PARTIAL)
            qk = tl.dot(q_tile, k_tile.T, input_precision=spec.precision, out_dtype=ACC)
            at = beside(rows, col, BLOCK_N)
            s = score.score(qk, at, mods, sizes, scale, spec)
            if PARTIAL:
                keep = there[None, :] if walk.alike else visible(at, part, mods, sizes, spec)
                s = tl.where(keep, s, float("-inf"))
            p, alpha, m, l = softmax.step(s, m, l, unit, PRECISE)
            v_tile = cached.load(caches.v, h_k, place, there, TYPE, shape.head_dim_v, DV, PARTIAL)
            if PARTIAL and not walk.alike:  # as in `forward`: what is not finite is left out, and comes back at the end
                strange = tl.maximum(strange, tl.max((tile.finite(v_tile) != v_tile).to(tl.int32)))
                v_tile = tile.finite(v_tile)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(TYPE), v_tile, acc, input_precision=spec.precision, out_dtype=ACC)

    bad = own.bad | (tl.max((lies != 0).to(tl.int32)) != 0)
    o_tile, lse_row = softmax.finish(acc, m, l, natural, mods, b, tl.reshape(rows.h, [BLOCK_M]))
    if caches.v_scale is not None:
        o_tile *= cached.factor(caches.v_scale, b, h_k, ACC)
    at_b = b * splits + split
    lse = View(lse, heads.to(tl.int64) * seqlen_q, seqlen_q, 1, 0)
    tl.store(tile.origin(lse, at_b, rows.h) + rows.i, tl.where(bad, float("nan"), lse_row)[:, None], mask=inside)
    dims = tl.arange(0, DV)
    at_o = tile.origin(o, at_b, rows.h) + rows.i.to(tl.int64) * o.stride_s + (dims.to(tl.int64) * o.stride_d)[None, :]
    inside &= (dims < shape.head_dim_v)[None, :]
    tl.store(at_o, tl.where(bad, float("nan"), o_tile).to(o.ptr.dtype.element_ty), mask=inside)

    if not walk.alike and strange != 0:  # rare: the outputs that do see what is not finite
        tl.debug_barrier()  # not before o is written, by whatever thread
        nan = tl.full([BLOCK_M, DV], float("nan"), o.ptr.dtype.element_ty)
        for t in tl.range(band.tiles(run, mods, spec, 1, BLOCK_N, True), num_stages=1):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, True)
            place, _ = cached.locate(caches, extent, own.slot, col, part[0], run[3], PAGE, BLOCK_N, True, True)
            there = cached.within(col, part[0], run[3], BLOCK_N)
            v_tile = cached.load(caches.v, h_k, place, there, TYPE, shape.head_dim_v, DV, True)
            keep = visible(beside(rows, col, BLOCK_N), part, mods, sizes, spec).to(TYPE)
            found = (tile.finite(v_tile) != v_tile).to(TYPE)
            hit = tl.dot(keep, found, input_precision=spec.precision, out_dtype=ACC)
            tl.store(at_o, nan, mask=inside & (hit > 0.0))


@triton.jit(do_not_specialize=["heads", "seqlen_q", "splits"])
def merge_kernel(
    parts, lses, o, lse, mods, heads, seqlen_q, splits, shape: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns one row, and takes in MERGED of its parts [batch * splits, heads, seqlen_q, head_dim_v] a time.

    Always as many, so that a part without keys more or less changes no bit.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    DV: tl.constexpr = shape.block_dv
    i, h, b = tile.locate(seqlen_q, heads)
    dims = tl.arange(0, DV)
    m = tl.full([1], float("-inf"), ACC)
    l = tl.zeros([1], ACC)
    acc = tl.zeros([1, DV], ACC)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        row = ((b.to(tl.int64) * splits + split) * heads + h) * seqlen_q + i
        there = split < splits
        ptrs = parts + (row * shape.head_dim_v)[:, None] + dims[None, :]
        own = tl.load(ptrs, mask=there[:, None] & (dims < shape.head_dim_v)[None, :], other=0.0)
        m, l, acc = softmax.merge(own, tl.load(lses + row, mask=there, other=float("-inf")), m, l, acc)
    o_row, lse_row = softmax.finish(acc, m, l, 1.0, mods, b, h)
    at_b = b.to(tl.int64) * heads + h
    tl.store(lse + at_b * seqlen_q + i + tl.arange(0, 1), lse_row)
    tile.store(o, o_row, b, h, i, i + 1, shape.head_dim_v)


def converts_float8(q: torch.Tensor) -> bool:
    """Whether Triton converts float8 to q's dtype where q is; the kernel takes the bytes elsewhere."""
    if q.dtype == torch.float64:
        return False
    return not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) >= (8, 9)


def options_of(nvidia: bool, busy: bool) -> dict[str, Any]:
    """What the compiler is told where queries see different keys, or something changes scores.

    ptxas would spill some bytes of such calls to get by with 128 registers, so that a third program fits beside two.
    """
    return {"maxnreg": 255} if nvidia and busy else {}


def decode(
    q: torch.Tensor,
    cache: Cache,
    new: int,
    rotary: Rotary | None,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
    splits: int,
    config: Config,
    keys: int = 0,
) -> tuple[list[torch.Tensor], list[Launched]]:
    """Launch the decode kernel, and the one that merges where keys are split.

    Args:
        q: [batch, heads, seqlen_q, head_dim], any strides.
        cache: keys and values, the new ones already among them: of q's dtype, or of one that it holds exactly.
        new: keys of each sequence that cache.seqlens does not count yet.
        rotary: rotary embedding of q, or None.
        mods: optional operands; alibi_slopes and sinks are used.
        spec: compile-time choices; causal, left, right, softcap, raw and precision are used.
        scale: factor of q.k.
        positions: the window's reach.
        splits: parts that a sequence's keys are cut into, at least 1; a part of a short one may be empty.
        config: tile sizes and launch options; block_m is cut to the rows there are.
        keys: of each part, a multiple of config.block_n, so that splits times as many are no fewer than a sequence can
            have. Default: 0, each sequence is cut into equal parts.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and axis order, lse [batch, heads, seqlen_q] in natural
        logarithm, float32 (float64 for float64), and what else was allocated; and the launches.
    """
    batch, heads, seqlen_q, _ = q.shape
    o = dense_like(q, cache.v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if cache.k_scale is not None:  # a factor on the score whose sign nobody has read
        spec = spec._replace(raw=False)
    operands, spec = prepare(Mods(alibi_slopes=mods.alibi_slopes, sinks=mods.sinks), spec)
    shape = shape_of(q, cache.k, cache.v)
    if cache.k.dtype.itemsize == 1 and not converts_float8(q):
        cache = cache._replace(k=cache.k.view(torch.uint8), v=cache.v.view(torch.uint8))
    caches, extent, page = cached.prepare(cache)
    angles, turn = angles_of(rotary)
    if seqlen_q == 1:  # the last position: what is after it does not exist
        spec = spec._replace(causal=False, right=False)
    alike = seqlen_q == 1 or not (spec.causal or spec.left or spec.right)
    rows = shape.group * seqlen_q
    config = config._replace(block_m=min(config.block_m, max(16, triton.next_power_of_2(rows))))
    blocks = triton.cdiv(rows, config.block_m)
    parts, lses, own = o, lse, operands
    merged = splits > 1 or keys > 0  # what is merged alone rounds as beside others
    if merged:
        parts = lse.new_empty((batch * splits, heads, seqlen_q, cache.v.shape[3]))
        lses = lse.new_empty((batch * splits, heads, seqlen_q))
        own = operands._replace(sinks=None)  # once, by the merge
    lengths = Lengths(heads, seqlen_q, positions.left, positions.right, new, splits, keys)
    numbers = coded(lengths), coded(extent), scale
    args = (view(q), view(parts), lses, caches, angles, own, *numbers, spec, shape, Walk(turn, page, alike, blocks > 1))
    programs = blocks * cache.k.shape[1] * splits * batch
    busy = not alike or spec.softcap is not None or operands.slopes is not None
    options = options_of(q.is_cuda and torch.version.hip is None, busy)
    made = [Launched.by(decode_kernel, programs, q.device, config, *args, **options)]
    if not merged:
        return [o, lse], made
    rest = (operands, heads, seqlen_q, splits, shape)
    made.append(Launched.by(merge_kernel, batch * heads * seqlen_q, q.device, config, parts, lses, view(o), lse, *rest))
    return [o, lse, parts, lses], made
