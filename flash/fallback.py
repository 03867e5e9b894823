"""Attention in torch operations, for the CPU and every machine without Triton: O(n) memory, forward and backward.

The same contract as `kernels/forward.py` and `kernels/backward.py`, served in two ways.

Fused (`flash/fused.py`): torch's own flash kernels for the CPU, where they say the same thing.

Block-wise: everything else. A tile is some query rows against all the keys that any of them can see (Rabe & Staats
2021, arXiv 2112.05682). The backward pass computes the weights again from lse (Dao et al. 2022, arXiv 2205.14135,
algorithm 4).

What is not finite in v, do, q or k reaches no row that cannot see it, and where anything is hidden makes NaN of the
rows that see it, also where the sum would be inf.
"""

import torch
from torch import Tensor

from flash import fused
from flash.kernels.spec import Gradients, Mods, Positions, Spec, accumulator_dtype, dense_like, output_dtype
from flash.scoring import all_finite, distances, dropped, matmul, score
from flash.tiling import (
    Call,
    Tile,
    accumulator_of,
    add_keys,
    add_operand,
    cut,
    load_keys,
    load_rows,
    operand,
    pairs_of_a_tile,
    sequences,
    store_rows,
    tiles,
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mods: Mods, spec: Spec, scale: float, positions: Positions
) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, heads, seqlen_q, head_dim], k and v [batch, heads_k, seqlen_k, head_dim or head_dim_v].

    Args:
        q, k, v: one float dtype, any strides, heads_k divides heads; packed sequences have a batch of one.
        mods: optional operands of the score.
        spec: choices of the call.
        scale: factor on q . k.
        positions: which keys a query sees by its position.

    Returns:
        o [batch, heads, seqlen_q, head_dim_v] in q's dtype (a part's in lse's) and order in memory, and lse [batch,
        heads, seqlen_q], natural logarithm, float32 (float64 for float64).
    """
    o = dense_like(q, v.shape[-1], dtype=output_dtype(q, spec)).zero_()
    lse = torch.full(q.shape[:3], float("-inf"), dtype=accumulator_dtype(q), device=q.device)
    call = Call(q, k, v, mods, spec, scale, positions)
    if mods.starts_q is None:
        forward_dense(call, o, lse)
        return o, lse
    for own, rows, _, bad in sequences(call):
        if bad:
            o[:, :, rows], lse[:, :, rows] = float("nan"), float("nan")
        else:
            forward_dense(own, o[:, :, rows], lse[:, :, rows])
    return o, lse


def forward_dense(call: Call, o: Tensor, lse: Tensor) -> None:
    """Fill o and lse, which hold 0 and -inf."""
    if call.mods.sinks is not None:
        lse.copy_(call.mods.sinks.to(lse.dtype)[:, None])
    if not (fused.serves(call) and fused.forward(call, o, lse)):
        forward_blocks(call, o, lse)


def forward_blocks(call: Call, o: Tensor, lse: Tensor) -> None:
    """Fill o and lse tile by tile."""
    q, k, v, accumulator = call.q, call.k, call.v, lse.dtype
    finite = None  # found where keys are hidden
    for tile in tiles(call, pairs_of_a_tile(call)):
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        s, keep, *_ = score(call, tile, load_rows(q, tile, accumulator), k_tile)
        m = s.amax(-1, keepdim=True)
        sink = None if call.mods.sinks is None else call.mods.sinks[tile.heads].to(accumulator)[:, None, None]
        if sink is not None:
            m = torch.maximum(m, sink)
        m = m.masked_fill_(m == float("-inf"), 0.0)  # a row without keys stays finite
        p = s.sub_(m).exp_()
        l = p.sum(-1, keepdim=True)
        if sink is not None:
            l += (sink - m).exp()
        stays = dropped(call, tile)
        if stays is not None:
            p *= stays
        if keep is not None and finite is None:
            finite = all_finite(v)
        acc = matmul(by_key_head(p, tile), v_tile, None if finite or keep is None else keep_of(keep, tile))
        factor = l.masked_fill(l == 0, 1.0).mul_(1.0 - call.spec.dropout_p)
        store_rows(o, tile, acc.div_(by_key_head(factor, tile)))
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
    positions: Positions,
    needs: Gradients,
) -> Gradients:
    """Gradients of `forward`, those that `needs` asks for and None for the others.

    Args:
        do: gradient of o, any strides.
        dlse: gradient of lse, or None for zero.
        q, k, v, mods, spec, scale, positions: as given to `forward`.
        o, lse: as it returned them; of a part, those of the whole call, of its rows.
        needs: which gradients to compute.

    Returns:
        each in the shape, dtype and order in memory of its operand; of a part, dq, dk and dv in lse's dtype.
    """
    inputs, others = (q, k, v), (mods.bias, mods.alibi_slopes, mods.sinks)
    grads = Gradients(
        *(
            torch.zeros_like(x, dtype=output_dtype(x, spec)) if need else None
            for x, need in zip(inputs, needs[:3], strict=True)
        ),
        *(torch.empty_like(x) if need else None for x, need in zip(others, needs[3:], strict=True)),
    )
    # sums over tiles and sequences, zeros at first; dk and dv have theirs in each pass
    sums = [accumulator_of(x, accumulator_dtype(q)) for x in grads[3:]]
    call = Call(q, k, v, mods, spec, scale, positions)
    if mods.starts_q is None:
        backward_dense(call, do, dlse, o, lse, Gradients(grads.q, grads.k, grads.v, *sums))
    else:
        for own, rows, keys, bad in sequences(call):
            parts = [None if x is None else x[:, :, at] for x, at in zip(grads[:3], (rows, keys, keys), strict=True)]
            if bad:
                for part in parts:
                    if part is not None:
                        part.fill_(float("nan"))
                continue
            dlse_part = None if dlse is None else dlse[:, :, rows]
            b, lengths = own.origin.b, (None, rows.stop - rows.start, keys.stop - keys.start)
            bias, slopes = cut(sums[0], b, *lengths), cut(sums[1], b, None)
            own_grads = Gradients(parts[0], parts[1], parts[2], bias, slopes, sums[2])
            backward_dense(own, do[:, :, rows], dlse_part, o[:, :, rows], lse[:, :, rows], own_grads)
    for grad, total in zip(grads[3:], sums, strict=True):
        if grad is not None and grad is not total:
            grad.copy_(total)
    return grads


def backward_dense(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fill dq, dk, dv, and add to the others."""
    if not (fused.serves_backward(call, do, dlse, o, grads) and fused.backward(call, do, o, lse, grads)):
        backward_blocks(call, do, dlse, o, lse, grads)
    elif grads.sinks is not None:
        add_sinks(call, (do * o).sum(-1, dtype=lse.dtype), lse, grads.sinks)


