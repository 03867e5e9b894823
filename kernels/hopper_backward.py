"""Backward pass for Hopper (sm_90) in Gluon: five matrix products in one kernel (Shah et al. 2024, FlashAttention-3).

    s^T = k q^T      dp^T = v do^T      dv += p^T do      dk += ds^T q      dq += ds k

draft
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import band, score, softmax, tile
from .launch import LENGTHS
from .spec import Site, Sizes

# Triton 3.8 renamed these
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS: gl.constexpr = gl.constexpr(64)  # keys of one consumer, a warpgroup: the rows of one wgmma


class Buffers(NamedTuple):
    """Shared memory of a program."""

    k: Any  # [consumers, 1, 1, ROWS, D]
    v: Any
    q: Any  # [slots, 1, 1, BLOCK_M, D]
    do: Any
    lse: Any  # [slots, BLOCK_M]
    delta: Any
    k_finite: Any  # [parts of D, consumers, ROWS, COLS]
    ds: Any  # [consumers, ROWS, BLOCK_M]


class Barriers(NamedTuple):
    kv_full: Any  # [consumers]
    full: Any  # [slots]
    empty: Any
    finite: Any  # [1]
    ds_full: Any
    ds_empty: Any


class Walk(NamedTuple):
    b: Any
    h_k: Any
    col: Any
    offset: Any
    run: Any


@gluon.jit
def following(h, t, tiles, GROUP: gl.constexpr):
    if GROUP == 1:
        return h, t + 1
    else:
        last = t == tiles - 1
        return tl.where(last, h + 1, h), tl.where(last, 0, t + 1)


@gluon.jit
def producer(q, k, v, do, lse, delta, smem, bars, walk, mods, sizes, spec: gl.constexpr, GROUP: gl.constexpr):
    CONSUMERS: gl.constexpr = smem.k.shape[0]
    SLOTS: gl.constexpr = smem.q.shape[0]
    BLOCK_M: gl.constexpr = smem.q.shape[3]
    for i in gl.static_range(CONSUMERS):
        mbarrier.expect(bars.kv_full.index(i), 2 * k.block_type.nbytes)
        load_tile(k, [walk.b, walk.h_k, walk.col + i * ROWS, 0], bars.kv_full.index(i), smem.k.index(i))
        load_tile(v, [walk.b, walk.h_k, walk.col + i * ROWS, 0], bars.kv_full.index(i), smem.v.index(i))
    n = 0
    for PARTIAL in gl.static_range(2):
        tiles = band.tiles(walk.run, mods, spec, 0, BLOCK_M, PARTIAL)
        h, t = walk.h_k * GROUP, 0
        for _ in range(GROUP * tiles):
            row = band.start(walk.run, t, mods, spec, 0, BLOCK_M, PARTIAL)
            slot, lap = n % SLOTS, n // SLOTS & 1
            full = bars.full.index(slot)
            stats = (walk.b * sizes.heads + h) * sizes.seqlen_q + row
            mbarrier.wait(bars.empty.index(slot), lap ^ 1)
            mbarrier.expect(full, 2 * (q.block_type.nbytes + lse.block_type.nbytes))
            load_tile(q, [walk.b, h, row, 0], full, smem.q.index(slot))
            load_tile(lse, [stats], full, smem.lse.index(slot))
            load_tile(do, [walk.b, h, row, 0], full, smem.do.index(slot))
            load_tile(delta, [stats], full, smem.delta.index(slot))
            n += 1
            h, t = following(h, t, tiles, GROUP)


@gluon.jit
def make_finite(source, target, WIDTH: gl.constexpr):
    LANES: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    target.store(tile.finite(source.load(LAYOUT)))


@gluon.jit
def fold(x):
    """[M, N] in the layout of a wgmma -> [M * N / 512, 512], each thread's numbers four by four; nothing moves."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    x = x.reshape([M // 64, 4, 2, 8, N // 16, 2, 4, 2])
    return x.permute((0, 4, 5, 1, 3, 6, 2, 7)).reshape([M * N // 512, 512])


@gluon.jit
def product_dq(smem, part, n):
    """Start the part of ds k that lies in these COLS columns: [BLOCK_M, COLS]."""
    CONSUMERS: gl.constexpr = smem.ds.shape[0]
    BLOCK_M: gl.constexpr = smem.ds.shape[2]
    COLS: gl.constexpr = smem.k_finite.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    acc = gl.zeros([BLOCK_M, COLS], gl.float32, LAYOUT)
    for i in gl.static_range(CONSUMERS):
        keys = smem.k_finite.index(part * CONSUMERS + i + (n >> 30))
        acc = warpgroup_mma(smem.ds.index(i + (n >> 30)).permute((1, 0)), keys, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def add(place, x):
    x = fold(x)
    LAYOUT: gl.constexpr = x.type.layout
    high = gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))[:, None] * x.shape[1]
    low = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.atomic_add(place + (high + low), x, sem="relaxed")


@gluon.jit
def consumer(
    me: gl.constexpr, dk, dv, dq, smem, bars, walk, mods, sizes, scale, natural, unit,
    spec: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = smem.k.shape[0]
    SLOTS: gl.constexpr = smem.q.shape[0]
    BLOCK_M: gl.constexpr = smem.q.shape[3]
    D: gl.constexpr = smem.q.shape[4]
    PARTS: gl.constexpr = smem.k_finite.shape[0] // CONSUMERS
    COLS: gl.constexpr = smem.k_finite.shape[2]
    SHARE: gl.constexpr = BLOCK_M // CONSUMERS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = dk.dtype

    lanes = gl.arange(0, BLOCK_M, gl.SliceLayout(0, S))
    j = (walk.col + me * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S)))[:, None]
    no_s = gl.zeros([ROWS, BLOCK_M], gl.float32, S)
    dk_acc = gl.zeros([ROWS, D], gl.float32, ACC)
    dv_acc = gl.zeros([ROWS, D], gl.float32, ACC)
    mbarrier.wait(bars.kv_full.index(me), 0)
    for part in gl.static_range(PARTS):
        make_finite(smem.k.index(me).reshape([ROWS, D]).slice(part * COLS, COLS, 1), smem.k_finite.index(part * CONSUMERS + me), COLS)
    n = 0
    edges = 0
    for PARTIAL in gl.static_range(2):
        tiles = band.tiles(walk.run, mods, spec, 0, BLOCK_M, PARTIAL)
        h, t = walk.h_k * GROUP, 0
        for _ in range(GROUP * tiles):
            row = band.start(walk.run, t, mods, spec, 0, BLOCK_M, PARTIAL)
            slot, lap = n % SLOTS, n // SLOTS & 1
            at = Site(walk.b, h, (row + lanes)[None, :], j, walk.offset, 0, 0)
            own = me + (n >> 30)
            k, v = smem.k.index(own).reshape([ROWS, D]), smem.v.index(own).reshape([ROWS, D])
            q, do = smem.q.index(slot).reshape([BLOCK_M, D]), smem.do.index(slot).reshape([BLOCK_M, D])
            mbarrier.wait(bars.full.index(slot), lap)
            if PARTIAL:
                mine_q, mine_do = q.slice(me * SHARE, SHARE, 0), do.slice(me * SHARE, SHARE, 0)
                make_finite(mine_q, mine_q, D)
                make_finite(mine_do, mine_do, D)
                fence_async_shared()
                mbarrier.arrive(bars.finite, count=1)
                mbarrier.wait(bars.finite, edges & 1)
                edges += 1
            lse_row = smem.lse.index(slot).load(gl.SliceLayout(0, S))[None, :]
            qk = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.permute((1, 0)), no_s, use_acc=False, is_async=True)
            qk = warpgroup_mma_wait(1, deps=(qk,))
            s = score.score(qk, at, mods, sizes, scale, spec)
            p = softmax.probability(s, softmax.closed(lse_row), natural, unit, False)
            delta_row = smem.delta.index(slot).load(gl.SliceLayout(0, S))[None, :]
            if PARTIAL:
                keep = score.visible(at, mods, sizes, spec)
                p = gl.where(keep, p + (delta_row - delta_row), 0.0)
            _, slope = score.gradient(p, qk, at, mods, sizes, scale, spec)  # of x, for a dp - delta of 1
            dv_acc = warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT), do, dv_acc, is_async=True)
            if dq is not None:  # the branch keeps ptxas from waiting before the exponentials
                mbarrier.wait(bars.ds_empty, n & 1 ^ 1)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            dx = slope * (dp - delta_row)
            if PARTIAL:
                dx = gl.where(keep, dx, 0.0)
            dx = dx.to(dtype)
            dk_acc = warpgroup_mma(gl.convert_layout(dx, LEFT), q, dk_acc, is_async=True)
            if dq is None:
                dv_acc, dk_acc = warpgroup_mma_wait(0, deps=(dv_acc, dk_acc))
                mbarrier.arrive(bars.empty.index(slot), count=1)
            else:
                smem.ds.index(own).store(dx)
                fence_async_shared()
                mbarrier.arrive(bars.ds_full, count=1)
                mbarrier.wait(bars.ds_full, n & 1)
                for mine in gl.static_range(PARTS // CONSUMERS):
                    tile_dq = product_dq(smem, me * (PARTS // CONSUMERS) + mine, n)
                    if mine == 0:
                        dv_acc, dk_acc = warpgroup_mma_wait(CONSUMERS, deps=(dv_acc, dk_acc))
                        mbarrier.arrive(bars.empty.index(slot), count=1)
                    tile_dq = warpgroup_mma_wait(0, deps=(tile_dq,))
                    if mine == PARTS // CONSUMERS - 1:
                        mbarrier.arrive(bars.ds_empty, count=1)
                    start = row * D + (me * (PARTS // CONSUMERS) + mine) * (BLOCK_M * COLS)
                    add(tile.origin(dq, walk.b, h) + start, tile_dq)
            n += 1
            h, t = following(h, t, tiles, GROUP)
    k, v = smem.k.index(me).reshape([ROWS, D]), smem.v.index(me).reshape([ROWS, D])
    k.store(score.derivative(dk_acc, scale).to(dtype))
    v.store(dv_acc.to(dtype))
    fence_async_shared()
    store_tile(dk, [walk.b, walk.h_k, walk.col + me * ROWS, 0], smem.k.index(me))
    store_tile(dv, [walk.b, walk.h_k, walk.col + me * ROWS, 0], smem.v.index(me))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    q, k, v, do, lse, delta, dq, dk, dv, mods, heads, seqlen_q, seqlen_k, batch, q_offset, left, right,
    scale: tl.float64,
    spec: gl.constexpr, shape: gl.constexpr, SLOTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    sizes = Sizes(heads, seqlen_q, seqlen_k, batch, q_offset, left, right)
    D: gl.constexpr = q.block_type.shape[3]
    GROUP: gl.constexpr = shape.group
    CONSUMERS: gl.constexpr = BLOCK_N // ROWS
    COLS: gl.constexpr = min(64, D // CONSUMERS)
    dtype: gl.constexpr = q.dtype
    col, h_k, b, _, _, _ = tile.place(mods, sizes, heads // GROUP, True, BLOCK_N)
    offset = tile.first_position(mods, sizes, b)
    run = band.of_queries(col, b, h_k, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    walk = Walk(b, h_k, col, offset, run)

    natural, unit = score.units(scale, spec, gl.float32)
    scale = tl.cast(scale, gl.float32)
    K_FINITE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    smem = Buffers(
        k=gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], k.layout),
        v=gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], v.layout),
        q=gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, D], q.layout),
        do=gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, D], do.layout),
        lse=gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], lse.layout),
        delta=gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], delta.layout),
        k_finite=gl.allocate_shared_memory(dtype, [D // COLS * CONSUMERS, ROWS, COLS], K_FINITE),
        ds=gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_M], DS),
    )
    bars = Barriers(
        kv_full=gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER),
        full=gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER),
        empty=gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER),
        finite=gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        ds_full=gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        ds_empty=gl.allocate_shared_memory(gl.int64, [1], BARRIER),
    )
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(bars.kv_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.full.index(i), count=1)
        mbarrier.init(bars.empty.index(i), count=CONSUMERS)
    mbarrier.init(bars.finite, count=CONSUMERS)
    mbarrier.init(bars.ds_full, count=CONSUMERS)
    mbarrier.init(bars.ds_empty, count=CONSUMERS)
    gl.warp_specialize(
        [
            (consumer, (0, dk, dv, dq, smem, bars, walk, mods, sizes, scale, natural, unit, spec, GROUP)),
            (consumer, (1, dk, dv, dq, smem, bars, walk, mods, sizes, scale, natural, unit, spec, GROUP)),
            (producer, (q, k, v, do, lse, delta, smem, bars, walk, mods, sizes, spec, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )
