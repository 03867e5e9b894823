"""Flash attention as Triton's tutorial 06 teaches it, written anew: what "written in Triton" means to most people.

    forward     one program owns BLOCK_M queries; the keys before the diagonal, then those on it; autotuned
    backward    one program owns BLOCK_N1 keys for dk and dv, then BLOCK_M2 queries for dq; tiles as the tutorial fixes

Scores are base 2, q, k and v of the forward come through tensor descriptors, those of the backward through pointers,
k is scaled in memory before the backward, and lse is kept in base 2: all as there. Of the tutorial's configurations the
forward tries the eight below; trying all of them would take minutes of every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
HEAD_DIMS = (64, 128)
MULTIPLE = 128  # of which lengths are: nothing in the kernels looks where a sequence ends


class Tiles(NamedTuple):
    """The tiles of a call: of the forward (None: autotuned), of dk and dv, of dq, and launch options."""

    forward: tuple[int, int] | None = None
    dkdv: tuple[int, int] = (32, 128)
    dq: tuple[int, int] = (128, 32)
    num_warps: int = 4
    num_stages: int = 5


TILES = Tiles()
SLICE: tl.constexpr = tl.constexpr(2)  # tiles on the diagonal are walked in pieces of half the size


@triton.jit
def walk_keys(
    acc, l, m, q_tile, k, v, first, row, start, stop, unit,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Take in the keys from start to stop: (acc [M, D], l [M], m [M]), scores in base 2."""
    for col in tl.range(start, stop, BLOCK_N):
        col = tl.multiple_of(col, BLOCK_N)
        k_tile = k.load([first + col, 0])
        s = tl.dot(q_tile, k_tile.T)
        if DIAGONAL:
            seen = (row + tl.arange(0, BLOCK_M))[:, None] >= (col + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v_tile = v.load([first + col, 0])
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
        m = m_new
    return acc, l, m


@triton.jit
def forward_kernel(
    q, k, v, o, lse, unit, seqlen,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q, k, v, o: descriptors of [batch * heads * seqlen, head_dim]; lse [batch * heads, seqlen], base 2."""
    row = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1) * seqlen
    q_tile = q.load([first + row, 0])
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    before = row if CAUSAL else seqlen
    acc, l, m = walk_keys(acc, l, m, q_tile, k, v, first, row, 0, before, unit, BLOCK_M, BLOCK_N, False)
    if CAUSAL:
        end = row + BLOCK_M
        acc, l, m = walk_keys(acc, l, m, q_tile, k, v, first, row, row, end, unit, BLOCK_M, BLOCK_N, True)
    o.store([first + row, 0], (acc / l[:, None]).to(q_tile.dtype))
    tl.store(lse + first + row + tl.arange(0, BLOCK_M), m + tl.log2(l))


@triton.jit
def delta_kernel(o, do, delta, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta = sum_d o_d do_d, [batch * heads * seqlen]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    total = tl.sum(tl.load(o + at).to(tl.float32) * tl.load(do + at).to(tl.float32), 1)
    tl.store(delta + rows, total)


@triton.jit
def walk_queries(
    dk, dv, k_tile, v_tile, q, do, lse, delta, col, start, stop, BLOCK_M: tl.constexpr, DIAGONAL: tl.constexpr
):  # fmt: skip
    """Take in the queries from start to stop: (dk [N, D], dv [N, D]), dk without its factor."""
    BLOCK_N: tl.constexpr = k_tile.shape[0]
    HEAD_DIM: tl.constexpr = k_tile.shape[1]
    dims = tl.arange(0, HEAD_DIM)
    for row in tl.range(start, stop, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        at = rows[:, None] * HEAD_DIM + dims[None, :]
        q_tile = tl.load(q + at)
        p = tl.exp2(tl.dot(k_tile, q_tile.T) - tl.load(lse + rows)[None, :])  # [N, M]
        if DIAGONAL:
            p = tl.where(rows[None, :] >= (col + tl.arange(0, BLOCK_N))[:, None], p, 0.0)
        do_tile = tl.load(do + at)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
        ds = p * (tl.dot(v_tile, do_tile.T) - tl.load(delta + rows)[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit
def walk_keys_back(
    dq, q_tile, do_tile, lse_row, delta_row, k, v, row, start, stop,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Take in the keys from start to stop: dq [M, D], in units of the scaled k."""
    dims = tl.arange(0, HEAD_DIM)
    for col in tl.range(start, stop, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        at = cols[:, None] * HEAD_DIM + dims[None, :]
        k_tile = tl.load(k + at)
        p = tl.exp2(tl.dot(q_tile, k_tile.T) - lse_row)  # [M, N]
        if DIAGONAL:
            p = tl.where((row + tl.arange(0, BLOCK_M))[:, None] >= cols[None, :], p, 0.0)
        ds = p * (tl.dot(do_tile, tl.load(v + at).T) - delta_row)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq)
    return dq


@triton.jit
def backward_kernel(
    q, k, v, do, lse, delta, dq, dk, dv, scale, seqlen,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, tiles: tl.constexpr,
):  # fmt: skip
    """Pointers to [batch * heads, seqlen, head_dim]; k times scale log2(e). Block x of both kinds has as many rows."""
    BLOCK_M1: tl.constexpr = tiles.dkdv[0]
    BLOCK_N1: tl.constexpr = tiles.dkdv[1]
    BLOCK_M2: tl.constexpr = tiles.dq[0]
    BLOCK_N2: tl.constexpr = tiles.dq[1]
    head = tl.program_id(1).to(tl.int64)
    origin = head * seqlen * HEAD_DIM
    q, k, v, do = q + origin, k + origin, v + origin, do + origin
    lse, delta = lse + head * seqlen, delta + head * seqlen
    dims = tl.arange(0, HEAD_DIM)

    col = tl.program_id(0) * BLOCK_N1
    at = (col + tl.arange(0, BLOCK_N1))[:, None] * HEAD_DIM + dims[None, :]
    k_tile, v_tile = tl.load(k + at), tl.load(v + at)
    dk_acc = tl.zeros([BLOCK_N1, HEAD_DIM], tl.float32)
    dv_acc = tl.zeros([BLOCK_N1, HEAD_DIM], tl.float32)
    row = 0
    if CAUSAL:
        row = col + BLOCK_N1
        dk_acc, dv_acc = walk_queries(
            dk_acc, dv_acc, k_tile, v_tile, q, do, lse, delta, col, col, row, BLOCK_M1 // SLICE, True
        )
    dk_acc, dv_acc = walk_queries(dk_acc, dv_acc, k_tile, v_tile, q, do, lse, delta, col, row, seqlen, BLOCK_M1, False)
    tl.store(dk + origin + at, (dk_acc * scale).to(k_tile.dtype))
    tl.store(dv + origin + at, dv_acc.to(v_tile.dtype))

    row = tl.program_id(0) * BLOCK_M2
    rows = row + tl.arange(0, BLOCK_M2)
    at = rows[:, None] * HEAD_DIM + dims[None, :]
    q_tile, do_tile = tl.load(q + at), tl.load(do + at)
    lse_row, delta_row = tl.load(lse + rows)[:, None], tl.load(delta + rows)[:, None]
    dq_acc = tl.zeros([BLOCK_M2, HEAD_DIM], tl.float32)
    end = seqlen
    if CAUSAL:
        end = row
        dq_acc = walk_keys_back(
            dq_acc, q_tile, do_tile, lse_row, delta_row, k, v, row, row, row + BLOCK_M2,
            HEAD_DIM, BLOCK_M2, BLOCK_N2 // SLICE, True,
        )  # fmt: skip
    dq_acc = walk_keys_back(
        dq_acc, q_tile, do_tile, lse_row, delta_row, k, v, row, 0, end, HEAD_DIM, BLOCK_M2, BLOCK_N2, False
    )
    tl.store(dq + origin + at, (dq_acc * LN2).to(q_tile.dtype))


def shape_descriptors(arguments: dict[str, Any]) -> None:
    """Give the descriptors the blocks of the configuration about to run."""
    block_m, block_n, head_dim = (arguments[name] for name in ("BLOCK_M", "BLOCK_N", "HEAD_DIM"))
    for name, block in (("q", block_m), ("k", block_n), ("v", block_n), ("o", block_m)):
        arguments[name].block_shape = [block, head_dim]


CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages, pre_hook=shape_descriptors)
    for m, n, warps, stages in (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4),
        (128, 32, 4, 4), (64, 64, 4, 3),
    )
]  # fmt: skip
# Not a decorator: the interpreter cannot time, and runs the kernel itself.
tuned_forward_kernel = triton.autotune(configs=CONFIGS, key=["seqlen", "HEAD_DIM", "CAUSAL"])(forward_kernel)


