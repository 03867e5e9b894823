"""The score of a tile in torch: the twin of `kernels/score.py`, with its derivative, and which pairs are visible.

    x = scale * q . k                  y = softcap * tanh(x / softcap)
    z = y + bias - slope * |i + q_offset - j|
    s = score_mod(z)                   -inf where hidden

A hidden pair's score is -inf whatever its operands are, so that its weight is 0. `matmul` keeps what is not finite on
the other side of such a weight from coming back as 0 * NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash.keep_bits import recalled
from flash.kernels.spec import accumulator_dtype
from flash.philox import kept
from flash.tiling import Call, Tile, operand, origin_of, part_of_blocks


class Score(NamedTuple):
    """A tile's scores, and what leads back from them; [heads, rows, cols] or what broadcasts to it."""

    s: Tensor
    keep: Tensor | None  # bool, which pairs are visible; None: all
    outer: Tensor | None = None  # ds/dz, of score_mod; None: 1
    inner: Tensor | None = None  # dy/dx, of softcap; None: 1


def score(call: Call, tile: Tile, q_tile: Tensor, k_tile: Tensor, slope: bool = False) -> Score:
    """The scores of q_tile [heads_k, group * rows, d] and k_tile [heads_k, cols, d], with derivatives if `slope`."""
    mods, softcap = call.mods, call.spec.softcap
    outer = inner = None
    s = (q_tile @ k_tile.mT).mul_(call.scale).view(tile.shape)
    if softcap is not None:
        s = s.div_(softcap).tanh_()
        inner = s.square().neg_().add_(1.0) if slope else None
        s = s.mul_(softcap)
    keep = visible(call, tile)
    if mods.bias is not None:
        s += operand(mods.bias, tile)
    if mods.alibi_slopes is not None:
        s.addcmul_(slopes_of(call, tile, s.dtype), distances(call, tile, s.dtype), value=-1.0)
    if mods.score_mod is not None:
        s, outer = modified(call, tile, s, slope)
    if keep is not None and bool(s.amax() < float("inf")):
        s += hiding(keep, s.dtype)
    elif keep is not None:
        s.masked_fill_(~keep, float("-inf"))
    return Score(s, keep, outer, inner)


def slopes_of(call: Call, tile: Tile, dtype: torch.dtype) -> Tensor:
    """ALiBi's slopes, [heads, 1, 1]."""
    slopes = call.mods.alibi_slopes
    return slopes[tile.b if slopes.shape[0] > 1 else 0, tile.heads].to(dtype)[:, None, None]  # type: ignore[no-any-return]


def distances(call: Call, tile: Tile, dtype: torch.dtype) -> Tensor:
    """|i + q_offset - j|, [rows, cols], rounded once."""
    rows, cols = tile.shape[1], tile.keys(call.q.device) - tile.first  # both count from the first row
    farthest = rows + max(abs(int(cols[0])), abs(int(cols[-1])))
    wide = dtype if farthest * torch.finfo(dtype).eps < 1 else torch.float64
    return (torch.arange(rows, dtype=wide, device=cols.device).unsqueeze(1) - cols.to(wide)).abs_().to(dtype)