def backward_blocks(call: Call, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, grads: Gradients) -> None:
    """Fill dq, dk, dv, and add to the others, tile by tile."""
    q, k, v, accumulator = call.q, call.k, call.v, lse.dtype
    dk, dv = accumulator_of(grads.k, accumulator), accumulator_of(grads.v, accumulator)
    delta = torch.zeros_like(lse) if grads.sinks is not None else None  # of rows without keys it is 0
    others = any(x is not None for x in (grads.q, dk, *grads[3:]))
    whole_o = o if call.spec.part else None  # keys of other parts may have made NaN of it
    rows_finite = all(all_finite(x) for x in (do, q, k, v, dlse, whole_o) if x is not None)
    finite = rows_finite and all_finite(lse.masked_fill(lse == float("-inf"), 0.0))
    for tile in tiles(call, pairs_of_a_tile(call)):
        q_tile = load_rows(q, tile, accumulator)
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        do_tile, lse_tile = load_rows(do, tile, accumulator), load_rows(lse.unsqueeze(-1), tile, accumulator)
        s, keep, outer, inner = score(call, tile, q_tile, k_tile, slope=True)
        lse_tile = lse_tile.masked_fill(lse_tile == float("-inf"), 0.0).view(*tile.shape[:2], 1)
        p = s.sub_(lse_tile).clamp_(max=0.0).exp_()  # s may round otherwise than in the forward: huge ones overflow
        hide, keep_rows, keep_cols = None, None, None
        if keep is not None and not finite:
            hide, keep_rows = ~keep, keep_of(keep, tile)
            keep_cols = keep_rows.mT
            p.masked_fill_(hide, 0.0)
        stays = dropped(call, tile)
        weights = p  # of v
        if stays is not None:
            do_tile = do_tile / (1.0 - call.spec.dropout_p)
            weights = stays.mul_(p)
        if dv is not None:
            add_keys(dv, tile, matmul(by_key_head(weights, tile).mT, do_tile, keep_cols))
        if not others:
            continue
        ds = (do_tile @ v_tile.mT).view(tile.shape).mul_(weights)
        if hide is not None:
            ds.masked_fill_(hide, 0.0)
        if call.spec.part:
            delta_tile = (load_rows(do, tile, accumulator) * load_rows(o, tile, accumulator)).sum(-1, keepdim=True)
            delta_tile = delta_tile.view(*tile.shape[:2], 1)
        else:
            delta_tile = ds.sum(-1, keepdim=True)  # do . o, without o's rounding
        if delta is not None:
            store_rows(delta.unsqueeze(-1), tile, delta_tile)
        if dlse is not None:
            delta_tile -= load_rows(dlse.unsqueeze(-1), tile, accumulator).view_as(delta_tile)
        ds.addcmul_(p, delta_tile, value=-1.0)
        if outer is not None:
            ds *= outer
            hide = hide if keep is None else ~keep  # what a user function says of a hidden pair may be NaN
        if hide is not None:
            ds.masked_fill_(hide, 0.0)
        gradients_of_score(call, tile, ds, inner, grads)
        ds = by_key_head(ds, tile)
        if grads.q is not None:
            store_rows(grads.q, tile, matmul(ds, k_tile, keep_rows).mul_(call.scale))
        if dk is not None:
            add_keys(dk, tile, matmul(ds.mT, q_tile, keep_cols).mul_(call.scale))
    for grad, total in zip(grads[1:3], (dk, dv), strict=True):
        if grad is not None and grad is not total:
            grad.copy_(total)
    if delta is not None:
        add_sinks(call, delta if dlse is None else delta.sub_(dlse), lse, grads.sinks)


