"""Attention in torch operations, for the CPU and every machine without Triton: O(n) memory, forward and backward.

The same contract as `kernels/forward.py` and `kernels/backward.py`, served in two ways.

Fused: torch's own flash kernels for the CPU, called in float32 (float64 for float64), which on half inputs is nearer to
the truth than their half versions and faster backward. A causal call is a rectangle of keys that all rows see and a
triangle (`Part`), merged by lse. Those kernels leak a hidden NaN and take no gradient of lse and no empty tensor.

Block-wise: everything else. A tile is some query rows against all the keys that any of them can see: whole rows, so the
softmax needs no running maximum, and few enough that the scores stay within `TILE_BYTES` at every length (Rabe & Staats
2021, arXiv 2112.05682). The backward pass computes the weights again from lse (Dao et al. 2022, arXiv 2205.14135,
algorithm 4).

What is not finite in v, do, q or k reaches no row that cannot see it, and of the rows that see it a causal call makes
NaN, also where the sum would be inf.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash.kernels.spec import Mods, Spec, dense_like

TILE_BYTES = 2 * 2**20  # of one temporary; a handful of this size is all the memory beside the results
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
FEW_DIMS = 8  # of v; below, o's rounding to half shows in do . o, and standard attention would be nearer
# Largest score of a fused call. Over 512 products float32 rounds it by at most 512 * 2**-24 * 1e4 = 0.3, so a weight
# computed again from lse is off by a third at the very worst; much larger scores would make it anything, inf too.
MAX_SCORE = 1e4
ALIGNMENT = 64  # bytes; the CPU's matrix products may round differently for a tensor that starts elsewhere

fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Call(NamedTuple):
    """The operands of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mods: Mods
    spec: Spec
    scale: float
    q_offset: int


class Part(NamedTuple):
    """Some heads of some sequences for one fused call, and which keys they see: a rectangle, a triangle or both."""

    b: slice
    heads_k: slice
    heads: list[slice]  # the query heads that share heads_k, one of each group at a time
    rows: slice
    pieces: list[tuple[slice, bool]]  # keys, and whether row r of rows sees only the first r + 1 of them


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
    o = dense_like(q, v.shape[-1]).zero_()
    lse = torch.full(q.shape[:3], float("-inf"), dtype=accumulator_dtype(q), device=q.device)
    call = Call(q, k, v, mods, spec, scale, q_offset)
    run = forward_fused if fused_serves(call) else forward_blocks
    run(call, o, lse)
    return o, lse


def forward_fused(call: Call, o: Tensor, lse: Tensor) -> None:
    """Fill o and lse by torch's kernels."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    head_dim, dtype = max(q.shape[-1], v.shape[-1]), lse.dtype
    for part in parts(call, head_dim):
        keys = [[dense(x[part.b, part.heads_k, cols], head_dim, dtype) for x in (k, v)] for cols, _ in part.pieces]
        for heads in part.heads:
            q_part = dense(q[part.b, heads, part.rows], head_dim, dtype)
            pieces = [
                fused_forward(q_part, k_part, v_part, 0.0, causal, scale=scale)
                for (k_part, v_part), (_, causal) in zip(keys, part.pieces, strict=True)
            ]
            o_part, lse_part = pieces[0] if len(pieces) == 1 else merge(*pieces[0], *pieces[1])
            o[part.b, heads, part.rows] = o_part[..., : v.shape[-1]].to(o.dtype)
            lse[part.b, heads, part.rows] = lse_part


def forward_blocks(call: Call, o: Tensor, lse: Tensor) -> None:
    """Fill o and lse tile by tile."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    accumulator = lse.dtype
    finite = not call.spec.causal or all_finite(v)
    for tile in tiles(call):
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
) -> Gradients:
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
    call = Call(q, k, v, mods, spec, scale, q_offset)
    dq, dk, dv = (torch.zeros_like(x) if need else None for x, need in zip((q, k, v), needs, strict=True))
    grads = dq, dk, dv
    rounded = o.dtype != lse.dtype and o.shape[-1] < FEW_DIMS
    if dlse is None and not rounded and fused_serves(call, do, o):
        backward_fused(call, do, o, lse, grads)
    else:
        backward_blocks(call, do, dlse, lse, grads)
    return grads


