"""Torch's own flash kernels for the CPU, where they say what a call of ours says.

They are called in float32 (float64 for float64), which on half inputs is nearer to the truth than their half versions
and faster backward. A causal call is a rectangle of keys that all rows see and a triangle (`Part`), merged by lse.
Those kernels leak a hidden NaN and take no gradient of lse and no empty tensor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash import tiling
from flash.kernels.spec import Gradients
from flash.scoring import all_finite, longest
from flash.tiling import Call, accumulator_dtype, offsets_of

FEW_DIMS = 8  # of v; below, o's rounding to half shows in do . o, and standard attention would be nearer
# Largest score of a fused call. Over 512 products float32 rounds it by at most 512 * 2**-24 * 1e4 = 0.3, so a weight
# computed again from lse is off by a third at the very worst; much larger scores would make it anything, inf too.
MAX_SCORE = 1e4
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
    if any(x.device.type != "cpu" or x.numel() == 0 for x in call[:3]):
        return False
    spec, mods = call.spec, call.mods
    if spec.softcap is not None or spec.dropout_p or mods.score_mod is not None:
        return False
    if any(x is not None for x in (mods.mask, mods.bias, mods.alibi_slopes, mods.sinks, mods.blocks, mods.mask_mod)):
        return False
    if spec.left or spec.right:
        return False
    if spec.causal and not call.scale > 1e-30:  # they hide by -inf and then scale: -inf * 0 is NaN
        return False
    # |q . k| <= |q| |k|; a NaN or inf in q or k fails the comparison
    largest = abs(call.scale) * longest(call.q) * longest(call.k)
    return largest <= MAX_SCORE and all(all_finite(x) for x in (call.v, *others))


def serves_backward(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, grads: Gradients) -> bool:
    """Whether they do backward too."""
    if dlse is not None or any(x is not None for x in grads[3:]):
        return False
    rounded = o.dtype != accumulator_dtype(o) and o.shape[-1] < FEW_DIMS
    return not rounded and serves(call, do, o)


def forward(call: Call, o: Tensor, lse: Tensor) -> None:
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


def backward(call: Call, do: Tensor, o: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fill dq, dk, dv by torch's kernels; given the whole o and lse, the gradients of a part's pieces add up."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    dq, dk, dv = grads[:3]
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


def parts(call: Call, head_dim: int) -> Iterator[Part]:
    """The fused calls that make up one of ours."""
    q, k, spec = call.q, call.k, call.spec
    batch, heads, seqlen_q, _ = q.shape
    heads_k, seqlen_k = k.shape[1:3]
    group = heads // heads_k
    fits = tiling.TILE_BYTES // (max(seqlen_q, seqlen_k) * head_dim * accumulator_dtype(q).itemsize)
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
