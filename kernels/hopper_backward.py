"""Backward pass for Hopper (sm_90) in Gluon, after FlashAttention-3 (Shah et al. 2024): five products in one kernel.

    s^T  = k q^T       p^T  = exp(score(s^T) - lse)         dv += p^T do
    dp^T = v do^T      ds^T = p^T (dp^T - delta)            dk += dx^T q      dq += dx k,  dx = ds d score / d qk

One program owns 128 keys of one key head and walks the queries that see them, 64 a step, of every head of the group: dk
and dv of a key have one owner and one order. Two consumers, warpgroups of 64 keys each, keep theirs in registers, and
p^T and dx^T enter their products from there. A producer warp brings Q, dO, lse and delta of a step by TMA into a ring
of slots: a slot's `full` barrier counts its bytes, its `empty` barrier the consumers that are done with it.

dq has many owners. Both consumers put their half of dx into shared memory (`dx_full`), each multiplies all of it with
all keys for half of the columns (`dx_empty`), and adds that to a float32 buffer by atomics: half as many as one tile
from each would take. The order of these sums changes from run to run, so dq does; dk and dv do not. The buffer keeps
the order of a wgmma's registers, so that a thread adds four numbers at once and a warp 512 bytes, without a detour
through shared memory; `convert_kernel` puts them in their place, scaled and in q's dtype.

Tiles that some query sees whole and others not (the diagonal, the window's edges, ragged ends) have a loop of their own
behind that of the others. There what is not finite in q and do is taken out of shared memory before the products, since
0 * NaN = NaN: a query that holds it has a NaN in lse or delta, and carries it to the keys it does see from there. k
has a second copy without, for dq.

Compiled and simulated, not yet run on a GPU. Same contract as `backward.backward`, for the calls that `unserved` lets
pass.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import band, hopper_forward, score, softmax, tile
from .backward import delta_kernel, of_sinks
from .hopper_forward import descriptor, tile_of, tma_load, tma_store, unaddressed
from .launch import coded, launch, prepare, shape_of, sizes_of, view
from .spec import Config, Configs, Gradients, Mods, Positions, Site, Spec, View, check_limits

ROWS = gl.constexpr(64)  # keys of a consumer, and queries of a step: the M of a wgmma
CONSUMERS = gl.constexpr(2)
REGISTERS = 168  # of a thread at launch; the producer then gives most of its own to the consumers
HEAD_DIMS = (64, 128)
STATISTICS = 2**31  # TMA's coordinates are 32-bit, and lse is one axis to it

# head_dim: tiles that compile without local memory in the main loops, with all exponentials under dp^T: 168 registers,
# 131, 98, 178 and 211 KiB of shared memory, at most 136 bytes spilled before and behind them. num_stages counts the
# ring's slots. The first is the one to use until one is measured. So Triton 3.6 and 3.7; with 3.9 a main loop of
# head_dim 128 reads 3 to 5 words of local memory.
CONFIGS = {
    64: (Config(64, 128, 8, 4), Config(64, 128, 8, 2)),
    128: (Config(64, 128, 8, 2), Config(64, 128, 8, 3)),
}


class Buffers(NamedTuple):
    """Shared memory of a program."""

    k: Any  # [CONSUMERS, 1, 1, ROWS, D]
    v: Any
    k_finite: Any  # [parts of D, then CONSUMERS; ROWS, D / parts]; a part is what one consumer finds of dq
    dx: Any  # [CONSUMERS, ROWS, ROWS], transposed: keys, queries
    q: Any  # [slots, 1, 1, ROWS, D]
    do: Any
    lse: Any  # [slots, ROWS]
    delta: Any


class Given(NamedTuple):
    """What changes from call to call."""

    sums: Any  # pointer to where dq is added up, or None
    scale: Any  # float32, and those of `score.units`, multiplied in 64 bits before they are
    natural: Any
    unit: Any


class Static(NamedTuple):
    """What is known when the kernel is compiled; slots are those of the ring."""

    spec: Any
    shape: Any
    slots: int


class Barriers(NamedTuple):
    """Who waits for whom."""

    kv_full: Any  # [CONSUMERS], a consumer for its k and v
    full: Any  # [slots], consumers for the producer
    empty: Any  # [slots], the producer for both consumers
    finite: Any  # consumers for each other: q and do hold no NaN
    dx_full: Any  # dx is written
    dx_empty: Any  # dx is read


class Walk(NamedTuple):
    """The keys of a program, the run of queries that see them, and where dq is added up, if it is."""

    b: Any
    h_k: Any
    col: Any
    offset: Any
    run: Any
    dq: Any


@gluon.jit
def following(h, t, tiles, GROUP: gl.constexpr):
    """The head and tile after tile t of head h: one loop for both costs fewer registers than two."""
    if GROUP == 1:
        return h, t + 1
    else:
        last = t == tiles - 1
        return gl.where(last, h + 1, h), gl.where(last, 0, t + 1)


@gluon.jit
def producer(descs, smem, bars, walk, mods, sizes, spec: gl.constexpr, GROUP: gl.constexpr):
    """Bring k and v, and what belongs to the queries in the order that `consumer` takes them."""
    SLOTS: gl.constexpr = smem.q.shape[0]
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc = descs
    for i in gl.static_range(CONSUMERS):
        full = bars.kv_full.index(i)
        mbarrier.expect(full, 2 * k_desc.block_type.nbytes)
        tma_load(k_desc, [walk.b, walk.h_k, walk.col + i * ROWS, 0], full, smem.k.index(i))
        tma_load(v_desc, [walk.b, walk.h_k, walk.col + i * ROWS, 0], full, smem.v.index(i))
    n = 0
    for PARTIAL in gl.static_range(2):
        tiles = band.tiles(walk.run, mods, spec, 0, ROWS, PARTIAL)
        h, t = walk.h_k * GROUP, 0
        for _ in range(GROUP * tiles):
            row = band.start(walk.run, t, mods, spec, 0, ROWS, PARTIAL)
            slot = n % SLOTS
            full = bars.full.index(slot)
            place = (walk.b * sizes.heads + h) * sizes.seqlen_q + row  # a head's last tile reads on in the next: masked
            mbarrier.wait(bars.empty.index(slot), n // SLOTS & 1 ^ 1)
            mbarrier.expect(full, 2 * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes))
            tma_load(q_desc, [walk.b, h, row, 0], full, smem.q.index(slot))
            tma_load(lse_desc, [place], full, smem.lse.index(slot))
            tma_load(do_desc, [walk.b, h, row, 0], full, smem.do.index(slot))
            tma_load(delta_desc, [place], full, smem.delta.index(slot))
            n += 1
            h, t = following(h, t, tiles, GROUP)


@gluon.jit
def copy_finite(source, target):
    """Copy [.., COLUMNS] within shared memory, with 0 for what is not finite."""
    LANES: gl.constexpr = source.shape[1] // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    target.store(tile.finite(source.load(LAYOUT)))


@gluon.jit
def product_dq(smem, PART: gl.constexpr, zero):
    """Start dx k for a part of the columns: [ROWS, columns], a wgmma for each consumer's keys."""
    COLUMNS: gl.constexpr = smem.k_finite.shape[2]
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    for i in gl.static_range(CONSUMERS):
        keys = smem.k_finite.index(PART * CONSUMERS + i + zero)
        acc = warpgroup_mma(smem.dx.index(i + zero).permute((1, 0)), keys, acc, use_acc=i > 0, is_async=True)
    return acc