def jvp(
    tangents: Gradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mods: Mods,
    spec: Spec,
    scale: float,
    positions: Positions,
) -> tuple[Tensor, Tensor]:
    """Tangents of o and lse, for those of the operands; None stands for zero.

    Args:
        tangents: each of its operand's shape and dtype, any strides.
        q, k, v, mods, spec, scale, positions: as given to `forward`.
        o, lse: as it returned them.

    Returns:
        each in the shape, dtype and order in memory of o or lse.
    """
    to, tlse = dense_like(q, v.shape[-1]).zero_(), torch.zeros_like(lse)
    call = Call(q, k, v, mods, spec, scale, positions)
    if mods.starts_q is None:
        jvp_blocks(call, tangents, o, lse, to, tlse)
        return to, tlse
    for own, rows, keys, bad in sequences(call):
        if bad:
            to[:, :, rows], tlse[:, :, rows] = float("nan"), float("nan")
            continue
        b, lengths = own.origin.b, (None, rows.stop - rows.start, keys.stop - keys.start)
        parts = [None if x is None else x[:, :, at] for x, at in zip(tangents[:3], (rows, keys, keys), strict=True)]
        bias, slopes = cut(tangents.bias, b, *lengths), cut(tangents.alibi_slopes, b, None)
        own_tangents = Gradients(parts[0], parts[1], parts[2], bias, slopes, tangents.sinks)
        jvp_blocks(own, own_tangents, o[:, :, rows], lse[:, :, rows], to[:, :, rows], tlse[:, :, rows])
    return to, tlse


