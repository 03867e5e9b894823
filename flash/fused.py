"""Torch's own flash kernels for the CPU, where they say what a call of ours says.

They are called in float32 (float64 for float64), which on half inputs is nearer to the truth than their half versions
and faster backward. A causal call is a rectangle of keys that all rows see and a triangle (`Part`), merged by lse.
Everything that hides keys or is added to scores travels as their float mask, some rows at a time. A sink
rescales what comes out. Those kernels leak a hidden NaN and take no gradient of lse and no empty tensor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash import tiling
from flash.kernels.spec import Gradients, accumulator_dtype
from flash.scoring import additive, all_finite, longest
from flash.tiling import Call, Tile, accumulator_of, add_keys, offsets_of, tiles

FEW_DIMS = 8  # of v; below, o's rounding to half shows in do . o, and standard attention would be nearer
# Largest score of a fused call. Over 512 products float32 rounds it by at most 512 * 2**-24 * 1e4 = 0.3, so a weight
# computed again from lse is off by a third at the very worst; much larger scores would make it anything, inf too.
MAX_SCORE = 1e4
FEW_ROWS = 16  # that share keys: to look through the keys, as is asked first, costs as much as to attend to them
MASK_TILES = 3  # tiles' worth of mask in a call: 384 rows by 4096 keys; with fewer rows the kernels are slower, and of
# what takes 32 MB glibc gets every page anew from the system
ALIGNMENT = 64  # bytes; the CPU's matrix products may round differently for a tensor that starts elsewhere

fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Some heads of some sequences for one fused call, and which keys they see: a rectangle, a triangle or both."""

    b: slice
    heads_k: slice
    heads: list[slice]  # the query heads that share heads_k, one of each group at a time
    rows: slice
    pieces: list[tuple[slice, bool]]  # keys, and whether row r of rows sees only the first r + 1 of them