@gluon.jit
def folded(x):
    """[ROWS, N] of a wgmma in the order of its registers: a thread's numbers four by four, [N / 8, 512]."""
    N: gl.constexpr = x.shape[1]
    x = x.reshape([4, 2, 8, N // 16, 2, 4, 2])  # rows: warp, half, lane; columns: .., half, lane, number
    return x.permute((3, 4, 0, 2, 5, 1, 6)).reshape([N // 8, 512])


@triton.jit
def unfolded(x, D: tl.constexpr):
    """`folded` undone, for all D columns: [ROWS * D] -> [ROWS, D]."""
    x = x.reshape([CONSUMERS, D // (16 * CONSUMERS), 2, 4, 8, 4, 2, 2])
    return tl.permute(x, (3, 6, 4, 0, 1, 2, 5, 7)).reshape([ROWS, D])


@gluon.jit
def add(target, x):
    """Add `folded` x to float32 memory."""
    x = folded(x)
    LAYOUT: gl.constexpr = x.type.layout
    quads = gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    lanes = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.atomic_add(target + (quads * x.shape[1] + lanes), x, sem="relaxed")


@gluon.jit
def consumer(
    me: gl.constexpr, dk_desc, dv_desc, smem, bars, walk, mods, sizes, units,
    spec: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Find dk and dv of 64 keys, and half of the columns of what 128 keys add to dq."""
    SLOTS: gl.constexpr = smem.q.shape[0]
    D: gl.constexpr = smem.q.shape[4]
    SHARE: gl.constexpr = ROWS // CONSUMERS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    dtype: gl.constexpr = dk_desc.dtype
    scale, natural, unit = units

    lanes = gl.arange(0, ROWS, ROW_LAYOUT)
    j = (walk.col + me * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT)))[:, None]
    none = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([ROWS, D], gl.float32, ACC_LAYOUT)
    dv = gl.zeros([ROWS, D], gl.float32, ACC_LAYOUT)
    mbarrier.wait(bars.kv_full.index(me), 0)
    if walk.dq is not None:
        k = smem.k.index(me).reshape([ROWS, D])
        for part in gl.static_range(CONSUMERS):
            columns = k.slice(part * (D // CONSUMERS), D // CONSUMERS, 1)
            copy_finite(columns, smem.k_finite.index(part * CONSUMERS + me))

    n, edges = 0, 0
    for PARTIAL in gl.static_range(2):
        tiles = band.tiles(walk.run, mods, spec, 0, ROWS, PARTIAL)
        h, t = walk.h_k * GROUP, 0
        for _ in range(GROUP * tiles):
            # 0, but not to the compiler: it would move all that follows from these addresses out of the loop, and spill
            zero = n >> 30
            row = band.start(walk.run, t, mods, spec, 0, ROWS, PARTIAL)
            at = Site(walk.b, h, (row + lanes)[None, :], j, walk.offset, 0, 0)
            k, v = smem.k.index(me + zero).reshape([ROWS, D]), smem.v.index(me + zero).reshape([ROWS, D])
            slot = n % SLOTS
            q, do = smem.q.index(slot).reshape([ROWS, D]), smem.do.index(slot).reshape([ROWS, D])
            mbarrier.wait(bars.full.index(slot), n // SLOTS & 1)
            if PARTIAL:
                q_share, do_share = q.slice(me * SHARE, SHARE, 0), do.slice(me * SHARE, SHARE, 0)
                copy_finite(q_share, q_share)
                copy_finite(do_share, do_share)
                fence_async_shared()
                mbarrier.arrive(bars.finite, count=1)
                mbarrier.wait(bars.finite, edges & 1)
                edges += 1
            lse_row = smem.lse.index(slot).load(ROW_LAYOUT)[None, :]
            qk = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, do.permute((1, 0)), none, use_acc=False, is_async=True)
            qk = warpgroup_mma_wait(1, deps=(qk,))
            s = score.score(qk, at, mods, sizes, scale, spec)
            p = softmax.probability(s, softmax.closed(lse_row), natural, unit, False)
            delta_row = smem.delta.index(slot).load(ROW_LAYOUT)[None, :]
            if PARTIAL:
                keep = score.visible(at, mods, sizes, spec)
                p = gl.where(keep, p + (delta_row - delta_row), 0.0)  # NaN where do_i is not finite: delta_i is not
            _, slope = score.gradient(p, qk, at, mods, sizes, scale, spec)  # dx where dp - delta is 1: dx is linear
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT_LAYOUT), do, dv, is_async=True)
            if walk.dq is not None:
                mbarrier.wait(bars.dx_empty, n & 1 ^ 1)  # ends a basic block: ptxas waits below the exponentials then
            dp = warpgroup_mma_wait(1, deps=(dp,))
            dx = slope * (dp - delta_row)
            if PARTIAL:
                dx = gl.where(keep, dx, 0.0)  # p = 0 alone would let a NaN of dp through
            dx = dx.to(dtype)
            dk = warpgroup_mma(gl.convert_layout(dx, LEFT_LAYOUT), q, dk, is_async=True)
            if walk.dq is None:
                dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                mbarrier.arrive(bars.empty.index(slot), count=1)
            else:
                smem.dx.index(me + zero).store(dx)
                fence_async_shared()
                mbarrier.arrive(bars.dx_full, count=1)
                mbarrier.wait(bars.dx_full, n & 1)
                dq_part = product_dq(smem, me, zero)
                dv, dk = warpgroup_mma_wait(CONSUMERS, deps=(dv, dk))
                mbarrier.arrive(bars.empty.index(slot), count=1)
                dq_part = warpgroup_mma_wait(0, deps=(dq_part,))
                mbarrier.arrive(bars.dx_empty, count=1)
                add(tile.origin(walk.dq, walk.b, h) + row.to(gl.int64) * D + me * (ROWS * D // CONSUMERS), dq_part)
            n += 1
            h, t = following(h, t, tiles, GROUP)

    smem.k.index(me).reshape([ROWS, D]).store(score.derivative(dk, scale).to(dtype))  # k and v are spent
    smem.v.index(me).reshape([ROWS, D]).store(dv.to(dtype))
    fence_async_shared()
    tma_store(dk_desc, [walk.b, walk.h_k, walk.col + me * ROWS, 0], smem.k.index(me))
    tma_store(dv_desc, [walk.b, walk.h_k, walk.col + me * ROWS, 0], smem.v.index(me))
    tma.store_wait(0)


@gluon.jit
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_desc, dv_desc, given, mods, sizes,
    static: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    spec: gl.constexpr = static.spec
    shape: gl.constexpr = static.shape
    SLOTS: gl.constexpr = static.slots
    D: gl.constexpr = shape.block_d
    GROUP: gl.constexpr = shape.group
    dtype: gl.constexpr = q_desc.dtype
    sizes = tile.decoded(sizes)
    col, h_k, b, _, _, _ = tile.place(mods, sizes, sizes.heads // GROUP, True, BLOCK_N)
    offset = tile.first_position(mods, sizes, b)
    run = band.of_queries(col, b, h_k, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)
    dq = None
    if given.sums is not None:
        numbers = tl.cdiv(sizes.seqlen_q, BLOCK_M).to(gl.int64) * (BLOCK_M * D)
        dq = View(given.sums, sizes.heads * numbers, numbers, D, 1)

    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D // CONSUMERS], dtype)
    DX_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], dtype)
    smem = Buffers(
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], v_desc.layout),
        gl.allocate_shared_memory(dtype, [CONSUMERS * CONSUMERS, ROWS, D // CONSUMERS], K_LAYOUT),
        gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, ROWS], DX_LAYOUT),
        gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_M, D], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], lse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK_M], delta_desc.layout),
    )
    bars = Barriers(
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(bars.kv_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.full.index(i), count=1)
        mbarrier.init(bars.empty.index(i), count=CONSUMERS)
    mbarrier.init(bars.finite, count=CONSUMERS)
    mbarrier.init(bars.dx_full, count=CONSUMERS)
    mbarrier.init(bars.dx_empty, count=CONSUMERS)

    walk = Walk(b, h_k, col, offset, run, dq)
    units = (given.scale, given.natural, given.unit)
    # What is known when compiling stays out of tuples that have a name: those hold tensors.
    gl.warp_specialize(
        [
            (consumer, (0, dk_desc, dv_desc, smem, bars, walk, mods, sizes, units, spec, GROUP)),
            (consumer, (1, dk_desc, dv_desc, smem, bars, walk, mods, sizes, units, spec, GROUP)),
            (
                producer,
                ((q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc), smem, bars, walk, mods, sizes, spec, GROUP),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def convert_kernel(
    sums, dq, sizes, scale: tl.float64, shape: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program owns BLOCK_M queries of one head: from sums over x in the order of registers to dq."""
    D: tl.constexpr = shape.block_d
    heads, seqlen_q = tile.number(sizes.heads), tile.number(sizes.seqlen_q)
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block, h, b = tile.locate(blocks, heads)
    place = ((b.to(tl.int64) * heads + h) * blocks + block) * (BLOCK_M * D)
    total = unfolded(tl.load(sums + place + tl.arange(0, BLOCK_M * D)), D)
    tile.store(dq, score.derivative(total, scale), b, h, block * BLOCK_M, seqlen_q, shape.head_dim)


def unserved(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mods: Mods,
    spec: Spec,
    needs: Gradients,
    deterministic: bool,
) -> str | None:
    """Why this kernel does not serve a call, whatever the device; None where it does.

    Args:
        q, k, v, mods, spec, needs: as `backward` takes them.
        deterministic: whether the gradients must not change from run to run.

    Returns:
        The reason, as part of a sentence.
    """
    if reason := hopper_forward.unserved(q, k, v, mods, spec):
        return reason
    head_dim = max(q.shape[3], v.shape[3])
    if head_dim > HEAD_DIMS[-1]:
        return f"head_dim {head_dim}, where dk and dv of up to {HEAD_DIMS[-1]} fit the registers"
    if spec.softcap is not None and head_dim > 64:
        return f"softcap with head_dim {head_dim}, where tanh fits the registers up to 64"
    if not (needs.k and needs.v):
        return "dk or dv is not asked for: one kernel finds all"
    if needs.q and deterministic:
        return "deterministic gradients: dq is added up by atomics"
    if q.shape[0] * q.shape[1] * q.shape[2] >= STATISTICS:
        return f"{q.shape[0] * q.shape[1] * q.shape[2]} rows, where TMA counts to 2^31"
    return None


def candidates(head_dim: int, banded: bool) -> tuple[Config, ...]:
    """The configurations for a head dimension that `unserved` lets pass; a band makes no difference."""
    return CONFIGS[next(size for size in HEAD_DIMS if head_dim <= size)]


def options_of(config: Config) -> dict[str, int]:
    """The compiler's options for a configuration; warp specialisation adds to the first consumer's four warps.

    Raises:
        ValueError: the configuration is none of this kernel's.
    """
    check_limits("hopper_backward", config, "config['dkdv']")
    return {"num_warps": 4, "maxnreg": REGISTERS}


def addressed(x: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, seqlen_q, head_dim_v], or a copy where TMA cannot address it."""
    return x if unaddressed(x) is None else x.clone(memory_format=torch.contiguous_format)


def statistics(x: torch.Tensor) -> TensorDescriptor:
    """Tiles [ROWS] of x [batch, heads, seqlen_q] as one axis: a tile may start anywhere on it. Copied where need be."""
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [ROWS.value], layout)


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
    """Launch the Hopper backward kernels, for a call of which `unserved` says nothing.

    Args:
        do: gradient of o, [batch, heads, seqlen_q, head_dim_v], any strides; copied where TMA cannot address it.
        dlse: gradient of lse, [batch, heads, seqlen_q], any strides, or None.
        q, k, v, mods, spec, scale, positions: as the forward took them.
        o, lse: as the forward returned them.
        configs: dkdv says the tiles of the one kernel: block_m 64, block_n 128, num_warps 8; num_stages, slots of the
            ring. dq says those of delta.
        needs: which gradients are wanted; dk and dv are.

    Returns:
        The gradients, each with its operand's shape, dtype and (of q, k and v) axis order; None where not wanted.

    Raises:
        ValueError: the configuration is none of this kernel's.
    """
    config, options = configs.dkdv, options_of(configs.dkdv)
    blank = torch.empty_like if q.numel() else torch.zeros_like
    dk, dv = blank(k), blank(v)
    dq, delta = torch.empty_like(q) if needs.q else None, torch.empty_like(lse)
    if q.numel() == 0:
        return Gradients(dq, dk, dv, sinks=of_sinks(lse, delta, mods) if needs.sinks else None)
    do = addressed(do)
    operands, spec = prepare(mods, spec)
    sizes, shape = sizes_of(q, k, mods, positions), shape_of(q, k, v)
    programs = triton.cdiv(q.shape[2], configs.dq.block_m) * q.shape[1] * q.shape[0]
    shares = None if dlse is None else view(dlse.unsqueeze(3))
    launch(delta_kernel, programs, q.device, configs.dq, view(o), view(do), shares, delta, coded(sizes), shape)

    columns = tile_of(shape.head_dim)
    shape = shape._replace(block_d=columns, block_dv=columns)
    blocks = triton.cdiv(q.shape[2], config.block_m)
    sums = None
    if dq is not None:
        numbers = q.shape[0] * q.shape[1] * blocks * config.block_m * columns
        sums = torch.zeros(numbers, dtype=torch.float32, device=q.device)
    tiles = (descriptor(x, ROWS.value, columns) for x in (q, k, v, do))
    gradients = (descriptor(x, ROWS.value, columns) for x in (dk, dv))
    natural = scale if spec.raw else 1.0
    given = Given(sums, scale, natural, natural * score.LOG2E.value)
    rest = (given, operands, coded(sizes), Static(spec, shape, config.num_stages))
    programs = triton.cdiv(k.shape[2], config.block_n) * k.shape[1] * k.shape[0]
    args = (*tiles, statistics(lse), statistics(delta), *gradients, *rest)
    launch(backward_kernel, programs, q.device, config, *args, **options)
    if dq is not None:
        plain = Config(config.block_m, config.block_n, 4, 1)
        last = (sums, view(dq), coded(sizes), scale, shape)
        launch(convert_kernel, blocks * q.shape[1] * q.shape[0], q.device, plain, *last)
    return Gradients(dq, dk, dv, sinks=of_sinks(lse, delta, mods) if needs.sinks else None)
