"""Forward pass for Hopper (sm_90) in Gluon, after FlashAttention-3 (Shah et al. 2024, Algorithm 2).

    s   = score(q k^T)               [seqlen_q, seqlen_k]      -inf where a key is not visible
    lse = log sum_j exp(s_j)         [seqlen_q]                natural logarithm
    o   = sum_j exp(s_j - lse) v_j   [seqlen_q, head_dim_v]

One program owns 64 queries of one head for each of its consumers, which are warpgroups. A producer warp brings tiles of
K and V by TMA into a ring of slots; a slot's `full` barrier counts its bytes, its `empty` barrier the consumers that
are done with it. Tiles at the edges of what is visible come first, one after the other. Then come those that every
query sees whole: q k_j^T is issued before p_{j-1} v_{j-1}, so that the softmax of tile j runs under the second.

ptxas moves the wait for p v above the softmax, and hides nothing, unless a basic block ends between them. The spin on
the barrier of the next K ends one: it stands there for that (tests/test_hopper_compiled.py asks for the overlap).

At head_dim 256 a consumer takes all its 240 registers. The compiler finds what follows from the arguments alone before
the consumers part, and keeps it to the end or spills it: so `Given` is an argument, and scale has 32 bits.

A weight of 0 does not keep a NaN of v from queries that must not see it. Tiles where that can happen are at the edges,
which come first: where acc is not finite after them, it is found again key by key, from the visible pairs alone.

Same contract as `forward.forward`, for the calls that `unserved` lets pass.
Compiled and simulated, not yet run on a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton

try:
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
except ImportError as error:
    raise ImportError(f"the Hopper kernels are written in Gluon, which Triton {triton.__version__} lacks") from error

from . import band, score, softmax, tile
from .launch import coded, launch, prepare, shape_of, sizes_of, view
from .spec import Config, Mods, Positions, Site, Sizes, Spec, check_limits, dense_like

# Triton 3.8 renamed both copies, and 3.9 has the new names alone.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # queries of a consumer: the M of a wgmma
COLUMNS = gl.constexpr(64)  # of head_dim that the search for hidden NaN takes at a time
HEAD_DIMS = (64, 128, 256)  # of a tile in shared memory; TMA fills what a head lacks with zeros
REGISTERS = {2: 168, 3: 128}  # of a thread at launch, by the number of consumers: all there are
RESIDENT = 32 * 2**20  # bytes of K and V that stay in the 50 MB of L2 while their queries pass

# (columns of a tile, whether some visible pair is hidden by position): tiles that compile with the softmax under p v
# and without a spill. block_m is 64 for each consumer, num_warps 4, num_stages counts slots. The first is the one to
# use.
CONFIGS = {
    (64, False): (Config(192, 128, 12, 2), Config(128, 128, 8, 2)),
    (64, True): (Config(128, 128, 8, 2),),
    (128, False): (Config(128, 128, 8, 2),),
    (128, True): (Config(128, 128, 8, 2),),
    (256, False): (Config(128, 64, 8, 2),),
    (256, True): (Config(128, 64, 8, 2),),
}


class Sources(NamedTuple):
    """Keys and values in memory, for what is looked up beside the tiles that TMA brings."""

    k: Any  # Views
    v: Any


class Given(NamedTuple):
    """Numbers that the compiler would find before the consumers part, and keep, did they follow from others there."""

    blocks: Any  # of BLOCK_M queries of one head; this and section by `launch.coded`
    section: Any  # heads that are taken together
    scale: Any  # float32, and the second of `score.units`
    unit: Any


@gluon.jit
def place(blocks, section, heads, batch, BLOCK_M: gl.constexpr):
    """(first query, head, batch element) of this program.

    Heads are taken a section at a time, so that its K and V stay in L2; in it the last queries come first, since causal
    ones see most keys, and heads that share K and V are neighbours.
    """
    pid = gl.program_id(0)
    first = pid // blocks // section * section
    size = gl.minimum(section, heads * batch - first)
    within = pid - first * blocks
    head = first + within % size
    return (blocks - 1 - within // size) * BLOCK_M, head % heads, head // heads


@gluon.jit
def producer(
    given, mods,
    spec: gl.constexpr, shape: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Bring q, and the tiles of k and v in the order that `consumer` takes them."""
    q_desc, k_desc, v_desc, smem, bars, at, run = given
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    row, h, b = at
    for n in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(n), q_desc.block_type.nbytes)
        tma_load(q_desc, [b, h, row + n * ROWS, 0], q_full.index(n), q_smem.index(n))
    before = 0
    for FULL in gl.static_range(2):
        count = band.tiles(run, mods, spec, 1, BLOCK_N, FULL == 0)
        for t in range(count):
            col = band.start(run, t, mods, spec, 1, BLOCK_N, FULL == 0)
            slot = (before + t) % SLOTS
            phase = ((before + t) // SLOTS) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma_load(k_desc, [b, h // shape.group, col, 0], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma_load(v_desc, [b, h // shape.group, col, 0], v_full.index(slot), v_smem.index(slot))
        before = count


@gluon.jit
def consumer(
    me: gl.constexpr, given, mods,
    spec: gl.constexpr, shape: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Find o and lse of 64 queries."""
    o_desc, lse, sources, smem, bars, at, run, lengths, units = given
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    row, h, b = at
    seqlen_q, seqlen_k, offset, left, right = lengths
    scale, unit = units
    sizes = Sizes(1, seqlen_q, seqlen_k, 1, offset, left, right)
    dtype: gl.constexpr = o_desc.dtype
    D: gl.constexpr = shape.block_d
    DV: gl.constexpr = shape.block_dv
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    EACH_WARP: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [4], [0])

    first = row + me * ROWS
    rows = first + gl.arange(0, ROWS, ROW_LAYOUT)
    cols = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))[None, :]
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
    l = gl.full([ROWS], 0.0, gl.float32, ROW_LAYOUT)
    acc = gl.zeros([ROWS, DV], gl.float32, O_LAYOUT)
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    q = q_smem.index(me).reshape([ROWS, D])
    mbarrier.wait(q_full.index(me), 0)

    partial = band.tiles(run, mods, spec, 1, BLOCK_N, True)
    for t in range(partial):
        slot = t % SLOTS
        phase = (t // SLOTS) & 1
        mbarrier.wait(k_full.index(slot), phase)
        k = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
        qk = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
        qk = warpgroup_mma_wait(0, deps=(qk,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        site = Site(b, h, rows[:, None], band.start(run, t, mods, spec, 1, BLOCK_N, True) + cols, offset, 0, 0)
        s = score.score(qk, site, mods, sizes, scale, spec)
        s = gl.where(score.visible(site, mods, sizes, spec), s, float("-inf"))
        p, alpha, m, l = softmax.step(s, m, l, unit, False)
        acc = acc * gl.convert_layout(alpha, O_ROW_LAYOUT)[:, None]
        p = gl.convert_layout(p.to(dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(slot), phase)
        acc = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, DV]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)

    if spec.causal or spec.left or spec.right:
        # every warp adds up all rows: where some threads load for all, Triton 3.6 holds a register from the start on
        if gl.sum(gl.convert_layout(gl.sum(acc - acc, 1), EACH_WARP), 0) != 0.0:
            pivot = gl.convert_layout(gl.where(m == float("-inf"), 0.0, m), O_ROW_LAYOUT)
            acc = visible_sum(sources, q, first, pivot, at, run, mods, lengths, units, spec, shape, BLOCK_N, O_LAYOUT)

    full = band.tiles(run, mods, spec, 1, BLOCK_N, False)
    if full > 0:
        slot = partial % SLOTS
        mbarrier.wait(k_full.index(slot), (partial // SLOTS) & 1)
        k = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
        qk = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
        qk = warpgroup_mma_wait(0, deps=(qk,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        site = Site(b, h, rows[:, None], cols, offset, 0, 0)  # nothing in a full tile asks where it lies
        p, alpha, m, l = softmax.step(score.score(qk, site, mods, sizes, scale, spec), m, l, unit, False)
        acc = acc * gl.convert_layout(alpha, O_ROW_LAYOUT)[:, None]
        p = gl.convert_layout(p.to(dtype), P_LAYOUT)
        mbarrier.wait(k_full.index((partial + 1) % SLOTS), ((partial + 1) // SLOTS) & 1, pred=full > 1)

        for j in range(partial + 1, partial + full):
            slot = j % SLOTS
            last = (j - 1) % SLOTS
            k = k_smem.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
            qk = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(last), ((j - 1) // SLOTS) & 1)
            acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, DV]), acc, is_async=True)
            qk = warpgroup_mma_wait(1, deps=(qk,))
            mbarrier.arrive(k_empty.index(slot), count=1)
            s = score.score(qk, site, mods, sizes, scale, spec)
            p_next, alpha, m, l = softmax.step(s, m, l, unit, False)
            # ends the basic block: see above
            mbarrier.wait(k_full.index((j + 1) % SLOTS), ((j + 1) // SLOTS) & 1, pred=j + 1 < partial + full)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(last), count=1)
            acc = acc * gl.convert_layout(alpha, O_ROW_LAYOUT)[:, None]
            p = gl.convert_layout(p_next.to(dtype), P_LAYOUT)

        last = (partial + full - 1) % SLOTS
        mbarrier.wait(v_full.index(last), ((partial + full - 1) // SLOTS) & 1)
        acc = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, DV]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))

    weight, divisor, lse_row = softmax.totals(m, l, scale if spec.raw else 1.0, mods, b, h)
    factor = weight / divisor if mods.sinks is not None else 1.0 / divisor
    o = acc * gl.convert_layout(factor, O_ROW_LAYOUT)[:, None]
    gl.store(lse + rows, lse_row, mask=rows < seqlen_q)
    o_smem = q_smem.index(me)  # the queries are spent
    o_smem.reshape([ROWS, DV]).store(o.to(dtype))
    fence_async_shared()
    tma_store(o_desc, [b, h, first, 0], o_smem)
    tma.store_wait(0)


@gluon.jit
def visible_sum(
    sources, q, first, pivot, at, run, mods, lengths, units,
    spec: gl.constexpr, shape: gl.constexpr, BLOCK_N: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """acc after the tiles at the edges, from the visible pairs alone: exp(s - pivot) v, key by key. [ROWS, DV]"""
    seqlen_q, seqlen_k, offset, left, right = lengths
    scale, unit = units
    sizes = Sizes(1, seqlen_q, seqlen_k, 1, offset, left, right)
    _, h, b = at
    D: gl.constexpr = shape.block_d
    DV: gl.constexpr = shape.block_dv
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    rows = first + gl.arange(0, ROWS, ROW_LAYOUT)
    dims = gl.arange(0, COLUMNS, gl.SliceLayout(0, Q_LAYOUT))
    dims_v = gl.arange(0, DV, gl.SliceLayout(0, O_LAYOUT))
    k, k_stride, v, v_stride = sources
    acc = gl.zeros([ROWS, DV], gl.float32, O_LAYOUT)
    for t in range(band.tiles(run, mods, spec, 1, BLOCK_N, True)):
        col = band.start(run, t, mods, spec, 1, BLOCK_N, True)
        for j in range(col, gl.minimum(col + BLOCK_N, seqlen_k)):
            qk = gl.full([ROWS], 0.0, gl.float32, ROW_LAYOUT)
            for c in gl.static_range(D // COLUMNS):
                inside = dims + c * COLUMNS < shape.head_dim
                k_row = gl.load(k + j * k_stride.to(gl.int64) + dims + c * COLUMNS, mask=inside, other=0.0)
                products = (
                    q.slice(c * COLUMNS, COLUMNS, 1).load(Q_LAYOUT).to(gl.float32) * k_row.to(gl.float32)[None, :]
                )
                qk += gl.convert_layout(gl.sum(products, 1), ROW_LAYOUT)
            v_row = gl.load(v + j * v_stride.to(gl.int64) + dims_v, mask=dims_v < shape.head_dim_v, other=0.0)
            site = Site(b, h, rows, j, offset, 0, 0)
            s = score.score(qk, site, mods, sizes, scale, spec)
            p = softmax.exponential(s, pivot, unit, False).to(v_row.dtype).to(gl.float32)
            keep = score.visible(site, mods, sizes, spec)[:, None]
            acc = gl.where(keep, acc + p[:, None] * v_row.to(gl.float32)[None, :], acc)
    return acc


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, sources, mods, sizes, given, spec: gl.constexpr, shape: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = shape.block_d
    DV: gl.constexpr = shape.block_dv
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    sizes = tile.decoded(sizes)
    heads, batch = sizes.heads, sizes.batch
    row, h, b = place(tile.number(given.blocks), tile.number(given.section), heads, batch, BLOCK_M)
    offset = tile.first_position(mods, sizes, b)
    run = band.of_keys(row, b, h, offset, mods, sizes, spec, BLOCK_M, BLOCK_N)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [SLOTS, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [SLOTS, 1, 1, BLOCK_N, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(n), count=1)
    for n in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=CONSUMERS)
        mbarrier.init(v_empty.index(n), count=CONSUMERS)

    smem = (q_smem, k_smem, v_smem)
    bars = (q_full, k_full, k_empty, v_full, v_empty)
    at = (row, h, b)
    lse += (b.to(gl.int64) * heads + h) * sizes.seqlen_q
    h_k = h // shape.group
    k, v = sources.k, sources.v
    places = (tile.origin(k, b, h_k), k.stride_s, tile.origin(v, b, h_k), v.stride_s)
    lengths = (sizes.seqlen_q, sizes.seqlen_k, offset, sizes.left, sizes.right)
    units = (given.scale, given.unit)
    # A tuple with a name holds tensors alone: what is known when compiling is passed beside it.
    brings = (q_desc, k_desc, v_desc, smem, bars, at, run)
    finds = (o_desc, lse, places, smem, bars, at, run, lengths, units)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, finds, mods, spec, shape, BLOCK_N, SLOTS)),
                (consumer, (1, finds, mods, spec, shape, BLOCK_N, SLOTS)),
                (producer, (brings, mods, spec, shape, BLOCK_N, SLOTS, CONSUMERS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, finds, mods, spec, shape, BLOCK_N, SLOTS)),
                (consumer, (1, finds, mods, spec, shape, BLOCK_N, SLOTS)),
                (consumer, (2, finds, mods, spec, shape, BLOCK_N, SLOTS)),
                (producer, (brings, mods, spec, shape, BLOCK_N, SLOTS, CONSUMERS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def unserved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mods: Mods, spec: Spec) -> str | None:
    """Why these kernels do not serve a call, whatever the device; None where they do.

    Args:
        q, k, v, mods, spec: as `forward` takes them.

    Returns:
        The reason, as part of a sentence.
    """
    shape = shape_of(q, k, v)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(q.dtype).removeprefix('torch.')}, where wgmma multiplies float16 or bfloat16"
    if not 0 < tile_of(shape.head_dim) == tile_of(shape.head_dim_v):
        return f"head_dim {shape.head_dim} and head_dim_v {shape.head_dim_v}, which fill no tile of {HEAD_DIMS} alike"
    features = {
        "packed sequences": mods.bad,
        "a mask": mods.mask,
        "a bias": mods.bias,
        "ALiBi": mods.alibi_slopes,
        "dropout": spec.dropout_p or None,
        "a block mask": mods.blocks,
        "a score_mod": mods.score_mod,
        "a mask_mod": mods.mask_mod,
        "a part of the keys": spec.part or None,
    }
    found = [name for name, operand in features.items() if operand is not None]
    if found or spec.hides or mods.spans is not None:
        return f"{', '.join(found) or 'a mask'}, which the Hopper kernels lack"
    if k.shape[2] == 0:
        return "no key"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if reason := unaddressed(x):
            return f"{name} {reason}, which TMA cannot address"
    return None


def tile_of(head_dim: int) -> int:
    """Columns of the tile that holds a head; 0 where none does."""
    return next((size for size in HEAD_DIMS if head_dim <= size), 0)


def unaddressed(x: torch.Tensor) -> str | None:
    """Why no descriptor describes x [batch, heads, seqlen, head_dim]; None where one does."""
    unit = 16 // x.element_size()
    if x.shape[3] % unit:
        return f"with rows of {x.shape[3]} elements, no multiple of {unit}"
    if x.stride(3) != 1 and x.shape[3] > 1:
        return "whose head_dim is not innermost"
    wrong = [n for n, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1 and (n % unit or n == 0)]
    if wrong:
        return f"with a stride of {wrong[0]} elements, no positive multiple of {unit}"
    return None if x.data_ptr() % 16 == 0 else "at an address that is no multiple of 16"


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [rows, columns] of x [batch, heads, seqlen, head_dim]; an axis of one index may have any stride."""
    unit = 16 // x.element_size()
    strides = [unit if size == 1 else n for size, n in zip(x.shape[:3], x.stride()[:3], strict=True)]
    block = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16 if x.dtype == torch.float16 else gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def candidates(head_dim: int, banded: bool) -> tuple[Config, ...]:
    """The configurations for a head dimension that `unserved` lets pass; banded: causal, or with a window."""
    return CONFIGS[tile_of(head_dim), banded]


def options_of(config: Config) -> dict[str, int]:
    """The compiler's options for a configuration; warp specialisation adds to the first consumer's four warps.

    Raises:
        ValueError: the configuration is none of these kernels'.
    """
    check_limits("hopper_forward", config)
    return {"num_warps": 4, "maxnreg": REGISTERS[config.block_m // ROWS.value]}


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
    """Launch the Hopper forward kernel, for a call of which `unserved` says nothing.

    Args:
        q: [batch, heads, seqlen_q, head_dim], float16 or bfloat16.
        k: [batch, heads_k, seqlen_k, head_dim].
        v: [batch, heads_k, seqlen_k, head_dim_v].
        mods: optional operands: q_offset and sinks.
        spec: compile-time choices.
        scale: factor of q.k.
        positions: position of query 0 among the keys, and the window's reach.
        config: block_m 128 or 192, 64 for each consumer; block_n; num_warps 4 for each consumer; num_stages, slots of
            the ring.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v], of q's dtype and axis order, and lse [batch, heads, seqlen_q] in natural
        logarithm, float32.

    Raises:
        ValueError: the configuration is none of these kernels'.
    """
    options = options_of(config)
    o = dense_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    operands, spec = prepare(mods, spec)
    sizes, shape = sizes_of(q, k, mods, positions), shape_of(q, k, v)
    columns = tile_of(shape.head_dim)
    shape = shape._replace(block_d=columns, block_dv=columns)
    descriptors = (
        descriptor(x, rows, columns)
        for x, rows in ((q, ROWS.value), (k, config.block_n), (v, config.block_n), (o, ROWS.value))
    )
    blocks = triton.cdiv(q.shape[2], config.block_m)
    unit = (scale if spec.raw else 1.0) * score.LOG2E.value  # the second of `score.units`
    given = coded(Given(blocks, section(q, k, v), 0, 0))._replace(scale=scale, unit=unit)
    rest = (coded(sizes), given, spec, shape, config.num_stages)
    args = (*descriptors, lse, Sources(view(k), view(v)), operands, *rest)
    launch(forward_kernel, blocks * q.shape[1] * q.shape[0], q.device, config, *args, **options)
    return o, lse


def section(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many query heads are taken together: those whose keys and values stay in L2."""
    nbytes = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    group = q.shape[1] // k.shape[1]
    return min(max(1, RESIDENT // nbytes) * group, q.shape[0] * q.shape[1])