class TutorialAttention(torch.autograd.Function):
    """The kernels as an autograd function of q, k, v [batch, heads, seqlen, head_dim], dense."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, tiles: Tiles) -> Tensor:
        batch, heads, seqlen, head_dim = q.shape
        o = torch.empty_like(q)
        lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
        unit = head_dim**-0.5 * LOG2E
        block_m, block_n = tiles.forward or (1, 1)
        flat = [batch * heads * seqlen, head_dim]
        views = [
            TensorDescriptor(x, flat, [head_dim, 1], [block, head_dim])
            for x, block in ((q, block_m), (k, block_n), (v, block_n), (o, block_m))
        ]
        if tiles.forward is None:
            tuned_forward_kernel[lambda meta: (triton.cdiv(seqlen, meta["BLOCK_M"]), batch * heads)](
                *views, lse, unit, seqlen, HEAD_DIM=head_dim, CAUSAL=causal
            )
        else:
            forward_kernel[triton.cdiv(seqlen, block_m), batch * heads](
                *views, lse, unit, seqlen, HEAD_DIM=head_dim, CAUSAL=causal, BLOCK_M=block_m, BLOCK_N=block_n
            )
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.tiles = causal, tiles
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        tiles = ctx.tiles
        batch, heads, seqlen, head_dim = q.shape
        do = do.contiguous()
        scale = head_dim**-0.5
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        block = tiles.dq[0]
        delta_kernel[(batch * heads * seqlen // block,)](o, do, delta, HEAD_DIM=head_dim, BLOCK_M=block)
        backward_kernel[seqlen // tiles.dkdv[1], batch * heads](
            q, k * (scale * LOG2E), v, do, lse, delta, dq, dk, dv, scale, seqlen,
            HEAD_DIM=head_dim, CAUSAL=ctx.causal, tiles=tiles,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        return dq, dk, dv, None, None


def refusal(heads: int, heads_k: int, seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int) -> str | None:
    """Why the tutorial does not serve a shape, None where it does."""
    if heads != heads_k:
        return f"the tutorial has as many key heads as query heads, got {heads_k} and {heads}"
    if seqlen_q != seqlen_k or seqlen_q % MULTIPLE:
        return f"the tutorial wants as many queries as keys, in multiples of {MULTIPLE}, got {seqlen_q} and {seqlen_k}"
    if head_dim not in HEAD_DIMS or head_dim_v != head_dim:
        return f"the tutorial's backward is for head_dim {HEAD_DIMS}, got {head_dim} and {head_dim_v}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, tiles: Tiles = TILES) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v by the tutorial's kernels.

    Args:
        q, k, v: [batch, heads, seqlen, head_dim], dense; seqlen a multiple of every tile.
        causal: query i sees key j when j <= i.
        tiles: those of the tutorial; others are for tests.

    Returns:
        o [batch, heads, seqlen, head_dim].
    """
    o: Tensor = TutorialAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), causal, tiles)
    return o