def serves(call: Call, *others: Tensor) -> bool:
    """Whether torch's kernels say the same thing: not of empty tensors, nor where a NaN or inf could arise or leak."""
    spec, mods = call.spec, call.mods
    if any(x.device.type != "cpu" or x.numel() == 0 for x in call[:3]):
        return False
    if call.q.shape[2] * (call.q.shape[1] // call.k.shape[1]) <= FEW_ROWS:
        return False
    if spec.softcap is not None or spec.dropout_p or mods.score_mod is not None:
        return False
    if spec.causal and not call.scale > 1e-30:  # they hide by -inf and then scale: -inf * 0 is NaN
        return False
    # |q . k| <= |q| |k|; a NaN or inf in q or k fails the comparison
    largest = abs(call.scale) * longest(call.q) * longest(call.k)
    return largest <= MAX_SCORE and all(all_finite(x) for x in (call.v, *others))


def serves_backward(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, grads: Gradients) -> bool:
    """Whether they do backward too."""
    if dlse is not None or grads.bias is not None or grads.alibi_slopes is not None:
        return False
    rounded = o.dtype != accumulator_dtype(o) and o.shape[-1] < FEW_DIMS
    return not rounded and serves(call, do, o)


def forward(call: Call, o: Tensor, lse: Tensor) -> bool:
    """Fill o and lse; False where a mask turns out to hold what these kernels must not be given."""
    if is_masked(call):
        return forward_masked(call, o, lse)
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
            o_part, lse_part = with_sinks(call, heads, o_part, lse_part)
            o[part.b, heads, part.rows] = o_part[..., : v.shape[-1]].to(o.dtype)
            lse[part.b, heads, part.rows] = lse_part
    return True


def backward(call: Call, do: Tensor, o: Tensor, lse: Tensor, grads: Gradients) -> bool:
    """Fill dq, dk, dv; given the whole o and lse, the gradients of a part's pieces add up. False as in `forward`."""
    if is_masked(call):
        return backward_masked(call, do, o, lse, grads)
    q, k, v, scale = call.q, call.k, call.v, call.scale
    dq, dk, dv = grads.q, grads.k, grads.v
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
    return True


def is_masked(call: Call) -> bool:
    """Whether more than causal decides what is visible, or something is added to a score."""
    mods, spec = call.mods, call.spec
    operands = mods.mask, mods.bias, mods.alibi_slopes, mods.mask_mod, mods.blocks
    return spec.left or spec.right or any(x is not None for x in operands)


def forward_masked(call: Call, o: Tensor, lse: Tensor) -> bool:
    """`forward` on some rows at a time, with their part of the mask."""
    q, k, v = call.q, call.k, call.v
    head_dim, dtype = max(q.shape[-1], v.shape[-1]), lse.dtype
    for tile in masked_tiles(call):
        k_part, v_part = (dense(part_of_keys(x, tile), head_dim, dtype) for x in (k, v))
        for heads, mask, empty in masks(call, tile, dtype):
            if empty is None:
                return False
            q_part = dense(q[tile.b, heads, tile.rows][None], head_dim, dtype)
            o_part, lse_part = fused_forward(q_part, k_part, v_part, 0.0, False, attn_mask=mask, scale=call.scale)
            lse_part = lse_part.masked_fill_(empty, float("-inf"))  # it says 0 there
            o_part, lse_part = with_sinks(call, heads, o_part, lse_part)
            o[tile.b, heads, tile.rows] = o_part[0, ..., : v.shape[-1]].to(o.dtype)
            lse[tile.b, heads, tile.rows] = lse_part[0]
    return True


def backward_masked(call: Call, do: Tensor, o: Tensor, lse: Tensor, grads: Gradients) -> bool:
    """`backward` on some rows at a time, with their part of the mask."""
    q, k, v = call.q, call.k, call.v
    head_dim, dtype = max(q.shape[-1], v.shape[-1]), lse.dtype
    sums = [accumulator_of(x, dtype) for x in (grads.k, grads.v)]
    for tile in masked_tiles(call):
        k_part, v_part = (dense(part_of_keys(x, tile), head_dim, dtype) for x in (k, v))
        for heads, mask, empty in masks(call, tile, dtype):
            if empty is None:
                return False
            do_part, q_part, o_part = (dense(x[tile.b, heads, tile.rows][None], head_dim, dtype) for x in (do, q, o))
            lse_part = lse[tile.b, heads, tile.rows][None]
            lse_part = lse_part.masked_fill(lse_part == float("-inf"), 0.0)
            operands = do_part, q_part, k_part, v_part, o_part, lse_part
            found = fused_backward(*operands, 0.0, False, attn_mask=mask, scale=call.scale)
            if grads.q is not None:
                grads.q[tile.b, heads, tile.rows] = found[0][0, ..., : q.shape[-1]].to(grads.q.dtype)
            for total, part in zip(sums, found[1:], strict=True):
                if total is not None:
                    add_keys(total, tile, part[0, ..., : total.shape[-1]])
    for grad, total in zip((grads.k, grads.v), sums, strict=True):
        if grad is not None and grad is not total:
            grad.copy_(total)
    return True


def masked_tiles(call: Call) -> Iterator[Tile]:
    """Tiles whose part of the mask is small: all heads share it, or as many heads as there are threads have theirs."""
    step = min(call.k.shape[1], torch.get_num_threads()) if differs_by_head(call) else 1
    fits = max(1, MASK_TILES * tiling.TILE_BYTES // (accumulator_dtype(call.q).itemsize * step))
    yield from tiles(call, fits, step if differs_by_head(call) else call.k.shape[1])


def differs_by_head(call: Call) -> bool:
    """Whether heads may have masks of their own."""
    mods = call.mods
    if mods.alibi_slopes is not None or any(x is not None and x.shape[1] > 1 for x in (mods.mask, mods.bias)):
        return True
    if mods.blocks is not None and mods.blocks.state.shape[1] > 1:
        return True
    if mods.mask_mod is None:
        return False
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    every = torch.arange(call.q.shape[1])[:, None, None]
    answer = torch.as_tensor(mods.mask_mod.torch_fn(zero + call.origin.b, every, zero, zero, mods.mask_mod.args))
    return answer.dim() == 3 and answer.shape[0] > 1


def masks(call: Call, tile: Tile, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """For query heads one of each group at a time: the heads, what is added to their scores, and rows without keys.

    Yields:
        heads, mask [1, heads or 1, rows or 1, cols] or None, and bool that broadcasts to [1, heads, rows], or None
        where the mask holds NaN, inf, or more than MAX_SCORE in size at the best key of a row.
    """
    group = call.q.shape[1] // call.k.shape[1]
    shared = not differs_by_head(call)
    mask, empty = None, torch.zeros((), dtype=torch.bool)
    for g in range(group):
        heads = slice(tile.heads.start + g, tile.heads.stop, group)
        if g == 0 or not shared:
            mask, empty = additive(call, tile._replace(heads=heads), dtype), torch.zeros((), dtype=torch.bool)
            if mask is not None:
                best = mask.amax(-1)
                empty = best == float("-inf")
                if not bool(((best.abs() <= MAX_SCORE) | empty).all()):
                    yield heads, None, None
                    return
        yield heads, mask, empty


def with_sinks(call: Call, heads: slice, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse [batch, heads, rows] once the sinks have joined the sum."""
    if call.mods.sinks is None:
        return o, lse
    total = torch.logaddexp(lse, call.mods.sinks[heads].to(lse.dtype)[:, None])
    weight = (lse - total).masked_fill_(lse == float("-inf"), float("-inf")).exp_()
    return o.mul_(weight.unsqueeze(-1)), total


def part_of_keys(x: Tensor, tile: Tile) -> Tensor:
    """x [batch, heads_k, seqlen_k, d] -> [1, heads_k, cols, d]."""
    return x[tile.b, tile.heads_k][:, tile.cols][None]


def parts(call: Call, head_dim: int) -> Iterator[Part]:
    """The fused calls that make up one of ours."""
    q, k, spec = call.q, call.k, call.spec
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    group = heads // heads_k
    fits = tiling.NARROW_BYTES // (max(seqlen_q, seqlen_k) * head_dim * accumulator_dtype(q).itemsize)
    pairs = max(fits, torch.get_num_threads())  # the fused backward runs one thread a head
    step_h = min(heads_k, pairs)
    step_b = max(1, pairs // heads_k) if call.mods.q_offset is None else 1
    offsets = offsets_of(call)
    for b in range(0, batch, step_b):
        offset = offsets[b]
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