def coordinates(call: Call, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64 b, h, i, j that broadcast to [heads, rows, cols], as user functions and dropout know them."""
    device = call.q.device
    first, head, row, col = origin_of(call, tile.b)
    b = torch.full((1, 1, 1), tile.b + call.origin.b + first, device=device)
    h = torch.arange(*tile.heads.indices(tile.heads.stop), device=device)[:, None, None]
    return b, h + head, tile.queries(device).unsqueeze(0) + row, tile.keys(device)[None, None] + col


def modified(call: Call, tile: Tile, z: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """score_mod(z), and its derivative if `slope`."""
    mod, where = call.mods.score_mod, coordinates(call, tile)

    def function(z: Tensor) -> Tensor:
        s: Tensor = mod.torch_fn(z, *where, mod.args)
        return s.to(z.dtype).expand(z.shape)

    if not slope:
        s = function(z)
        ours = s.data_ptr() == z.data_ptr() and s.is_contiguous()  # what is not, say an argument, is only read
        return s if ours else s.clone(memory_format=torch.contiguous_format), None
    # inside an op autograd records nothing; torch.func does
    s, vjp = torch.func.vjp(function, z)  # type: ignore[misc]
    (outer,) = vjp(torch.ones_like(s))
    return s.clone(memory_format=torch.contiguous_format), outer


def visible(call: Call, tile: Tile) -> Tensor | None:
    """bool, which pairs of the tile are visible, broadcasts to [heads, rows, cols]; None: all of them."""
    mods, device = call.mods, call.q.device
    parts = band(call, tile)
    if mods.mask is not None:
        parts.append(operand(mods.mask, tile))
    if mods.bias is not None:
        bias, lowest = operand(mods.bias, tile), torch.finfo(mods.bias.dtype).min
        if not bool(bias.amin() > lowest):  # NaN too
            parts.append(~(bias <= lowest))
    if mods.mask_mod is not None:
        part = mods.mask_mod.torch_fn(*coordinates(call, tile), mods.mask_mod.args)
        parts.append(torch.as_tensor(part, dtype=torch.bool, device=device))
    if call.spec.blocks is not None:
        parts.append(block_mask(call, tile))
    if not parts:
        return None
    keep = parts[0]
    for part in parts[1:]:
        keep = keep & part
    return None if bool(keep.contiguous().view(torch.uint8).amin()) else keep  # faster than all() on a CPU


def additive(call: Call, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    """What is added to q . k * scale, [1, heads or 1, rows or 1, cols], or None; hidden is -inf, or NaN like a bias."""
    mods, keep = call.mods, visible(call, tile)
    terms = [] if keep is None else [hiding(keep, dtype)]
    if mods.bias is not None:
        terms.append(operand(mods.bias, tile).to(dtype))
    if mods.alibi_slopes is not None:
        terms.append(-slopes_of(call, tile, dtype) * distances(call, tile, dtype))
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    total = total[(None,) * (4 - total.dim())]
    total = total.expand(*total.shape[:3], tile.shape[2])
    return total if total.stride(3) == 1 else total.contiguous()


def hiding(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where keep, else -inf; many times faster than torch.where on a CPU."""
    return keep.contiguous().view(torch.uint8).to(dtype).reciprocal_().neg_().add_(1.0)


def band(call: Call, tile: Tile) -> list[Tensor]:
    """What causal and window leave visible, [rows, cols]; nothing where that is the whole tile."""
    spec, positions, device = call.spec, call.positions, call.q.device
    parts: list[Tensor] = []
    if not (spec.causal or spec.left or spec.right):
        return parts
    cols = tile.keys(device)
    first, last = int(cols[0]), int(cols[-1])
    begin, end = tile.first, tile.first + tile.shape[1] - 1  # positions of the first and the last row
    if spec.causal or spec.right:
        right = 0 if spec.causal else positions.right
        if last > begin + right:
            parts.append(cols <= tile.positions(device) + right)
    if spec.left and first < end - positions.left:
        parts.append(cols >= tile.positions(device) - positions.left)
    return parts


def block_mask(call: Call, tile: Tile) -> Tensor:
    """What a block-sparse mask leaves visible, [heads or 1, rows, cols]."""
    assert call.spec.blocks is not None and tile.key_blocks is not None
    size_q, size_k = call.spec.blocks
    state, head, row, col = part_of_blocks(call, tile.b)
    heads, device = slice(tile.heads.start + head, tile.heads.stop + head, tile.heads.step), call.q.device
    state = state[heads] if state.shape[0] > 1 else state
    at = torch.arange(tile.rows.start, tile.rows.stop, device=device) + row
    state = state[:, at // size_q][..., tile.key_blocks]  # [heads or 1, rows, key blocks]
    blocks: Any = call.mods.blocks
    keep = (state == -2).unsqueeze(-1).expand(*state.shape, size_k)
    if bool((state >= 0).any()):
        words = blocks.bits[state.clamp(min=0), (at % size_q).unsqueeze(1)]  # [heads or 1, rows, key blocks, words]
        bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device) & 1
        keep = keep | (bits.bool().flatten(-2)[..., :size_k] & (state >= 0).unsqueeze(-1))
    keep = keep.flatten(-2)
    keys = (tile.key_blocks.unsqueeze(1) * size_k + torch.arange(size_k, device=device)).flatten() - col
    if isinstance(tile.cols, slice):
        inside = (keys >= tile.cols.start) & (keys < tile.cols.stop)
    else:
        inside = (keys >= tile.cols[0]) & (keys <= tile.cols[-1])
    return keep[..., inside] if len(keys) != tile.shape[2] else keep


def dropped(call: Call, tile: Tile) -> Tensor | None:
    """1 where dropout keeps the weight and 0 where not, [heads, rows, cols]; None without dropout.

    What is drawn first may stay for the backward pass, as bits: no more bytes than q, k, v and o have themselves.
    """
    p, dtype = call.spec.dropout_p, accumulator_dtype(call.q)
    if p == 0.0:
        return None
    seed, (first, head, row, col) = int(call.mods.seed), origin_of(call, tile.b)
    b = tile.b + call.origin.b + first

    def draw() -> Tensor:
        return kept(seed, p, b, *coordinates(call, tile)[1:])

    if call.spec.part or not isinstance(tile.cols, slice):  # parts of a whole share a seed: each has room, all have not
        stays = draw()
    else:
        q, k, v = call.q, call.k, call.v
        room = (q.numel() + k.numel() + v.numel() + q[..., 0].numel() * v.shape[3]) * q.itemsize // len(q)
        place = (seed, p, tile.heads.start + head, tile.rows.start + row, tile.cols.start + col)
        stays = recalled(call.mods.seed, b, place, tile.shape, room, draw)
    return stays.view(torch.uint8).to(dtype)  # far faster on a CPU than from bool


def matmul(weights: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    """weights [h, m, n] @ x [h, n, d] over the pairs that keep [h, m, n] allows (None: all); elsewhere weights are 0.

    A sum that meets 0 * NaN or 0 * inf at a hidden pair would be NaN, so what is not finite in x is added apart.
    """
    if keep is None:
        return weights @ x
    finite = torch.isfinite(x)
    hits = keep.to(x.dtype) @ (~finite).to(x.dtype)  # how many such elements the row sees
    return (weights @ x.where(finite, 0.0)).masked_fill_(hits > 0, float("nan"))


def all_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no inf; one pass without a temporary, may say False of values near the dtype's end."""
    return bool(torch.isfinite(x.sum(dtype=accumulator_dtype(x))))


def longest(x: Tensor) -> float:
    """The largest norm of a row of x [batch, heads, seqlen, d]; NaN or inf where x is not finite."""
    return float(torch.linalg.vector_norm(x, dim=-1, dtype=accumulator_dtype(x)).max())