def backward_fused(call: Call, do: Tensor, o: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fill dq, dk, dv by torch's kernels; given the whole o and lse, the gradients of a part's pieces add up."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    dq, dk, dv = grads
    head_dim, dtype = max(q.shape[-1], v.shape[-1]), lse.dtype
    for part in parts(call, head_dim):
        keys = [[dense(x[part.b, part.heads_k, cols], head_dim, dtype) for x in (k, v)] for cols, _ in part.pieces]
        sums = [[torch.zeros_like(x) for x in pair] for pair in keys]
        for heads in part.heads:
            do_part, q_part, o_part = (dense(x[part.b, heads, part.rows], head_dim, dtype) for x in (do, q, o))
            lse_part = lse[part.b, heads, part.rows].contiguous()
            dq_part = torch.zeros_like(q_part)
            for (k_part, v_part), (dk_part, dv_part), (_, causal) in zip(keys, sums, part.pieces, strict=True):
                piece = fused_backward(do_part, q_part, k_part, v_part, o_part, lse_part, 0.0, causal, scale=scale)
                for total, term in zip((dq_part, dk_part, dv_part), piece, strict=True):
                    total += term
            if dq is not None:
                dq[part.b, heads, part.rows] = dq_part[..., : q.shape[-1]].to(dq.dtype)
        for (dk_part, dv_part), (cols, _) in zip(sums, part.pieces, strict=True):
            if dk is not None:
                dk[part.b, part.heads_k, cols] = dk_part[..., : k.shape[-1]].to(dk.dtype)
            if dv is not None:
                dv[part.b, part.heads_k, cols] = dv_part[..., : v.shape[-1]].to(dv.dtype)


def backward_blocks(call: Call, do: Tensor, dlse: Tensor | None, lse: Tensor, grads: Gradients) -> None:
    """Fill dq, dk, dv tile by tile."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    accumulator = lse.dtype
    dq = grads[0]
    dk, dv = (None if x is None else torch.zeros_like(x, dtype=accumulator) for x in grads[1:])
    finite = not call.spec.causal or all(all_finite(x) for x in (do, q, k, v, dlse) if x is not None)
    for tile in tiles(call):
        q_tile = load_rows(q, tile, accumulator)
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        do_tile, lse_tile = load_rows(do, tile, accumulator), load_rows(lse.unsqueeze(-1), tile, accumulator)
        p = scores(q_tile, k_tile, tile, scale)
        p = p.sub_(lse_tile.masked_fill(lse_tile == float("-inf"), 0.0))
        p = p.clamp_(max=0.0).exp_()  # s may round otherwise than in the forward: huge scores would overflow
        keep, keep_t = None, None
        if not finite:
            keep = visible(p, tile)
            keep_t = keep.mT
            p.masked_fill_(~keep, 0.0)
        if dv is not None:
            dv[tile.b, tile.heads_k, tile.cols] += matmul(p.mT, do_tile, keep_t)
        if dq is None and dk is None:
            continue
        ds = (do_tile @ v_tile.mT).mul_(p)
        if keep is not None:
            ds.masked_fill_(~keep, 0.0)
        delta = ds.sum(-1, keepdim=True)  # do . o, without o's rounding
        if dlse is not None:
            delta -= load_rows(dlse.unsqueeze(-1), tile, accumulator)
        ds.addcmul_(p, delta, value=-1.0).mul_(scale)
        if keep is not None:
            ds.masked_fill_(~keep, 0.0)
        if dq is not None:
            store_rows(dq, tile, matmul(ds, k_tile, keep))
        if dk is not None:
            dk[tile.b, tile.heads_k, tile.cols] += matmul(ds.mT, q_tile, keep_t)
    for grad, total in zip(grads[1:], (dk, dv), strict=True):
        if grad is not None and total is not None:
            grad.copy_(total)


def fused_serves(call: Call, *others: Tensor) -> bool:
    """Whether torch's kernels say the same thing: not of empty tensors, nor where a NaN or inf could arise or leak."""
    if any(x.device.type != "cpu" or x.numel() == 0 for x in call[:3]):
        return False
    if call.spec.causal and not call.scale > 1e-30:  # they hide by -inf and then scale: -inf * 0 is NaN
        return False
    # |q . k| <= |q| |k|; a NaN or inf in q or k fails the comparison
    largest = abs(call.scale) * longest(call.q) * longest(call.k)
    return largest <= MAX_SCORE and all(all_finite(x) for x in (call.v, *others))


def parts(call: Call, head_dim: int) -> Iterator[Part]:
    """The fused calls that make up one of ours."""
    q, k, mods, spec = call.q, call.k, call.mods, call.spec
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    group = heads // heads_k
    fits = TILE_BYTES // (max(seqlen_q, seqlen_k) * head_dim * accumulator_dtype(q).itemsize)
    pairs = max(fits, torch.get_num_threads())  # the fused backward runs one thread a head
    step_h = min(heads_k, pairs)
    step_b = max(1, pairs // heads_k) if mods.q_offset is None else 1
    for b in range(0, batch, step_b):
        offset = call.q_offset if mods.q_offset is None else int(mods.q_offset[b])
        start = max(0, -offset) if spec.causal else 0  # the rows before see nothing
        if start >= seqlen_q:
            continue
        shared = min(start + offset, seqlen_k) if spec.causal else seqlen_k
        if shared >= seqlen_k - 1:
            pieces = [(slice(0, seqlen_k), False)]
        else:
            pieces = [(slice(0, shared), False)] if shared else []
            pieces.append((slice(shared, min(seqlen_k, shared + seqlen_q - start)), True))
        for h in range(0, heads_k, step_h):
            stop = min(h + step_h, heads_k)
            one_of_each = [slice(h * group + g, stop * group, group) for g in range(group)]
            yield Part(slice(b, b + step_b), slice(h, stop), one_of_each, slice(start, seqlen_q), pieces)


def dense(x: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """x [batch, heads, seqlen, d] as dtype, d padded to head_dim, laid out in memory alike whatever x's strides."""
    if x.shape[-1] < head_dim:
        return F.pad(x.to(dtype), (0, head_dim - x.shape[-1])).contiguous()
    same = x.dtype == dtype and x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0
    return x if same else torch.empty(x.shape, dtype=dtype).copy_(x)


def merge(o: Tensor, lse: Tensor, o_more: Tensor, lse_more: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse over two disjoint sets of keys from those over each; both lse finite."""
    total = torch.logaddexp(lse, lse_more)
    o = o * (lse - total).exp().unsqueeze(-1)
    return o.addcmul_(o_more, (lse_more - total).exp().unsqueeze(-1)), total


def tiles(call: Call) -> Iterator[Tile]:
    """The tiles of a call, without those no query of which can see a key."""
    q, k, mods, spec = call.q, call.k, call.mods, call.spec
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    if 0 in (batch, heads, seqlen_q, seqlen_k):
        return
    group = heads // heads_k
    budget = max(1, TILE_BYTES // (accumulator_dtype(q).itemsize * group * seqlen_k))  # rows of a key head
    block_m = min(seqlen_q, budget)
    step = min(heads_k, max(1, budget // seqlen_q))
    offsets = [call.q_offset] * batch if mods.q_offset is None else mods.q_offset.tolist()
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


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """What scores and sums are held in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def all_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no inf; one pass without a temporary, may say False of values near the dtype's end."""
    return bool(torch.isfinite(x.sum(dtype=accumulator_dtype(x))))


def longest(x: Tensor) -> float:
    """The largest norm of a row of x [batch, heads, seqlen, d]; NaN or inf where x is not finite."""
    return float(torch.linalg.vector_norm(x, dim=-1, dtype=accumulator_dtype(x)).max())