def jvp_blocks(call: Call, tangents: Gradients, o: Tensor, lse: Tensor, to: Tensor, tlse: Tensor) -> None:
    """Fill the tangents of o and lse, which hold 0, tile by tile."""
    q, k, v, accumulator = call.q, call.k, call.v, lse.dtype
    every = (q, k, v, *(x for x in tangents[:3] if x is not None))
    finite = all(all_finite(x) for x in every)
    if tangents.sinks is not None:
        weights = (call.mods.sinks.to(accumulator)[:, None] - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
        tlse.addcmul_(weights, tangents.sinks.to(accumulator)[:, None])
    for tile in tiles(call, pairs_of_a_tile(call)):
        q_tile = load_rows(q, tile, accumulator)
        k_tile, v_tile = load_keys(k, tile, accumulator), load_keys(v, tile, accumulator)
        lse_tile = load_rows(lse.unsqueeze(-1), tile, accumulator)
        s, keep, outer, inner = score(call, tile, q_tile, k_tile, slope=True)
        p = s.sub_(lse_tile.masked_fill(lse_tile == float("-inf"), 0.0).view(*tile.shape[:2], 1)).clamp_(max=0.0).exp_()
        ts = tangent_of_score(call, tile, tangents, q_tile, k_tile, outer, inner)
        if keep is not None:
            p.masked_fill_(~keep, 0.0)
            ts = ts.masked_fill(~keep, 0.0)
        ts = ts * p
        tlse_tile = load_rows(tlse.unsqueeze(-1), tile, accumulator).view(*tile.shape[:2], 1) + ts.sum(-1, keepdim=True)
        stays = dropped(call, tile)
        if stays is not None:
            stays /= 1.0 - call.spec.dropout_p
            ts, p = ts * stays, p * stays
        keep_rows = None if finite or keep is None else keep_of(keep, tile)
        acc = matmul(by_key_head(ts, tile), v_tile, keep_rows)
        if tangents.v is not None:
            acc += matmul(by_key_head(p, tile), load_keys(tangents.v, tile, accumulator), keep_rows)
        acc -= load_rows(o, tile, accumulator) * by_key_head(tlse_tile, tile)
        store_rows(to, tile, acc)
        store_rows(tlse.unsqueeze(-1), tile, tlse_tile)


def tangent_of_score(
    call: Call, tile: Tile, tangents: Gradients, q_tile: Tensor, k_tile: Tensor, outer: Tensor | None,
    inner: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tangent of a tile's scores, [heads, rows, cols], by the same lines as the scores; hidden pairs are not 0."""
    dtype = q_tile.dtype
    ts = torch.zeros(tile.shape, dtype=dtype, device=call.q.device)
    if tangents.q is not None:
        ts += (load_rows(tangents.q, tile, dtype) @ k_tile.mT).view(tile.shape)
    if tangents.k is not None:
        ts += (q_tile @ load_keys(tangents.k, tile, dtype).mT).view(tile.shape)
    ts *= call.scale
    if inner is not None:
        ts *= inner
    if tangents.bias is not None:
        ts += operand(tangents.bias, tile)
    if tangents.alibi_slopes is not None:
        slopes = tangents.alibi_slopes[tile.b if tangents.alibi_slopes.shape[0] > 1 else 0, tile.heads]
        ts.addcmul_(slopes.to(dtype)[:, None, None], distances(call, tile, dtype), value=-1.0)
    if outer is not None:
        ts *= outer
    return ts


def gradients_of_score(call: Call, tile: Tile, ds: Tensor, inner: Tensor | None, grads: Gradients) -> None:
    """Add ds, the gradient of the score before score_mod, to dbias and dalibi_slopes; take it through softcap."""
    if grads.bias is not None:
        add_operand(grads.bias, tile, ds)
    if grads.alibi_slopes is not None:
        slopes = grads.alibi_slopes[tile.b if grads.alibi_slopes.shape[0] > 1 else 0, tile.heads]
        slopes -= ds.flatten(1) @ distances(call, tile, ds.dtype).flatten()
    if inner is not None:
        ds *= inner


def add_sinks(call: Call, delta: Tensor, lse: Tensor, total: Tensor) -> None:
    """Add -sum_bi exp(sink - lse) (do . o - dlse), whose last factor is `delta` [batch, heads, seqlen_q], to dsinks."""
    sinks = call.mods.sinks.to(lse.dtype)[:, None]
    weights = (sinks - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
    total -= weights.mul_(delta).sum((0, 2))


def by_key_head(x: Tensor, tile: Tile) -> Tensor:
    """x [heads, rows, n] as [heads_k, group * rows, n]."""
    return x.view(tile.heads_k.stop - tile.heads_k.start, -1, x.shape[-1])


def keep_of(keep: Tensor, tile: Tile) -> Tensor:
    """What broadcasts to [heads, rows, cols], as [heads_k, group * rows, cols]."""
    return by_key_head(keep.expand(tile.shape).contiguous(), tile)
