"""Attention in torch operations, for the CPU and every machine without Triton: O(n) memory, forward and backward.

The same contract as `kernels/forward.py` and `kernels/backward.py`. A tile here is some query rows against all the keys
that any of them can see: whole rows, so the softmax needs no running maximum, and few enough that the scores stay within
`TILE_BYTES` at every length (Rabe & Staats 2021, arXiv 2112.05682). The backward pass computes the weights again from lse
(Dao et al. 2022, arXiv 2205.14135, algorithm 4).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash.kernels.spec import Mods, Spec

TILE_BYTES = 2 * 2**20  # scores of one tile; a handful of temporaries of this size is all the memory beside the results


class Tile(NamedTuple):
    """Query rows of some heads of one sequence, and the keys that any of the rows can see."""

    b: int
    heads_k: slice
    heads: slice  # the query heads that share heads_k
    rows: slice
    cols: slice
    diagonal: int | None  # row r of the tile sees key j when j <= r + diagonal; None: every row sees every key


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, spec: Spec, scale: float, q_offset: int
) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, heads, seqlen_q, head_dim], k and v [batch, heads_k, seqlen_k, head_dim or head_dim_v].

    Args:
        q, k, v: one float dtype, any strides, heads_k divides heads.
        mods: optional operands of the score.
        spec: choices of the call.
        scale: factor on q . k.
        q_offset: position of the first query among the keys; mods.q_offset, int [batch], stands in for it.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v] in q's dtype and order in memory, and lse [batch, heads, seqlen_q],
        natural logarithm, float32 (float64 for float64).
    """
    accumulator = accumulator_dtype(q)
    o = like(q, v.shape[-1]).zero_()
    lse = torch.full(q.shape[:3], float("-inf"), dtype=accumulator, device=q.device)
    finite = not spec.causal or all_finite(v)
    for tile in tiles(q, k, mods, spec, q_offset):
        q_tile = load_rows(q, tile, accumulator)
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        s = scores(q_tile, k_tile, tile, scale)
        m = s.amax(-1, keepdim=True)
        m = m.masked_fill_(m == float("-inf"), 0.0)  # a row without keys stays finite
        p = s.sub_(m).exp_()
        l = p.sum(-1, keepdim=True)
        acc = matmul(p, v_tile, None if finite else visible(p, tile))
        store_rows(o, tile, acc.div_(l.masked_fill(l == 0, 1.0)))
        store_rows(lse.unsqueeze(-1), tile, l.log().add_(m))
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    q_offset: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`, those that `needs` (for q, k, v) asks for and None for the others.

    Args:
        do: gradient of o, any strides.
        dlse: gradient of lse, or None for zero.
        q, k, v, mods, spec, scale, q_offset: as given to `forward`.
        o, lse: as it returned them.
        needs: which of dq, dk, dv to compute.

    Returns:
        dq, dk, dv in the shape, dtype and order in memory of q, k, v.
    """
    accumulator = accumulator_dtype(q)
    dq = like(q, q.shape[-1]).zero_() if needs[0] else None
    dk = torch.zeros_like(k, dtype=accumulator) if needs[1] else None
    dv = torch.zeros_like(v, dtype=accumulator) if needs[2] else None
    finite = not spec.causal or all(all_finite(x) for x in (do, q, k, v, o, dlse) if x is not None)
    for tile in tiles(q, k, mods, spec, q_offset):
        q_tile = load_rows(q, tile, accumulator)
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        do_tile, o_tile = load_rows(do, tile, accumulator), load_rows(o, tile, accumulator)
        lse_tile = load_rows(lse.unsqueeze(-1), tile, accumulator)
        p = scores(q_tile, k_tile, tile, scale)
        p = p.sub_(lse_tile.masked_fill(lse_tile == float("-inf"), 0.0)).exp_()
        keep, keep_t = None, None
        if not finite:
            keep = visible(p, tile)
            keep_t = keep.mT
            p.masked_fill_(~keep, 0.0)
        if dv is not None:
            dv[tile.b, tile.heads_k, tile.cols] += matmul(p.mT, do_tile, keep_t)
        if dq is None and dk is None:
            continue
        delta = (do_tile * o_tile).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= load_rows(dlse.unsqueeze(-1), tile, accumulator)
        ds = (do_tile @ v_tile.mT).sub_(delta).mul_(p).mul_(scale)
        if keep is not None:
            ds.masked_fill_(~keep, 0.0)
        if dq is not None:
            store_rows(dq, tile, matmul(ds, k_tile, keep))
        if dk is not None:
            dk[tile.b, tile.heads_k, tile.cols] += matmul(ds.mT, q_tile, keep_t)
    return dq, None if dk is None else dk.to(k.dtype), None if dv is None else dv.to(v.dtype)


def tiles(q: Tensor, k: Tensor, mods: Mods, spec: Spec, q_offset: int) -> Iterator[Tile]:
    """The tiles of a call, without those no query of which can see a key."""
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    if 0 in (batch, heads, seqlen_q, seqlen_k):
        return
    group = heads // heads_k
    budget = max(1, TILE_BYTES // (accumulator_dtype(q).itemsize * group * seqlen_k))  # rows of a key head
    block_m = min(seqlen_q, budget)
    step = min(heads_k, max(1, budget // seqlen_q))
    offsets = [q_offset] * batch if mods.q_offset is None else mods.q_offset.tolist()
    for b, offset in enumerate(offsets):
        for h in range(0, heads_k, step):
            heads_slice = slice(h, min(h + step, heads_k))
            shared = slice(heads_slice.start * group, heads_slice.stop * group)
            for start in range(0, seqlen_q, block_m):
                stop = min(start + block_m, seqlen_q)
                last = min(seqlen_k, stop + offset) if spec.causal else seqlen_k
                diagonal = start + offset if spec.causal and start + offset < last - 1 else None
                if last > 0:
                    yield Tile(b, heads_slice, shared, slice(start, stop), slice(0, last), diagonal)


def scores(q_tile: Tensor, k_tile: Tensor, tile: Tile, scale: float) -> Tensor:
    """s [heads_k, group * rows, cols], -inf where hidden."""
    s = (q_tile @ k_tile.mT).mul_(scale)
    if tile.diagonal is not None:
        s.masked_fill_(~visible(s, tile), float("-inf"))
    return s


def visible(s: Tensor, tile: Tile) -> Tensor:
    """bool [group * rows, cols]: does the row see the key?"""
    rows, cols = tile.rows.stop - tile.rows.start, s.shape[-1]
    keep = torch.ones(rows, cols, dtype=torch.bool, device=s.device)
    if tile.diagonal is not None:
        keep = keep.tril_(tile.diagonal)
    return keep.repeat(s.shape[-2] // rows, 1)


def matmul(weights: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    """weights [h, m, n] @ x [h, n, d] over the pairs that keep [m, n] allows (None: all); elsewhere weights are 0.

    A sum that meets 0 * NaN or 0 * inf at a hidden pair would be NaN, so what is not finite in x is added apart.
    """
    if keep is None:
        return weights @ x
    finite = torch.isfinite(x)
    hits = keep.to(x.dtype) @ (~finite).to(x.dtype)  # how many such elements the row sees
    return (weights @ x.where(finite, 0.0)).masked_fill_(hits > 0, float("nan"))


def load_rows(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x [batch, heads, seqlen_q, d] -> [heads_k, group * rows, d]; copied, a tile's worth, where strides need it."""
    rows = x[tile.b, tile.heads, tile.rows].to(dtype)
    return rows.reshape(tile.heads_k.stop - tile.heads_k.start, -1, x.shape[-1])


def load_keys(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x [batch, heads_k, seqlen_k, d] -> [heads_k, cols, d]."""
    return x[tile.b, tile.heads_k, tile.cols].to(dtype)


def store_rows(x: Tensor, tile: Tile, value: Tensor) -> None:
    """value [heads_k, group * rows, d] into x [batch, heads, seqlen_q, d]."""
    x[tile.b, tile.heads, tile.rows] = value.reshape(tile.heads.stop - tile.heads.start, -1, x.shape[-1]).to(x.dtype)


def like(q: Tensor, head_dim: int) -> Tensor:
    """An empty tensor of q's shape but for the last axis, dense, its axes in the order that q's have in memory."""
    shape = (*q.shape[:-1], head_dim)
    strides = [stride if stride else q.numel() for stride in q.stride()]  # an expanded axis goes outermost
    order = sorted(range(q.dim()), key=lambda axis: -strides[axis])
    dense = torch.empty([shape[axis] for axis in order], dtype=q.dtype, device=q.device)
    return dense.permute([order.index(axis) for axis in range(q.dim())])


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What scores and sums are held in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def all_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no inf; one pass without a temporary, may say False of values near the dtype's end."""
    return bool(torch.isfinite(x.sum(dtype=accumulator_dtype(x))))
